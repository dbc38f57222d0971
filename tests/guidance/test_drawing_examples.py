"""The examples in the docstrings of `diffalign.generation` run."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize("name", ["guidance", "pipelines", "sampling"])
def test_examples_run(name: str) -> None:
    result = doctest.testmod(import_module(f"diffalign.generation.{name}"), verbose=False)
    assert result.attempted > 0 and result.failed == 0
