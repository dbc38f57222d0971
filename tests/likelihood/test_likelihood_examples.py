"""The examples in the docstrings of `diffalign.likelihood` run as they stand."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor

import diffalign.likelihood as likelihood

FUNCTIONS = [name for name in likelihood.__all__ if callable(getattr(likelihood, name))]


def examples(thing: Any) -> list[str]:
    """The Python blocks of a docstring."""
    text = inspect.getdoc(thing) or ""
    blocks = re.findall(r"^ *```python\n(.*?)^ *```$", text, flags=re.M | re.S)
    return [textwrap.dedent(block) for block in blocks]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_name_has_an_example_that_runs(name: str) -> None:
    names = {**vars(likelihood), "torch": torch, "Tensor": Tensor}
    blocks = examples(getattr(likelihood, name))
    assert blocks, f"{name} has no example"
    for block in blocks:
        exec(block, dict(names))
