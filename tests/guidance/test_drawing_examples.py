"""The examples in the docstrings of `diffalign.generation` run."""

from __future__ import annotations

from importlib import import_module

import pytest
from docstrings import run_module_examples


@pytest.mark.parametrize("name", ["guidance", "pipelines", "sampling"])
def test_examples_run(name: str) -> None:
    run_module_examples(import_module(f"diffalign.generation.{name}"))
