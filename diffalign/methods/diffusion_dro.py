"""Diffusion-DRO: Wu et al. 2025, arXiv 2510.18353.

    x^E_t = alpha_t x0 + sigma_t e          a noised image of the data (expert)
    x^P_t, y                                a state on a trajectory of the snapshot, and
                                            the snapshot's own output there
    d    = (m_E - r_E) - (m_P - r_P)
    loss = max(d + margin, 0)

m_E and r_E are the errors of policy and reference at x^E_t against e, m_P and r_P their
errors at x^P_t against y. Expert and policy sample of a row share the time t. The
snapshot is the policy of at most `sync_every` optimizer steps ago. Only images are
needed, no pairs: the policy's own samples take the place of rejected images. The paper
takes the 500 best images of a whole dataset, which `diffalign score --best 500`
chooses, and `diffalign data build --best 500` among drawn ones. The best image of each
prompt, also of prompts whose images are all bad, teaches less
(`benchmarks/study_dro.md`).

With `sync_every: 1` the snapshot is the policy, so that m_P has no gradient, and the
update is that of SFT on the rows whose d + margin is above 0. A larger value lets the
policy depart from its earlier self.

The official code draws a whole trajectory and uses one random step of it. Here the step
is drawn first, and the sampler stops there, which gives the same samples for half of
the work. The code samples with DPM-Solver++, while this samples with DDIM or the Euler
steps of a flow. v-prediction and flow models take v or the velocity in place of e.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..config.ranges import BatchSize, Count, NotNegative, count
from ..config.section import config_section
from ..errors import ConfigError
from ..likelihood.schedules import NoiseSchedule, VariancePreserving
from ..runtime.distributed import sharded_modules
from ..training.batch import Batch
from ..training.config import TrainingConfig
from ..training.denoiser import Denoiser
from ..training.loop import BatchSource
from ..training.online.rollout import guide, sampling_mode, transition
from ..training.reference import SnapshotReference
from ..training.trainer import Trainer


@config_section
class DiffusionDROConfig(TrainingConfig):
    """`train:` for `method: diffusion_dro`.

    Example:
        ```python
        from diffalign import DiffusionDROConfig

        args = DiffusionDROConfig(output_dir="runs/dro", sync_every=4, max_steps=1600)
        assert args.margin == 0.001
        ```
    """

    margin: NotNegative[float] = 1e-3
    """How far the expert's error must fall below that of the policy's own samples, both
    relative to the reference. Source: paper and official code, 0.001."""
    num_inference_steps: Annotated[int, count(2, 1000)] = 20
    """Steps of the sampler. Source: paper and official code, 20."""
    guidance_scale: float = 1.0
    """Classifier-free guidance while sampling. 1 runs the conditional branch alone.
    Source: official code, 1."""
    perturb_times: bool = True
    """Shift the sampler's times by a random offset per row, so that all times train.
    Source: paper and official code."""
    sync_every: Count = 1
    """Optimizer steps between two snapshots of the policy that samples. Source:
    official code, 1."""
    rollout_batch_size: BatchSize = 8
    """Images sampled at once. Source: ours; it changes no sample."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precompute_ref_errors:
            raise ConfigError(
                "precompute_ref_errors",
                "the reference is run on samples that are drawn while training; set it to false",
            )
        if self.timestep_sampling != "auto" or (self.min_timestep, self.max_timestep) != (0, 1000):
            raise ConfigError(
                "timestep_sampling",
                "the times are those of the sampler; leave out timestep_sampling, min_timestep "
                "and max_timestep",
            )


def dro_loss(policy_errors: Tensor, reference_errors: Tensor, *, margin: float) -> Tensor:
    """Compute the Diffusion-DRO loss.

    Args:
        policy_errors (`Tensor`): (g, 2): at the expert's sample, and at the policy's
            own sample against the snapshot's output there.
        reference_errors (`Tensor`): (g, 2), of the reference at the same samples.
        margin (`float`): At least 0.

    Returns:
        `Tensor`: Loss per row, (g,).

    Raises:
        ValueError: Other shapes.

    Example:
        ```python
        import torch

        policy = torch.tensor([[0.100, 0.000], [0.090, 0.010]])
        reference = torch.tensor([[0.100, 0.000], [0.095, 0.002]])
        loss = dro_loss(policy, reference, margin=0.001)
        assert torch.allclose(loss, torch.tensor([0.001, 0.0]))
        ```
    """
    if policy_errors.shape[1:] != (2,) or reference_errors.shape != policy_errors.shape:
        raise ValueError(
            f"errors: expected (g, 2) of policy and reference, got {tuple(policy_errors.shape)} "
            f"and {tuple(reference_errors.shape)}"
        )
    change = policy_errors - reference_errors
    return torch.relu(change[:, 0] - change[:, 1] + margin)


