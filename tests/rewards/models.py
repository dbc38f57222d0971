"""Loads every neural scorer on its tiny checkpoint, as a user would load the published one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints

from diffalign import load_scorer
from diffalign.rewards.base import ModelScorer


def _imagereward(folder: Path) -> dict[str, Any]:
    config = checkpoints.imagereward_config()
    model = checkpoints.write_imagereward(folder)
    return {"model": model, "config": {k: config[k] for k in ("vision", "text")}, "tokenizer": folder / "tokenizer"}


def _open_clip(folder: Path) -> dict[str, Any]:
    return {"model": checkpoints.write_hpsv2(folder), "config": folder / "model_config.json"}


def _aesthetic(version: int) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        clip = checkpoints.write_clip(folder / "clip")
        return {"model": checkpoints.write_aesthetic(folder, version, 16), "config": {"clip": clip}}

    return write


def _mps(folder: Path) -> dict[str, Any]:
    return {"model": checkpoints.write_mps(folder), "config": checkpoints.mps_config(), "tokenizer": folder / "tokenizer"}


MODELS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "imagereward": _imagereward,
    "pickscore": lambda folder: {"model": checkpoints.write_pickscore(folder)},
    "hpsv2.0": _open_clip,
    "hpsv2.1": _open_clip,
    "clip-l14": lambda folder: {"model": checkpoints.write_clip(folder)},
    "clip-h14": _open_clip,
    "open_clip": _open_clip,
    "aesthetic-v1": _aesthetic(1),
    "aesthetic-v2": _aesthetic(2),
    "mps": _mps,
    "shapes-clip": lambda folder: {},
}
"""Scorer -> writes its tiny checkpoint into a folder and returns the arguments of `load_scorer`."""


def load_tiny(name: str, folder: Path, **options: Any) -> ModelScorer:
    """The scorer `name` on its tiny checkpoint."""
    return load_scorer(name, **{**MODELS[name](folder / name), **options})  # type: ignore[return-value]
