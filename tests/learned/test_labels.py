"""Labels that an ensemble does not believe, and pairs that were judged equal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from judged import config, report_of, rows

from diffalign.errors import ConfigError, UserError
from diffalign.reward_training import RewardConfig, RewardTrainer
from diffalign.reward_training.fit_head import fit_head, margins_of
from diffalign.reward_training.label_strength import (
    FLIPPED,
    check_labels,
    strengthen,
    unseen_margins,
)
from diffalign.reward_training.pair_tensors import Pairs
from diffalign.rewards.scorers.trained import read_facts

PROMPTS, PER_PROMPT, DIM = 60, 6, 6
EACH = torch.arange(PROMPTS)  # a group of its own


def made(seed: int, threshold: float = 1.0) -> tuple[Pairs, torch.Tensor]:
    """Pairs judged as Rao and Kupper say by a linear taste, and their true margins."""
    generator = torch.Generator().manual_seed(seed)
    count = PROMPTS * PER_PROMPT

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    first, second = draw(count, DIM), draw(count, DIM)
    margins = 2.0 * (first - second)[:, 0] - (first - second)[:, 1]
    log_k = torch.tensor(threshold, dtype=torch.float64).log()
    shares = torch.rand(count, generator=generator, dtype=torch.float64)
    wins, losses = torch.sigmoid(margins - log_k), torch.sigmoid(-margins - log_k)
    label = torch.where(shares < wins, 1.0, torch.where(shares < wins + losses, 0.0, 0.5)).double()
    ones = torch.ones(count, dtype=torch.float64)
    pairs = Pairs(
        label=label, weight=ones, user=torch.full((count,), -1),
        prompt=torch.arange(PROMPTS).repeat_interleave(PER_PROMPT), margin=0 * ones, first=first,
        second=second, text=torch.ones(count, DIM, dtype=torch.float64),
        base=torch.zeros(count, 2, dtype=torch.float64),
        nuisances=torch.zeros(count, 6, dtype=torch.float64),
    )  # fmt: skip
    return pairs, margins


def settings(**options: Any) -> RewardConfig:
    return RewardConfig(l2=1e-3, **options)


def test_wrong_labels_are_flipped() -> None:
    """Most flips are right, sure labels get a margin, and right labels are kept."""
    pairs, true = made(0)
    pairs.label = (true > 0).double()
    wrong = torch.rand(len(true), generator=torch.Generator().manual_seed(5)) < FLIPPED
    pairs.label = torch.where(wrong, 1 - pairs.label, pairs.label)
    given = pairs.label.clone()
    changed, counts = strengthen(pairs, made(1)[0], EACH, settings(label_strength=True))
    assert torch.equal(pairs.label, given) and not pairs.margin.any()
    flipped = (changed.label == 1 - given) & ((changed.label == 0) | (changed.label == 1))
    assert counts["flipped"] == flipped.sum() <= FLIPPED * len(true) + 1
    assert flipped.sum() > 0.6 * wrong.sum()
    assert (flipped & wrong).sum() > 0.9 * flipped.sum()
    assert counts["with_margin"] == (changed.margin > 0).sum() > 0.6 * len(true)
    assert not (changed.margin > 0)[flipped].any()
    assert sum(counts.values()) == len(true)


def test_a_label_does_not_judge_itself() -> None:
    """Other labels of a prompt change nothing in its own margins."""
    pairs, _ = made(0)
    before = unseen_margins(pairs, made(1)[0], EACH, settings(label_strength=True))
    mine = pairs.prompt == 7
    pairs.label = torch.where(mine, 1 - pairs.label, pairs.label)
    after = unseen_margins(pairs, made(1)[0], EACH, settings(label_strength=True))
    assert torch.equal(before[mine], after[mine])
    assert not torch.equal(before[~mine], after[~mine])


@pytest.mark.parametrize("hidden", [0, 8])
@pytest.mark.parametrize("threshold", [1.3, 3.0, 20.0])
def test_ties_have_a_probability_of_their_own(threshold: float, hidden: int) -> None:
    """The threshold that made the ties is found again, and so is the scale. With a
    hidden layer the best step of the validation pairs is an early one."""
    pairs, true = made(2, threshold)
    near = 0.8 if hidden else 0.5
    args = settings(ties="rao_kupper", hidden=hidden)
    head, chosen = fit_head(pairs, made(3, threshold)[0], args)
    assert math.log(chosen["tie_threshold"]) == pytest.approx(math.log(threshold), abs=near)
    with torch.no_grad():
        found = margins_of(head, pairs)[:, 0]
    assert float((found @ true) / (true @ true)) == pytest.approx(1.0, abs=0.7 * near)
    assert torch.corrcoef(torch.stack([found, true]))[0, 1] > 0.95


@pytest.mark.parametrize(
    "options", [{"label_strength": True}, {"ties": "rao_kupper"}, {"ties": "drop"}], ids=str
)
def test_a_reward_is_trained(options: dict[str, Any], tmp_path: Path) -> None:
    data = [
        {
            "prompt": row["prompt"],
            "jpg_0": row["chosen"],
            "jpg_1": row["rejected"],
            "label_0": 0.5 if number % 6 == 0 else 1.0,
        }
        for number, row in enumerate(rows(60))
    ]
    folder = RewardTrainer("shapes-clip", config(tmp_path / "mine", **options), data).train()
    report, facts = report_of(folder), read_facts(folder)
    assert report["reward"]["accuracy"] > report["base"]["accuracy"]
    assert facts["data"]["ties"] == 10
    if "label_strength" in options:
        assert facts["chosen"]["with_margin"] > 0
    if options.get("ties") == "rao_kupper":
        assert facts["chosen"]["tie_threshold"] > 1


def test_bad_settings_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="either flip_rate or label_strength, not both"):
        RewardConfig(flip_rate=0.1, label_strength=True)
    with pytest.raises(ConfigError, match="either margin or ties: rao_kupper, not both"):
        RewardConfig(margin=0.1, ties="rao_kupper")
    with pytest.raises(ConfigError, match=r"ties: is for pairs, and loss is thumbs"):
        RewardConfig(loss="thumbs", ties="drop")
    with pytest.raises(ConfigError, match="rao_kupper is for a bradley_terry head"):
        RewardConfig(head="pal", ties="rao_kupper")
    with pytest.raises(ConfigError, match="label_strength: is no setting of a pal head"):
        RewardConfig(head="pal", label_strength=True)
    with pytest.raises(ConfigError, match="label_strength: applies to frozen towers alone"):
        RewardConfig(towers="lora", label_strength=True)
    with pytest.raises(UserError, match="the training prompts have none; set it to half"):
        RewardTrainer("shapes-clip", config(tmp_path / "x", ties="rao_kupper"), rows(40))


def test_labels_are_checked_before_anything_is_embedded(tmp_path: Path) -> None:
    args = RewardConfig(output_dir=str(tmp_path / "mine"), val=0.4, test=0.4, label_strength=True)
    with pytest.raises(UserError, match="2 training prompts with images of their own are too few"):
        RewardTrainer("shapes-clip", args, rows(10))
    with pytest.raises(UserError, match="no training pair is decided"):
        check_labels(torch.tensor([0.5, 0.5, 0.25]), torch.arange(3))
    for name in ("val", "test"):
        with pytest.raises(ConfigError, match=f"{name}: expected a share of the prompts above 0"):
            RewardConfig(**{name: 0.0})
