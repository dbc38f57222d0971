"""Heads of few pairs: no worse than their base, and sure of what they know."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from diffalign.reward_training import RewardConfig
from diffalign.reward_training.fit_head import (
    FOLDS,
    PENALTIES,
    fit_head,
    folds_of,
    margins_of,
    weight_covariance,
)
from diffalign.reward_training.opinions import Opinions
from diffalign.reward_training.pair_tensors import Items, Pairs
from diffalign.rewards.learned.heads import RewardHead
from diffalign.rewards.learned.information import (
    after_label,
    information_gain,
    label_information,
    posterior_covariance,
)

DIM = 24


def judged(count: int, seed: int, taste: float = 0.0) -> tuple[Pairs, Tensor]:
    """Pairs that are judged by what the base says and by one feature, two per prompt.
    Returns their true margins, too."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    first, second, base = draw(count, DIM), draw(count, DIM), draw(count, 2)
    margins = base[:, 0] - base[:, 1] + taste * (first - second)[:, 0]
    shares = torch.rand(count, generator=generator, dtype=torch.float64)
    ones = torch.ones(count, dtype=torch.float64)
    pairs = Pairs(
        label=(shares < torch.sigmoid(margins)).double(), weight=ones,
        user=torch.full((count,), -1), prompt=torch.arange(count) // 2, margin=0 * ones,
        first=first, second=second, text=torch.ones(count, DIM, dtype=torch.float64), base=base,
        nuisances=torch.zeros(count, 6, dtype=torch.float64),
    )  # fmt: skip
    return pairs, margins


def right_share(head: RewardHead, pairs: Pairs, true: Tensor) -> float:
    with torch.no_grad():
        margins = margins_of(head, pairs).mean(1)
    return float(((margins > 0) == (true > 0)).double().mean())


def test_few_pairs_leave_the_base_as_it_is() -> None:
    test, true = judged(4000, 99)
    shares, spoilt = [], []
    for seed in range(5):
        train, val = judged(40, seed)[0], judged(4, 50 + seed)[0]
        head, chosen = fit_head(train, val, RewardConfig())
        assert chosen["l2"] in PENALTIES
        shares.append(right_share(head, test, true))
        weak, _ = fit_head(train, val, RewardConfig(l2=1e-3))
        spoilt.append(right_share(weak, test, true))
    # The base itself is always right here.
    assert np.mean(shares) > 0.9 > 0.85 > np.mean(spoilt)


def test_many_pairs_are_learned_from() -> None:
    (train, _), (test, true) = judged(1500, 0, taste=1.0), judged(4000, 99, taste=1.0)
    head, chosen = fit_head(train, judged(20, 1, taste=1.0)[0], RewardConfig())
    assert chosen["l2"] <= 1e-2 and right_share(head, test, true) > 0.93


