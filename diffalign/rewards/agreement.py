"""Images grouped by prompt, and how far several scorers agree about them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ensemble

LARGEST_COMPARED = 2000
"""Images of one prompt up to which all are compared with all."""
_CELLS = 4_000_000  # comparisons held in memory at once


def group_members(groups: Sequence[Hashable]) -> list[list[int]]:
    """List the image indices of each group, in the order of first appearance."""
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    return list(members.values())


def stacks(members: list[list[int]], scorers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield groups of one size at a time, no more than memory holds. Nothing is padded.

    Args:
        members (list of lists): the image indices of each group.
        scorers (`int`): how many scores an image has.

    Returns:
        pairs of group numbers (g,) and image indices (g, k).
    """
    by_size: dict[int, list[int]] = {}
    for number, indices in enumerate(members):
        by_size.setdefault(len(indices), []).append(number)
    for k, numbers in by_size.items():
        step = max(1, _CELLS // (k * k * scorers))
        for start in range(0, len(numbers), step):
            part = numbers[start : start + step]
            yield torch.tensor(part), torch.tensor([members[number] for number in part])


def agreement(
    scores: Tensor, names: list[str], train: Tensor, members: list[list[int]]
) -> dict[str, Any]:
    """Compute the statistics of `Combined.agreement` (see panel.py).

    Args:
        scores (`Tensor`): signed scores (n, columns) of all columns.
        names (list of `str`): of these columns.
        train (`Tensor`): signed scores (n, combined) of those that are combined.
        members (list of lists): the image indices of each group.
    """
    compared = [indices for indices in members if len(indices) <= LARGEST_COMPARED]
    places = [number for number, indices in enumerate(members) if len(indices) <= LARGEST_COMPARED]
    per_group: list[float | None] = [None] * len(members)
    alike = torch.zeros(len(names), len(names), dtype=torch.float64)
    told = torch.zeros_like(alike)
    for numbers, index in stacks(compared, len(names)):
        for number, w in zip(
            numbers.tolist(), ensemble.kendalls_w(train[index]).tolist(), strict=True
        ):
            per_group[places[number]] = w if math.isfinite(w) else None
        count = _told_apart(scores[index])
        alike += ensemble.pairwise_agreement(scores[index]).nan_to_num(0.0) * count
        told += count
    known = [w for w in per_group if w is not None]
    return {
        "names": list(names),
        "kendalls_w": sum(known) / len(known) if known else None,
        "kendalls_w_per_group": per_group,
        "pairwise": [
            [float(a / t) if t else None for a, t in zip(*rows, strict=True)]
            for rows in zip(alike, told, strict=True)
        ],
        "left_out": len(members) - len(compared),
    }


def _told_apart(scores: Tensor) -> Tensor:
    """Count the image pairs that both of two scorers tell apart: (n, n)."""
    first, second = torch.triu_indices(scores.shape[1], scores.shape[1], 1)
    difference = scores[:, first] - scores[:, second]
    told = (difference.nan_to_num(0.0) != 0).flatten(0, 1).double()
    return told.T @ told
