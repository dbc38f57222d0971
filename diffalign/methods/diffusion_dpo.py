"""Diffusion-DPO: Wallace et al. 2023, arXiv 2311.12908, eq. 14.

    z    = -(beta/2) [(m_w - m_l) - (r_w - r_l)]
    loss = -log sigmoid(z)                              (sigmoid)
           max(0, 1 - z)                                (hinge)
           ((r_w - r_l) - (m_w - m_l) - 1/beta)^2       (ipo)
           KL(p, q), p = sigmoid(z), q = 1 - dmpo_alpha (dmpo, arXiv 2507.07510)
           w (m_w - m_l), w = clamp(0.5 - 2 linear_slope z, linear_floor,
                                    1 - linear_floor)    (linear, arXiv 2605.21123)
         + sft_weight m_w                               (optional)

`preserve_winner` scales the gradient of m_l pair by pair, so that no step raises the
chosen error to first order: Fu et al. 2025, arXiv 2511.03317.

m and r are the mean squared denoising errors of policy and reference, for the chosen
(w) and the rejected (l) image. All are taken at the same timestep and noise. The code
shares both within a pair, while the paper writes separate noises. T and omega of the
paper are inside beta, as in its code.

Differences from the official code: errors are float32 under any autocast, v-prediction
and flow targets work, ties never train, and the learning rate is not scaled.

beta follows the official code and diffusers' SDXL script, which have the 1/2 and mean
errors. diffusers' SD script has no 1/2, so its beta 2500 is 5000 here. Its `ipo` margin
1/(2 beta') is 1/beta here.

`dmpo` is Divergence Minimization Preference Optimization, the reverse KL divergence
between the policy's preference and the data's. Its smallest value lies at
z = log((1 - dmpo_alpha) / dmpo_alpha), so the pull ends there. Pairs that are ordered
very wrongly have a vanishing gradient.

`linear` is Linear-DPO. w is a constant in the gradient, which has no factor beta/2:
learning rates are far higher. Beyond z = 1 / (4 linear_slope) a pair gives no gradient.
Its value says little, rewards/margins does. Its paper's reference follows the policy:
`reference_decay`.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..config.ranges import NotNegative, Positive, Range, Share
from ..config.section import config_section
from ..errors import ConfigError
from ..likelihood import implicit_rewards, winner_safeguard
from ..training.batch import Batch
from ..training.config import TrainingConfig
from ..training.diagnostics import pair_metrics
from ..training.reference import BlendedReference, Reference
from ..training.trainer import Trainer

LossType = Literal["sigmoid", "hinge", "ipo", "dmpo", "linear"]
LOSS_TYPES = get_args(LossType)


@config_section
class DiffusionDPOConfig(TrainingConfig):
    """`train:` for `method: diffusion_dpo`.

    Example:
        ```python
        from diffalign import DiffusionDPOConfig

        args = DiffusionDPOConfig(output_dir="runs/dpo", beta=2000, max_steps=2000)
        assert args.loss_type == "sigmoid"
        ```
    """

    beta: Positive[float] = 5000.0
    """Strength of the pull to the reference, on per-image mean errors with the 1/2
    (paper: 2000 for SD1.5, 5000 for SDXL). 2 x the beta of diffusers' SD script; N x
    that of sum-of-squares codes. Flow models want 100 to 2000. Source: released
    launchers, 5000; the paper's main table has 2000 for SD1.5 and 5000 for SDXL."""
    loss_type: LossType = "sigmoid"
    """sigmoid | hinge | ipo | dmpo | linear. dmpo and linear stop pulling at a margin
    that dmpo_alpha and linear_slope set. Source: paper, eq. 14; hinge and ipo as in
    diffusers' research project; dmpo as in arXiv 2507.07510, linear as in arXiv
    2605.21123."""
    dmpo_alpha: Annotated[float, Range(0.0, 0.5, above=True, below=True)] = 0.01
    """loss_type dmpo: share of pairs that the data are taken to order the other way.
    Source: official code of DMPO, 0.01."""
    linear_slope: Positive[float] = 0.2
    """loss_type linear: how fast the weight of a pair falls with its margin. Source:
    official code of Linear-DPO, 0.2."""
    linear_floor: Annotated[float, Range(0.0, 0.5, below=True)] = 0.0
    """loss_type linear: smallest weight of a pair, in [0, 0.5). Source: official code
    of Linear-DPO, 0."""
    label_smoothing: Annotated[float, Range(0.0, 0.5, below=True)] = 0.0
    """Assumed share of flipped labels, in [0, 0.5). Source: ours (conservative DPO of
    Mitchell 2023); 0 is the paper's loss."""
    sft_weight: NotNegative[float] = 0.0
    """Weight of the chosen image's own error, an anchor against both errors rising.
    Source: ours, against both errors rising; 0 is the paper's loss."""

    reference_decay: Share | None = None
    """The reference is an average of the policy: so much of it stays at each step. null
    is a fixed reference. Source: arXiv 2605.21123, which tries 0.95 to 0.9999."""
    preserve_winner: Share | None = None
    """Safeguard against rising chosen errors, in [0, 1]: how much of the rejected
    image's gradient it may take away. Source: arXiv 2511.03317, whose scripts have 0.9
    for SD1.5 and 0.6 for SDXL, one factor per micro-batch; ours is per pair. null is
    the paper's loss."""

    @property
    def error_beta(self) -> float | None:
        """`beta`. See `TrainingConfig.error_beta`."""
        return self.beta


