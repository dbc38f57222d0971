"""Loads every neural scorer on its tiny checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffalign import load_scorer
from diffalign.rewards.model_scorer import ModelScorer
from diffalign.rewards.testing.reference import MODELS, arguments

__all__ = ["MODELS", "load_tiny"]


def load_tiny(name: str, folder: Path, **options: Any) -> ModelScorer:
    """The scorer `name` on its tiny checkpoint."""
    return load_scorer(name, **{**arguments(name, folder), **options})  # type: ignore[return-value]
