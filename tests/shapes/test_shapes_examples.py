"""The examples in the docstrings of `diffalign.shapes` run as they stand."""

from __future__ import annotations

import pytest
from docstrings import run_examples

from diffalign import shapes


@pytest.mark.parametrize("name", ["Scene", "parse_prompt", "render", "verify"])
def test_the_example_runs(name: str) -> None:
    run_examples(getattr(shapes, name), vars(shapes))
