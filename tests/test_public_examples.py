"""Every public name has an example that runs as it stands, in an empty folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from docstrings import has_example, run_examples

import diffalign
from diffalign.rewards import registry

# They train, in tests/methods/test_method_examples.py.
TRAINERS = [name for name in diffalign.__all__ if name.endswith("Trainer")]


def documented(name: str) -> Any:
    """What holds the documentation of a public name."""
    return diffalign if name == "__version__" else getattr(diffalign, name)


def test_every_public_name_has_an_example() -> None:
    assert [name for name in diffalign.__all__ if not has_example(documented(name))] == []


@pytest.mark.parametrize("name", sorted({*diffalign.__all__} - {*TRAINERS}))
def test_the_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_registered", {})
    run_examples(documented(name))
