"""Sections: what `@config_section` reads and refuses, in Python and in run files."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from diffalign.config.ranges import Count, OneOf, Positive, Range, count
from diffalign.config.section import build_section, config_section, field_docs, split_source
from diffalign.errors import ConfigError
from diffalign.training.config import TrainingConfig


@config_section
class Inner:
    """A section inside a section."""

    k: Annotated[int, count(2, 65_536)] = 8
    """Images. Source: paper."""
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.k > 100 and not self.names:
            raise ConfigError("names", "give names for more than 100 images")


@config_section
class Outer:
    """A section with one field of each kind."""

    beta: Positive[float] = 5000
    """Strength. Source: launchers."""
    steps: Count | None = None
    kind: Literal["sigmoid", "hinge"] = "sigmoid"
    anchor: Annotated[float, OneOf((0.0, 1.0))] = 1.0
    alpha: Annotated[int | float, Range(0.0, 9.0, words="a number above 0")] | None = None
    targets: list[str] | str | None = None
    ranks: dict[str, Annotated[int, count(1, 100)]] = field(default_factory=dict)
    inner: Inner | None = None
    flag: bool = False
    folder: str = "out"


@config_section
class Changed(Outer):
    """Another default, from another source."""

    beta: Positive[float] = 2000.0
    """Source: scripts."""


@dataclass
class Plain(TrainingConfig):
    """A method's options as a user may write them."""

    gamma: float = 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta": "five"}, "beta: expected float, got 'five'"),
        ({"beta": "-1"}, "beta: expected float > 0, got -1.0"),
        ({"beta": float("nan")}, "beta: expected a finite number, got nan"),
        ({"beta": True}, "beta: expected float, got True"),
        ({"steps": 1.5}, "steps: expected int or null, got 1.5"),
        ({"steps": 10**10}, "steps: expected at most 1e+09, got 10000000000"),
        (
            {"kind": "hing"},
            "kind: expected one of sigmoid, hinge, got 'hing' (did you mean 'hinge'?)",
        ),
        ({"anchor": 0.5}, "anchor: expected one of 0.0, 1.0, got 0.5"),
        ({"alpha": -1}, "alpha: expected a number above 0, got -1"),
        ({"alpha": "x"}, "alpha: expected int or float or null, got 'x'"),
        ({"targets": ["a", 1]}, "targets: expected list[str] or str or null, got ['a', 1]"),
        ({"ranks": {"to_q": 0}}, "ranks.to_q: expected int >= 1, got 0"),
        ({"ranks": {1: 1}}, "ranks: expected str, got 1; write it in quotes"),
        ({"inner": []}, "inner: expected a section with keys, got []"),
        ({"inner": {"k": 1}}, "inner.k: expected int >= 2, got 1"),
        ({"inner": {"kk": 1}}, "inner.kk: unknown key (did you mean 'k'?); inner takes k, names"),
        ({"inner": {"names": ["a", 3]}}, "inner.names[1]: expected str, got 3; write it in quotes"),
        ({"inner": {"k": 101}}, "inner.names: give names for more than 100 images"),
        ({"flag": 1}, "flag: expected bool, got 1"),
        ({"folder": 2026}, "folder: expected str, got 2026; write it in quotes"),
        ({"bta": 1}, "bta: unknown key (did you mean 'beta'?); "),
        ({"bta": 1, "flag": 1}, "bta: unknown key"),  # it may be the reason of the rest
    ],
)
def test_wrong_values_are_one_sentence(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as in_python:
        Outer(**values)
    with pytest.raises(ConfigError) as in_a_file:
        build_section(Outer, values, "train")
    assert str(in_python.value).startswith(message)
    assert str(in_a_file.value).startswith(f"train.{message.split('; Outer')[0]}")
    assert in_python.value.field == message.split(":")[0]


def test_lossless_readings() -> None:
    found = Outer(beta="1e-5", steps=10.0, flag="Yes", targets=("a",), folder=Path("x"), alpha=2.0)  # type: ignore[arg-type]
    assert (found.beta, found.steps, found.flag) == (1e-5, 10, True)
    assert (found.targets, found.folder, found.alpha) == (["a"], "x", 2)
    assert isinstance(found.steps, int) and isinstance(Outer().beta, float)


def test_sections_are_dataclasses() -> None:
    section = Changed(inner=Inner(k=3))
    assert (section.beta, section.inner) == (2000.0, Inner(k=3))
    for other in (copy.deepcopy(section), pickle.loads(pickle.dumps(section))):
        assert other == section
    assert Changed(**{**dataclasses.asdict(section)}) == section
    assert dataclasses.replace(section, beta=4).beta == 4.0
    section.beta = -1.0  # only building checks
    with pytest.raises(ConfigError, match="beta: expected float > 0"):
        dataclasses.replace(section, steps=3)
    with pytest.raises(TypeError, match="positional"):
        Inner(2, [], 3)  # type: ignore[call-arg]


def test_a_plain_dataclass_of_a_user_is_checked_too() -> None:
    assert Plain(gamma="1e-3", max_steps=10.0).gamma == 1e-3  # type: ignore[arg-type]
    for values in ({"gamma": "x"}, {"learning_rate": -1}, {"optim": "sgd"}):
        with pytest.raises(ConfigError, match=f"^{next(iter(values))}: expected"):
            Plain(**values)  # type: ignore[arg-type]


def test_sources_stand_in_docstrings() -> None:
    assert split_source(field_docs(Outer)["beta"]) == ("Strength.", "launchers")
    assert split_source(field_docs(Changed)["beta"]) == ("Strength.", "scripts")
