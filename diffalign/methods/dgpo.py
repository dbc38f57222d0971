"""DGPO: Luo et al. 2025, arXiv 2510.08425, direct group preference optimisation.

    s    = sum_i A_i beta (m_i - r_i) / k          without gradient, over the k images
    loss = mean_i sigmoid(s) A_i m_i

m and r are the errors of policy and reference at the same noise and time, A the
advantages of the images within their list. With two images and advantages +1 and -1
this is Diffusion-DPO: -s is its margin and the gradient its own, divided by beta. So
the learning rate is far higher than that of Diffusion-DPO.

Lists come from a dataset with scores, or are drawn while training (`data.online`). The
authors train online, on deterministic samples and noisy times, with clipping against an
average of the policy. This has the loss as Flow-Factory has it, without clipping.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..config.ranges import OneOf, Positive
from ..config.section import config_section
from ..training.batch import Batch
from ..training.config import TrainingConfig
from ..training.online.advantages import group_advantages
from ..training.trainer import Trainer

RULES = ("group", "dance_grpo")


@config_section
class DGPOConfig(TrainingConfig):
    """`train:` for `method: dgpo`.

    Example:
        ```python
        from diffalign import DGPOConfig

        args = DGPOConfig(output_dir="runs/dgpo", beta=100.0, max_steps=1000)
        assert args.shared_noise
        ```
    """

    beta: Positive[float] = 100.0
    """Strength of the pull to the reference: how fast a list that is ranked well stops
    to train. Source: Flow-Factory, 10 to 100 for SD3.5."""
    advantage: Annotated[str, OneOf(RULES)] = "group"
    """group: scores of a list minus their mean, divided by their deviation |
    dance_grpo: by the unbiased one. Source: Flow-Factory."""
    adv_clip: Positive[float] = 5.0
    """Advantages are clamped to this size. Source: as in GRPO, 5."""


def dgpo_loss(
    policy_errors: Tensor, reference_errors: Tensor, advantages: Tensor, *, beta: float
) -> Tensor:
    """Compute the DGPO loss of every image (arXiv 2510.08425, as in Flow-Factory).

    Args:
        policy_errors (`Tensor`): (g, k), from `denoising_errors`.
        reference_errors (`Tensor`): (g, k), at the same noisy samples.
        advantages (`Tensor`): (g, k). NaN marks the padding of shorter lists.
        beta (`float`): Strength of the pull to the reference.

    Returns:
        `Tensor`: (g, k). 0 where there is no image. Their mean over a list's images is
        the loss of the list.

    Raises:
        ValueError: Shapes differ.

    Example:
        ```python
        import torch

        errors, advantages = torch.full((1, 2), 0.1), torch.tensor([[1.0, -1.0]])
        loss = dgpo_loss(errors, errors, advantages, beta=100.0)
        assert torch.allclose(loss, torch.tensor([[0.05, -0.05]]))
        ```
    """
    if not policy_errors.shape == reference_errors.shape == advantages.shape:
        raise ValueError(
            f"advantages: expected one per image {tuple(policy_errors.shape)}, got "
            f"{tuple(advantages.shape)}"
        )
    present = ~torch.isnan(advantages)
    sizes = advantages.nan_to_num(0.0).to(policy_errors)
    zero = torch.zeros_like(policy_errors)
    errors = torch.where(present, policy_errors, zero)
    change = errors - torch.where(present, reference_errors, zero)
    count = present.sum(1).clamp(min=1)
    margin = beta * (sizes * change.detach()).sum(1) / count
    return torch.sigmoid(margin)[:, None] * sizes * errors


class DGPOTrainer(Trainer):
    """Trains on scored lists, weighted by how badly the policy ranks them.

    Example:
        ```python
        from peft import LoraConfig

        from diffalign import DGPOConfig, DGPOTrainer

        trainer = DGPOTrainer(
            model="shapes",
            args=DGPOConfig(output_dir="runs/dgpo", max_steps=5),
            train_dataset="diffalign-quickstart/dataset",  # from `diffalign quickstart`
            peft_config=LoraConfig(r=16, lora_alpha=16),
        )
        trainer.train()
        ```
    """

    method = "dgpo"
    _name = "DGPO"
    _tag_names = ("dgpo",)
    _paper: ClassVar[dict[str, str]] = {
        "title": "Reinforcing Diffusion Models by Direct Group Preference Optimization",
        "id": "2510.08425",
        "citation": """@article{luo2025dgpo,
  title   = {Reinforcing Diffusion Models by Direct Group Preference Optimization},
  author  = {Luo, Yihong and Hu, Tianyang and Tang, Jing},
  journal = {arXiv preprint arXiv:2510.08425},
  year    = {2025}
}""",
    }
    _not_public: ClassVar[str] = "Seeds, and settings of lists from a dataset, which are ours."
    config_class = DGPOConfig
    data_kind = "ranked"
    start_message = ""
    args: DGPOConfig

    def compute_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the DGPO loss. See `Trainer.compute_loss`."""
        policy, reference = self.errors(batch)
        assert reference is not None and batch.scores is not None
        args, present = self.args, ~torch.isnan(batch.scores)
        advantages = group_advantages(batch.scores.cpu(), rule=args.advantage).to(policy)
        advantages = advantages.clamp(-args.adv_clip, args.adv_clip)
        advantages = advantages.masked_fill(~present, torch.nan)
        count = present.sum(1).clamp(min=1)
        each = dgpo_loss(policy, reference, advantages, beta=args.beta)
        with torch.no_grad():
            sizes = advantages.nan_to_num(0.0)
            change = torch.where(present, policy - reference, torch.zeros_like(policy))
            margin = -(sizes * change).sum(1) / count
            best = sizes.argmax(1, keepdim=True)
            worst = sizes.argmin(1, keepdim=True)
            metrics = {
                "rewards/margins": args.beta * margin,
                "rewards/accuracies": (margin > 0).to(margin) + 0.5 * (margin == 0).to(margin),
                "change/chosen": change.gather(1, best)[:, 0],
                "change/rejected": change.gather(1, worst)[:, 0],
            }
        return each.sum(1) / count, metrics
