"""Compute win-rates and their intervals.

Images of one prompt are not independent. So intervals, standard errors and tests are
clustered by prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class WinRate:
    """How often the tuned image beats the base image of the same prompt and seed.

    A tie counts as half a win. Every prompt has the same weight, however many of its
    images have scores.

    Attributes:
        rate (`float`): Share of wins plus half the share of ties, from 0 to 1.
        low (`float`): Lower end of the 95 % interval, see `rate_interval`.
        high (`float`): Upper end of it.
        wins (`float`): Share of wins.
        ties (`float`): Share of ties.
        losses (`float`): Share of losses.

    Example:
        >>> import numpy as np
        >>> from diffalign.evaluation import win_rate
        >>> result = win_rate(np.zeros((2, 2)), np.array([[1.0, 1.0], [0.0, -1.0]]))
        >>> result.wins, result.ties, result.losses
        (0.5, 0.25, 0.25)
        >>> result.rate
        0.625
    """

    rate: float
    low: float
    high: float
    wins: float
    ties: float
    losses: float

    @property
    def verdict(self) -> int:
        """1 for a significant win, -1 for a significant loss, 0 for neither."""
        return int(self.low > 0.5) - int(self.high < 0.5)


def expanded_level(level: float, prompts: int) -> float:
    """Widen the level of a percentile interval for few prompts.

    The percentile interval of few prompts is too short. At the level returned here it
    covers as often as a t interval does (Hesterberg 2015, "What Teachers Should Know
    about the Bootstrap", Am. Stat. 69(4)).

    Args:
        level (`float`): Coverage to reach.
        prompts (`int`): Number of independent units, at least 2.

    Returns:
        The level at which to take the percentiles.
    """
    t = student_quantile((1 + level) / 2, prompts - 1)
    return 2 * NormalDist().cdf(t * math.sqrt(prompts / (prompts - 1))) - 1


def student_quantile(probability: float, degrees: int) -> float:
    """Compute a quantile of Student's t distribution.

    Args:
        probability (`float`): Between 0 and 1.
        degrees (`int`): Degrees of freedom, at least 1.

    Returns:
        The quantile.
    """
    if probability < 0.5:
        return -student_quantile(1 - probability, degrees)
    # Bisection of the angle atan(t / sqrt(n)), which lies in [0, pi / 2].
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        if _student_probability(angle, degrees) < probability:
            low = angle
        else:
            high = angle
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _student_probability(angle: float, degrees: int) -> float:
    """Compute P(T <= sqrt(n) tan(angle)), for an angle of at least 0.

    The finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0 if degrees == 1 else term
    for k in range(2 + odd, degrees, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + inside / 2


def clustered_bootstrap(
    values: Array, *, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Compute the bootstrap interval of the mean by drawing whole prompts.

    Prompts are drawn with replacement. The interval is made of the percentiles at the
    `expanded_level`.

    Args:
        values (`ndarray`): (prompts, images per prompt). NaN means missing and is left
            out.
        samples (`int`, defaults to 10000): Number of bootstrap draws.
        level (`float`, defaults to 0.95): Coverage.
        seed (`int`, defaults to 0): Seed of the draws.

    Returns:
        (low, high). Both are NaN with fewer than two prompts.

    Example:
        >>> import numpy as np
        >>> from diffalign.evaluation import clustered_bootstrap
        >>> scores = np.random.default_rng(0).normal(1.0, 0.1, (40, 4))
        >>> low, high = clustered_bootstrap(scores)
        >>> low < float(scores.mean()) < high
        True
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
"""With fewer prompts than this an interval says little."""


def rate_interval(points: Array, *, level: float = 0.95) -> tuple[float, float]:
    """Compute Wilson's interval of a rate whose independent units are prompts.

    The number of trials is the effective one, p (1 - p) / (s^2 / n), where p is the
    mean, s^2 the variance and n the number of the per-prompt rates. It is at most the
    number of images. Where all prompts agree it is the number of prompts.

    From 8 prompts on, coverage is 94 to 97 % on average over rates from 5 to 95 %. At
    single rates it is 91 to 98 %, because counts of few prompts take few values. The
    nightly tests in ``tests/evaluation/test_statistics.py`` measure this.

    Args:
        points (`ndarray`): (prompts, images per prompt) from 0 to 1. NaN means missing
            and is left out.
        level (`float`, defaults to 0.95): Coverage.

    Returns:
        (low, high). Both are NaN with fewer than two prompts. They are 0.5 where every
        image is a tie.
    """
    per_prompt = nanmean(points)
    per_prompt = per_prompt[~np.isnan(per_prompt)]
    present = points[~np.isnan(points)]
    n = len(per_prompt)
    if n < 2:
        return math.nan, math.nan
    if (present == 0.5).all():
        return 0.5, 0.5
    p, variance = float(per_prompt.mean()), float(per_prompt.var(ddof=1))
    size = float(n) if variance < 1e-12 else min(p * (1 - p) * n / variance, float(len(present)))
    z = NormalDist().inv_cdf((1 + level) / 2)
    shrink = 1 + z**2 / size
    centre = 0.5 + (p - 0.5) / shrink
    half = z * math.sqrt(p * (1 - p) / size + (z / (2 * size)) ** 2) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)


def points(base: Array, tuned: Array, tolerance: float = 1e-9) -> Array:
    """Turn paired scores into points: 1 for a win, 0 for a loss, one half for a tie.

    Args:
        base (`ndarray`): (prompts, images per prompt), scores of the base.
        tuned (`ndarray`): Scores of the tuned model, of the same shape.
        tolerance (`float`, defaults to 1e-9): Differences up to it are ties.

    Returns:
        Points of the same shape, NaN where a score is missing.

    Raises:
        ValueError: The shapes differ or are not two-dimensional.
    """
    if base.shape != tuned.shape or base.ndim != 2:
        raise ValueError(
            "scores: expected two equal (prompts, images) arrays, "
            f"got {base.shape} and {tuned.shape}"
        )
    difference = tuned - base
    result = np.where(difference > tolerance, 1.0, np.where(difference < -tolerance, 0.0, 0.5))
    return np.where(np.isnan(base) | np.isnan(tuned), np.nan, result)


def rate_of(points: Array) -> WinRate:
    """Compute the win-rate of points.

    Args:
        points (`ndarray`): (prompts, images per prompt), 1 for a win, 0 for a loss, one
            half for a tie, NaN for missing; see `points`.

    Returns:
        The win-rate, with all shares weighted by prompt. Everything is NaN without a
        single point.
    """
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
    """Compute how often tuned images beat base images of the same prompt and seed.

    Args:
        base (`ndarray`): (prompts, images per prompt), scores of the base, higher is
            better. A pair with a NaN is left out.
        tuned (`ndarray`): Scores of the tuned model, of the same shape.
        tolerance (`float`, defaults to 1e-9): Differences up to it are ties.

    Returns:
        The win-rate with its 95 % interval.

    Raises:
        ValueError: The shapes differ or are not two-dimensional.

    Example:
        >>> import numpy as np
        >>> from diffalign.evaluation import win_rate
        >>> scores = np.random.default_rng(0).random((20, 4))
        >>> win_rate(scores, scores + 1).rate
        1.0
        >>> win_rate(scores, scores).rate
        0.5
    """
    return rate_of(points(base, tuned, tolerance))


def sign_test(base: Array, tuned: Array, *, tolerance: float = 1e-9) -> float:
    """Compute the two-sided p value of the exact sign test over prompts.

    It asks whether the tuned model wins on more prompts than by chance. The sign of a
    prompt is that of its wins minus its losses. Prompts without a difference are left
    out.

    Args:
        base (`ndarray`): (prompts, images per prompt), scores of the base, higher is
            better.
        tuned (`ndarray`): Scores of the tuned model, of the same shape.
        tolerance (`float`, defaults to 1e-9): Differences up to it are ties.

    Returns:
        The p value, 1 where no prompt differs.

    Raises:
        ValueError: The shapes differ or are not two-dimensional.

    Example:
        >>> import numpy as np
        >>> from diffalign.evaluation import sign_test
        >>> base = np.zeros((5, 1))
        >>> sign_test(base, base + 1)
        0.0625
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
    """Compute the standard error of a mean, with prompts as the independent units.

    Args:
        values (`ndarray`): (prompts, images per prompt), at least two prompts and no
            NaN.

    Returns:
        The standard error.

    Example:
        >>> import numpy as np
        >>> from diffalign.evaluation import clustered_standard_error
        >>> clustered_standard_error(np.array([[1.0, 1.0], [3.0, 3.0]]))
        1.0
    """
    per_prompt = values.mean(1)
    return float(per_prompt.std(ddof=1) / np.sqrt(len(per_prompt)))


def nanmean(values: Array, axis: int = 1) -> Array:
    """Average the values that are not NaN.

    Args:
        values (`ndarray`): Values of any shape.
        axis (`int`, defaults to 1): Axis to average over.

    Returns:
        The mean, NaN (without a warning) where all values are NaN.
    """
    missing = np.isnan(values)
    count = (~missing).sum(axis)
    total = np.where(missing, 0.0, values).sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
