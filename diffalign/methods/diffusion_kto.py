"""Diffusion-KTO: Li et al. 2024, arXiv 2404.04465, eq. 8-9.

    q_i  = -(beta/2) (m_i - r_i)                    implicit reward of image i
    Q    = max(mean of q, 0)                        baseline, without gradient
    x_i  = y_i (q_i - Q)                            y = +1 for a liked image, -1 if not
    loss = weight_y (1 - sigmoid(x_i))              (sigmoid)
           weight_y (1 - log sigmoid(x_i))          (loss_averse)
           weight_y (1 + log sigmoid(-x_i))         (risk_seeking)

m and r are the mean squared denoising errors of policy and reference at the same noise
and timestep. Each image is liked or disliked by itself: thumbs up and down, star
ratings from a threshold on, or the two images of a pair, which then share their noise
and timestep.

The official code takes the mean over the batch, so that the loss of an image depends on
the others of its micro-batch. Here Q is a running mean over the rows of past optimizer
steps, which does not depend on how a step is split into micro-batches and processes.
`baseline: batch` is the code's. The code has no 1/2, so its beta 1000 is 2000 here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..config.ranges import Decay, NotNegative, Positive
from ..config.section import config_section
from ..errors import ConfigError
from ..likelihood import implicit_rewards
from ..training.batch import Batch
from ..training.config import TrainingConfig
from ..training.loop import BatchSource
from ..training.step_mean import StepMean
from ..training.trainer import Trainer

Utility = Literal["sigmoid", "loss_averse", "risk_seeking"]
UTILITIES = get_args(Utility)


@config_section
class DiffusionKTOConfig(TrainingConfig):
    """`train:` for `method: diffusion_kto`.

    Example:
        ```python
        from diffalign import DiffusionKTOConfig

        args = DiffusionKTOConfig(output_dir="runs/kto", desirable_weight=0.5)
        assert args.utility == "sigmoid"
        ```
    """

    beta: Positive[float] = 2000.0
    """Strength of the pull to the reference, on per-image mean errors with the 1/2.
    Source: official code, 1000 without the 1/2."""
    utility: Utility = "sigmoid"
    """sigmoid (Kahneman and Tversky's model) | loss_averse | risk_seeking. Source:
    paper, section 4.2, which finds sigmoid the best."""
    desirable_weight: NotNegative[float] = 1.0
    """Weight of liked images. Source: official code, 1."""
    undesirable_weight: NotNegative[float] = 1.0
    """Weight of disliked images. With more dislikes than likes, lower it in proportion.
    Source: official code, 1, with four of five rows drawn from the liked images."""
    baseline: Literal["running", "batch"] = "running"
    """running: Q is a running mean of past steps | batch: the mean of the micro-batch
    over all processes. Source: ours; the official code's is batch."""
    baseline_decay: Decay = 0.9
    """baseline: running: how much of Q stays at each step. Source: ours."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.desirable_weight == self.undesirable_weight == 0:
            raise ConfigError(
                "desirable_weight", "both weights are 0, so nothing trains; set one above 0"
            )

    @property
    def error_beta(self) -> float | None:
        """`beta`. See `TrainingConfig.error_beta`."""
        return self.beta


def diffusion_kto_loss(
    policy_errors: Tensor,
    reference_errors: Tensor,
    labels: Tensor,
    *,
    beta: float,
    baseline: float | Tensor,
    utility: str = "sigmoid",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Compute the Diffusion-KTO loss.

    Args:
        policy_errors (`Tensor`): (g, 1), from `denoising_errors`.
        reference_errors (`Tensor`): (g, 1), at the same noisy samples.
        labels (`Tensor`): (g,), above 0 for a liked image.
        beta (`float`): Strength of the pull to the reference.
        baseline (`float` or `Tensor`): Q, at least 0, without gradient.
        utility (`str`, *optional*, defaults to `"sigmoid"`): `sigmoid`, `loss_averse`
            or `risk_seeking`.
        desirable_weight (`float`, *optional*, defaults to `1.0`): Weight of liked ones.
        undesirable_weight (`float`, *optional*, defaults to `1.0`): Weight of disliked
            ones.

    Returns:
        `Tensor`: Loss per image, (g,).

    Raises:
        ValueError: Another utility.

    Example:
        ```python
        import torch

        errors = torch.tensor([[0.1], [0.2]])
        labels = torch.tensor([1.0, -1.0])
        loss = diffusion_kto_loss(errors, errors, labels, beta=2000, baseline=0.0)
        assert loss.tolist() == [0.5, 0.5]
        ```
    """
    rewards = implicit_rewards(policy_errors, reference_errors, beta)[:, 0]
    liked = labels > 0
    x = torch.where(liked, 1.0, -1.0).to(rewards) * (rewards - baseline)
    if utility == "sigmoid":
        loss = 1 - torch.sigmoid(x)
    elif utility == "loss_averse":
        loss = 1 - logsigmoid(x)
    elif utility == "risk_seeking":
        loss = 1 + logsigmoid(-x)
    else:
        raise ValueError(f"utility: expected one of {', '.join(UTILITIES)}, got {utility!r}")
    return torch.where(liked, desirable_weight, undesirable_weight).to(loss) * loss


class RunningBaseline:
    """The mean reward of past optimizer steps, kept in checkpoints.

    Args:
        decay (`float`): Share that stays at each step, in [0, 1).

    Attributes:
        value (`float`, *optional*): The mean. None before the first step.
    """

    def __init__(self, decay: float) -> None:
        self.decay, self.mean = decay, StepMean()
        self.value: float | None = None

    @property
    def baseline(self) -> float:
        """Q: the mean, or 0 where it is below 0."""
        return max(self.value or 0.0, 0.0)

    def step(self, accelerator: Accelerator) -> None:
        """Add the mean reward of a step.

        Args:
            accelerator (`Accelerator`): Sums over the processes.
        """
        mean = self.mean.take(accelerator)
        if mean is None:
            return
        before = mean if self.value is None else self.value
        self.value = self.decay * before + (1 - self.decay) * mean

    def save(self, folder: Path, rank: int) -> None:
        """Write the mean into a checkpoint's folder. See `CheckpointPart`."""
        if rank == 0:
            (folder / "kto_baseline.json").write_text(json.dumps({"mean": self.value}))

    def load(self, folder: Path, rank: int, device: torch.device) -> None:
        """Read the mean from a checkpoint's folder. See `CheckpointPart`."""
        self.value = json.loads((folder / "kto_baseline.json").read_text())["mean"]


class DiffusionKTOTrainer(Trainer):
    """Trains on liked and disliked images against a frozen reference.

    Of a pair or a ranked list the best image is a liked one and the worst a disliked
    one.

    Example:
        ```python
        from peft import LoraConfig

        from diffalign import DiffusionKTOConfig, DiffusionKTOTrainer

        trainer = DiffusionKTOTrainer(
            model="shapes",
            args=DiffusionKTOConfig(output_dir="runs/kto", max_steps=5),
            train_dataset="diffalign-quickstart/dataset",  # from `diffalign quickstart`
            peft_config=LoraConfig(r=16, lora_alpha=16),
        )
        trainer.train()
        ```
    """

    method = "diffusion_kto"
    _name = "Diffusion-KTO"
    _tag_names = ("diffusion-kto",)
    _paper: ClassVar[dict[str, str]] = {
        "title": "Aligning Diffusion Models by Optimizing Human Utility",
        "id": "2404.04465",
        "citation": """@inproceedings{li2024aligning,
  title     = {Aligning Diffusion Models by Optimizing Human Utility},
  author    = {Li, Shufan and Kallidromitis, Konstantinos and Gokul, Akash and
               Kato, Yusuke and Kozuka, Kazuki},
  booktitle = {NeurIPS},
  year      = {2024}
}""",
    }
    _not_public: ClassVar[str] = (
        "Whether the released weights were trained with the launcher's learning rate 1e-7 or the "
        "script's default 5e-4."
    )
    config_class = DiffusionKTOConfig
    data_kind = "labelled"
    can_be_online = False
    start_message = (
        "Diffusion-KTO starts at half of the weights and moves slowly. Watch rewards/liked "
        "(rising) and rewards/disliked (falling)"
    )
    args: DiffusionKTOConfig
    baseline: RunningBaseline | None = None
    """Q of past steps, with `baseline: running`."""

    def validate(self) -> None:
        """Note data of one kind alone. See `Trainer.validate`."""
        super().validate()
        share = self.train_dataset.liked_share()
        if share in (0.0, 1.0):
            kind = "liked" if share else "disliked"
            self.notes.append(
                f"WARNING: all images are {kind}, and Diffusion-KTO learns from liked and disliked "
                "ones; check the column of labels (data.columns), or add the other kind"
            )

    def build_source(self) -> BatchSource:
        """Build the source of batches, and the running baseline."""
        if self.args.baseline == "running":
            self.baseline = RunningBaseline(self.args.baseline_decay)
            self.checkpoints.parts.append(self.baseline)
        return super().build_source()

    def compute_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the Diffusion-KTO loss. See `Trainer.compute_loss`."""
        args = self.args
        policy, reference = self.errors(batch)
        assert reference is not None and batch.scores is not None
        labels = batch.scores[:, 0]
        rewards = implicit_rewards(policy.detach(), reference, args.beta)[:, 0]
        if self.baseline is None:
            mean = rewards.mean()
            if torch.is_grad_enabled():  # processes may evaluate unequal numbers of batches
                mean = self.accelerator.reduce(mean, "mean")
            baseline: float | Tensor = mean.clamp(min=0)
        else:
            baseline = self.baseline.baseline
            if torch.is_grad_enabled():
                self.baseline.mean.add(rewards, batch.weights)
        loss = diffusion_kto_loss(
            policy,
            reference,
            labels,
            beta=args.beta,
            baseline=baseline,
            utility=args.utility,
            desirable_weight=args.desirable_weight,
            undesirable_weight=args.undesirable_weight,
        )
        liked = labels > 0
        change = (policy.detach() - reference)[:, 0]
        right = ((torch.where(liked, 1.0, -1.0) * (rewards - baseline)).sign() + 1) / 2
        return loss, {
            "rewards/liked": rewards.masked_fill(~liked, math.nan),
            "rewards/disliked": rewards.masked_fill(liked, math.nan),
            "rewards/accuracies": right,
            "change/liked": change.masked_fill(~liked, math.nan),
            "change/disliked": change.masked_fill(liked, math.nan),
            "kto/baseline": torch.zeros_like(rewards) + baseline,
        }

    def on_optimizer_step(self, step: int) -> None:
        """Move the running baseline. See `Trainer.on_optimizer_step`."""
        if self.baseline is not None:
            self.baseline.step(self.accelerator)
