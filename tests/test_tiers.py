"""The tiers: the table of unit tests is up to date, and `by_default` leaves the right
cases for the night."""

from __future__ import annotations

import re
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import tiers


@pytest.mark.parametrize("file", tiers.UNIT)
def test_the_table_names_tests_that_exist(file: str) -> None:
    names = set(re.findall(r"^ *def (test_\w+)", (tiers.TESTS / file).read_text(), re.M))
    assert names
    assert set(tiers.UNIT[file]) <= names


def cases(*lists: tuple[str, list[tuple[str, ...]]]) -> list[Any]:
    """The cases of a test with one `parametrize` per argument: names and values."""
    marks = [pytest.mark.parametrize(names, values).mark for names, values in lists]
    made = []
    for values in product(*(values for _, values in lists)):
        params: dict[str, str] = {}
        for (names, _), value in zip(lists, values, strict=True):
            params |= dict(zip(names.split(","), value, strict=True))
        made.append(
            SimpleNamespace(
                callspec=SimpleNamespace(params=params), iter_markers=lambda name: marks
            )
        )
    return made


def by_default(items: list[Any], keep: Any = None, values: int | None = None) -> list[str]:
    """What runs by default: the values of each case in one word."""
    night = tiers.left_for_the_night(items, keep, values)
    return ["".join(item.callspec.params.values()) for item in items if item not in night]


METHODS = ("method", [("a",), ("b",), ("c",)])
FAMILIES = ("family,size", [("x", "1"), ("y", "2")])


def test_each_value_is_met_once() -> None:
    assert by_default(cases(METHODS, FAMILIES)) == ["ax1", "ay2", "bx1", "cx1"]
    assert by_default(cases(METHODS)) == ["a", "b", "c"]


def test_only_the_first_values_are_met() -> None:
    assert by_default(cases(METHODS), values=2) == ["a", "b"]
    assert by_default(cases(METHODS, FAMILIES), values=1) == ["ax1"]


def test_a_rule_of_ones_own() -> None:
    assert by_default(cases(METHODS, FAMILIES), lambda size: size == "2") == ["ay2", "by2", "cy2"]


def test_parts_hold_every_test_once() -> None:
    items: list[Any] = [SimpleNamespace(nodeid=f"tests/test_x.py::test_{i}") for i in range(100)]
    parts = [tiers.split_off(items, f"{k}/3") for k in (1, 2, 3)]
    assert sorted(i.nodeid for kept, _ in parts for i in kept) == sorted(i.nodeid for i in items)
    assert all(len(kept) + len(left) == 100 and len(kept) > 20 for kept, left in parts)


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "x/3", "1/", "-1/3"])
def test_parts_that_do_not_exist(part: str) -> None:
    with pytest.raises(pytest.UsageError, match="--part: expected K/N"):
        tiers.split_off([], part)
