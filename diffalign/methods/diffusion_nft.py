"""DiffusionNFT: Zheng et al. 2025, arXiv 2509.16117 (ICLR 2026).

    r    = clamp(A / A_max, -1, 1) / 2 + 1/2          how good a drawn image is
    x0+  = b x0_theta + (1 - b) x0_old                the positive policy
    x0-  = (1 + b) x0_old - b x0_theta                the negative policy
    loss = A_max (r |x0+ - x0|^2 / w+ + (1 - r) |x0- - x0|^2 / w-) / b + kl_weight KL

x0 is an image that the old policy drew, x0_theta and x0_old are what policy and old
policy predict from a noised copy of it. w+ and w- are the mean absolute differences,
without gradient. KL is the squared difference of the outputs of policy and base. The
paper mixes velocities. The clean prediction is linear in the output, so that mixing x0
is the same, and serves models that predict noise as well.

The old policy draws the images. After each round it moves towards the policy: old <-
decay old + (1 - decay) theta. Drawing needs no log-probabilities, so any solver serves.
Neither drawing nor training uses guidance.

At theta = old the gradient is (2 r - 1) A_max times that of fine-tuning on the image,
whatever b. An image of average score then gives none.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cached_property, partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..config.ranges import Count, Decay, NotNegative, Positive
from ..config.section import config_section
from ..errors import ConfigError
from ..training.batch import Batch
from ..training.denoiser import Denoiser
from ..training.online.forward_process import (
    ForwardProcessConfig,
    ForwardProcessTrainer,
    output_distance,
)
from ..training.online.policy_sampler import PolicySampler
from ..training.online.source import RolloutSource
from ..training.reference import BlendedReference

MODES = ("all", "positive_only", "negative_only", "one_only", "binary")


@config_section
class DiffusionNFTConfig(ForwardProcessConfig):
    """`train:` for `method: diffusion_nft`.

    Example:
        ```python
        from diffalign import DiffusionNFTConfig

        args = DiffusionNFTConfig(output_dir="runs/nft", images_per_prompt=8, beta=1.0)
        assert args.guidance_scale == 1.0
        ```
    """

    beta: Positive[float] = 1.0
    """b: how far the positive and the negative policy lie from the old one. Source:
    official code, 1; 0.1 for OCR and several rewards."""
    advantage_mode: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = "all"
    """all | positive_only | negative_only: of one sign | one_only: 1 where positive,
    else 0 | binary: the sign. Source: official code."""
    decay_start: NotNegative[int] = 0
    """Optimizer steps during which the old policy is the policy. Source: official code,
    0; 75 in its second schedule."""
    decay_rate: NotNegative[float] = 0.001
    """Rise of the decay per optimizer step after that. Source: official code, 0.001;
    0.0075 in its second schedule."""
    max_decay: Decay = 0.5
    """Largest decay of the old policy. 0 makes it the policy. Source: official code,
    0.5; 0.999 in its second schedule."""
    times_per_image: Count | None = None
    """Times at which each drawn image is trained, in random order. None for all times
    of the sampler but the last hundredth. Source: official code, 9 of 10."""

    def __post_init__(self) -> None:
        super().__post_init__()
        most = trained_times(self.num_inference_steps)
        if self.times_per_image is not None and self.times_per_image > most:
            raise ConfigError(
                "times_per_image",
                f"expected at most {most}, of {self.num_inference_steps} steps of the sampler, "
                f"got {self.times_per_image}",
            )


def trained_times(steps: int) -> int:
    """Return how many times of a sampler are trained: all but the last hundredth.

    Args:
        steps (`int`): Steps of the sampler.
    """
    return max(1, int(steps * 0.99))


def optimality(advantages: Tensor, *, adv_clip: float = 5.0, mode: str = "all") -> Tensor:
    """Turn advantages into the probabilities that images are good (paper, section 3).

    Args:
        advantages (`Tensor`): Any shape.
        adv_clip (`float`, *optional*, defaults to `5.0`): A_max, the advantage of a
            probability of 1.
        mode (`str`, *optional*, defaults to `"all"`): One of `MODES`.

    Returns:
        `Tensor`: In [0, 1], as `advantages`.

    Raises:
        ValueError: An unknown mode.

    Example:
        ```python
        import torch

        r = optimality(torch.tensor([-7.0, 0.0, 1.0]))
        assert torch.allclose(r, torch.tensor([0.0, 0.5, 0.6]))
        ```
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if mode == "positive_only":
        advantages = advantages.clamp(min=0)
    elif mode == "negative_only":
        advantages = advantages.clamp(max=0)
    elif mode == "one_only":
        advantages = (advantages > 0).to(advantages)
    elif mode == "binary":
        advantages = advantages.sign()
    return (advantages / adv_clip).clamp(-1, 1) / 2 + 0.5


def nft_loss(
    x0_policy: Tensor, x0_old: Tensor, x0: Tensor, optimality: Tensor, *, beta: float
) -> Tensor:
    """Compute the loss of DiffusionNFT without A_max and KL (paper, eq. 5).

    Args:
        x0_policy (`Tensor`): Clean samples that the policy predicts, (n, ...).
        x0_old (`Tensor`): Those of the old policy, (n, ...). No gradient flows into
            them.
        x0 (`Tensor`): The drawn samples, (n, ...).
        optimality (`Tensor`): r in [0, 1], (n,).
        beta (`float`): b.

    Returns:
        `Tensor`: (n,).
    """
    old = x0_old.detach()
    positive = beta * x0_policy + (1 - beta) * old
    negative = (1 + beta) * old - beta * x0_policy

    def weighted(prediction: Tensor) -> Tensor:
        difference = prediction - x0
        size = difference.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
        return difference.square().flatten(1).mean(1) / size

    good = optimality.to(x0_policy)
    return (good * weighted(positive) + (1 - good) * weighted(negative)) / beta


