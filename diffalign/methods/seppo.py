"""SePPO: Zhang, Lan et al. 2024, arXiv 2410.05255, eq. 7-14.

    ref  ~ one of the past checkpoints theta_0 ... theta_{k-1},  x_ref ~ p_ref(. | c)
    d_w  = m_w - r_w,  d_ref = m_ref - r_ref          error changes on winner and x_ref
    a    = sign(-d_w), averaged over draws, detached
    loss = -log sigmoid(-(beta/2) (d_w - a d_ref))

The data are winners alone. The rival x_ref is an image of the reference, which is a
past checkpoint. If the policy denoises the winner better than the reference does (a =
+1), x_ref is the loser, as in Diffusion-DPO. Otherwise (a = -1) x_ref is probably good,
and the policy learns from it too. `anchor: indicator` ignores it then (a = 0).

At the first step policy and reference are equal, and sgn(0) is taken as +1
(`zero_anchor`). The training code is not public. The paper leaves beta, learning rate,
sampler and noise sharing open. T and omega are inside beta, in Diffusion-DPO's
convention.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Annotated, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..config.ranges import BatchSize, Count, NotNegative, OneOf, Positive, count
from ..config.section import config_section
from ..errors import ConfigError
from ..likelihood import group_noise, implicit_rewards
from ..training.batch import Batch
from ..training.config import TrainingConfig
from ..training.diagnostics import pair_metrics
from ..training.online.checkpoint_pool import STRATEGIES, CheckpointPool
from ..training.online.rollout import Rollout, SamplerConfig, sampling_mode
from ..training.online.source import RoundSource
from ..training.reference import Reference
from ..training.sharding import is_fsdp
from ..training.trainer import Trainer

Anchor = Literal["sign", "indicator"]
ANCHORS = get_args(Anchor)


@config_section
class SePPOConfig(TrainingConfig):
    """`train:` for `method: seppo`.

    Example:
        ```python
        from diffalign import SePPOConfig

        args = SePPOConfig(output_dir="runs/seppo", pool_save_steps=10, max_steps=2000)
        assert args.ref_strategy == "random"
        ```
    """

    beta: Positive[float] = 2000.0
    """Strength of the pull to the reference, in Diffusion-DPO's convention; not public.
    Source: not public; Diffusion-DPO's for SD1.5."""
    ref_strategy: Annotated[str, OneOf(STRATEGIES)] = "random"
    """Which past checkpoint is the reference of a step: random (the method) | initial |
    latest. Source: paper: random; the others are its ablations."""
    pool_save_steps: Count = 30
    """Optimizer steps between two checkpoints of the pool. Source: paper, every 30
    updates."""
    pool_size: Annotated[int, count(2)] = 8
    """Most checkpoints in the pool. The oldest one is dropped, but never the initial
    one. Source: paper, 7 rounds and the initial model."""
    anchor: Anchor = "sign"
    """sign: a is +1 or -1 | indicator: 1 or 0. Source: paper; indicator is its
    ablation."""
    anchor_samples: Count = 1
    """Draws of (noise, timestep) over which the anchor criterion is averaged; the paper
    takes the training draw alone. Source: paper: one draw."""
    zero_anchor: Annotated[float, OneOf((0.0, 1.0))] = 1.0
    """a where policy and reference are equal, as at the first step: 1 or 0. Source:
    ours: the paper does not say what sgn(0) is."""
    num_inference_steps: Annotated[int, count(2, 1000)] = 50
    """Steps of the sampler that draws the reference's images. Source: not public; the
    baseline's 50."""
    guidance_scale: float = 7.5
    """Classifier-free guidance while sampling. Source: official test script, 7.5."""
    eta: NotNegative[float] = 0.0
    """Stochasticity of the sampler. Source: not public; the baseline's deterministic
    sampler."""
    rollout_batch_size: BatchSize = 8
    """Images sampled at once. Source: ours."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precompute_ref_errors:
            raise ConfigError(
                "precompute_ref_errors", "the reference changes while training; set it to false"
            )

    @property
    def error_beta(self) -> float | None:
        """`beta`. See `TrainingConfig.error_beta`."""
        return self.beta


def anchors(winner_changes: Tensor, kind: str = "sign", zero: float = 1.0) -> Tensor:
    """Compute the anchor a from the winner's error change m - r.

    Args:
        winner_changes (`Tensor`): Error changes, averaged over draws, any shape.
        kind (`str`, *optional*, defaults to `"sign"`): `sign` or `indicator`.
        zero (`float`, *optional*, defaults to `1.0`): a where the change is 0.

    Returns:
        `Tensor`: +1 where the policy is better. -1 (or 0 with `indicator`) where it is
        worse. No gradient, the same shape.
    """
    changes = winner_changes.detach()
    worse = torch.full_like(changes, -1.0 if kind == "sign" else 0.0)
    values = torch.where(changes < 0, torch.ones_like(changes), worse)
    return torch.where(changes == 0, torch.full_like(changes, zero), values)


def seppo_loss(
    policy_errors: Tensor,
    reference_errors: Tensor,
    *,
    beta: float,
    anchor: str = "sign",
    zero_anchor: float = 1.0,
    anchor_values: Tensor | None = None,
) -> Tensor:
    """Compute the SePPO loss (paper, eq. 7-14).

    Args:
        policy_errors (`Tensor`): (g, 2), the winner and the reference's image.
        reference_errors (`Tensor`): (g, 2), at the same noisy samples.
        beta (`float`): Strength of the pull to the reference.
        anchor (`str`, *optional*, defaults to `"sign"`): `sign` or `indicator`.
        zero_anchor (`float`, *optional*, defaults to `1.0`): a where the winner's
            errors are equal.
        anchor_values (`Tensor`, *optional*): a from other draws, (g,). +1 everywhere
            gives Diffusion-DPO's loss. Defaults to a from these errors.

    Returns:
        `Tensor`: Loss per group, (g,).

    Raises:
        ValueError: Another anchor.
    """
    if anchor not in ANCHORS:
        raise ValueError(f"anchor: expected one of {', '.join(ANCHORS)}, got {anchor!r}")
    rewards = implicit_rewards(policy_errors, reference_errors, beta)
    if anchor_values is None:
        anchor_values = anchors(policy_errors[:, 0] - reference_errors[:, 0], anchor, zero_anchor)
    return softplus(-(rewards[:, 0] - anchor_values.to(rewards) * rewards[:, 1]))


class SePPOTrainer(Trainer):
    """Trains on winners against images that past checkpoints of the policy draw.

    Example:
        ```python
        from peft import LoraConfig

        from diffalign import SePPOConfig, SePPOTrainer

        trainer = SePPOTrainer(
            model="shapes",
            args=SePPOConfig(
                output_dir="runs/seppo", max_steps=2, num_inference_steps=5
            ),
            train_dataset="diffalign-quickstart/dataset",
            peft_config=LoraConfig(r=16, lora_alpha=16),
        )
        trainer.train()
        ```
    """

    method = "seppo"
    _name = "SePPO"
    _tag_names = ("seppo",)
    _paper: ClassVar[dict[str, str]] = {
        "title": "SePPO: Semi-Policy Preference Optimization for Diffusion Alignment",
        "id": "2410.05255",
        "citation": """@article{zhang2024seppo,
  title   = {SePPO: Semi-Policy Preference Optimization for Diffusion Alignment},
  author  = {Zhang, Daoan and Lan, Guangchen and Han, Dong-Jun and Yao, Wenlin and
             Pan, Xiaoman and Zhang, Hongming and Li, Mingxiao and others},
  journal = {arXiv preprint arXiv:2410.05255},
  year    = {2024}
}""",
    }
    _not_public: ClassVar[str] = (
        "Training code, beta, learning rate, the sampler of the reference's images, and "
        "whether the pair shares its noise."
    )
    config_class = SePPOConfig
    data_kind = "single"
    can_be_online = False
    args: SePPOConfig

    def build_reference(self) -> Reference:
        """Build the pool of past checkpoints."""
        return CheckpointPool(
            self.network, self.output_dir / "pool", self.args.pool_size, self.args.ref_strategy
        )

    @cached_property
    def rollout(self) -> Rollout:
        """How the reference's images are drawn."""
        args = self.args
        sampler = SamplerConfig(
            args.num_inference_steps,
            self.guidance_scale,
            args.eta,
            args.rollout_batch_size,
            keep="final",
        )
        grid = self.make_grid(sampler.num_inference_steps, sampler.eta)
        return Rollout(
            self.backbone,
            self.schedule,
            sampler,
            "sampling from the reference",
            grid=grid,
            fixed_batch_size=is_fsdp(self.accelerator),
        )

    @property
    def pool(self) -> CheckpointPool:
        """The past checkpoints."""
        assert isinstance(self.reference_model, CheckpointPool)
        return self.reference_model

    def build_source(self) -> RoundSource:
        """Build a source that draws the reference's images batch by batch."""
        return RoundSource(self._round, 1)

    def _round(self, number: int, batches: list[Batch]) -> list[Batch]:
        return [self.with_rivals(batch) for batch in batches]

    def prepare(self, batch: Batch) -> Batch:
        """Draw the reference's images for an evaluation.

        Args:
            batch (`Batch`): Groups of one image. Groups of two, as in training, stay.
        """
        if batch.k > 1:
            return batch
        return self.with_rivals(batch)

    @torch.no_grad()
    def with_rivals(self, batch: Batch) -> Batch:
        """Choose the reference of the optimizer step and add its image to every winner.

        Args:
            batch (`Batch`): g groups of one image.

        Returns:
            `Batch`: g groups of two images, the winner first.
        """
        self.pool.choose(self.args.seed, self.state.global_step)
        empty = self.data_pipeline.builder.unconditional(batch.condition)
        main = self.accelerator.is_main_process
        assert self.reference is not None
        with sampling_mode(self.network), self.accelerator.autocast():
            drawn = self.rollout(
                self.reference.predict,
                batch,
                1,
                empty,
                purpose="seppo",
                decode=False,
                progress=main,
            )
        noise, weights = batch.noise, batch.weights
        if drawn.broken is not None and drawn.broken.any():
            lost = drawn.broken[:, 0]
            self.accelerator.print(
                f"{int(lost.sum())} of {len(lost)} images of the reference left out: not finite"
            )
            weights = weights * (~lost).to(weights)
        if self.args.shared_noise:
            rival = noise
        else:
            rival = group_noise(
                noise.shape[2:],
                1,
                batch.generators("rival-noise"),
                offset=self.args.noise_offset,
            ).to(noise.device)
        return dataclasses.replace(
            batch,
            x0=torch.cat([batch.x0, drawn.final.to(batch.x0.device)], 1),
            noise=torch.cat([noise, rival], 1),
            weights=weights,
            condition={
                name: value.repeat_interleave(2, 0) for name, value in batch.condition.items()
            },
        )

    def compute_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the SePPO loss. See `Trainer.compute_loss`."""
        policy, reference = self.errors(batch)
        assert reference is not None
        args = self.args
        change = (policy[:, 0] - reference[:, 0]).detach()
        if args.anchor_samples > 1:
            change = self._averaged_change(batch, change)
        a = anchors(change, args.anchor, args.zero_anchor)
        loss = seppo_loss(policy, reference, beta=args.beta, anchor=args.anchor, anchor_values=a)
        metrics = pair_metrics(policy, reference, args.beta, self.schedule.fraction(batch.times))
        return loss, {
            **metrics,
            "anchor/better": (a > 0).to(policy),
            "pool/reference": torch.full_like(change, self.pool.current),
        }

    @torch.no_grad()
    def _averaged_change(self, batch: Batch, first: Tensor) -> Tensor:
        """Average the winner's error change over the training draw and others."""
        winners = {
            name: value.unflatten(0, (len(batch), -1))[:, 0]
            for name, value in batch.condition.items()
        }
        generators, total = batch.generators("anchor"), first.clone()
        builder = self.data_pipeline.builder
        for _ in range(self.args.anchor_samples - 1):
            uniforms = torch.cat(
                [torch.rand(1, generator=g, dtype=torch.float64) for g in generators]
            )
            noise = group_noise(batch.x0.shape[2:], 1, generators, offset=self.args.noise_offset)
            times = builder.times(uniforms, batch.x0.shape[2:])
            drawn = dataclasses.replace(
                batch,
                x0=batch.x0[:, :1],
                noise=noise.to(first.device),
                times=times,
                condition=winners,
            )
            with sampling_mode(self.network):
                total += (self.sampling_policy.errors(drawn) - self.reference_errors(drawn))[:, 0]
        return total / self.args.anchor_samples

    def on_optimizer_step(self, step: int) -> None:
        """Add the weights to the pool every `pool_save_steps`.

        Args:
            step (`int`): Optimizer steps done.
        """
        if step % self.args.pool_save_steps == 0:
            self.pool.append(step, self.accelerator.is_main_process)
