"""Train rewards on votes, pairs, lists and thumbs."""

from .average import average_rewards
from .config import RewardConfig
from .trainer import RewardTrainer, add_user

__all__ = ["RewardConfig", "RewardTrainer", "add_user", "average_rewards"]
