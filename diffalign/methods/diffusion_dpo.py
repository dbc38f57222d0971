"""Diffusion-DPO: Wallace et al. 2023, arXiv 2311.12908, eq. 14.

    z    = -(beta/2) [(m_w - m_l) - (r_w - r_l)]
    loss = -log sigmoid(z)                              (sigmoid)
           max(0, 1 - z)                                (hinge)
           ((r_w - r_l) - (m_w - m_l) - 1/beta)^2       (ipo)
           KL(p, q), p = sigmoid(z), q = 1 - dmpo_alpha (dmpo, arXiv 2507.07510)
           w (m_w - m_l), w = clamp(0.5 - 2 linear_slope z, linear_floor,
                                    1 - linear_floor)    (linear, arXiv 2605.21123)
           (z - (s_w - s_l))^2                           (regression, arXiv 2502.02588)
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

`regression` is CaPO's: the margin z is to equal the difference of the scores s. The
paper's scores are calibrated win rates, `data.calibrate: sigmoid`.

`score_margin` multiplies z by score_margin (2 sigmoid((s_w - s_l) / range) - 1), so
that pairs of equal scores have no gradient: SmPO, arXiv 2506.02698. Its code uses the
first pair's factor for the whole batch, while here each pair has its own.

`beta: auto` moves beta after every optimizer step so that the mean gradient factor
sigmoid(-z) stays at `gradient_factor`. It is ours.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..config.ranges import NotNegative, Positive, Range, Share, finite
from ..config.section import config_section
from ..data import PreferenceDataset
from ..errors import ConfigError
from ..likelihood import implicit_rewards, winner_safeguard
from ..training.auto_beta import AutoBeta
from ..training.batch import Batch
from ..training.config import TrainingConfig
from ..training.diagnostics import pair_metrics
from ..training.loop import BatchSource
from ..training.reference import BlendedReference, Reference
from ..training.trainer import Trainer

LossType = Literal["sigmoid", "hinge", "ipo", "dmpo", "linear", "regression"]
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

    beta: Positive[float] | Literal["auto"] = 5000.0
    """Strength of the pull to the reference, on per-image mean errors with the 1/2
    (paper: 2000 for SD1.5, 5000 for SDXL). 2 x the beta of diffusers' SD script; N x
    that of sum-of-squares codes. Flow models want 100 to 2000. auto moves it while
    training, see gradient_factor. Source: released launchers, 5000; the paper's main
    table has 2000 for SD1.5 and 5000 for SDXL; auto is ours."""
    beta_start: Positive[float] = 2000.0
    """beta: auto: where beta starts. It stays within a factor of 100 of this. Source:
    ours; 2000 is the paper's beta for SD1.5."""
    gradient_factor: Annotated[float, Range(0.0, 1.0, above=True, below=True)] = 0.45
    """beta: auto: mean of sigmoid(-z) to hold. 0.5 is an untrained model, lower values
    let the policy go farther from the reference. Source: ours."""
    loss_type: LossType = "sigmoid"
    """sigmoid | hinge | ipo | dmpo | linear | regression. dmpo and linear stop pulling
    at a margin that dmpo_alpha and linear_slope set, regression at the difference of
    the scores. Source: paper, eq. 14; hinge and ipo as in diffusers' research project;
    dmpo as in arXiv 2507.07510, linear as in arXiv 2605.21123, regression as in arXiv
    2502.02588."""
    score_margin: Positive[float] | None = None
    """Weigh the margin of a pair by how far its scores differ: SmPO's factor, at most
    this. A pair whose scores contradict its order trains in the order of the scores.
    null is the paper's loss. Source: official code of SmPO (arXiv 2506.02698), 10."""
    score_range: list[Annotated[float, finite]] | None = None
    """score_margin: lowest and highest score, between which scores are scaled to [0,
    1]. null takes those of the data. Source: official code of SmPO, 0.115 and 0.282 for
    PickScore."""
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta == "auto" and self.loss_type != "sigmoid":
            raise ConfigError(
                "beta", f"auto moves the beta of loss_type sigmoid, got {self.loss_type}; set one"
            )
        if self.score_margin is not None and self.loss_type in ("linear", "regression"):
            raise ConfigError(
                "score_margin", f"it has no meaning for loss_type {self.loss_type}; leave it out"
            )
        if self.score_margin is not None and self.beta == "auto":
            raise ConfigError("score_margin", "it scales beta, which auto moves; leave one out")
        limits = self.score_range
        if limits is not None and not (len(limits) == 2 and limits[0] < limits[1]):
            raise ConfigError(
                "score_range", f"expected the lowest and the highest score, got {limits}"
            )

    @property
    def error_beta(self) -> float | None:
        """`beta`. See `TrainingConfig.error_beta`."""
        return self.beta_start if self.beta == "auto" else self.beta

    @property
    def needs_scores(self) -> bool:
        """Whether pairs need the scores of their images."""
        return self.loss_type == "regression" or self.score_margin is not None


