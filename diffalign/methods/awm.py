"""AWM: Xue et al. 2025, arXiv 2509.25050 (ICML 2026), advantage-weighted matching.

    l    = mean (output - target)^2 at a noised copy of a drawn image
    lp   = -l, weighted by the time                 what stands for log p
    rho  = exp(lp - lp_old)
    A'   = clamp(A, -5, 5) / 5 adv_max
    loss = max(-A' rho, -A' clamp(rho, 1 - eps, 1 + eps))
           + kl_weight KL + average_weight |output - average's output|^2

The policy draws images with any solver, and learns on them as in pre-training, weighted
by their advantages. lp_old is that of the policy at the beginning of the round, at the
same noise and time. In a round of one optimizer step it is the policy itself: rho is 1
and the gradient -A' grad lp. Neither drawing nor training uses guidance.

`ghuber`, the default weighting, has a slope that grows without bound as l falls to 0.
With a negative advantage that is unstable, so the pull to the average of the policy is
on by default, as in the official run files.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cached_property, partial
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from ..config.ranges import Count, Decay, NotNegative, Positive, Range
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
from ..training.reference import BlendedReference, SnapshotReference

WEIGHTINGS = ("uniform", "t", "t2", "huber", "ghuber")


@config_section
class AWMConfig(ForwardProcessConfig):
    """`train:` for `method: awm`.

    Example:
        ```python
        from diffalign import AWMConfig

        args = AWMConfig(output_dir="runs/awm", weighting="uniform")
        assert args.times_per_image == 6
        ```
    """

    weighting: Literal["uniform", "t", "t2", "huber", "ghuber"] = "ghuber"
    """uniform: -l | t, t2: times the share of noise, or its square | huber: the root of
    l, times t | ghuber: the fourth root of l, times 4 t. Source: official run files,
    ghuber."""
    adv_max: Positive[float] = 1.0
    """Advantages are clamped to `adv_clip` and then scaled to this size. Source:
    official run files, 1."""
    clip_range: Annotated[float, Range(0.0, 1.0, above=True)] = 1.0
    """eps: the ratio is kept within [1 - eps, 1 + eps]. Source: official run files,
    1."""
    kl_weight: NotNegative[float] = 1e-3
    """Pull to the starting weights, on the squared difference of the outputs. 0 runs no
    reference. Source: official run files, 1e-3; 3e-3 for OCR, 1e-4 for PickScore."""
    average_weight: NotNegative[float] = 1.0
    """Pull to the average of the policy, on the same difference. 0 for none. Source:
    official run files, 1."""
    average_rate: NotNegative[float] = 0.001
    """Rise of the average's decay per optimizer step. Source: official code, 0.001."""
    max_decay: Decay = 0.3
    """Largest decay of the average, which moves after each round. Source: official
    code, 0.3."""
    off_policy: bool = False
    """Draw with the average, and take lp_old from it. Source: official code, false."""
    times_per_image: Count = 6
    """Times at which each drawn image is trained, one from each equal part of the
    sampler's first nine tenths without the very first. Source: official run files, 6 of
    14 steps; those of PickScore include the first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        most = max(1, int(0.9 * self.num_inference_steps) - 1)
        if self.times_per_image > most:
            raise ConfigError(
                "times_per_image",
                f"expected at most {most}, of {self.num_inference_steps} steps of the sampler, "
                f"got {self.times_per_image}",
            )


def awm_log_probs(errors: Tensor, fractions: Tensor, weighting: str = "ghuber") -> Tensor:
    """Compute the surrogate log-probability of a sample (paper, section 4).

    Args:
        errors (`Tensor`): l, mean squared error at a noised copy, (n,).
        fractions (`Tensor`): t, share of noise in it, from 0 to 1, (n,).
        weighting (`str`, *optional*, defaults to `"ghuber"`): One of `WEIGHTINGS`.

    Returns:
        `Tensor`: (n,), at most 0.

    Raises:
        ValueError: An unknown weighting.
    """
    t = fractions.to(errors)
    if weighting == "uniform":
        return -errors
    if weighting == "t":
        return -errors * t
    if weighting == "t2":
        return -errors * t.square()
    if weighting == "huber":
        return -((errors + 1e-10).sqrt() - 1e-5) * t
    if weighting == "ghuber":
        power = 0.25
        return -((errors + 1e-10) ** power - 1e-10**power) * t / power
    raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, got {weighting!r}")


def awm_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_range: float = 1.0,
    adv_max: float = 1.0,
    adv_clip: float = 5.0,
) -> Tensor:
    """Compute the clipped loss of AWM (paper, eq. 9).

    Args:
        log_probs (`Tensor`): lp of the policy, (n,).
        old_log_probs (`Tensor`): lp of the policy that drew the samples, (n,). No
            gradient flows into them.
        advantages (`Tensor`): (n,).
        clip_range (`float`, *optional*, defaults to `1.0`): eps.
        adv_max (`float`, *optional*, defaults to `1.0`): Size of the largest advantage.
        adv_clip (`float`, *optional*, defaults to `5.0`): Advantages are clamped to it.

    Returns:
        `Tensor`: (n,).
    """
    ratios = (log_probs - old_log_probs.detach()).clamp(-20, 20).exp()
    bounded = ratios.clamp(1 - clip_range, 1 + clip_range)
    sizes = advantages.to(ratios).clamp(-adv_clip, adv_clip) / adv_clip * adv_max
    return torch.maximum(-sizes * ratios, -sizes * bounded)


def stratified_steps(steps: int, count: int, uniforms: Tensor) -> Tensor:
    """Draw one step from each of equal parts of a sampler's first nine tenths.

    The very first step, which is pure noise, is left out.

    Args:
        steps (`int`): Steps of the sampler.
        count (`int`): Number of parts.
        uniforms (`Tensor`): Random numbers in [0, 1), (..., count).

    Returns:
        `Tensor`: Indices of steps, as `uniforms`, in order.
    """
    last = max(2, int(0.9 * steps))
    edges = torch.linspace(1, last, count + 1, dtype=torch.float64).floor()
    width = (edges[1:] - edges[:-1]).clamp(min=1)
    drawn = edges[:-1] + (uniforms.double() * width).floor()
    return drawn.long().clamp(max=max(1, min(last, steps) - 1))


class AveragePolicy(BlendedReference):
    """The average of the policy that AWM stays close to."""

    field = "train.average_weight"
    file = "average_policy.safetensors"


class RoundStart(SnapshotReference):
    """The policy at the beginning of the round, for the ratio."""

    field = "train.steps_per_round"
    file = "round_start.safetensors"


class AWMTrainer(ForwardProcessTrainer):
    """Trains on its own images as in pre-training, weighted by their advantages.

    Example:
        ```python
        from peft import LoraConfig

        from diffalign import AWMConfig, AWMTrainer

        trainer = AWMTrainer(
            model="shapes",
            args=AWMConfig(
                output_dir="runs/awm",
                max_steps=2,
                images_per_prompt=4,
                num_inference_steps=5,
                times_per_image=3,
            ),
            train_dataset="diffalign-quickstart/dataset",  # from `diffalign quickstart`
            peft_config=LoraConfig(r=16, lora_alpha=16),
            scorers=["shapes"],
        )
        trainer.train()
        ```
    """

    method = "awm"
    _name = "AWM"
    _tag_names = ("awm",)
    _paper: ClassVar[dict[str, str]] = {
        "title": "Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models",
        "id": "2509.25050",
        "citation": """@article{xue2025awm,
  title   = {Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models},
  author  = {Xue, Shuchen and Ge, Chongjian and Zhang, Shilong and Li, Yichen and
             Ma, Zhi-Ming},
  journal = {arXiv preprint arXiv:2509.25050},
  year    = {2025}
}""",
    }
    _not_public: ClassVar[str] = "Settings of models that predict noise, which are ours."
    config_class = AWMConfig
    args: AWMConfig
    average: AveragePolicy | None = None
    """Average of the policy, with `average_weight` or `off_policy`."""
    average_policy: Denoiser
    round_start: RoundStart | None = None
    """The policy at the beginning of the round, if a round has several steps."""
    start_policy: Denoiser

    def build_source(self) -> RolloutSource:
        """Build the source of batches, and the other policies."""
        args = self.args
        if args.average_weight or args.off_policy:
            self.average = AveragePolicy(self.network, 0.0)
            self.average.start()
            self.checkpoints.parts.append(self.average)
            self.average_policy = self._denoiser(partial(self.average.predict, self.backbone))
        if self.steps_in_round > 1 and not args.off_policy:
            self.round_start = RoundStart(self.network)
            self.round_start.start()
            self.checkpoints.parts.append(self.round_start)
            self.start_policy = self._denoiser(partial(self.round_start.predict, self.backbone))
        return super().build_source()

    def drawing_weights(self) -> AbstractContextManager[None]:
        """Return the context in which the network draws: as it is, or its average."""
        if not self.args.off_policy or self.average is None:
            return super().drawing_weights()
        return self.average.in_place(self.average.weights)

    @cached_property
    def sampler(self) -> PolicySampler:
        """Sampler that draws with the policy, or with its average if off-policy."""
        drawing = self.average_policy if self.args.off_policy else None
        return self.policy_sampler(self.sampler_config(), policy=drawing)

    def trained_steps(self, steps: int) -> int:
        """Return at how many times an image is trained."""
        return self.args.times_per_image

    def step_order(self, batch: Batch, steps: int, stream: str = "") -> Tensor:
        """Draw the times of each group, one from each part of the sampler's times."""
        count = self.args.times_per_image
        generators = batch.generators(f"step-order{stream}")
        uniforms = [torch.rand(count, generator=g) for g in generators]
        return stratified_steps(steps, count, torch.stack(uniforms))

    def begin_round(self, number: int) -> None:
        """Remember the policy that draws. See `OnPolicyTrainer.begin_round`."""
        super().begin_round(number)
        if self.round_start is not None:
            self.round_start.take()

    def on_optimizer_step(self, step: int) -> None:
        """Move the average towards the policy after each round."""
        if self.average is not None and self.round_is_over:
            self.average.decay = min(step * self.args.average_rate, self.args.max_decay)
            self.average.blend()

    def _log_probs(self, batch: Batch, output: Tensor, times: Tensor) -> Tensor:
        target = self.schedule.target(batch.x0.flatten(0, 1), batch.noise.flatten(0, 1), times)
        errors = (output - target.float()).square().flatten(1).mean(1)
        return awm_log_probs(errors, self.schedule.fraction(times), self.args.weighting)

    def _old_log_probs(self, batch: Batch) -> Tensor | None:
        """Those of the policy that drew the images, at the same noise and times. None
        where that is the policy itself."""
        if self.args.off_policy:
            drawing = self.average_policy
        elif self.round_start is not None:
            drawing = self.start_policy
        else:
            return None
        with torch.no_grad():
            output, _, times = self.output_at(batch, drawing)
            return self._log_probs(batch, output, times)

    def compute_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of one time of every image. See `Trainer.compute_loss`."""
        args, shape = self.args, (len(batch), batch.k)
        old_log_probs = self._old_log_probs(batch)
        reference = average = None
        if self.reference is not None:
            reference = self.fixed_output(batch, self.reference)
        if args.average_weight:
            average = self.fixed_output(batch, self.average_policy)
        output, _, times = self.output_at(batch, self.policy)
        log_probs = self._log_probs(batch, output, times)
        if old_log_probs is None:
            old_log_probs = log_probs.detach()
        loss = awm_loss(
            log_probs,
            old_log_probs,
            batch.extra["advantages"].to(output).flatten(),
            clip_range=args.clip_range,
            adv_max=args.adv_max,
            adv_clip=args.adv_clip,
        ).unflatten(0, shape)
        with torch.no_grad():
            log_ratios = (log_probs - old_log_probs).unflatten(0, shape)
            metrics = {
                **self.round_metrics(batch),
                "policy/log_ratio": log_ratios.abs().mean(1),
                "policy/log_prob": log_probs.unflatten(0, shape).mean(1),
            }
        if reference is not None:
            distance = output_distance(output, reference).unflatten(0, shape)
            loss = loss + args.kl_weight * distance
            metrics["policy/kl"] = distance.detach().mean(1)
        if average is not None:
            distance = output_distance(output, average).unflatten(0, shape)
            loss = loss + args.average_weight * distance
            metrics["policy/since_average"] = distance.detach().mean(1)
        return loss.mean(1), metrics
