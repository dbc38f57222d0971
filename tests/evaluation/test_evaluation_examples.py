"""The examples in the docstrings of `diffalign.evaluation` run as they stand."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
from docstrings import run_module_examples

MODULES = ("compare", "comparison", "diversity", "statistics")


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_module_examples(import_module(f"diffalign.evaluation.{name}"))
