"""PAL's linear form: one reward for everybody, and the users' tastes beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from judged import rows
from torch import Tensor

from diffalign import load_scorer
from diffalign.cli.entry import run
from diffalign.errors import ConfigError
from diffalign.reward_training import RewardConfig
from diffalign.reward_training.fit_head import fit_head, margins_of
from diffalign.reward_training.fit_linear_pal import fit_linear_pal
from diffalign.reward_training.fit_pal import pal_margins
from diffalign.reward_training.pair_tensors import Pairs
from diffalign.rewards.learned.heads import LinearPalHead

DIM = 8


def world(
    users: int, votes: int, taste: float, seed: int = 0, noise: float = 1.0
) -> tuple[Pairs, Tensor]:
    """Pairs of one prompt each, and the lead of the first image for its judge.

    All users like what suits the prompt. Every second one likes the first direction of
    images, and the others dislike it.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    count = users * votes
    user = torch.arange(count) % users
    text = torch.nn.functional.normalize(normal(count, DIM), dim=1)
    images = [torch.nn.functional.normalize(normal(count, DIM), dim=1) for _ in range(2)]
    base = torch.stack([8 * (image * text).sum(1) for image in images], 1)
    sign = torch.where(user % 2 == 0, 1.0, -1.0).double()
    lead = base[:, 0] - base[:, 1] + taste * sign * (images[0] - images[1])[:, 0]
    chance = torch.rand(count, generator=generator, dtype=torch.float64)
    label = ((noise * chance.logit() + lead) > 0).double()
    pairs = Pairs(
        label=label, weight=torch.ones(count).double(), user=user, prompt=torch.arange(count),
        margin=torch.zeros(count).double(), first=images[0], second=images[1], text=text,
        base=base, nuisances=torch.zeros(count, 6).double(),
    )  # fmt: skip
    return pairs, lead


def pal(**settings: Any) -> RewardConfig:
    return RewardConfig(head="pal", **settings)


def test_opposite_tastes_are_found_from_few_votes() -> None:
    train, _ = world(20, 20, taste=8.0)
    fresh, lead = world(20, 50, taste=8.0, seed=1)
    head, chosen = fit_linear_pal(train, 20, pal())
    one, _ = fit_head(train, train, RewardConfig())

    def right(margins: Tensor) -> float:
        return float(((margins > 0) == (lead > 0)).double().mean())

    assert chosen["taste_gain"] > 0.05
    weights = head.logits.softmax(1)[:, 0]
    assert len({bool(w > 0.5) for w in weights[::2]}) == 1
    assert len({bool(w > 0.5) for w in weights}) == 2
    assert right(pal_margins(head, fresh)) > right(margins_of(one, fresh).mean(1)) + 0.1


def test_people_who_agree_have_one_reward() -> None:
    """That of a Bradley-Terry head, to the accuracy of its fit."""
    train, _ = world(20, 20, taste=0.0)
    head, chosen = fit_linear_pal(train, 20, pal(l2=0.03))
    one, _ = fit_head(train, train, RewardConfig(l2=0.03))
    assert chosen["taste_gain"] == 0 and "taste_l2" not in chosen
    assert (head.logits == 0).all() and (head.tastes == 0).all()
    torch.testing.assert_close(
        pal_margins(head, train), margins_of(one, train)[:, 0], rtol=0, atol=2e-4
    )


def test_one_prototype_is_one_reward() -> None:
    train, _ = world(6, 20, taste=8.0)
    head, _ = fit_linear_pal(train, 6, pal(prototypes=1, l2=0.1))
    one, _ = fit_head(train, train, RewardConfig(l2=0.1))
    torch.testing.assert_close(
        pal_margins(head, train), margins_of(one, train)[:, 0], rtol=0, atol=2e-4
    )


def test_an_unknown_judge_is_the_mean_user() -> None:
    train, _ = world(8, 30, taste=8.0)
    train.user[::5] = -1
    head, chosen = fit_linear_pal(train, 8, pal())
    assert chosen["taste_gain"] > 0
    mean = head.logits.softmax(1).mean(0)
    margins = head.margins(train.first, train.second, train.text)(mean)
    torch.testing.assert_close(pal_margins(head, train)[::5], margins[::5].detach())


def test_margins_are_differences_of_scores() -> None:
    torch.manual_seed(0)
    head = LinearPalHead(DIM, users=3, prototypes=2).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    first, second, text = torch.randn(3, 5, DIM, dtype=torch.float64)
    head.standardise(first, text)
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    scores = [head.score(image, text, weights.expand(5, -1)) for image in (first, second)]
    margins = head.margins(first, second, text, temperature=2.0)(weights)
    torch.testing.assert_close(margins, (2 * (scores[0] - scores[1])).detach())


def test_prompts_that_are_linked_by_images_are_no_obstacle() -> None:
    train, _ = world(6, 20, taste=8.0)
    head, _ = fit_linear_pal(train, 6, pal(), groups=torch.zeros(120, dtype=torch.long))
    assert torch.isfinite(head.tastes).all()


def test_the_fit_is_repeated_exactly() -> None:
    train, _ = world(6, 20, taste=8.0)
    heads = [fit_linear_pal(train, 6, pal(seed=3))[0] for _ in range(2)]
    for name, value in heads[0].state_dict().items():
        assert torch.equal(value, heads[1].state_dict()[name]), name


def test_command_and_card_say_that_no_tastes_were_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [row for n in range(4) for row in rows(12, True, f"user {n % 2}", 12 * n)]
    folder, table = tmp_path / "one", tmp_path / "votes.parquet"
    Dataset.from_list(data).to_parquet(table)
    command = ["reward", "train", "--model", "shapes-clip", "--data", str(table)]
    assert run([*command, "--train.head", "pal", "--train.output_dir", str(folder)]) == 0
    assert "WARNING: no tastes found among 2 people" in capsys.readouterr().out
    facts = json.loads((folder / "reward.json").read_text())
    assert facts["chosen"]["taste_gain"] == 0
    assert "WARNING: no tastes found among 2 people" in (folder / "README.md").read_text()
    scorers = [load_scorer(str(folder), user=f"user {n}", device="cpu") for n in range(2)]
    scores = [scorer([data[0]["chosen"]], [data[0]["prompt"]]) for scorer in scorers]
    torch.testing.assert_close(*scores)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"user_hidden": 8}, "user_hidden: is for pal_form a and b"),
        ({"max_steps": 8}, "max_steps: has no effect on a linear head.*pal_form: b"),
        ({"learning_rate": 0.1}, "learning_rate: has no effect on a linear head"),
    ],
)
def test_settings_of_networks_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pal(**settings)
    pal(pal_form="b", **settings)
