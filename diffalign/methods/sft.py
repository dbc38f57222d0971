"""Supervised fine-tuning on the chosen images: the baseline every preference paper compares with.

    loss = m_w

m_w is the mean squared denoising error of the chosen (or only) image; no reference, no rejected image.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..training.batch import Batch
from ..training.config import TrainingConfig
from ..training.trainer import Trainer


@dataclass
class SFTConfig(TrainingConfig):
    """`train:` for `method: sft`."""


def sft_loss(policy_errors: Tensor) -> Tensor:
    """The denoising error itself: (g, 1) -> (g,)."""
    return policy_errors[:, 0]


class SFTTrainer(Trainer):
    """Trains on single images; of a pair or a ranked list it takes the best."""

    method = "sft"
    _name = "SFT"
    _tag_names = ("sft",)
    config_class = SFTConfig
    data_kind = "single"
    reference_free = True
    args: SFTConfig

    def compute_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        policy, _ = self.errors(batch)
        return sft_loss(policy), {"errors/chosen": policy[:, 0].detach()}