def test_opinions_on_single_images_choose_by_prompts_too() -> None:
    """Likes of what the base scores high, without a taste: a strong pull is best."""
    train, val = judged(60, 0)[0], judged(4, 1)[0]
    both = torch.cat([train.base[:, 0], train.base[:, 1]])
    prompt = torch.cat([train.prompt, train.prompt])
    shares = torch.rand(120, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    likes = (shares < torch.sigmoid(both)).double()
    opinions = Opinions(
        np.arange(120), prompt.numpy(), np.full(120, -1), likes.numpy(), np.arange(120),
        are_thumbs=True,
    )  # fmt: skip
    items = Items(
        opinions, torch.cat([train.first, train.second]), torch.cat([train.text, train.text]),
        both, torch.ones(120, dtype=torch.float64), prompt,
    )  # fmt: skip
    head, chosen = fit_head(train, val, RewardConfig(loss="thumbs"), items)
    test, true = judged(4000, 99)
    assert chosen["l2"] >= 1e-1 and right_share(head, test, true) > 0.9
    # Folds without a dislike cannot be fitted. The validation pairs choose then.
    items.opinions.value[:] = 1.0
    items.opinions.value[0] = 0.0
    assert fit_head(train, val, RewardConfig(loss="thumbs"), items)[1]["l2"] in PENALTIES


def test_folds_keep_groups_together() -> None:
    groups = torch.tensor([7, 7, 2, 9, 9, 9, 4, 1, 3, 3])
    folds = folds_of(groups, 0)
    assert set(folds.tolist()) == set(range(FOLDS))
    for group in groups.unique():
        assert len(folds[groups == group].unique()) == 1
    assert folds_of(torch.tensor([5, 5]), 0).tolist() == [0, 0]


def test_one_group_cannot_be_folded() -> None:
    train, val = judged(20, 0)[0], judged(6, 1)[0]
    one_group = torch.zeros(10, dtype=torch.long)
    assert fit_head(train, val, RewardConfig(), groups=one_group)[1]["l2"] in PENALTIES


@pytest.mark.parametrize("members", [1, 3])
def test_covariance_by_autograd(members: int) -> None:
    """The inverse of the curvature of the summed loss, its Jacobian by autograd."""
    train, val = judged(60, 0, taste=1.0)[0], judged(10, 1)[0]
    train.weight = torch.linspace(0.5, 1.5, 60, dtype=torch.float64)
    config = RewardConfig(l2=0.02, members=members)
    head, _ = fit_head(train, val, config)
    covariance = weight_covariance(head, train, config, 0.02)
    assert covariance is not None
    one = RewardHead(DIM).double()
    state = {name: value for name, value in head.state_dict().items() if name in one.state_dict()}
    weights = [network[0].weight for network in head.networks]  # type: ignore[index]
    state["networks.0.0.weight"] = torch.stack(weights).mean(0)
    state["networks.0.0.bias"] = torch.zeros(1)
    state["log_factor"] = head.log_factor.exp().mean()[None].log()
    one.load_state_dict(state)
    rows = []
    for margin in margins_of(one, train)[:, 0]:
        factor, weight = torch.autograd.grad(
            margin, [one.log_factor, one.networks[0][0].weight], retain_graph=True  # type: ignore[index]
        )  # fmt: skip
        rows.append(torch.cat([factor, weight[0]]))
    with torch.no_grad():
        p = torch.sigmoid(margins_of(head, train).mean(1))
    jacobian = torch.stack(rows)
    prior = torch.full((2 * DIM + 2,), 2 * 0.02 * 60, dtype=torch.float64)
    prior[0] = 1.0
    curvature = jacobian.T @ ((train.weight * p * (1 - p))[:, None] * jacobian) + prior.diag()
    assert torch.allclose(covariance, curvature.inverse(), atol=1e-10)
    for values in ({"hidden": 4}, {"loss": "thumbs"}):
        other = dataclasses.replace(config, **values)
        assert weight_covariance(head, train, other, 0.02) is None


def test_information_by_autograd() -> None:
    """The expected square of the slope of a label's likelihood."""
    margins = torch.linspace(-6, 6, 13, dtype=torch.float64).requires_grad_()
    for flip_rate in (0.0, 0.1, 0.3):
        q = flip_rate + (1 - 2 * flip_rate) * torch.sigmoid(margins)
        expected = torch.zeros_like(margins)
        for likelihood in (q, 1 - q):
            (slope,) = torch.autograd.grad(likelihood.log().sum(), margins, retain_graph=True)
            expected = expected + likelihood * slope.square()
        assert torch.allclose(label_information(margins, flip_rate), expected, atol=1e-12)


def test_a_label_shrinks_the_posterior() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    information = torch.rand(9, generator=generator, dtype=torch.float64) / 4
    prior = torch.rand(5, generator=generator, dtype=torch.float64) + 0.1
    before = posterior_covariance(directions[:-1], information[:-1], prior)
    after = after_label(before, directions[-1], information[-1])
    assert torch.allclose(after, posterior_covariance(directions, information, prior), atol=1e-12)
    gain = information_gain(directions, information, before)[-1]
    assert float(gain) == pytest.approx(float(before.logdet() - after.logdet()) / 2)
    gains = [information_gain(directions, information, each) for each in (before, after)]
    assert (gains[1] <= gains[0] + 1e-12).all()
