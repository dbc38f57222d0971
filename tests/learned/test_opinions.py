"""Rewards from thumbs, stars and lists: what each loss is, what is learned from it, and
quantiles."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from judged import config, report_of
from tiny import picture
from torch.nn.functional import softplus

from diffalign import load_scorer
from diffalign.errors import ConfigError, UserError
from diffalign.reward_training import RewardTrainer
from diffalign.reward_training.item_losses import item_loss
from diffalign.reward_training.judgements import read_judgements
from diffalign.reward_training.opinions import Opinions
from diffalign.rewards.learned.heads import QUANTILES, RewardHead

PROMPTS = ["a small red circle"] * 3
IMAGES = [picture(230, 1, 64), picture(130, 2, 64), picture(30, 3, 64)]


def stars(count: int, images: int = 3, noise: float = 0.4) -> list[dict[str, Any]]:
    """Brighter images get more stars. One of two judges is stricter by a star."""
    rng, rows = random.Random(1), []
    for i in range(count):
        for j in range(images):
            level = rng.randrange(20, 235)
            judge = rng.choice(["ann", "bob"])
            rating = 1 + 4 * level / 255 + rng.gauss(0, noise) - (judge == "bob")
            row = {"image": picture(level, 100 * i + j, 64), "prompt": f"prompt {i}"}
            rows.append(row | {"rating": min(5, max(1, round(rating))), "user_id": judge})
    return rows


def thumbs(count: int) -> list[dict[str, Any]]:
    """Half of the prompts have one image, which no pair can use."""
    rows = []
    for i in range(count):
        for j in range(1 + i % 2):
            bright = (i // 2 + j) % 2 == 0
            image = picture(200 if bright else 60, 100 * i + j, 64)
            rows.append({"image": image, "prompt": f"prompt {i}", "label": bright})
    return rows


def lists(count: int, ties: bool = False) -> list[dict[str, Any]]:
    rng, rows = random.Random(2), []
    for i in range(count):
        levels = rng.sample(range(20, 235, 20), 4)
        scores = [float(level // 60 if ties else level) for level in levels]
        images = [picture(level, 100 * i + j, 64) for j, level in enumerate(levels)]
        rows.append({"prompt": f"prompt {i}", "images": images, "scores": scores})
    return rows


def train(folder: Path, data: Any, **values: Any) -> Path:
    return RewardTrainer("shapes-clip", config(folder, **values), data).train()


@pytest.mark.parametrize(
    ("loss", "data"),
    [
        ("thumbs", thumbs(60)),
        ("ratings", stars(40)),
        ("quantiles", stars(40)),
        ("plackett_luce", lists(40)),
        ("plackett_luce", lists(40, ties=True)),
    ],
)
@pytest.mark.parametrize("hidden", [0, 8])
def test_a_reward_learns_from_it(tmp_path: Path, loss: str, data: Any, hidden: int) -> None:
    members = 1 if hidden else 2
    folder = train(tmp_path / "reward", data, loss=loss, hidden=hidden, members=members)
    bright, _, dark = load_scorer(str(folder), device="cpu")(IMAGES, ["prompt 3"] * 3)
    assert bright > dark
    mean, spread = load_scorer(str(folder), device="cpu").spec.affine  # also of losses with levels
    assert dark - spread < mean < bright + spread
    report = report_of(folder)
    assert report["reward"]["accuracy"] > max(0.7, report["base"]["accuracy"] + 0.2)


def test_prompts_with_one_image_are_used(tmp_path: Path) -> None:
    data = read_judgements(thumbs(60))
    in_pairs = {*data.first, *data.second}
    assert len(data.opinions) == 90 > len(in_pairs) == 60 and data.opinions.are_thumbs


def test_quantiles(tmp_path: Path) -> None:
    folder = train(tmp_path / "reward", stars(60), loss="quantiles", l2=1e-2)
    scorer: Any = load_scorer(str(folder), device="cpu")
    result = scorer.score(IMAGES, PROMPTS, quantiles=[0.05, 0.12, 0.5, 0.95])
    assert result.quantiles.shape == (3, 4) and (result.quantiles.diff(dim=1) >= 0).all()
    assert (result.quantiles[:, 3] > result.quantiles[:, 0]).all()
    assert torch.equal(result.values, scorer(IMAGES, PROMPTS))
    every = scorer.score(IMAGES, PROMPTS, quantiles=list(QUANTILES)).quantiles
    assert torch.allclose(every.mean(1), result.values, atol=1e-3)
    share = (0.12 - 0.10) / 0.05  # between two levels it is interpolated
    between = every[:, 1] * (1 - share) + every[:, 2] * share
    assert torch.allclose(between, result.quantiles[:, 1], atol=1e-4)
    careful = load_scorer(str(folder), device="cpu", quantile=0.05)
    assert torch.allclose(careful(IMAGES, PROMPTS), result.quantiles[:, 0], atol=1e-3)
    assert careful.fingerprint() != scorer.fingerprint()
    pixels = torch.rand(1, 3, 64, 64, requires_grad=True)
    careful.score_tensor(pixels, PROMPTS[:1]).sum().backward()
    assert float(pixels.grad.abs().sum()) > 0  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"0\.05 to 0\.95"):
        load_scorer(str(folder), quantile=0.01)
    plain = train(tmp_path / "plain", stars(60), loss="ratings")
    with pytest.raises(ConfigError, match="has no quantiles"):
        load_scorer(str(plain), quantile=0.1)
    with pytest.raises(ConfigError, match="has no quantiles"):
        load_scorer(str(plain), device="cpu").score(IMAGES, PROMPTS, quantiles=[0.1])  # type: ignore[call-arg]


def test_a_new_head_of_quantiles_is_its_base() -> None:
    head = RewardHead(5, 2, quantiles=True)
    base, image, text = torch.randn(3), torch.randn(3, 5), torch.randn(3, 5)
    assert torch.equal(head(base, image, text), base[:, None].expand(-1, 2))
    assert torch.allclose(
        head.quantiles(base, image, text, [0.3, 0.62]), base[:, None].expand(3, 2)
    )


def opinions(
    values: list[float], users: Any = None, source: Any = None, likes: bool = False
) -> Any:
    n = np.arange(len(values))
    user = np.full(len(n), -1) if users is None else np.array(users)
    rows = n if source is None else np.array(source)
    return Opinions(n, n, user, np.array(values), rows, are_thumbs=likes)


def test_the_losses_by_hand() -> None:
    one = torch.ones(3, dtype=torch.float64)
    scores = torch.tensor([0.8, -0.3, 1.5], dtype=torch.float64)
    loss, learned = item_loss("thumbs", opinions([1, 0, 0], likes=True), one)
    with torch.no_grad():
        learned[0].fill_(-0.2)
    assert float(loss(scores)) == pytest.approx(0.8175244628)
    # At the start the cut points give the shares of the ratings.
    values, weight = [1.0, 2, 2, 3, 3, 3], torch.ones(6, dtype=torch.float64)
    loss, learned = item_loss("ratings", opinions(values), weight)
    shares = np.array([1, 2, 2, 3, 3, 3]) / 6
    assert float(loss(torch.zeros(6, dtype=torch.float64))) == pytest.approx(-np.log(shares).mean())
    loss, _ = item_loss("plackett_luce", opinions([3, 1, 2], source=[0, 0, 0]), one)
    order = scores[[0, 2, 1]]
    by_hand = order.flip(0).logcumsumexp(0).flip(0) - order
    assert float(loss(scores)) == pytest.approx(float(by_hand.sum() / 2))
    pair, _ = item_loss("plackett_luce", opinions([2, 1], source=[0, 0]), one[:2])
    assert float(pair(scores[:2])) == pytest.approx(float(softplus(scores[1] - scores[0])))
    tied, _ = item_loss("plackett_luce", opinions([1, 1, 0], source=[0, 0, 0]), one)
    expected = (softplus(scores[2] - scores[0]) + softplus(scores[2] - scores[1])) / 2
    assert float(tied(scores)) == pytest.approx(float(expected))


def test_lists_of_any_length_count_the_same() -> None:
    weight = torch.tensor([0.5] * 2 + [0.25] * 4, dtype=torch.float64)
    said = opinions([2, 1, 4, 3, 2, 1], source=[0, 0, 1, 1, 1, 1])
    loss, _ = item_loss("plackett_luce", said, weight)
    pair, four = torch.tensor([0.3, -0.2]).double(), torch.tensor([0.1, 0.7, -0.5, 0.2]).double()
    first = softplus(pair[1] - pair[0])
    second = (four.flip(0).logcumsumexp(0).flip(0) - four).sum() / 3
    assert float(loss(torch.cat([pair, four]))) == pytest.approx(float((first + second) / 2))


def test_a_threshold_makes_likes_of_ratings() -> None:
    ratings = read_judgements(stars(12), like_threshold=0.0)
    assert not ratings.opinions.are_thumbs and len(np.unique(ratings.opinions.value)) == 5
    likes = read_judgements(stars(12), ratings=False, like_threshold=3.0)
    assert likes.opinions.are_thumbs and set(likes.opinions.value) == {0.0, 1.0}
    assert len(likes) < len(ratings)  # ratings order more pairs than likes


def test_people_use_a_scale_differently() -> None:
    said = opinions([1, 3, 5, 4, 4, 2], users=[0, 0, 0, 1, 2, 2])
    values = said.standardised()
    assert values[:3] == pytest.approx([-1.2247449, 0, 1.2247449]) and values[3] == 0
    assert values[4:] == pytest.approx([1, -1])


def test_mistakes(tmp_path: Path) -> None:
    for loss, data, words in (
        ("thumbs", lists(20), "does not fit the data, ratings or lists"),
        ("ratings", thumbs(40), "does not fit the data, likes and dislikes; take thumbs"),
    ):
        with pytest.raises(UserError, match=words):
            train(tmp_path / loss, data, loss=loss)
    from judged import rows

    with pytest.raises(UserError, match="needs lists"):
        train(tmp_path / "single", stars(20), loss="plackett_luce")
    with pytest.raises(UserError, match="single images"):
        train(tmp_path / "pairs", rows(40), loss="thumbs")
    scores = [float(i) for i in range(30)]
    with pytest.raises(UserError, match="take quantiles"):
        item_loss("ratings", opinions(scores), torch.ones(30, dtype=torch.float64))
    fine = [row | {"rating": row["rating"] + i / 64} for i, row in enumerate(stars(20))]
    with pytest.raises(UserError, match="take quantiles"):  # before anything is embedded
        RewardTrainer("shapes-clip", config(tmp_path / "fine", loss="ratings"), fine)
    for values, words in (
        ({"loss": "ratings", "flip_rate": 0.1}, "flip_rate: is for pairs"),
        ({"loss": "thumbs", "head": "pal"}, "loss: is no setting of a pal head"),
        ({"loss": "thumbs", "towers": "lora"}, "loss: applies to frozen towers alone"),
    ):
        with pytest.raises(ConfigError, match=words):
            config(tmp_path, **values)