def old_decay(step: int, *, start: int, rate: float, largest: float) -> float:
    """Compute the decay of the old policy after a round.

    Args:
        step (`int`): Optimizer steps done.
        start (`int`): Steps during which it is 0.
        rate (`float`): Rise per step after that.
        largest (`float`): Largest value.

    Returns:
        `float`: In [0, `largest`].
    """
    return min(max(step - start, 0) * rate, largest)


class OldPolicy(BlendedReference):
    """The policy that draws the images of a run, an average of earlier ones."""

    field = "train.max_decay"
    file = "old_policy.safetensors"


class DiffusionNFTTrainer(ForwardProcessTrainer):
    """Trains towards its good images and away from its bad ones, at noised copies.

    Example:
        ```python
        from peft import LoraConfig

        from diffalign import DiffusionNFTConfig, DiffusionNFTTrainer

        trainer = DiffusionNFTTrainer(
            model="shapes",
            args=DiffusionNFTConfig(
                output_dir="runs/nft",
                max_steps=2,
                images_per_prompt=4,
                num_inference_steps=5,
            ),
            train_dataset="diffalign-quickstart/dataset",  # from `diffalign quickstart`
            peft_config=LoraConfig(r=16, lora_alpha=16),
            scorers=["shapes"],
        )
        trainer.train()
        ```
    """

    method = "diffusion_nft"
    _name = "DiffusionNFT"
    _tag_names = ("diffusion-nft",)
    _paper: ClassVar[dict[str, str]] = {
        "title": "DiffusionNFT: Online Diffusion Reinforcement with Forward Process",
        "id": "2509.16117",
        "citation": """@inproceedings{zheng2026diffusionnft,
  title     = {DiffusionNFT: Online Diffusion Reinforcement with Forward Process},
  author    = {Zheng, Kaiwen and Chen, Huayu and Ye, Haotian and Wang, Haoxiang and
               Zhang, Qinsheng and Jiang, Kai and Su, Hang and Ermon, Stefano and Zhu, Jun and
               Liu, Ming-Yu},
  booktitle = {ICLR},
  year      = {2026}
}""",
    }
    _not_public: ClassVar[str] = "Settings of full fine-tuning, which the code refuses."
    config_class = DiffusionNFTConfig
    args: DiffusionNFTConfig
    old: OldPolicy
    old_policy: Denoiser

    def build_source(self) -> RolloutSource:
        """Build the source of batches, and the old policy."""
        self.old = OldPolicy(self.network, 0.0)
        self.old.start()
        self.checkpoints.parts.append(self.old)
        self.old_policy = self._denoiser(partial(self.old.predict, self.backbone))
        return super().build_source()

    def drawing_weights(self) -> AbstractContextManager[None]:
        """Return the context in which the network is the old policy."""
        return self.old.in_place(self.old.weights)

    @cached_property
    def sampler(self) -> PolicySampler:
        """Sampler that draws with the old policy."""
        return self.policy_sampler(self.sampler_config(), policy=self.old_policy)

    def trained_steps(self, steps: int) -> int:
        """Return at how many times an image is trained."""
        return self.args.times_per_image or trained_times(steps)

    def step_order(self, batch: Batch, steps: int, stream: str = "") -> Tensor:
        """Draw the times of each group at random, without repetition."""
        count = trained_times(steps)
        generators = batch.generators(f"step-order{stream}")
        orders = [torch.randperm(count, generator=g) for g in generators]
        return torch.stack(orders)[:, : self.trained_steps(steps)]

    def on_optimizer_step(self, step: int) -> None:
        """Move the old policy towards the policy after each round."""
        if self.round_is_over:
            args = self.args
            self.old.decay = old_decay(
                step, start=args.decay_start, rate=args.decay_rate, largest=args.max_decay
            )
            self.old.blend()

    def compute_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of one time of every image. See `Trainer.compute_loss`."""
        args, shape = self.args, (len(batch), batch.k)
        old_output = self.fixed_output(batch, self.old_policy)
        reference = None
        if self.reference is not None:
            reference = self.fixed_output(batch, self.reference)
        output, noisy, times = self.output_at(batch, self.policy)
        x0 = batch.x0.flatten(0, 1)
        good = optimality(
            batch.extra["advantages"].to(output), adv_clip=args.adv_clip, mode=args.advantage_mode
        )
        predictions = [self.schedule.to_x0(value, noisy, times) for value in (output, old_output)]
        loss = args.adv_clip * nft_loss(
            predictions[0], predictions[1], x0, good.flatten(), beta=args.beta
        ).unflatten(0, shape)
        metrics = {
            **self.round_metrics(batch),
            "policy/optimality": good.mean(1),
            "policy/since_old": output_distance(output.detach(), old_output)
            .unflatten(0, shape)
            .mean(1),
        }
        if reference is not None:
            distance = output_distance(output, reference).unflatten(0, shape)
            loss = loss + args.kl_weight * distance
            metrics["policy/kl"] = distance.detach().mean(1)
        # An image without a score is neither good nor bad: 1/2 would be a judgement.
        # Rounds in checkpoints of earlier versions have no `judged`.
        judged = batch.extra.get("judged", torch.ones_like(loss)).to(loss)
        return (judged * loss).sum(1) / judged.sum(1).clamp(min=1), metrics
