"""The scorers of examples/custom_scorers.py, as a reader would use them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign import UserError, load_scorer
from diffalign.rewards import check_scorer

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module", autouse=True)
def examples() -> None:
    sys.path.append(str(EXAMPLES))
    __import__("custom_scorers")


def picture(color: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (32, 32), color)


def test_the_file_runs() -> None:
    command = [sys.executable, EXAMPLES / "custom_scorers.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "colourfulness of a red and a gray image: tensor([" in done.stdout


def test_colourfulness() -> None:
    scorer = load_scorer("colourfulness")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    gray, red, mixed = scorer([picture((90, 90, 90)), picture((255, 0, 0)), noise]).tolist()
    assert gray == 0.0 < mixed
    # (255, 0, 0): rg = 255, yb = 127.5, no spread.
    assert red == pytest.approx(0.3 * np.hypot(255.0, 127.5))
    check_scorer(scorer)


def classifier(folder: Path) -> Path:
    """A tiny image classifier of transformers with random weights."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=32, patch_size=16, id2label={0: "normal", 1: "nsfw"},
        label2id={"normal": 0, "nsfw": 1},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_safe_for_work(tmp_path: Path) -> None:
    folder = classifier(tmp_path)
    scorer = load_scorer("safe_for_work", model=str(folder))
    images = [picture((255, 0, 0)), picture((0, 0, 255))]
    scores = scorer(images)
    other = load_scorer("safe_for_work", model=str(folder), unsafe="normal")(images)
    torch.testing.assert_close(scores + other, torch.ones(2))
    assert ((scores > 0) & (scores < 1)).all()
    check_scorer(scorer)
    with pytest.raises(UserError, match="unsafe: expected one of normal, nsfw, got 'bad'"):
        load_scorer("safe_for_work", model=str(folder), unsafe="bad")
    with pytest.raises(UserError, match="model: expected the folder or the Hub id"):
        load_scorer("safe_for_work")
