"""Losses of scores of single images, for heads on frozen towers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..rewards.learned.heads import QUANTILES
from ..rewards.learned.losses import (
    pinball_loss,
    plackett_luce_loss,
    preference_loss,
    rating_probabilities,
    thumbs_loss,
)
from .opinions import Opinions

MOST_LEVELS = 20
_PULL = 1e-2  # of what belongs to users, towards 0

ItemLoss = Callable[[Tensor], Tensor]
"""Mean loss of the scores of all opinions, (n,) or (n, quantiles)."""


def item_loss(kind: str, opinions: Opinions, weight: Tensor) -> tuple[ItemLoss, list[Tensor]]:
    """Return a loss, and its own trainable parameters.

    Args:
        kind (`str`): `thumbs`, `ratings`, `quantiles` or `plackett_luce`.
        opinions (`Opinions`): n opinions.
        weight (`Tensor`): Weight of each of them, (n,).

    Raises:
        UserError: The data have no such opinions.
    """
    check_opinions(kind, opinions)
    if kind == "thumbs":
        return _thumbs(opinions, weight)
    if kind == "ratings":
        return _ratings(opinions, weight)
    if kind == "quantiles":
        values = torch.from_numpy(opinions.standardised())
        levels = torch.tensor(QUANTILES, dtype=torch.float64)

        def pinball(scores: Tensor) -> Tensor:
            return _mean(pinball_loss(scores, values, levels).mean(1), weight)

        return pinball, []
    return _lists(opinions, weight), []


def check_opinions(kind: str, opinions: Opinions) -> None:
    """Check that a loss suits some opinions.

    Args:
        kind (`str`): As for `item_loss`.
        opinions (`Opinions`): The opinions.

    Raises:
        UserError: It does not.
    """
    if not len(opinions):
        raise UserError(f"train.loss: {kind} needs judgements of single images; take pairs")
    if opinions.are_thumbs != (kind == "thumbs"):
        what = "likes and dislikes" if opinions.are_thumbs else "ratings or lists"
        fitting = "thumbs" if opinions.are_thumbs else "ratings, quantiles or plackett_luce"
        raise UserError(f"train.loss: {kind} does not fit the data, {what}; take {fitting}")
    levels = len(np.unique(opinions.value))
    if levels < 2:
        raise UserError(f"train.loss: all {len(opinions)} opinions are equal, nothing is preferred")
    if kind == "ratings" and levels > MOST_LEVELS:
        raise UserError(
            f"train.loss: ratings takes at most {MOST_LEVELS} distinct values, and there are "
            f"{levels}; take quantiles"
        )
    if kind == "plackett_luce" and np.unique(opinions.source, return_counts=True)[1].max() < 2:
        raise UserError("train.loss: plackett_luce needs lists, and every row has one image")


def _mean(rows: Tensor, weight: Tensor) -> Tensor:
    return (weight * rows).sum() / weight.sum()


def _of_users(opinions: Opinions) -> tuple[Tensor, Tensor]:
    """A bias per user and one for unnamed users, and the row of each opinion."""
    bias = torch.zeros(int(opinions.user.max(initial=-1)) + 2, dtype=torch.float64)
    return bias.requires_grad_(), torch.from_numpy(opinions.user)  # -1 is the last


def _thumbs(opinions: Opinions, weight: Tensor) -> tuple[ItemLoss, list[Tensor]]:
    liked = torch.from_numpy(opinions.value)
    bias, user = _of_users(opinions)
    level = torch.zeros((), dtype=torch.float64).requires_grad_()

    def loss(scores: Tensor) -> Tensor:
        rows = thumbs_loss(scores, liked, level + bias[user])
        return _mean(rows, weight) + _PULL * bias.square().mean()

    return loss, [level, bias]


def _ratings(opinions: Opinions, weight: Tensor) -> tuple[ItemLoss, list[Tensor]]:
    places = np.unique(opinions.value, return_inverse=True)[1]
    place = torch.from_numpy(places.astype(np.int64))
    shares = np.cumsum(np.bincount(places))[:-1] / len(places)
    start = torch.from_numpy(np.log(shares / (1 - shares)))
    first = start[:1].clone().requires_grad_()
    steps = start.diff().clamp(min=1e-2).expm1().log().requires_grad_()  # softplus gives them back
    bias, user = _of_users(opinions)

    def loss(scores: Tensor) -> Tensor:
        cuts = torch.cat([first, first + torch.nn.functional.softplus(steps).cumsum(0)])
        shares = rating_probabilities(scores + bias[user], cuts)
        rows = -shares.gather(1, place[:, None])[:, 0].clamp(min=1e-12).log()
        return _mean(rows, weight) + _PULL * bias.square().mean()

    return loss, [first, steps, bias]


def _lists(opinions: Opinions, weight: Tensor) -> ItemLoss:
    """Plackett-Luce over lists without ties. A list with ties counts by its pairs."""
    orders: dict[int, list[Tensor]] = {}
    tied: list[tuple[int, int, float]] = []
    for source in np.unique(opinions.source):
        rows = np.flatnonzero(opinions.source == source)
        order = rows[np.argsort(-opinions.value[rows], kind="stable")]
        values = opinions.value[order]
        if len(order) < 2 or values[0] == values[-1]:
            continue
        if len(np.unique(values)) == len(values):
            orders.setdefault(len(order), []).append(torch.from_numpy(order))
            continue
        pairs = [
            (int(a), int(b))
            for i, a in enumerate(order)
            for b in order[i + 1 :]
            if opinions.value[a] > opinions.value[b]
        ]
        share = float(weight[torch.from_numpy(order)].sum()) / len(pairs)
        tied += [(a, b, share) for a, b in pairs]
    stacked = [torch.stack(group) for group in orders.values()]

    def loss(scores: Tensor) -> Tensor:
        losses = [plackett_luce_loss(scores[rows]) / (rows.shape[1] - 1) for rows in stacked]
        weights = [weight[rows].sum(1) for rows in stacked]
        if tied:
            first, second = (torch.tensor([pair[i] for pair in tied]) for i in (0, 1))
            losses.append(preference_loss(scores[first] - scores[second]))
            weights.append(torch.tensor([pair[2] for pair in tied], dtype=torch.float64))
        return _mean(torch.cat(losses), torch.cat(weights))

    return loss
