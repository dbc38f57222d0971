"""How far a reward's probabilities can be believed: accuracy and calibration."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from .losses import preference_loss

SMALLEST_TEMPERATURE = 1e-3


def accuracy_with_ties(scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """PickScore's accuracy, in which a small difference predicts a tie.

    Args:
        scores (`Tensor`): (n, 2).
        labels (`Tensor`): 1, 1/2 or 0 for the first image, (n,).
        threshold (`float`): Largest difference of the two probabilities that is a tie.

    Returns:
        `Tensor`: 1 for a right prediction, 1/2 if label or prediction alone is a tie,
        0 otherwise, (n,).
    """
    p = torch.sigmoid(scores[:, 0] - scores[:, 1])
    predicted = torch.where((2 * p - 1).abs() <= threshold, 0.5, (p > 0.5).to(p.dtype))
    return 1 - (predicted - labels).abs()


def disagreement(margins: Tensor) -> Tensor:
    """How much an ensemble's members disagree about pairs, in nats.

    The entropy of their mean probability less the mean of their entropies (BALD,
    Houlsby et al. 2011, arXiv 1112.5745). It is 0 where all members give the same
    probability, also if that is 1/2.

    Args:
        margins (`Tensor`): Of every member, (n, members).

    Returns:
        `Tensor`: (n,).
    """
    return _entropy(torch.sigmoid(margins).mean(1)) - _entropy(torch.sigmoid(margins)).mean(1)


def _entropy(shares: Tensor) -> Tensor:
    return -(torch.special.xlogy(shares, shares) + torch.special.xlogy(1 - shares, 1 - shares))


def prompt_mean(values: Sequence[float], prompts: Sequence[str]) -> float:
    """Average values within each prompt, then over the prompts.

    Args:
        values (`Sequence[float]`): n values.
        prompts (`Sequence[str]`): n prompts.
    """
    by_prompt: dict[str, list[float]] = {}
    for value, prompt in zip(values, prompts, strict=True):
        by_prompt.setdefault(prompt, []).append(float(value))
    return sum(sum(v) / len(v) for v in by_prompt.values()) / max(1, len(by_prompt))


def wilson_interval(hits: float, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's 95 % interval of a share.

    Args:
        hits (`float`): Right answers.
        count (`int`): Answers.
        z (`float`, *optional*, defaults to `1.96`): Quantile of the normal
            distribution.
    """
    share, square = hits / count, z * z
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = z * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    half /= 1 + square / count
    return middle - half, middle + half


def calibration_bins(
    confidence: Tensor, hits: Tensor, bins: int = 5
) -> list[tuple[float, float, int]]:
    """Sort answers into equally wide bins of confidence from 1/2 to 1.

    Args:
        confidence (`Tensor`): Probability of the predicted answer, (n,).
        hits (`Tensor`): 1 for a right answer, (n,).
        bins (`int`, *optional*, defaults to `5`): Number of bins.

    Returns:
        `list`: Mean confidence, share of right answers and number of each bin that is
        not empty.
    """
    edges = torch.linspace(0.5, 1.0, bins + 1, dtype=confidence.dtype)
    place = torch.bucketize(confidence, edges[1:-1])  # right-closed
    rows = []
    for number in range(bins):
        inside = place == number
        count = int(inside.sum())
        if count:
            rows.append((float(confidence[inside].mean()), float(hits[inside].mean()), count))
    return rows


def expected_calibration_error(confidence: Tensor, hits: Tensor, bins: int = 5) -> float:
    """Mean distance of confidence and share of right answers, weighted by bin.

    Arguments as for `calibration_bins`.
    """
    rows = calibration_bins(confidence, hits, bins)
    total = sum(count for _, _, count in rows)
    return sum(count * abs(mean - share) for mean, share, count in rows) / max(1, total)


def fit_temperature(margins: Tensor, labels: Tensor) -> float:
    """Find the factor of the margins with the best likelihood, by Newton's method.

    Args:
        margins (`Tensor`): (n,).
        labels (`Tensor`): 1, 1/2 or 0 for the first item, (n,).

    Returns:
        `float`: At least 1e-3, with a warning where the margins say nothing.
    """
    z, y = margins.double(), labels.double()
    factor = torch.ones((), dtype=torch.float64)
    for _ in range(100):
        p = torch.sigmoid(factor * z)
        slope = ((p - y) * z).mean()
        curvature = (p * (1 - p) * z * z).mean().clamp(min=1e-12)
        step = (slope / curvature).clamp(-1.0, 1.0)
        factor = factor - step
        if abs(float(step)) < 1e-12:
            break
    if float(factor) < SMALLEST_TEMPERATURE or not math.isfinite(float(factor)):
        warnings.warn(
            "the reward's margins say nothing about the labels, so its temperature is not fitted",
            stacklevel=2,
        )
        return SMALLEST_TEMPERATURE
    return float(factor)


def likelihood(margins: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood of labels.

    Args:
        margins (`Tensor`): (n,).
        labels (`Tensor`): (n,).
    """
    return float(preference_loss(margins, labels).mean())
