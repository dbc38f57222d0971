"""Numbers and sentences of tables and reports."""

from __future__ import annotations

import math

from .statistics import FEW_PROMPTS, WinRate

SOME_PROMPTS = 20


def percent(value: float) -> str:
    """``63.2``; a dash for what is not a number."""
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def rate(found: WinRate) -> str:
    """``63.2 (58.1 to 68.0)``; without the interval where one prompt is all there is."""
    return percent(found.rate) + (
        "" if math.isnan(found.low) else f" ({percent(found.low)} to {percent(found.high)})"
    )


def number(value: float, low: float = math.nan, high: float = math.nan) -> str:
    """Four digits, with the interval where there is one."""
    if math.isnan(value):
        return "-"
    return f"{value:.4g}" + ("" if math.isnan(low) else f" ({low:.4g} to {high:.4g})")


def few_prompts(count: int) -> list[str]:
    """A warning where there are too few prompts for an interval to mean much."""
    if count < FEW_PROMPTS:
        return [
            f"Only {count} prompts: below {FEW_PROMPTS} an interval says little, and prompts that agree prove little."
        ]
    return (
        [f"{count} prompts are few: intervals are rough, and only large differences show."]
        if count < SOME_PROMPTS
        else []
    )
