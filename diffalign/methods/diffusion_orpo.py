"""Diffusion-ORPO: Hong et al. 2024, arXiv 2403.07691, eq. 6-7, on denoising errors.

    o    = m_l - m_w                            (sign: correct)
    loss = m_w - beta log sigmoid(o)

m are the policy's mean squared denoising errors of the chosen (w) and the rejected (l)
image. There is no reference model. diffusers' research project `diffusion_orpo` carried
the method over to diffusion.

An error falls as the likelihood rises, so the odds need the minus sign above. The
published script has o = m_w - m_l, which rewards a larger error of the chosen image.
`sign: legacy` reproduces it. Its authors replaced the method by MaPO.
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

from torch import Tensor
from torch.nn.functional import softplus

from ..config.ranges import Positive
from ..config.section import config_section
from ..training.batch import Batch
from ..training.config import TrainingConfig
from ..training.trainer import Trainer
from .mapo import margin_metrics

Sign = Literal["correct", "legacy"]
SIGNS = get_args(Sign)


@config_section
class DiffusionORPOConfig(TrainingConfig):
    """`train:` for `method: diffusion_orpo`.

    Example:
        ```python
        from diffalign import DiffusionORPOConfig

        args = DiffusionORPOConfig(output_dir="runs/orpo", beta=0.1, max_steps=2000)
        assert args.sign == "correct"
        ```
    """

    beta: Positive[float] = 0.1
    """Weight of the odds (the script's 0.1). Source: published script, 0.1."""
    sign: Sign = "correct"
    """correct | legacy: the published script's, which prefers the rejected image's
    error to be the lower one. Source: ours: the published script's sign rewards a
    larger error of the chosen image."""


def diffusion_orpo_loss(
    policy_errors: Tensor, *, beta: float = 0.1, sign: str = "correct"
) -> Tensor:
    """Compute the Diffusion-ORPO loss.

    Args:
        policy_errors (`Tensor`): (g, 2), chosen first.
        beta (`float`, *optional*, defaults to `0.1`): Weight of the odds.
        sign (`str`, *optional*, defaults to `"correct"`): `correct` or `legacy`.

    Returns:
        `Tensor`: Loss per pair, (g,).

    Raises:
        ValueError: Another sign.
    """
    if sign not in SIGNS:
        raise ValueError(f"sign: expected one of {', '.join(SIGNS)}, got {sign!r}")
    odds = policy_errors[:, 1] - policy_errors[:, 0]
    return policy_errors[:, 0] + beta * softplus(-odds if sign == "correct" else odds)


class DiffusionORPOTrainer(Trainer):
    """Trains on pairs without a reference.

    Example:
        ```python
        from peft import LoraConfig

        from diffalign import DiffusionORPOConfig, DiffusionORPOTrainer

        trainer = DiffusionORPOTrainer(
            model="shapes",
            args=DiffusionORPOConfig(output_dir="runs/orpo", max_steps=5),
            train_dataset="diffalign-quickstart/dataset",  # from `diffalign quickstart`
            peft_config=LoraConfig(r=16, lora_alpha=16),
        )
        trainer.train()
        ```
    """

    method = "diffusion_orpo"
    _name = "Diffusion-ORPO"
    _tag_names = ("diffusion-orpo",)
    _paper: ClassVar[dict[str, str]] = {
        "title": "ORPO: Monolithic Preference Optimization without Reference Model (carried "
        "over to diffusion by diffusers' research project)",
        "id": "2403.07691",
        "citation": """@article{hong2024orpo,
  title   = {ORPO: Monolithic Preference Optimization without Reference Model},
  author  = {Hong, Jiwoo and Lee, Noah and Thorne, James},
  journal = {arXiv preprint arXiv:2403.07691},
  year    = {2024}
}""",
    }
    _not_public: ClassVar[str] = (
        "No paper derives the diffusion form; its authors replaced it by MaPO."
    )
    config_class = DiffusionORPOConfig
    data_kind = "pair"
    reference_free = True
    args: DiffusionORPOConfig

    def compute_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the Diffusion-ORPO loss. See `Trainer.compute_loss`."""
        policy, _ = self.errors(batch)
        loss = diffusion_orpo_loss(policy, beta=self.args.beta, sign=self.args.sign)
        return loss, margin_metrics(policy)
