"""Judge the labels of pairs by an ensemble that has not seen their prompts.

Wang et al. 2024, arXiv 2401.06080. There the ensemble trains on the labels that it
judges, which makes memorised labels look right. Here it is fitted on other prompts.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..errors import UserError
from ..rewards.learned.losses import label_strength
from .config import RewardConfig
from .fit_head import FOLDS, fit_head, folds_of, margins_of
from .pair_tensors import Pairs

MEMBERS = 5
FLIPPED = 0.1
"""Largest share of labels that are flipped."""


def strengthen(
    train: Pairs, val: Pairs, groups: Tensor, config: RewardConfig
) -> tuple[Pairs, dict[str, float]]:
    """Flip weak labels, soften uncertain ones, and give sure ones a margin.

    Ties and mixed votes stay as they are.

    Args:
        train (`Pairs`): The pairs to train on.
        val (`Pairs`): Pairs that choose the penalty.
        groups (`Tensor`): Group of each prompt, (prompts,). Prompts of one group are
            equal or share an image, see `connected`.
        config (`RewardConfig`): Settings of the heads.

    Returns:
        `tuple[Pairs, dict]`: The same pairs with other labels and margins, and how many
        labels are `flipped`, `softened` or `with_margin`.

    Raises:
        UserError: See `check_labels`.
    """
    decided = (train.label == 0) | (train.label == 1)
    check_labels(train.label, groups[train.prompt])
    margins = unseen_margins(train, val, groups, config)
    sign = torch.where(train.label >= 0.5, 1.0, -1.0).to(margins)
    strength, deviation, soft = label_strength(sign[:, None] * margins)
    weakest = torch.quantile(strength[decided], FLIPPED)
    is_flipped = decided & (strength <= weakest) & (strength < -deviation)
    is_sure = decided & (strength > deviation)
    is_soft = decided & ~is_flipped & ~is_sure
    label = torch.where(is_flipped, 1 - train.label, train.label)
    label = torch.where(is_soft, torch.where(sign > 0, soft, 1 - soft), label)
    changed = dataclasses.replace(train, label=label, margin=torch.where(is_sure, strength, 0.0))
    counts = {"flipped": is_flipped, "softened": is_soft, "with_margin": is_sure}
    return changed, {name: float(rows.sum()) for name, rows in counts.items()}


def check_labels(labels: Tensor, groups: Tensor) -> None:
    """Check that labels can be judged by an ensemble.

    Args:
        labels (`Tensor`): Of the training pairs, (n,).
        groups (`Tensor`): Group of the prompt of each of them, (n,).

    Raises:
        UserError: There are fewer groups than folds, or no decided pairs.
    """
    if not ((labels == 0) | (labels == 1)).any():
        raise UserError(
            "train.label_strength: no training pair is decided, all are ties or mixed votes; set "
            "it to false"
        )
    count = len(groups.unique())
    if count < FOLDS:
        raise UserError(
            f"train.label_strength: {count} training prompts with images of their own are too "
            f"few, it needs {FOLDS}; set it to false"
        )


def unseen_margins(train: Pairs, val: Pairs, groups: Tensor, config: RewardConfig) -> Tensor:
    """Margins of all pairs by ensembles that were fitted without their groups.

    Arguments as `strengthen`.

    Returns:
        `Tensor`: First image minus second, (n, members).
    """
    group = groups[train.prompt]
    plain = dataclasses.replace(config, label_strength=False, members=1)
    _, chosen = fit_head(train, val, plain, groups=groups)
    several = dataclasses.replace(plain, members=MEMBERS, l2=chosen["l2"])
    fold = folds_of(group, config.seed)
    margins = train.base.new_empty(len(train), MEMBERS)
    for number in range(FOLDS):
        head, _ = fit_head(train.rows(fold != number), val, several)
        held_out = fold == number
        with torch.no_grad():
            margins[held_out] = margins_of(head, train.rows(held_out))
    return margins
