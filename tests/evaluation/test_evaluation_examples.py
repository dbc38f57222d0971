"""The examples in the docstrings of `diffalign.evaluation` run as they stand."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

MODULES = ("compare", "comparison", "diversity", "statistics")


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(import_module(f"diffalign.evaluation.{name}"), verbose=False)
    assert result.attempted > 0 and result.failed == 0
