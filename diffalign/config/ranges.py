"""Ranges of numbers, for fields of a section and for options of a command. Every number is checked where it is read."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .yaml_text import shown

LARGEST = 1e30
"""Largest size of a float: larger ones overflow in float32 wherever they are used."""

COUNT = 10**9
"""Largest count."""


def as_float(value: Any) -> float | None:
    """A number, or the number that a text spells, as a float; None for anything else. Python's `1_000` is no number in a text."""
    if isinstance(value, str) and "_" in value:
        return None
    if not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


@dataclass(frozen=True)
class Range:
    """Which numbers are allowed.

    Attributes:
        low, high: bounds.
        kind: `int` or `float`.
        above: `low` itself is not allowed.
        below: `high` itself is not allowed.
        capped: `high` is only where numbers stop to make sense; a message names it when it was passed.
    """

    low: float
    high: float
    kind: type = float
    above: bool = False
    below: bool = False
    capped: bool = False

    def expected(self, value: Any = None) -> str:
        """The range in words, as a message about `value` needs them."""
        name = self.kind.__name__
        high = f"{self.high:.0f}" if self.kind is int else f"{self.high:g}"
        if self.capped:
            words = (
                f"finite {name}"
                if self.low == -self.high
                else f"{name} {'>' if self.above else '>='} {self.low:g}"
            )
            too_large = (
                isinstance(value, (int, float))
                and not isinstance(value, bool)
                and abs(value) > self.high
            )
            return f"{words} and <= {high}" if too_large else words
        return f"{name} in {'(' if self.above else '['}{self.low:g}, {high}{')' if self.below else ']'}"

    def holds(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        if self.kind is int and not isinstance(value, int):
            return False
        if isinstance(value, float) and not math.isfinite(value):
            return False
        low = value > self.low if self.above else value >= self.low
        return low and (value < self.high if self.below else value <= self.high)

    def check(self, field: str, value: Any) -> None:
        """Raises `ConfigError` naming the field, the range and the value."""
        if not self.holds(value):
            raise ConfigError(field, f"expected {self.expected(value)}, got {shown(value)}")

    def __call__(self, text: str) -> Any:
        """As the `type` of an argument."""
        try:
            value = int(text) if self.kind is int else float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected {self.expected()}, got {shown(text)}"
            ) from None
        if not self.holds(value):
            raise argparse.ArgumentTypeError(f"expected {self.expected(value)}, got {shown(value)}")
        return value


def count(least: int = 1, most: int = COUNT) -> Range:
    """Whole numbers from `least` on."""
    return Range(least, most, int, capped=True)


positive = Range(0.0, LARGEST, above=True, capped=True)
not_negative = Range(0.0, LARGEST, capped=True)
finite = Range(-LARGEST, LARGEST, capped=True)
share = Range(0.0, 1.0)
seed = Range(0, 2**63 - 1, int, capped=True)
steps = count(1, 1000)
side = count(8, 16_384)
port = Range(0, 65_535, int, capped=True)
