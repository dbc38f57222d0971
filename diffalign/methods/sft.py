"""Supervised fine-tuning on chosen images, the baseline of preference papers.

    loss = m_w

m_w is the mean squared denoising error of the chosen or only image. There is no
reference and no rejected image.
"""

from __future__ import annotations

from torch import Tensor

from ..config.section import config_section
from ..training.batch import Batch
from ..training.config import TrainingConfig
from ..training.trainer import Trainer


@config_section
class SFTConfig(TrainingConfig):
    """`train:` for `method: sft`.

    Example:
        ```python
        from diffalign import SFTConfig

        args = SFTConfig(output_dir="runs/sft", learning_rate=1e-4, max_steps=2000)
        assert args.per_device_train_batch_size == 1
        ```
    """


def sft_loss(policy_errors: Tensor) -> Tensor:
    """Compute the SFT loss, which is the denoising error itself.

    Args:
        policy_errors (`Tensor`): (g, 1).

    Returns:
        `Tensor`: Loss per image, (g,).
    """
    return policy_errors[:, 0]


class SFTTrainer(Trainer):
    """Trains on single images. Of a pair or a ranked list it takes the best.

    Example:
        ```python
        from peft import LoraConfig

        from diffalign import SFTConfig, SFTTrainer

        trainer = SFTTrainer(
            model="shapes",
            args=SFTConfig(output_dir="runs/sft", max_steps=5),
            train_dataset="diffalign-quickstart/dataset",  # from `diffalign quickstart`
            peft_config=LoraConfig(r=16, lora_alpha=16),
        )
        trainer.train()
        ```
    """

    method = "sft"
    _name = "SFT"
    _tag_names = ("sft",)
    config_class = SFTConfig
    data_kind = "single"
    reference_free = True
    args: SFTConfig

    def compute_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the SFT loss. See `Trainer.compute_loss`."""
        policy, _ = self.errors(batch)
        return sft_loss(policy), {"errors/chosen": policy[:, 0].detach()}
