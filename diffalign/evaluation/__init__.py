"""Compare models: paired images, win-rates with intervals, side-by-side pictures."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "Comparison": "evaluation.comparison",
    "Diversity": "evaluation.diversity",
    "GuidanceCurves": "evaluation.guidance_curves",
    "PromptSet": "data.prompt_sets",
    "WinRate": "evaluation.statistics",
    "clustered_bootstrap": "evaluation.statistics",
    "clustered_standard_error": "evaluation.statistics",
    "compare_guidance": "evaluation.guidance_sweep",
    "comparison_grid": "generation.grids",
    "generate": "generation.sampling",
    "load_prompts": "data.prompt_sets",
    "models_grid": "generation.grids",
    "sign_test": "evaluation.statistics",
    "win_rate": "evaluation.statistics",
}
__all__ = [
    "Comparison",
    "Diversity",
    "GuidanceCurves",
    "PromptSet",
    "WinRate",
    "clustered_bootstrap",
    "clustered_standard_error",
    "compare_guidance",
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
    return getattr(import_module(f"diffalign.{_EXPORTS[name]}"), name)
