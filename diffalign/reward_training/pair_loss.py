"""Losses of pairs as the settings say, and the scale of margins."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from ..rewards.learned.losses import (
    forward_corrected_loss,
    margin_loss,
    nuisance_correlations,
    preference_loss,
    smoothed_loss,
)
from .config import RewardConfig
from .pair_tensors import Labels, Pairs

_WIDEST = 5.0  # of the logarithm of a factor
_LABEL_FIELDS = tuple(field.name for field in fields(Labels))


def label_loss(
    margins: Tensor, labels: Tensor, config: RewardConfig, lead: Tensor | float = 0.0
) -> Tensor:
    """Loss of pairs as the settings say. Ties and mixed votes keep their share.

    Args:
        margins (`Tensor`): Score of the first image minus that of the second, (n,).
        labels (`Tensor`): (n,).
        config (`RewardConfig`): The settings.
        lead (`Tensor` or `float`): See `Labels.margin`, (n,) or one.

    Returns:
        `Tensor`: (n,).
    """
    sign = torch.where(labels >= 0.5, 1.0, -1.0).to(margins.dtype)
    won = sign * margins
    if config.flip_rate:
        decided = forward_corrected_loss(won, config.flip_rate)
    elif config.smoothing:
        decided = smoothed_loss(won, config.smoothing)
    else:
        decided = margin_loss(won, config.margin + lead)
    mixed = (labels > 0) & (labels < 1)
    return torch.where(mixed, preference_loss(margins, labels), decided)


def part_loss(margins: Tensor, pairs: Labels, config: RewardConfig) -> Tensor:
    """Weighted mean of `label_loss` over some pairs."""
    rows = pairs.weight * label_loss(margins, pairs.label, config, pairs.margin)
    return rows.sum() / pairs.weight.sum()


def nuisance_penalty(margins: Tensor, pairs: Pairs, config: RewardConfig) -> Tensor | float:
    """Return the weighted sum of the squared correlations with the nuisances.

    Args:
        margins (`Tensor`): (n,).
        pairs (`Pairs`): n pairs.
        config (`RewardConfig`): Its `nuisance` is the weight.
    """
    if not config.nuisance:
        return 0.0
    correlations = nuisance_correlations(margins, pairs.nuisances)
    return config.nuisance * correlations.square().sum()


def fit_scale(margins: Tensor, pairs: Labels, config: RewardConfig) -> float:
    """Find the factor of the margins that fits the labels best.

    A prior, worth one pair, keeps it near 1 where the pairs say little: few pairs that
    are all right would ask for any large factor.

    Args:
        margins (`Tensor`): (n,).
        pairs (`Labels`): Their labels.
        config (`RewardConfig`): Its share of wrong labels counts here, too.
    """
    log_factor = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_factor], max_iter=100, line_search_fn="strong_wolfe")
    margins = margins.detach()

    def closure() -> Tensor:
        optimizer.zero_grad()
        prior = log_factor.square() / (2 * len(pairs))
        loss = part_loss(log_factor.exp() * margins, pairs, config) + prior
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return float(log_factor.detach().clamp(-_WIDEST, _WIDEST).exp())


def fit_temperature(margins: Tensor, pairs: Labels, config: RewardConfig) -> float:
    """Find the factor that makes the margins of a trained reward logits.

    It is judged by the likelihood of decided pairs, whatever the reward was trained
    with: a margin or label smoothing changes how confident the best factor is.

    Args:
        margins (`Tensor`): (n,).
        pairs (`Labels`): Their labels.
        config (`RewardConfig`): Its share of wrong labels counts here, too.
    """
    decided = pairs.label != 0.5
    if not bool(decided.any()):
        return fit_scale(margins, pairs, config)
    rows = {name: getattr(pairs, name)[decided] for name in _LABEL_FIELDS}
    plain = RewardConfig(flip_rate=config.flip_rate)
    return fit_scale(margins[decided], Labels(**rows), plain)


def spread_of(margins: Tensor) -> float:
    """Deviation of the scores of one prompt, from the margins of its pairs."""
    return float((margins.square().mean() / 2).sqrt())


def margins_of_scores(scores: Tensor) -> Tensor:
    """Return the margins of pairs from the scores of both images, (n, 2)."""
    return scores[:, 0] - scores[:, 1]


def scale_of(scores: Tensor, temperature: float) -> list[float]:
    """Return mean and spread of a reward's scores of both images of pairs.

    Args:
        scores (`Tensor`): (n, 2), without the temperature.
        temperature (`float`): Multiplies them.
    """
    spread = temperature * spread_of(margins_of_scores(scores))
    return [temperature * float(scores.mean()), max(spread, 1e-6)]
