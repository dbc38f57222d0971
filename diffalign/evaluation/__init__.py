"""Paired generation, win-rates with intervals, side-by-side pictures."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "Comparison": "compare",
    "Diversity": "diversity",
    "PromptSet": "prompt_sets",
    "WinRate": "statistics",
    "clustered_bootstrap": "statistics",
    "clustered_standard_error": "statistics",
    "comparison_grid": "grids",
    "generate": "sampling",
    "load_prompts": "prompt_sets",
    "models_grid": "grids",
    "sign_test": "statistics",
    "win_rate": "statistics",
}
__all__ = [
    "Comparison",
    "Diversity",
    "PromptSet",
    "WinRate",
    "clustered_bootstrap",
    "clustered_standard_error",
    "comparison_grid",
    "generate",
    "load_prompts",
    "models_grid",
    "sign_test",
    "win_rate",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
