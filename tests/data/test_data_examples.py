"""The examples in the docstrings of `diffalign.data` and `diffalign.annotation` run."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
from docstrings import run_module_examples

MODULES = (
    "annotation.perturbers",
    "annotation.recaption",
    "data.config",
    "data.dataset",
    "data.groups",
    "data.inspect",
    "data.load",
    "data.load_report",
    "data.prompt_sets",
    "data.schema",
    "data.transforms",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_module_examples(import_module(f"diffalign.{name}"))
