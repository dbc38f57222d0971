"""Self-NPO: Wang et al. 2025, arXiv 2505.11777.

    x_t    = K sampler steps down an N-step grid, from noise or from a noised image
    target = x0_hat(x_t)                              Tweedie's estimate, over-smoothed
    x_s    = (alpha_s/alpha_t) x_t + ... z,  s > t    re-noised to the exact marginal
    loss   = |x0_hat_theta(x_s) - target|^2, or Huber's

The result is a *negative* model for the unconditional branch of guidance
(`diffalign.generation.guidance`). It learns from truncated samples of the model itself,
without images or judgements.

The paper starts from noise and takes the squared error. The official code starts from
real images, takes Huber's loss, and samples with the student's average at a negative
guidance weight. Both are options here, for epsilon-, v- and flow-prediction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..config.ranges import Count, Positive, Share, count
from ..config.section import config_section
from ..data import PreferenceDataset
from ..errors import ConfigError
from ..likelihood.schedules import NoiseSchedule, RectifiedFlow
from ..training.batch import Batch
from ..training.config import TrainingConfig
from ..training.data_pipeline import as_preferences
from ..training.reference import Reference
from ..training.trainer import Trainer

LossType = Literal["mse", "huber"]
LOSS_TYPES = get_args(LossType)


@config_section
class SelfNPOConfig(TrainingConfig):
    """`train:` for `method: self_npo`; the defaults are the paper's.

    It starts from noise, takes the squared error and runs 5 steps.

    Example:
        ```python
        from diffalign import SelfNPOConfig

        args = SelfNPOConfig(output_dir="runs/self-npo", truncation_steps=10)
        assert args.truncation_steps < args.num_inference_steps
        ```
    """

    start: Literal["noise", "data"] = "noise"
    """noise (paper): start from noise, which needs prompts alone; data (official code):
    start from noised images of the dataset. Source: paper; the official code starts
    from noised images."""
    loss_type: LossType = "mse"
    """mse (paper) | huber (official code), in the space of clean latents. Source:
    paper; the official code has Huber's loss."""
    huber_c: Positive[float] = 1e-3
    """Error at which the Huber loss turns from quadratic to linear. Source: official
    code."""
    num_inference_steps: Annotated[int, count(2, 1000)] = 25
    """Steps of the whole sampling grid. Source: official code, 25 DDIM steps."""
    truncation_steps: Count = 5
    """Number of these steps that are run before the sample is truncated. Source:
    official code, 5."""
    guidance_weight: float = 0.0
    """w of cond + w (cond - uncond) while sampling: 0 conditional, -1 unconditional
    (official SD1.5), -5 (official SDXL). Source: ours: the model's own conditional
    prediction; official code -1 (SD1.5) and -5 (SDXL)."""
    sampler: Literal["frozen_ref", "ema"] = "frozen_ref"
    """Weights that sample: frozen_ref, the starting weights | ema (official code), the
    average of the student; needs use_ema. Source: ours: the model itself; the
    official code draws with the average of the student, decay 0.999."""
    ema_decay: Share = 0.999
    """Decay of the student's average. Source: official code, 0.999."""
    ema_warmup: bool = False
    """false (official code): the average starts at the base weights and moves at one
    rate; true: diffusers' quick start. Source: official code: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.truncation_steps >= self.num_inference_steps:
            raise ConfigError(
                "truncation_steps",
                f"{self.truncation_steps} of {self.num_inference_steps} steps truncate nothing; "
                "give fewer than num_inference_steps",
            )
        if self.sampler == "ema" and not self.use_ema:
            raise ConfigError(
                "sampler",
                "ema draws with the average of the weights; set use_ema: true (official decay "
                "0.999)",
            )


def sampling_grid(schedule: NoiseSchedule, steps: int, shift: float | None = None) -> Tensor:
    """Build the times of the truncated sampler, from least to most noisy.

    Args:
        schedule (`NoiseSchedule`): Noise schedule of the model.
        steps (`int`): N, the number of steps.
        shift (`float`, *optional*): Of the sigmas of a flow model, where it depends on
            the image's size. None takes the schedule's.

    Returns:
        `Tensor`: (steps,). Timesteps T/steps * i - 1, or shifted sigmas i / steps.
    """
    index = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    if isinstance(schedule, RectifiedFlow):
        shift = schedule.shift if shift is None else shift
        return shift * index / (1 + (shift - 1) * index)
    return (schedule.num_timesteps * index).round().long() - 1


def guided_output(cond: Tensor, uncond: Tensor, weight: float) -> Tensor:
    """Compute cond + weight (cond - uncond).

    Args:
        cond (`Tensor`): Conditional output, any shape.
        uncond (`Tensor`): Unconditional output.
        weight (`float`): Guidance weight. 0 is the conditional output and -1 the
            unconditional.
    """
    return cond + weight * (cond - uncond)


def ddim_move(
    schedule: NoiseSchedule, output: Tensor, sample: Tensor, times: Tensor, new_times: Tensor
) -> Tensor:
    """Take a deterministic DDIM step, or an Euler step for flow models.

    See Song et al. 2021, arXiv 2010.02502, eq. 12 with sigma = 0. A row whose time does
    not change stays as it is.

    Args:
        schedule (`NoiseSchedule`): Noise schedule of the model.
        output (`Tensor`): Output of the network, (n, C, h, w).
        sample (`Tensor`): Latents before the step, (n, C, h, w).
        times (`Tensor`): Times before the step, (n,).
        new_times (`Tensor`): Times after the step, (n,).

    Returns:
        `Tensor`: Latents after the step, (n, C, h, w).
    """
    moved = schedule.add_noise(
        schedule.to_x0(output, sample, times), schedule.to_eps(output, sample, times), new_times
    )
    still = (times == new_times).to(sample.device).reshape(-1, *[1] * (sample.ndim - 1))
    return torch.where(still, sample, moved.to(sample.dtype))


def later_times(schedule: NoiseSchedule, times: Tensor, uniforms: Tensor) -> Tensor:
    """Draw noisier times, uniform on t+1, ..., T-1 or on (t, 1).

    Args:
        schedule (`NoiseSchedule`): Noise schedule of the model.
        times (`Tensor`): t, (n,).
        uniforms (`Tensor`): Random numbers in [0, 1), (n,).

    Returns:
        `Tensor`: (n,).
    """
    if isinstance(schedule, RectifiedFlow):
        return times + (1 - times) * uniforms.clamp(1e-6, 1 - 1e-6)
    last = schedule.num_timesteps - 1
    return times + 1 + (uniforms * (last - times)).long().clamp(max=last - 1 - times)


def self_npo_loss(
    predicted_x0: Tensor, target_x0: Tensor, *, kind: str = "huber", huber_c: float = 1e-3
) -> Tensor:
    """Compute the Self-NPO loss of predicted clean latents.

    With d their difference it is the mean of d^2, or of sqrt(d^2 + c^2) - c.

    Args:
        predicted_x0 (`Tensor`): Prediction of the student, (n, C, h, w).
        target_x0 (`Tensor`): Target, (n, C, h, w).
        kind (`str`, *optional*, defaults to `"huber"`): `mse` or `huber`.
        huber_c (`float`, *optional*, defaults to `1e-3`): c.

    Returns:
        `Tensor`: Loss per sample, (n,).

    Raises:
        ValueError: Another kind.
    """
    if kind not in LOSS_TYPES:
        raise ValueError(f"kind: expected one of {', '.join(LOSS_TYPES)}, got {kind!r}")
    wide = torch.promote_types(predicted_x0.dtype, torch.float32)
    difference = (predicted_x0.to(wide) - target_x0.to(wide)).flatten(1)
    if kind == "mse":
        return difference.square().mean(1)
    return ((difference.square() + huber_c**2).sqrt() - huber_c).mean(1)


class SelfNPOTrainer(Trainer):
    """Trains a negative model on truncated samples of the model itself.

    Example:
        ```python
        from peft import LoraConfig

        from diffalign import SelfNPOConfig, SelfNPOTrainer

        trainer = SelfNPOTrainer(
            model="shapes",
            args=SelfNPOConfig(output_dir="runs/self_npo", max_steps=5),
            train_dataset="diffalign-quickstart/dataset",  # from `diffalign quickstart`
            peft_config=LoraConfig(r=16, lora_alpha=16),
        )
        trainer.train()
        ```
    """

    method = "self_npo"
    _name = "Self-NPO"
    _tag_names = ("self-npo",)
    _paper: ClassVar[dict[str, str]] = {
        "title": "Self-NPO: Data-Free Diffusion Model Enhancement via Truncated Diffusion "
        "Fine-Tuning",
        "id": "2505.11777",
        "citation": """@inproceedings{wang2026selfnpo,
  title     = {Self-NPO: Data-Free Diffusion Model Enhancement via Truncated Diffusion
               Fine-Tuning},
  author    = {Wang, Fu-Yun and Sun, Keqiang and Teng, Yao and Liu, Xihui and Yuan, Jiale and
               Song, Jiaming and Li, Hongsheng},
  booktitle = {AAAI},
  year      = {2026}
}""",
    }
    _not_public: ClassVar[str] = (
        "The image folder of the official run; whether the published weights come from the "
        "paper's or the code's variant; the paper's own learning rate."
    )
    config_class = SelfNPOConfig
    data_kind = "prompt"
    can_be_online = False
    # The loss has no reference. With `sampler: frozen_ref` the starting weights sample.
    reference_free = True
    args: SelfNPOConfig

    def read_dataset(self, source: Any, split: str) -> PreferenceDataset:
        """Read prompts, or images with `start: data`. See `Trainer.read_dataset`."""
        return as_preferences(
            source, self.data_config, "prompt" if self.args.start == "noise" else "single", split
        )

    def build_reference(self) -> Reference | None:
        """Build the frozen starting weights, if they draw the samples."""
        return self.fixed_reference() if self.args.sampler == "frozen_ref" else None

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Batch:
        """Run the truncated sampler.

        Args:
            batch (`Batch`): Groups of the dataset.

        Returns:
            `Batch`: `x0` is the target, `noisy` and `times` are the student's input.
        """
        args, schedule = self.args, self.schedule
        generators = batch.generators("self_npo")
        uniforms = torch.stack(
            [torch.rand(2, generator=g, dtype=torch.float64) for g in generators]
        )
        again = torch.stack([torch.randn(batch.x0.shape[2:], generator=g) for g in generators]).to(
            batch.x0.device
        )
        height, width = (side * self.backbone.vae_scale for side in batch.x0.shape[-2:])
        shift = self.backbone.timestep_shift(height, width)
        grid = sampling_grid(schedule, args.num_inference_steps, shift)
        index = torch.full((len(batch),), len(grid) - 1)
        if args.start == "data":
            index = (uniforms[:, 0] * len(grid)).long().clamp(max=len(grid) - 1)
        times = grid[index]
        sample = batch.noise[:, 0]
        if args.start == "data":
            sample = schedule.add_noise(batch.x0[:, 0], sample, times)
        unconditional = self.data_pipeline.builder.unconditional(batch.condition)
        with self._sampling_weights():
            for step in range(1, args.truncation_steps + 1):
                below = index - step
                new_times = torch.where(below >= 0, grid[below.clamp(min=0)], self._floor(grid))
                output = self._sampler_output(sample, times, batch.condition, unconditional)
                sample, times = ddim_move(schedule, output, sample, times, new_times), new_times
            output = self._sampler_output(sample, times, batch.condition, unconditional)
        target = schedule.to_x0(output, sample, times)
        later = later_times(schedule, times, uniforms[:, 1])
        noisy = schedule.renoise(sample, times, later, again)
        return replace(
            batch,
            x0=target[:, None].float(),
            noise=again[:, None],
            noisy=noisy[:, None].float(),
            times=later,
        )

    def _floor(self, grid: Tensor) -> Tensor:
        """Return the last time of the grid: 0, or a twentieth of the first sigma."""
        return torch.zeros((), dtype=grid.dtype) if not grid.is_floating_point() else grid[0] / 20

    @contextlib.contextmanager
    def _sampling_weights(self) -> Iterator[None]:
        """Put the student's average into the network, without dropout."""
        if self.args.sampler != "ema" or self.ema is None:
            yield
            return
        training = self.network.training
        with self.averaged_weights():
            self.network.eval()
            try:
                yield
            finally:
                self.network.train(training)

    def _sampler_output(
        self,
        sample: Tensor,
        times: Tensor,
        condition: Mapping[str, Tensor],
        unconditional: Mapping[str, Tensor],
    ) -> Tensor:
        weight = self.args.guidance_weight
        model_times = self.schedule.model_times(times).to(sample.device)

        def predict(branch: Mapping[str, Tensor]) -> Tensor:
            with self.accelerator.autocast():
                if self.reference is not None:
                    return self.reference.predict(sample, model_times, dict(branch)).float()
                return self.sampling_policy.predict(sample, model_times, dict(branch)).float()

        # A branch without weight is not run.
        if weight == 0:
            return predict(condition)
        if weight == -1:
            return predict(unconditional)
        return guided_output(predict(condition), predict(unconditional), weight)

    def compute_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the Self-NPO loss. See `Trainer.compute_loss`."""
        assert batch.noisy is not None
        noisy, target = batch.noisy[:, 0], batch.x0[:, 0]
        times = self.schedule.model_times(batch.times).to(noisy.device)
        with self.accelerator.autocast():
            output = self.policy.predict(noisy, times, batch.condition)
        student = self.schedule.to_x0(output.float(), noisy, batch.times)
        loss = self_npo_loss(student, target, kind=self.args.loss_type, huber_c=self.args.huber_c)
        with torch.no_grad():
            error = self_npo_loss(student, target, kind="mse")
            contrast = target.flatten(1).std(1)
        return loss, {"errors/target": error, "targets/std": contrast}
