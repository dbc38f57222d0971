"""Format the numbers and sentences of tables and reports."""

from __future__ import annotations

import math

from .statistics import FEW_PROMPTS, WinRate

SOME_PROMPTS = 20


def percent(value: float) -> str:
    """Format a share as a percentage, ``63.2``, or as a dash if it is NaN."""
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def rate(win_rate: WinRate) -> str:
    """Format a win-rate with its interval, ``63.2 (58.1 to 68.0)``.

    The interval is left out where it is NaN, as with a single prompt.
    """
    if math.isnan(win_rate.low):
        return percent(win_rate.rate)
    return f"{percent(win_rate.rate)} ({percent(win_rate.low)} to {percent(win_rate.high)})"


def number(value: float, low: float = math.nan, high: float = math.nan) -> str:
    """Format a number with four digits, and its interval unless that is NaN."""
    if math.isnan(value):
        return "-"
    return f"{value:.4g}" + ("" if math.isnan(low) else f" ({low:.4g} to {high:.4g})")


def few_prompts(count: int) -> list[str]:
    """Warn if there are too few prompts for reliable intervals.

    Returns:
        One sentence, or none where there are enough prompts.
    """
    if count < FEW_PROMPTS:
        return [
            f"Only {count} prompts: with fewer than {FEW_PROMPTS}, intervals are unreliable, "
            "even if all prompts agree."
        ]
    if count < SOME_PROMPTS:
        return [f"{count} prompts are few: intervals are rough, and only large differences show."]
    return []
