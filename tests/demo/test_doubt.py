"""Votes are asked for where an ensemble disagrees."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from judged import config, rows
from tiny import picture

from diffalign.cli.entry import run
from diffalign.errors import UserError
from diffalign.evaluation.compare import read_models
from diffalign.reward_training import RewardTrainer
from diffalign.rewards import load_scorer
from diffalign.rewards.learned.calibration import disagreement
from diffalign.rewards.scorers.trained import COVARIANCE
from diffalign.shapes import lora_dir
from diffalign.shapes.prompts import train_prompts

pytest.importorskip("gradio")
from diffalign.demo.doubt import CANDIDATES, Doubt
from diffalign.demo.engine import Engine
from diffalign.demo.vote_tab import Voting
from diffalign.demo.votes import Pair, VoteStore


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards") / "ensemble"
    RewardTrainer("shapes-clip", config(folder, members=4), rows(40)).train()
    return folder


def test_disagreement() -> None:
    agreed = torch.tensor([[3.0, 3.0, 3.0], [0.0, 0.0, 0.0], [-9.0, -9.0, -9.0]])
    assert disagreement(agreed).abs().max() < 1e-6
    apart = disagreement(torch.tensor([[4.0, -4.0], [1.0, -1.0], [900.0, -900.0]]))
    assert float(apart[2]) == pytest.approx(math.log(2)) and apart[2] > apart[0] > apart[1] > 0
    assert torch.equal(apart, disagreement(torch.tensor([[-4.0, 4.0], [-1, 1], [-900, 900]])))


def test_the_pair_of_most_doubt_is_chosen(ensemble: Path) -> None:
    (ensemble / COVARIANCE).rename(ensemble / "aside")  # as earlier versions wrote it
    doubt = Doubt(ensemble, "cpu")
    (ensemble / "aside").rename(ensemble / COVARIANCE)
    pairs = four_pairs()
    margins = []
    for pair in pairs:
        scores = doubt.scorer.member_scores(list(pair.images), [pair.prompt] * 2)
        mean = doubt.scorer(list(pair.images), [pair.prompt] * 2)
        assert torch.allclose(scores.mean(1), mean, atol=1e-4)
        margins.append(scores[0] - scores[1])
    best = int(disagreement(torch.stack(margins)).argmax())
    random.Random(0).shuffle(pairs)
    assert doubt.choose(pairs).id == str(best)


def four_pairs() -> list[Pair]:
    pairs = []
    for i, (left, right) in enumerate([(120, 121), (200, 60), (90, 90), (255, 0)]):
        images = picture(left, i, 64), picture(right, 50 + i, 64)
        pairs.append(Pair(str(i), "a small red circle", images, ("a", "b"), {}))
    return pairs


@pytest.mark.parametrize("flip_rate", [0.0, 0.2])
def test_the_most_informative_pair_is_chosen(tmp_path: Path, flip_rate: float) -> None:
    args = config(tmp_path / "one", l2=1e-2, flip_rate=flip_rate)
    doubt = Doubt(RewardTrainer("shapes-clip", args, rows(40)).train(), "cpu")
    assert doubt.covariance is not None
    before, pairs = doubt.covariance, four_pairs()
    twice = picture(90, 2, 64)
    pairs[2] = Pair("2", "a small red circle", (twice, twice), ("a", "b"), {})
    images = [image for pair in pairs for image in pair.images]
    scores, directions = doubt.scorer.directions(images, [pair.prompt for pair in pairs] * 2)
    again = doubt.scorer(images, [pair.prompt for pair in pairs] * 2)
    assert torch.allclose(doubt.scorer.temperature * scores, again.double(), atol=1e-4)

    def gains(covariance: torch.Tensor) -> torch.Tensor:
        """By determinants: what a label takes from the logarithm of the volume."""
        rows = []
        for i in range(len(pairs)):
            margin, g = scores[2 * i] - scores[2 * i + 1], directions[2 * i] - directions[2 * i + 1]
            p = torch.sigmoid(margin)
            q = flip_rate + (1 - 2 * flip_rate) * p
            seen = ((1 - 2 * flip_rate) * p * (1 - p)) ** 2 / (q * (1 - q))
            precision = covariance.inverse() + seen * g.outer(g)
            rows.append((precision.logdet() + covariance.logdet()) / 2)
        return torch.stack(rows)

    first = doubt.choose(pairs)
    assert first.id == str(int(gains(before).argmax())) and float(gains(before).max()) > 0
    assert not torch.equal(doubt.covariance, before)
    assert gains(doubt.covariance)[int(first.id)] < gains(before)[int(first.id)]
    # The same image twice teaches nothing.
    assert gains(before)[2].abs() < gains(before).max() * 1e-6
    (tmp_path / "one" / COVARIANCE).write_bytes(b"no tensors")
    with pytest.raises(UserError, match="is damaged"):
        Doubt(tmp_path / "one")


def test_voting_asks_about_it(ensemble: Path, tmp_path: Path) -> None:
    models = read_models("shapes", [{"name": "tuned", "lora": str(lora_dir())}])
    engine, shown = Engine(models), []

    class Recorded(Doubt):
        def choose(self, pairs):  # type: ignore[no-untyped-def]
            shown.append(len(pairs))
            return super().choose(pairs)

    store = VoteStore(tmp_path)
    doubt = Recorded(ensemble, "cpu")
    voting = Voting(engine, store, train_prompts()[:4], ("base", "tuned"), doubt)
    pair = voting.new_pair("visitor", "ann")
    assert pair is not None and shown == [CANDIDATES] and set(pair.sides) == {"base", "tuned"}
    assert voting.vote("visitor", pair.id, "left", "ann") and len(store.votes) == 1
    assert store.rate("base", "tuned")[0] == 1 and isinstance(store.votes[0]["seed"], int)


def test_pairs_may_be_of_two_seeds(ensemble: Path, tmp_path: Path) -> None:
    """All pairs of both models' images: the seeds of both sides are stored."""
    models = read_models("shapes", [{"name": "tuned", "lora": str(lora_dir())}])
    voting = Voting(Engine(models), VoteStore(tmp_path), ["a cat"], ("base", "tuned"))
    pairs = voting._drawn(2)
    assert len(pairs) == 4 and len({pair.id for pair in pairs}) == 4
    seeds = [(pair.facts["seed"], pair.facts.get("right_seed")) for pair in pairs]
    assert sum(right is None for _, right in seeds) == 2
    assert len({id(image) for pair in pairs for image in pair.images}) == 4
    by_seed = {}
    for pair, (left, right) in zip(pairs, seeds, strict=True):
        for side, seed, image in zip(pair.sides, (left, right or left), pair.images, strict=True):
            assert by_seed.setdefault((side, seed), image) is image