def shifted_grid(
    schedule: NoiseSchedule, times: Tensor, uniforms: Tensor, perturb: bool = True
) -> Tensor:
    """Shift a sampler's times by an own offset for each row.

    Args:
        schedule (`NoiseSchedule`): Noise schedule of the model.
        times (`Tensor`): Times of the sampler, from noisy to clean, (S,).
        uniforms (`Tensor`): Random numbers in [0, 1), (n,).
        perturb (`bool`, *optional*, defaults to `True`): False repeats `times`.

    Returns:
        `Tensor`: (n, S). For timesteps a uniform offset of whole steps that covers all
        timesteps. For sigmas each one moves by the same fraction towards the next; the
        first stays, since sampling starts from pure noise.
    """
    steps, rows = len(times), len(uniforms)
    if not perturb:
        return times.expand(rows, steps).clone()
    if isinstance(schedule, VariancePreserving):
        ratio = schedule.num_timesteps // steps
        offset = (uniforms * ratio).long().clamp(max=ratio - 1)
        return torch.arange(steps).flip(0) * ratio + offset[:, None]
    following = torch.cat([times[1:], times.new_zeros(1)])
    shift = (following - times) * uniforms[:, None]
    shift[:, 0] = 0.0
    return times + shift


class PolicySnapshot(SnapshotReference):
    """The weights that draw the samples of a run, beside those of its reference."""

    description = "the policy at the last snapshot"
    field = "train.sync_every"
    file = "sampler.safetensors"


