"""Reward scorers: find them by name, score images, combine and cache the scores.

Numbers are those of the published code. Scorers that declare it are differentiable.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "ScoreCache": "cache",
    "ScoreResult": "scoring",
    "Scorer": "base",
    "ModelScorer": "model_scorer",
    "ScorerSpec": "spec",
    "Panel": "panel",
    "PanelResult": "panel",
    "as_ddpo": "adapters",
    "as_flow_factory": "adapters",
    "as_trl": "adapters",
    "check_scorer": "testing.check",
    "combine": "ensemble",
    "get_spec": "registry",
    "kendalls_w": "ensemble",
    "list_scorers": "registry",
    "load_scorer": "registry",
    "register_scorer": "registry",
    "win_rates": "ensemble",
}
__all__ = [
    "ModelScorer",
    "Panel",
    "PanelResult",
    "ScoreCache",
    "ScoreResult",
    "Scorer",
    "ScorerSpec",
    "as_ddpo",
    "as_flow_factory",
    "as_trl",
    "check_scorer",
    "combine",
    "get_spec",
    "kendalls_w",
    "list_scorers",
    "load_scorer",
    "register_scorer",
    "win_rates",
]

if TYPE_CHECKING:
    from .adapters import as_ddpo, as_flow_factory, as_trl
    from .base import Scorer
    from .cache import ScoreCache
    from .ensemble import combine, kendalls_w, win_rates
    from .model_scorer import ModelScorer
    from .panel import Panel, PanelResult
    from .registry import get_spec, list_scorers, load_scorer, register_scorer
    from .scoring import ScoreResult
    from .spec import ScorerSpec
    from .testing.check import check_scorer


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'diffalign.rewards' has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
