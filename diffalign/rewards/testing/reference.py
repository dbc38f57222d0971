"""Load every neural scorer on its tiny random checkpoint. Images are drawn in code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import reference_models as models

if TYPE_CHECKING:
    from PIL import Image

SCENES = [
    "a small red circle on the left of a gray background",
    "a large yellow star on the right of a black background",
    "a small blue square in the center of a white background",
    "a large purple cross in the center of a pink background",
]


def _imagereward(folder: Path) -> dict[str, Any]:
    return {
        "model": models.write_imagereward(folder),
        "config": models.imagereward_config(),
        "tokenizer": folder / "tokenizer",
    }


def _open_clip(folder: Path) -> dict[str, Any]:
    return {"model": models.write_hpsv2(folder), "config": folder / "model_config.json"}


def _aesthetic(version: int) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        clip = models.write_clip(folder / "clip")
        return {"model": models.write_aesthetic(folder, version, 16), "config": {"clip": clip}}

    return write


def _mps(folder: Path) -> dict[str, Any]:
    return {
        "model": models.write_mps(folder),
        "config": models.mps_config(),
        "tokenizer": folder / "tokenizer",
    }


MODELS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "imagereward": _imagereward,
    "pickscore": lambda folder: {"model": models.write_pickscore(folder)},
    "hpsv2.0": _open_clip,
    "hpsv2.1": _open_clip,
    "clip-l14": lambda folder: {"model": models.write_clip(folder)},
    "clip-h14": _open_clip,
    "open_clip": _open_clip,
    "aesthetic-v1": _aesthetic(1),
    "aesthetic-v2": _aesthetic(2),
    "mps": _mps,
    "shapes-clip": lambda folder: {},
}
"""Scorer -> a function that writes its tiny checkpoint into a folder.

It returns the arguments of `load_scorer`. shapes-clip carries its own weights.
"""


def arguments(name: str, folder: Path) -> dict[str, Any]:
    """Write the tiny checkpoint of `name`, return the arguments of `load_scorer`."""
    return MODELS[name](folder / name)


def drawn_images(prompts: Sequence[str]) -> list[Image.Image]:
    """Draw prompts of the shapes world, without variation."""
    from ...shapes import parse_prompt, render

    return [render(parse_prompt(prompt)) for prompt in prompts]


def sample_images() -> list[Image.Image]:
    """Return nine odd images of several sizes, as the published code sees them.

    They are in RGB, their transparency dropped.
    """
    return [image.convert("RGB") for image in models.sample_images().values()]


PROMPTS = models.PROMPTS
