"""Train rewards on votes, pairs, lists and thumbs."""

from .config import RewardConfig
from .trainer import RewardTrainer, add_user

__all__ = ["RewardConfig", "RewardTrainer", "add_user"]
