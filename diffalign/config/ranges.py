"""Which values are allowed: ranges and choices, for sections and for options.

A field of a section carries one in its annotation, as `beta: Positive[float]`. An
option of a command takes one as its `type`.
"""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

from ..errors import ConfigError, UserError
from .yaml_text import shown

T = TypeVar("T")

LARGEST = 1e30
"""Largest size of a float: larger ones overflow in float32 wherever they are used."""

COUNT = 10**9
"""Largest count."""


def as_float(value: object) -> float | None:
    """A number, or the number that a text spells, as a float; None for anything else.

    Python's `1_000` is no number in a text.
    """
    if isinstance(value, str) and "_" in value:
        return None
    if not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


@dataclass(frozen=True, repr=False)
class Range:
    """Which numbers are allowed.

    Attributes:
        low, high: bounds.
        kind: `int` or `float`. A field of a section takes it from its annotation.
        above: `low` itself is not allowed.
        below: `high` itself is not allowed.
        capped: `high` is only where numbers stop to make sense. A message names it when
            it was passed.
        words: what a message says in place of the bounds, e.g. "a share from 0 to 1".
    """

    low: float
    high: float
    kind: type = float
    above: bool = False
    below: bool = False
    capped: bool = False
    words: str = ""

    def __repr__(self) -> str:
        return f"<{self.words or self.expected()}>"

    def expected(self, value: object = None) -> str:
        """The range in words, as a message about `value` needs them."""
        name = self.kind.__name__
        high = f"{self.high:.0f}" if self.kind is int else f"{self.high:g}"
        if self.capped:
            words = (
                f"finite {name}"
                if self.low == -self.high
                else f"{name} {'>' if self.above else '>='} {self.low:g}"
            )
            return f"{words} and <= {high}" if self._is_too_large(value) else words
        left, right = "(" if self.above else "[", ")" if self.below else "]"
        return f"{name} in {left}{self.low:g}, {high}{right}"

    def _is_too_large(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return abs(value) > self.high

    def holds(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        if self.kind is int and not isinstance(value, int):
            return False
        if isinstance(value, float) and not math.isfinite(value):
            return False
        low = value > self.low if self.above else value >= self.low
        return low and (value < self.high if self.below else value <= self.high)

    def check(self, field: str, value: object) -> None:
        """Raises `ConfigError` naming the field, the range and the value."""
        if not self.holds(value):
            raise ConfigError(field, f"expected {self.expected(value)}, got {shown(value)}")

    def __call__(self, text: str) -> int | float:
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

    def require(self, value: T) -> T:
        """The number in a field of a section, which has the right type already.

        Raises:
            UserError: it is out of range; the section puts the field's path in front.
        """
        high = COUNT if isinstance(value, int) and self.high == LARGEST else self.high
        limits = replace(self, kind=type(value), high=high)
        if limits.holds(value):
            return value
        if isinstance(value, float) and not math.isfinite(value):
            expected = "a finite number"
        elif self.capped and limits._is_too_large(value):
            expected = f"at most {high:g}"
        else:
            expected = self.words or limits.expected()
        raise UserError(f"expected {expected}, got {shown(value)}")

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self.require, handler(source))


@dataclass(frozen=True)
class OneOf:
    """Which values are allowed, where `Literal` cannot list them.

    Attributes:
        choices: the values.
        words: what a message says in place of the list.
    """

    choices: tuple[object, ...]
    words: str = ""

    def require(self, value: T) -> T:
        """The value.

        Raises:
            UserError: it is none of the choices.
        """
        if value in self.choices:
            return value
        raise UserError(not_a_choice(value, self.choices, self.words))

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self.require, handler(source))


def suggestion(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'beta'?)`` when a known name is close, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def not_a_choice(value: object, choices: Sequence[object], words: str = "") -> str:
    """The message about a value that is none of the choices, with a remedy."""
    names = [str(choice) for choice in choices]
    expected = words or f"one of {', '.join(names)}"
    if isinstance(value, str):
        remedy = suggestion(value, names)
    else:  # the name 2 is a number to YAML
        remedy = "; write it in quotes" if str(value) in names else ""
    return f"expected {expected}, got {shown(value)}{remedy}"


def count(least: int = 1, most: int = COUNT, words: str = "") -> Range:
    """Whole numbers from `least` on."""
    return Range(least, most, int, capped=True, words=words)


positive = Range(0.0, LARGEST, above=True, capped=True)
not_negative = Range(0.0, LARGEST, capped=True)
finite = Range(-LARGEST, LARGEST, capped=True)
share = Range(0.0, 1.0)
seed = Range(0, 2**63 - 1, int, capped=True)
steps = count(1, 1000)
side = count(8, 16_384)
port = Range(0, 65_535, int, capped=True)

Positive = Annotated[T, positive]
"""`Positive[float]`: above 0, at most 1e30."""
NotNegative = Annotated[T, not_negative]
"""`NotNegative[float]`: 0 or above, at most 1e30."""
Share = Annotated[float, share]
"""From 0 to 1, both included."""
Decay = Annotated[float, Range(0.0, 1.0, below=True)]
"""From 0 to 1, without 1."""
Count = Annotated[int, count()]
"""1 to 10^9."""
BatchSize = Annotated[int, count(1, 65_536)]
"""1 to 65,536: images or groups at once."""
Steps = Annotated[int, steps]
"""Steps of a sampler, 1 to 1000."""
Seed = Annotated[int, seed]
"""0 to 2^63 - 1."""


def read_scales(scales: Sequence[float], field: str = "guidance_scales") -> list[float]:
    """Check guidance scales.

    Args:
        scales (`Sequence[float]`): The scales.
        field (`str`, *optional*): Name of the option, for error messages.

    Returns:
        `list[float]`: The scales, smallest first.

    Raises:
        ConfigError: They are not at least two different numbers.
    """
    numbers = list(scales) if isinstance(scales, Sequence) and not isinstance(scales, str) else []
    if not all(finite.holds(scale) for scale in numbers) or len(set(numbers)) < 2:
        raise ConfigError(
            field, f"expected at least two different numbers, e.g. 1,3,5, got {shown(scales)}"
        )
    return sorted({float(scale) for scale in numbers})