def diffusion_dpo_loss(
    policy_errors: Tensor,
    reference_errors: Tensor,
    *,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    dmpo_alpha: float = 0.01,
    linear_slope: float = 0.2,
    linear_floor: float = 0.0,
) -> Tensor:
    """Compute the Diffusion-DPO loss (paper, eq. 14).

    Args:
        policy_errors (`Tensor`): (g, 2), chosen first, from `denoising_errors`.
        reference_errors (`Tensor`): (g, 2), chosen first, at the same noisy samples.
        beta (`float`): Strength of the pull to the reference.
        loss_type (`str`, *optional*, defaults to `"sigmoid"`): `sigmoid`, `hinge`,
            `ipo`, `dmpo` or `linear`.
        label_smoothing (`float`, *optional*, defaults to `0.0`): Share of the swapped
            pair's loss.
        dmpo_alpha (`float`, *optional*, defaults to `0.01`): Of `dmpo`: share of pairs
            in the other order, in (0, 0.5).
        linear_slope (`float`, *optional*, defaults to `0.2`): Of `linear`: the weight
            falls by twice this per unit of z.
        linear_floor (`float`, *optional*, defaults to `0.0`): Of `linear`: smallest
            weight, in [0, 0.5).

    Returns:
        `Tensor`: Loss per pair, (g,).

    Raises:
        ValueError: Another loss type.
    """
    rewards = implicit_rewards(policy_errors, reference_errors, beta)
    z = rewards[:, 0] - rewards[:, 1]

    def loss(sign: float) -> Tensor:
        logit = sign * z
        if loss_type == "sigmoid":
            return softplus(-logit)
        if loss_type == "hinge":
            return torch.relu(1 - logit)
        if loss_type == "ipo":
            return ((2 / beta) * logit - 1 / beta).square()
        if loss_type == "dmpo":
            share = torch.sigmoid(logit)
            right = -softplus(-logit) - math.log(1 - dmpo_alpha)
            wrong = -softplus(logit) - math.log(dmpo_alpha)
            return share * right + (1 - share) * wrong
        if loss_type == "linear":
            weight = (0.5 - 2 * linear_slope * logit.detach()).clamp(linear_floor, 1 - linear_floor)
            return weight * sign * (policy_errors[:, 0] - policy_errors[:, 1])
        raise ValueError(f"loss_type: expected one of {', '.join(LOSS_TYPES)}, got {loss_type!r}")

    if not label_smoothing:
        return loss(1.0)
    return (1 - label_smoothing) * loss(1.0) + label_smoothing * loss(-1.0)


