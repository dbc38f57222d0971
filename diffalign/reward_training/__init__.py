"""Train rewards on votes, pairs, lists, thumbs and ratings.

Names are imported on first use: the settings alone need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "RewardConfig": "config",
    "RewardTrainer": "trainer",
    "add_user": "trainer",
    "average_rewards": "average",
}
__all__ = ["RewardConfig", "RewardTrainer", "add_user", "average_rewards"]

if TYPE_CHECKING:
    from .average import average_rewards
    from .config import RewardConfig
    from .trainer import RewardTrainer, add_user


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'diffalign.reward_training' has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
