"""The examples in the docstrings of `diffalign.likelihood` run as they stand."""

from __future__ import annotations

import pytest
import torch
from docstrings import run_examples
from torch import Tensor

import diffalign.likelihood as likelihood

FUNCTIONS = [name for name in likelihood.__all__ if callable(getattr(likelihood, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_name_has_an_example_that_runs(name: str) -> None:
    names = {**vars(likelihood), "torch": torch, "Tensor": Tensor}
    run_examples(getattr(likelihood, name), names)
