"""Win-rates with intervals. Images of one prompt are not independent: intervals and errors are clustered by prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class WinRate:
    """How often the tuned image beats the base image of the same prompt and seed; a tie is half a win.

    Attributes:
        rate, low, high: in [0, 1]; low and high bound the 95 % bootstrap interval.
        wins, ties, losses: shares of the images.
    """

    rate: float
    low: float
    high: float
    wins: float
    ties: float
    losses: float


def clustered_bootstrap(values: Array, *, samples: int = 10_000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean, drawing whole prompts with replacement.

    Args:
        values (`ndarray`): (prompts, images per prompt).
        samples (`int`): bootstrap draws.
        level (`float`): coverage.
        seed (`int`): of the draws.
    """
    per_prompt = values.mean(1)
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(per_prompt), size=(samples, len(per_prompt)))
    means = per_prompt[picks].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def win_rate(base: Array, tuned: Array, *, tolerance: float = 1e-9, seed: int = 0) -> WinRate:
    """Compares paired scores (prompts, images per prompt), higher is better.

    Raises:
        ValueError: when the shapes differ or are not two-dimensional.
    """
    if base.shape != tuned.shape or base.ndim != 2:
        raise ValueError(f"scores: expected two equal (prompts, images) arrays, got {base.shape} and {tuned.shape}")
    difference = tuned - base
    wins, losses = difference > tolerance, difference < -tolerance
    points = wins + 0.5 * (~wins & ~losses)
    low, high = clustered_bootstrap(points.astype(np.float64), seed=seed)
    return WinRate(
        rate=float(points.mean()),
        low=low,
        high=high,
        wins=float(wins.mean()),
        ties=float((~wins & ~losses).mean()),
        losses=float(losses.mean()),
    )


def clustered_standard_error(values: Array) -> float:
    """Standard error of the mean of (prompts, images per prompt), prompts being the independent units."""
    per_prompt = values.mean(1)
    return float(per_prompt.std(ddof=1) / np.sqrt(len(per_prompt)))