def test_the_number_of_pairs_needs_a_reward(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--ask_pairs", "16"]) == 2
    assert "no effect without --ask_reward" in capsys.readouterr().err


def test_rewards_that_cannot_disagree(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no reward"):
        Doubt(tmp_path)
    RewardTrainer("shapes-clip", config(tmp_path / "one", hidden=4), rows(40)).train()
    with pytest.raises(UserError, match="does not say how sure it is"):
        Doubt(tmp_path / "one")


def test_users_of_a_reward_disagree(tmp_path: Path) -> None:
    data = [
        row
        for number in range(6)
        for row in rows(12, number % 2 == 0, f"user {number}", first=12 * number)
    ]
    args = config(tmp_path / "pal", head="pal", seed=1, split_seed=1)
    doubt = Doubt(RewardTrainer("shapes-clip", args, data).train(), "cpu")
    users = [load_scorer(str(tmp_path / "pal"), user=f"user {i}", device="cpu") for i in range(6)]
    pairs, margins = [], []
    for i, (left, right) in enumerate([(120, 121), (205, 55), (60, 60)]):
        images = picture(left, i, 64), picture(right, 50 + i, 64)
        pairs.append(Pair(str(i), "a small red circle number 3", images, ("a", "b"), {}))
        scores = torch.stack([user(list(images), [pairs[-1].prompt] * 2) for user in users], 1)
        by_user = doubt.scorer.user_scores(list(images), [pairs[-1].prompt] * 2)
        assert torch.allclose(by_user, scores, atol=1e-4)
        margins.append(scores[0] - scores[1])
    assert (margins[1].sign() == torch.tensor([1, -1] * 3)).all()
    assert int(disagreement(torch.stack(margins)).argmax()) == 1
    assert doubt.choose(pairs).id == "1"
