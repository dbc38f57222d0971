"""The examples in the docstrings of `diffalign.rewards` run as they stand."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from docstrings import run_examples
from PIL import Image

from diffalign import rewards
from diffalign.rewards import registry
from diffalign.rewards.images import Preprocess


@pytest.mark.parametrize("name", rewards.__all__)
def test_the_example_of_a_public_name_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_registered", {})
    names = {each: getattr(rewards, each) for each in rewards.__all__}
    names |= {"torch": torch, "numpy": numpy, "Image": Image, "Preprocess": Preprocess}
    run_examples(getattr(rewards, name), names)