def score_factors(scores: Tensor, *, scale: float, score_range: Sequence[float]) -> Tensor:
    """Compute SmPO's factor of each pair's margin (arXiv 2506.02698).

    factor = scale (2 p - 1), where p = sigmoid((s_w - s_l) / (high - low)).

    Args:
        scores (`Tensor`): (g, 2), chosen first, higher is better.
        scale (`float`): Largest factor.
        score_range (`Sequence[float]`): Lowest and highest score.

    Returns:
        `Tensor`: (g,). Below 0 where the scores contradict the order of the pair.

    Example:
        ```python
        import torch

        scores = torch.tensor([[0.25, 0.2], [0.2, 0.2]])
        factors = score_factors(scores, scale=10, score_range=[0.1, 0.3])
        assert factors[0] > 1 and factors[1] == 0
        ```
    """
    low, high = score_range
    return scale * (2 * torch.sigmoid((scores[:, 0] - scores[:, 1]) / (high - low)) - 1)


def safeguarded(
    errors: Tensor, share: Tensor, winner: Tensor, loss_of: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Scale the gradient of the worse image of each pair.

    A pair whose loss raises the better image's error by itself keeps its gradient:
    `ipo`, `dmpo` and `regression` beyond their optimum, and smoothed labels at a large
    margin.

    Args:
        errors (`Tensor`): (g, 2), of the policy.
        share (`Tensor`): Factor of the gradient, (g,), from `winner_safeguard`.
        winner (`Tensor`): Index of the better image, (g,).
        loss_of (`Callable`): Loss of errors, (g, 2) to (g,).

    Returns:
        `tuple[Tensor, Tensor]`: The same errors with scaled gradients, and the factor
        that was used, (g,).
    """
    with torch.enable_grad():
        probe = errors.detach().requires_grad_()
        (slopes,) = torch.autograd.grad(loss_of(probe).sum(), probe)
    rows, loser = torch.arange(len(errors), device=errors.device), 1 - winner
    share = torch.where(slopes[rows, loser] > 0, 1.0, share)
    factor = torch.ones_like(errors)
    factor[rows, loser] = share
    return errors.detach() + factor * (errors - errors.detach()), share


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
    factors: Tensor | None = None,
    targets: Tensor | None = None,
) -> Tensor:
    """Compute the Diffusion-DPO loss (paper, eq. 14).

    Args:
        policy_errors (`Tensor`): (g, 2), chosen first, from `denoising_errors`.
        reference_errors (`Tensor`): (g, 2), chosen first, at the same noisy samples.
        beta (`float`): Strength of the pull to the reference.
        loss_type (`str`, *optional*, defaults to `"sigmoid"`): `sigmoid`, `hinge`,
            `ipo`, `dmpo`, `linear` or `regression`.
        label_smoothing (`float`, *optional*, defaults to `0.0`): Share of the swapped
            pair's loss.
        dmpo_alpha (`float`, *optional*, defaults to `0.01`): Of `dmpo`: share of pairs
            in the other order, in (0, 0.5).
        linear_slope (`float`, *optional*, defaults to `0.2`): Of `linear`: the weight
            falls by twice this per unit of z.
        linear_floor (`float`, *optional*, defaults to `0.0`): Of `linear`: smallest
            weight, in [0, 0.5).
        factors (`Tensor`, *optional*): (g,). Multiply the margins, see `score_factors`.
        targets (`Tensor`, *optional*): Of `regression`: margins to reach, (g,). NaN
            gives no gradient.

    Returns:
        `Tensor`: Loss per pair, (g,).

    Raises:
        ValueError: Another loss type, or `regression` without `targets`.
    """
    rewards = implicit_rewards(policy_errors, reference_errors, beta)
    z = rewards[:, 0] - rewards[:, 1]
    if factors is not None:
        z = factors * z

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
        if loss_type == "regression":
            if targets is None:
                raise ValueError("targets: loss_type regression needs the margins to reach")
            return (logit - torch.where(targets.isnan(), logit.detach(), targets)).square()
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
    auto_beta: AutoBeta | None = None
    """Moves beta, with `beta: auto`."""
    score_range: Sequence[float] | None = None
    """Lowest and highest score of the data, with `score_margin`."""

    @property
    def beta(self) -> float:
        """Beta of the current step."""
        return self.auto_beta.value if self.auto_beta is not None else float(self.args.beta)

    def read_dataset(self, source: Any, split: str) -> PreferenceDataset:
        """Read pairs, with scores where an option needs them.

        Raises:
            ConfigError: The pairs have no scores.
        """
        dataset = super().read_dataset(source, split)
        if not self.args.needs_scores:
            return dataset
        if not dataset.has_scores:
            option = "loss_type" if self.args.loss_type == "regression" else "score_margin"
            raise ConfigError(
                f"train.{option}",
                "it needs the scores of the images, which the dataset does not have; add columns "
                "chosen_score and rejected_score, or give ranked lists with scores",
            )
        return dataset.using("chosen_score", "rejected_score")

    def validate(self) -> None:
        """Refuse a fixed reference beside one that follows the policy.

        Raises:
            ConfigError: `reference_decay` with `ref_model` or `precompute_ref_errors`,
                or `score_margin` without a range of scores.
        """
        super().validate()
        if self.args.needs_scores:
            reverse, pairs = self.train_dataset.reversed_scores(), self.train_dataset.report.kept
            if reverse:
                self.notes.append(
                    f"WARNING: {reverse} of {pairs} pairs have a chosen_score below their "
                    "rejected_score; check the columns (data.columns)"
                )
        if self.args.score_margin is not None:
            self.score_range = self.args.score_range or self._range_of_scores()
        if self.args.reference_decay is None:
            return
        if self.ref_backbone is not None:
            raise ConfigError(
                "train.reference_decay",
                "cannot be combined with ref_model, which stays fixed; leave out one of them",
            )
        if self.args.precompute_ref_errors:
            raise ConfigError(
                "train.precompute_ref_errors",
                "with reference_decay the reference changes while training; set it to false",
            )

    def _range_of_scores(self) -> Sequence[float]:
        limits = None if self.data_config.online is not None else self.train_dataset.score_range()
        if limits is None or limits[0] == limits[1]:
            reason = "are not known beforehand" if limits is None else "are all equal"
            raise ConfigError(
                "train.score_range",
                f"the scores {reason}; set the lowest and the highest, e.g. [0.1, 0.3]",
            )
        self.notes.append(f"score_range: scores run from {limits[0]:g} to {limits[1]:g}")
        return limits

    def build_source(self) -> BatchSource:
        """Build the source of batches, and what moves beta."""
        if self.args.beta == "auto":
            self.auto_beta = AutoBeta(self.args.beta_start, self.args.gradient_factor)
            self.checkpoints.parts.append(self.auto_beta)
        return super().build_source()

    def build_reference(self) -> Reference | None:
        """Build the reference: fixed, or an average of the policy."""
        if self.args.reference_decay is None:
            return super().build_reference()
        return BlendedReference(self.network, self.args.reference_decay)

    def on_optimizer_step(self, step: int) -> None:
        """Move beta, and a reference that follows the policy.

        See `Trainer.on_optimizer_step`.
        """
        if isinstance(self.reference_model, BlendedReference):
            self.reference_model.blend()
        if self.auto_beta is not None:
            self.auto_beta.step(self.accelerator)

    def compute_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the Diffusion-DPO loss. See `Trainer.compute_loss`."""
        args, beta = self.args, self.beta
        share = None
        if args.preserve_winner is None:
            policy, reference = self.errors(batch)
        else:
            reference = self.reference_errors(batch)
            prediction, target = self.policy.outputs(batch)
            policy = self.policy.errors_of(batch, prediction, target)
        assert reference is not None
        factors, targets = self._from_scores(batch.scores)
        loss_of = functools.partial(
            diffusion_dpo_loss,
            reference_errors=reference,
            beta=beta,
            loss_type=args.loss_type,
            label_smoothing=args.label_smoothing,
            dmpo_alpha=args.dmpo_alpha,
            linear_slope=args.linear_slope,
            linear_floor=args.linear_floor,
            factors=factors,
            targets=targets,
        )
        if args.preserve_winner is not None:
            winner = torch.zeros(len(policy), dtype=torch.long, device=policy.device)
            if factors is not None:
                winner = (factors < 0).long().to(policy.device)  # scores against the order
            share = winner_safeguard(prediction, target, args.preserve_winner, winner).to(policy)
            policy, share = safeguarded(policy, share, winner, loss_of)
        loss = loss_of(policy)
        if args.sft_weight:
            loss = loss + args.sft_weight * policy[:, 0]
        metrics = pair_metrics(policy, reference, beta, self.schedule.fraction(batch.times))
        if share is not None:
            metrics["preserve_winner/share"] = share
        if factors is not None:
            metrics["score_margin/factor"] = factors
        if self.auto_beta is not None:
            metrics["beta"] = torch.full_like(loss, beta).detach()
            if torch.is_grad_enabled():
                self.auto_beta.add(metrics["gradient_factor"], batch.weights)
        return loss, metrics

    def _from_scores(self, scores: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return factors and targets of the margins, (g,), where an option asks."""
        args = self.args
        if scores is None or not args.needs_scores:
            return None, None
        factors = None
        if args.score_margin is not None:
            assert self.score_range is not None
            factors = score_factors(scores, scale=args.score_margin, score_range=self.score_range)
            factors = factors.nan_to_num(0.0)  # a pair without scores has no gradient
        return factors, scores[:, 0] - scores[:, 1]
