"""Win-rates with intervals. Images of one prompt are not independent: intervals, errors and tests are clustered by prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class WinRate:
    """How often the tuned image beats the base image of the same prompt and seed; a tie is half a win. Every prompt counts the same,
    however many of its images have scores.

    Attributes:
        rate, low, high: in [0, 1]; low and high bound the 95 % interval, see `rate_interval`.
        wins, ties, losses: shares; `rate` is wins + ties / 2.
    """

    rate: float
    low: float
    high: float
    wins: float
    ties: float
    losses: float


def expanded_level(level: float, prompts: int) -> float:
    """The level at which a percentile interval of the mean covers as a t interval does (Hesterberg 2015, "What Teachers Should Know about
    the Bootstrap", Am. Stat. 69(4)): the plain percentile interval of few prompts is too short.

    Args:
        level (`float`): wanted coverage.
        prompts (`int`): independent units, at least 2.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    n = prompts - 1
    # Student's quantile by Fisher's expansion around the normal one; within 1 % from four prompts on.
    t = (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )
    return 2 * NormalDist().cdf(t * math.sqrt(prompts / n)) - 1


def clustered_bootstrap(
    values: Array, *, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of the mean, drawing whole prompts with replacement: percentiles at the `expanded_level`.

    Args:
        values (`ndarray`): (prompts, images per prompt); NaN = missing, left out. A single prompt says nothing of others: NaN.
        samples (`int`): bootstrap draws.
        level (`float`): coverage.
        seed (`int`): of the draws.
    """
    per_prompt = nanmean(values)
    per_prompt = per_prompt[~np.isnan(per_prompt)]
    if len(per_prompt) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(per_prompt), size=(samples, len(per_prompt)))
    means = per_prompt[picks].mean(1)
    level = expanded_level(level, len(per_prompt))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


FEW_PROMPTS = 8
"""Below this many prompts an interval says little."""


def rate_interval(points: Array, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a rate whose independent units are prompts.

    The number of trials is the effective one, p (1 - p) / (s^2 / n) of the per-prompt rates (variance s^2, n prompts), at most the number
    of images; where all prompts agree it is the number of prompts. From 8 prompts on coverage is 94 to 97 % on average over rates from
    5 to 95 %, and 91 to 98 % at single rates: counts of few prompts have few values, and no interval covers evenly
    (`pytest -m nightly tests/evaluation/test_statistics.py`).

    Args:
        points (`ndarray`): (prompts, images per prompt) in [0, 1]; NaN = missing, left out.
        level (`float`): coverage.

    Returns:
        (low, high). A single prompt says nothing of others: NaN. Where every image is a tie: (0.5, 0.5).
    """
    per_prompt = nanmean(points)
    per_prompt = per_prompt[~np.isnan(per_prompt)]
    given = points[~np.isnan(points)]
    n = len(per_prompt)
    if n < 2:
        return math.nan, math.nan
    if (given == 0.5).all():
        return 0.5, 0.5
    p, variance = float(per_prompt.mean()), float(per_prompt.var(ddof=1))
    size = float(n) if variance < 1e-12 else min(p * (1 - p) * n / variance, float(len(given)))
    z = NormalDist().inv_cdf((1 + level) / 2)
    shrink = 1 + z**2 / size
    centre = 0.5 + (p - 0.5) / shrink
    half = z * math.sqrt(p * (1 - p) / size + (z / (2 * size)) ** 2) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)


def points(base: Array, tuned: Array, tolerance: float = 1e-9) -> Array:
    """1 where the tuned image scores higher, 0 where it scores lower, one half at a tie, NaN where a score is missing.

    Raises:
        ValueError: when the shapes differ or are not two-dimensional.
    """
    if base.shape != tuned.shape or base.ndim != 2:
        raise ValueError(
            f"scores: expected two equal (prompts, images) arrays, got {base.shape} and {tuned.shape}"
        )
    difference = tuned - base
    found = np.where(difference > tolerance, 1.0, np.where(difference < -tolerance, 0.0, 0.5))
    return np.where(np.isnan(base) | np.isnan(tuned), np.nan, found)


def rate_of(points: Array) -> WinRate:
    """The win-rate of points (prompts, images): 1 a win, 0 a loss, one half a tie, NaN missing; all numbers of one weighting."""
    points = points[~np.isnan(points).all(1)]
    if not len(points):
        return WinRate(*[math.nan] * 6)
    counts = (~np.isnan(points)).sum(1)
    wins, ties, losses = (
        float(((points == value).sum(1) / counts).mean()) for value in (1.0, 0.5, 0.0)
    )
    low, high = rate_interval(points)
    return WinRate(0.5 + (wins - losses) / 2, low, high, wins, ties, losses)


def win_rate(base: Array, tuned: Array, *, tolerance: float = 1e-9) -> WinRate:
    """Compares paired scores (prompts, images per prompt), higher is better; pairs with a missing score are left out.

    Args:
        tolerance (`float`): differences up to it are ties.

    Raises:
        ValueError: when the shapes differ or are not two-dimensional.
    """
    return rate_of(points(base, tuned, tolerance))


def sign_test(base: Array, tuned: Array, *, tolerance: float = 1e-9) -> float:
    """Two-sided p value of the exact sign test over prompts: does the tuned model win on more prompts than chance would have it?

    A prompt's sign is that of its wins less its losses; prompts without a difference are left out.
    """
    signs = np.sign(np.nansum(points(base, tuned, tolerance) - 0.5, axis=1))
    plus, minus = int((signs > 0).sum()), int((signs < 0).sum())
    n = plus + minus
    tail = (
        sum(math.comb(n, i) for i in range(min(plus, minus) + 1)) / 2**n
        if n < 1000
        else _normal_tail(min(plus, minus), n)
    )
    return min(1.0, 2 * tail)


def _normal_tail(count: int, n: int) -> float:
    return NormalDist(n / 2, math.sqrt(n) / 2).cdf(count + 0.5)


def clustered_standard_error(values: Array) -> float:
    """Standard error of the mean of (prompts, images per prompt), prompts being the independent units."""
    per_prompt = values.mean(1)
    return float(per_prompt.std(ddof=1) / np.sqrt(len(per_prompt)))


def nanmean(values: Array, axis: int = 1) -> Array:
    """The mean of what is there; NaN, without a warning, where nothing is."""
    missing = np.isnan(values)
    count = (~missing).sum(axis)
    total = np.where(missing, 0.0, values).sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