class DiffusionDPOTrainer(Trainer):
    """Trains on pairs against a frozen reference, which is the base model by default.

    Example:
        ```python
        from peft import LoraConfig

        from diffalign import DiffusionDPOConfig, DiffusionDPOTrainer

        trainer = DiffusionDPOTrainer(
            model="shapes",
            args=DiffusionDPOConfig(output_dir="runs/dpo", max_steps=5),
            train_dataset="diffalign-quickstart/dataset",  # from `diffalign quickstart`
            peft_config=LoraConfig(r=16, lora_alpha=16),
        )
        trainer.train()
        ```
    """

    method = "diffusion_dpo"
    _name = "Diffusion-DPO"
    _tag_names = ("diffusion-dpo",)
    _paper: ClassVar[dict[str, str]] = {
        "title": "Diffusion Model Alignment Using Direct Preference Optimization",
        "id": "2311.12908",
        "citation": """@inproceedings{wallace2024diffusion,
  title     = {Diffusion Model Alignment Using Direct Preference Optimization},
  author    = {Wallace, Bram and Dang, Meihua and Rafailov, Rafael and Zhou, Linqi and
               Lou, Aaron and Purushwalkam, Senthil and Ermon, Stefano and Xiong, Caiming and
               Joty, Shafiq and Naik, Nikhil},
  booktitle = {CVPR},
  year      = {2024}
}""",
    }
    _not_public: ClassVar[str] = (
        "Which learning rate made the released weights: the paper's formula gives 8.19e-9 at "
        "beta 5000 (2.048e-8 at 2000), the released "
        "launchers train at 2.048e-5 after their scaling by batch and processes."
    )
    config_class = DiffusionDPOConfig
    data_kind = "pair"
    args: DiffusionDPOConfig

    def validate(self) -> None:
        """Refuse a fixed reference beside one that follows the policy.

        Raises:
            ConfigError: `reference_decay` with `ref_model` or `precompute_ref_errors`.
        """
        super().validate()
        if self.args.reference_decay is None:
            return
        if self.ref_backbone is not None:
            raise ConfigError(
                "train.reference_decay", "ref_model is a fixed reference; leave out one of both"
            )
        if self.args.precompute_ref_errors:
            raise ConfigError(
                "train.precompute_ref_errors",
                "with reference_decay the reference changes while training; set it to false",
            )

    def build_reference(self) -> Reference | None:
        """Build the reference: fixed, or an average of the policy."""
        if self.args.reference_decay is None:
            return super().build_reference()
        return BlendedReference(self.network, self.args.reference_decay)

    def on_optimizer_step(self, step: int) -> None:
        """Move a reference that follows the policy. See `Trainer.on_optimizer_step`."""
        if isinstance(self.reference_model, BlendedReference):
            self.reference_model.blend()

    def compute_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the Diffusion-DPO loss. See `Trainer.compute_loss`."""
        args = self.args
        share = None
        if args.preserve_winner is None:
            policy, reference = self.errors(batch)
        else:
            reference = self.reference_errors(batch)
            policy, share = self._safeguarded_errors(batch, args.preserve_winner)
        assert reference is not None
        loss = diffusion_dpo_loss(
            policy,
            reference,
            beta=args.beta,
            loss_type=args.loss_type,
            label_smoothing=args.label_smoothing,
            dmpo_alpha=args.dmpo_alpha,
            linear_slope=args.linear_slope,
            linear_floor=args.linear_floor,
        )
        if args.sft_weight:
            loss = loss + args.sft_weight * policy[:, 0]
        metrics = pair_metrics(policy, reference, args.beta, self.schedule.fraction(batch.times))
        return loss, metrics if share is None else metrics | {"preserve_winner/share": share}

    def _safeguarded_errors(self, batch: Batch, strength: float) -> tuple[Tensor, Tensor]:
        """Errors whose rejected half has a scaled gradient, and the scale, (g,)."""
        prediction, target = self.policy.outputs(batch)
        errors = self.policy.errors_of(batch, prediction, target)
        share = winner_safeguard(prediction, target, strength).to(errors)
        chosen, rejected = errors.unbind(1)
        scaled = rejected.detach() + share * (rejected - rejected.detach())
        return torch.stack([chosen, scaled], dim=1), share