class DiffusionDROTrainer(Trainer):
    """Trains on single images against samples of the policy itself.

    Of a pair or a ranked list it takes the best image.

    Example:
        ```python
        from peft import LoraConfig

        from diffalign import DiffusionDROConfig, DiffusionDROTrainer

        trainer = DiffusionDROTrainer(
            model="shapes",
            args=DiffusionDROConfig(output_dir="runs/dro", max_steps=5),
            train_dataset="diffalign-quickstart/dataset",  # from `diffalign quickstart`
            peft_config=LoraConfig(r=16, lora_alpha=16),
        )
        trainer.train()
        ```
    """

    method = "diffusion_dro"
    _name = "Diffusion-DRO"
    _tag_names = ("diffusion-dro",)
    _paper: ClassVar[dict[str, str]] = {
        "title": "Ranking-based Preference Optimization for Diffusion Models from Implicit User "
        "Feedback",
        "id": "2510.18353",
        "citation": """@inproceedings{wu2025ranking,
  title     = {Ranking-based Preference Optimization for Diffusion Models from Implicit User
               Feedback},
  author    = {Wu, Yi-Lun and Ruan, Bo-Kai and Tseng, Chiang and Shuai, Hong-Han},
  booktitle = {NeurIPS},
  year      = {2025}
}""",
    }
    _not_public: ClassVar[str] = (
        "Seeds, the 500 images of the paper other than as archives, and the settings of SDXL."
    )
    config_class = DiffusionDROConfig
    data_kind = "single"
    can_be_online = False
    start_message = ""
    args: DiffusionDROConfig
    snapshot: PolicySnapshot | None = None
    """The policy of an earlier step, with `sync_every` above 1."""

    def build_source(self) -> BatchSource:
        """Build the source of batches, and take the first snapshot."""
        if self.args.sync_every > 1:
            self.snapshot = PolicySnapshot(self.network)
            self.snapshot.start()
            self.checkpoints.parts.append(self.snapshot)
        return super().build_source()

    @contextmanager
    def _sampler(self) -> Iterator[Denoiser]:
        """The network that samples, without dropout."""
        if self.snapshot is None:
            with sampling_mode(self.network):
                yield self.sampling_policy
        else:
            yield self._denoiser(partial(self.snapshot.predict, self.backbone))

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Batch:
        """Sample to a random step of each row.

        Args:
            batch (`Batch`): Groups of one image.

        Returns:
            `Batch`: `times` are those of the sampled states, in
            `extra["policy_sample"]`, and `extra["sampler_output"]` is the output there.
        """
        args, rows = self.args, len(batch)
        streams = batch.generators("diffusion_dro")
        uniforms = torch.stack([torch.rand(2, generator=g, dtype=torch.float64) for g in streams])
        noise = torch.stack([torch.randn(batch.x0.shape[2:], generator=g) for g in streams])
        grid = self.make_grid(args.num_inference_steps, 0.0)
        times = shifted_grid(self.schedule, grid.times, uniforms[:, 1], args.perturb_times)
        last = (uniforms[:, 0] * len(grid)).long().clamp(max=len(grid) - 1)
        empty = None
        if self.backbone.guidance_rule.active(self.guidance_scale):
            empty = self.data_pipeline.builder.unconditional(batch.condition)
        # Processes of a sharded network must run equal numbers of passes.
        equal = bool(sharded_modules(self.network))
        samples, outputs = noise.to(batch.x0.device), torch.zeros_like(noise).to(batch.x0.device)
        with self._sampler() as sampler, self.accelerator.autocast():
            for step in range(len(grid) if equal else int(last.max()) + 1):
                active = torch.arange(rows) if equal else torch.nonzero(last >= step)[:, 0]
                for part in active.split(args.rollout_batch_size):
                    self._advance(sampler, part, step, last, times, samples, outputs, batch, empty)
        return replace(
            batch,
            times=times[torch.arange(rows), last],
            extra={**batch.extra, "policy_sample": samples, "sampler_output": outputs},
        )

    def _advance(
        self,
        sampler: Denoiser,
        part: Tensor,
        step: int,
        last: Tensor,
        times: Tensor,
        samples: Tensor,
        outputs: Tensor,
        batch: Batch,
        empty: dict[str, Tensor] | None,
    ) -> None:
        """Run one step of some rows. A row at its last step keeps state and output."""
        index = part.to(samples.device)
        condition = {name: value[index] for name, value in batch.condition.items()}
        unconditional = None if empty is None else {n: v[index] for n, v in empty.items()}
        now = times[part, step]
        output = guide(
            sampler.predict,
            self.schedule,
            samples[index],
            now,
            condition,
            unconditional,
            self.guidance_scale,
            self.backbone.guidance_rule,
        )
        ends, moves = index[last[part] == step], last[part] > step
        outputs[ends] = output[last[part] == step]
        if bool(moves.any()):
            following = times[part, step + 1]
            mean, _ = transition(
                self.schedule,
                output[moves],
                samples[index[moves]],
                now[moves],
                following[moves],
                0.0,
            )
            samples[index[moves]] = mean.to(samples)

    def _both_errors(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """Errors at the expert's and at the policy's sample, (g, 2)."""
        x0, noise, schedule = batch.x0[:, 0], batch.noise[:, 0], denoiser.schedule
        expert = schedule.add_noise(x0, noise, batch.times)
        noisy = torch.stack([expert, batch.extra["policy_sample"].to(expert)], 1)
        target = schedule.target(x0, noise, batch.times)
        targets = torch.stack([target, batch.extra["sampler_output"].to(target)], 1)
        times = schedule.model_times(batch.times.repeat_interleave(2)).to(noisy.device)
        condition = {n: value.repeat_interleave(2, 0) for n, value in batch.condition.items()}
        with self.accelerator.autocast():
            prediction = denoiser.predict(noisy.flatten(0, 1), times, condition)
        both = replace(batch, x0=batch.x0.expand(-1, 2, *batch.x0.shape[2:]))
        return denoiser.errors_of(both, prediction, targets.flatten(0, 1))

    def compute_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the Diffusion-DRO loss. See `Trainer.compute_loss`."""
        assert self.reference is not None
        with torch.no_grad():
            reference = self._both_errors(self.reference, batch)
        policy = self._both_errors(self.policy, batch)
        loss = dro_loss(policy, reference, margin=self.args.margin)
        errors = policy.detach()
        change = errors - reference
        return loss, {
            "errors/expert": errors[:, 0],
            "errors/policy": errors[:, 1],
            "change/expert": change[:, 0],
            "dro/gap": change[:, 0] - change[:, 1],
            "dro/active": (loss.detach() > 0).float(),
        }

    def on_optimizer_step(self, step: int) -> None:
        """Take a snapshot when it is due. See `Trainer.on_optimizer_step`."""
        if self.snapshot is not None and step % self.args.sync_every == 0:
            self.snapshot.take()
