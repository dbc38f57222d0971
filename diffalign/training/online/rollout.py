"""Sampling while training: trajectories with their log-probabilities, one random stream per image.

A step of the sampler is Gaussian: DDIM with eta (variance preserving, methods of Yang et al. 2023, arXiv 2311.13231) or one
Euler-Maruyama step of the flow SDE. Whatever is random belongs to (seed, row, epoch, image), so that the noise of a trajectory depends neither
on the batch nor on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from tqdm.auto import tqdm

from ...backbones import Backbone
from ...errors import ConfigError
from ...likelihood.schedules import NoisingProcess, RectifiedFlow, VariancePreserving
from ...likelihood.transitions import MIN_STD, ddim_step, flow_sde_step, gaussian_log_prob
from ...runtime.missing import NOT_FINITE, Missing
from ..batch import Batch
from ..reference import without_dropout

Predict = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class SamplerConfig:
    """How trajectories are drawn.

    Attributes:
        num_inference_steps: of the grid.
        guidance_scale: of classifier-free guidance; 1 or below runs the conditional branch alone.
        eta: share of the stochastic step's standard deviation; 0 is deterministic.
        batch_size: images at once.
        shared_init: one initial noise for all images of a prompt.
        reduce: log-probabilities as the ``mean`` or ``sum`` over the elements of a latent.
    """

    num_inference_steps: int = 20
    guidance_scale: float = 5.0
    eta: float = 1.0
    batch_size: int = 8
    shared_init: bool = True
    reduce: str = "mean"

    def __post_init__(self) -> None:
        if self.num_inference_steps < 2:
            raise ConfigError(
                "num_inference_steps", f"expected int >= 2, got {self.num_inference_steps}"
            )
        if self.batch_size < 1:
            raise ConfigError("rollout_batch_size", f"expected int >= 1, got {self.batch_size}")
        if not self.eta >= 0:
            raise ConfigError("eta", f"expected float >= 0, got {self.eta}")


@dataclass
class Grid:
    """The times of a sampler from noisy to clean, (S,) each; `trainable` marks steps with a density.

    A next timestep of -1 is the clean sample itself.
    """

    times: Tensor
    next_times: Tensor
    trainable: Tensor

    def __len__(self) -> int:
        return len(self.times)


@dataclass
class Trajectories:
    """What a rollout leaves, on the CPU.

    Attributes:
        states (`Tensor`): (g, k, S + 1, C, h, w) float32, from the initial noise to the sample.
        log_probs (`Tensor`): (g, k, S) of each next state under the policy that drew it; NaN where a step is deterministic.
        images (`list[list[PIL.Image]]`): (g)(k), where they were decoded; `diffalign.runtime.missing.Missing` where one cannot be used.
        broken (`Tensor`, *optional*): (g, k) bool, trajectories that were not finite; their states are zero.
    """

    states: Tensor
    log_probs: Tensor
    images: list[list[Any]]
    broken: Tensor | None = None

    @property
    def final(self) -> Tensor:
        """(g, k, C, h, w)."""
        return self.states[:, :, -1]


SAMPLER_RULE = 2
"""How trajectories are drawn. 1: runs of earlier versions, which always took leading timesteps; their checkpoints go on with it."""


def make_grid(
    process: NoisingProcess,
    scheduler: Any,
    steps: int,
    eta: float,
    *,
    patches: int | None = None,
    rule: int = SAMPLER_RULE,
    offset: int | None = None,
) -> Grid:
    """The pipeline's own grid: the timesteps of a DDIM scheduler with the model's configuration, or the flow scheduler's shifted sigmas.

    Args:
        scheduler: of the pipeline; its timestep spacing, offset and last alpha count, as in the official code of D3PO.
        steps: at most the model's timesteps.
        eta: stochasticity; at 0 no step can be trained on.
        patches: of a latent, on which a dynamic shift depends.
        rule: see `SAMPLER_RULE`.
        offset: of timesteps under rule 1; None takes the scheduler's.

    Raises:
        ConfigError: more steps than timesteps.
    """
    if isinstance(process, VariancePreserving):
        count = process.num_timesteps
        if steps > count:
            raise ConfigError(
                "num_inference_steps",
                f"expected at most {count}, the model's timesteps, got {steps}",
            )
        ratio = count // steps
        if rule == 1:
            offset = int(scheduler.config.get("steps_offset", 0)) if offset is None else offset
            times = (torch.arange(steps).flip(0) * ratio + offset).clamp(max=count - 1)
            next_times = (times - ratio).clamp(0, count - 1)
            next_times[next_times == times] = -1
        else:
            own = DDIMScheduler.from_config(scheduler.config)
            own.set_timesteps(steps)
            times = own.timesteps.clamp(max=count - 1)
            next_times = times - ratio  # also where the grid is not regular, as DDIM does
            next_times[next_times < 0] = -1 if own.config.set_alpha_to_one else 0
        # The clean sample, or a sample that does not move, has no density.
        return Grid(times, next_times, (next_times >= 0) & (next_times < times) & (eta > 0))
    own = type(scheduler).from_config(scheduler.config)
    more = (
        {"mu": dynamic_shift(own, patches)}
        if own.config.get("use_dynamic_shifting") and patches is not None
        else {}
    )
    own.set_timesteps(steps, **more)
    sigmas = own.sigmas.double()
    return Grid(sigmas[:-1], sigmas[1:], torch.full((len(sigmas) - 1,), eta > 0))


def dynamic_shift(scheduler: Any, patches: int) -> float:
    """mu of a flow scheduler with dynamic shifting, linear in the number of patches, as pipelines of diffusers compute it."""
    config = scheduler.config
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return base + (most - base) * (patches - low) / (high - low)


def transition(
    process: NoisingProcess,
    output: Tensor,
    sample: Tensor,
    times: Tensor,
    next_times: Tensor,
    eta: float,
) -> tuple[Tensor, Tensor]:
    """Mean (n, ...) and standard deviation (broadcastable) of a step from `times` to `next_times`, (n,) each."""
    if isinstance(process, VariancePreserving):
        now, then = process.alphas_cumprod[times], process.alphas_cumprod[next_times.clamp(min=0)]
        return ddim_step(
            model_output=output,
            sample=sample,
            alpha_bar=now,
            alpha_bar_prev=torch.where(next_times < 0, torch.ones_like(then), then),
            eta=eta,
            prediction_type=process.prediction_type,
            clip_range=process.clip_range,
        )
    first = isinstance(process, RectifiedFlow) and process.legacy_first_step
    return flow_sde_step(
        model_output=output,
        sample=sample,
        sigma=times,
        sigma_prev=next_times,
        eta=eta,
        legacy_first_step=first,
    )


def step_log_prob(
    process: NoisingProcess,
    output: Tensor,
    sample: Tensor,
    next_sample: Tensor,
    times: Tensor,
    next_times: Tensor,
    eta: float,
    reduce: str = "mean",
) -> Tensor:
    """Log-probability (n,) of stored `next_sample` under a step; the gradient flows through `output` alone.

    Raises:
        ValueError: a deterministic step.
    """
    mean, std = transition(process, output, sample, times, next_times, eta)
    return gaussian_log_prob(next_sample, mean, std, reduce)


def guide(
    predict: Predict,
    process: NoisingProcess,
    sample: Tensor,
    times: Tensor,
    condition: Mapping[str, Tensor],
    unconditional: Mapping[str, Tensor] | None,
    scale: float,
) -> Tensor:
    """The network's output under classifier-free guidance, float32; both branches in one pass of 2n rows."""
    model_times = process.model_times(times).to(sample.device)
    if unconditional is None or scale <= 1:
        return predict(sample, model_times, dict(condition)).float()
    both = {name: torch.cat([unconditional[name], condition[name]]) for name in condition}
    out = predict(torch.cat([sample, sample]), torch.cat([model_times, model_times]), both).float()
    empty, full = out.chunk(2)
    return empty + scale * (full - empty)


class Rollout:
    """Draws trajectories.

    Args:
        backbone, process: of the run.
        config: how.
        description: of the progress bar.
        grid: times of the steps; None makes them of `config`.
    """

    def __init__(
        self,
        backbone: Backbone,
        process: NoisingProcess,
        config: SamplerConfig,
        description: str = "sampling",
        *,
        grid: Grid | None = None,
    ) -> None:
        self.backbone, self.process, self.config, self.description = (
            backbone,
            process,
            config,
            description,
        )
        steps = config.num_inference_steps
        self.grid = (
            make_grid(process, backbone.scheduler, steps, config.eta) if grid is None else grid
        )

    @torch.no_grad()
    def __call__(
        self,
        predict: Predict,
        batch: Batch,
        k: int,
        unconditional: Mapping[str, Tensor] | None,
        *,
        purpose: str = "rollout",
        decode: bool = True,
        on_images: Callable[[int, list[Any]], None] | None = None,
        progress: bool = True,
    ) -> Trajectories:
        """k trajectories for every group of `batch`, whose condition has one row per group.

        Args:
            predict: (noisy, model times, condition) -> output.
            unconditional: one row per group, as `condition`; None without guidance.
            purpose: name of the random streams.
            on_images: called with (index of the first image, images) as soon as a chunk is decoded, so that scoring can begin.
        """
        shape, g, device = batch.x0.shape[2:], len(batch), batch.x0.device
        start = self._initial(batch, k, shape, purpose)
        streams = [generator for i in range(k) for generator in batch.generators(f"{purpose}-{i}")]
        streams = [streams[i * g + row] for row in range(g) for i in range(k)]
        flat, size, steps = start.flatten(0, 1), self.config.batch_size, len(self.grid)
        states, log_probs, images, lost = [], [], [], []
        with tqdm(
            total=len(flat) * steps,
            desc=self.description,
            unit="step",
            disable=not progress,
            leave=False,
        ) as bar:
            for first in range(0, len(flat), size):
                part = slice(first, min(first + size, len(flat)))
                rows = torch.arange(part.start, part.stop, device=device) // k
                given = {name: value[rows] for name, value in batch.condition.items()}
                empty = (
                    None
                    if unconditional is None
                    else {name: value[rows] for name, value in unconditional.items()}
                )
                seen, found = self._chunk(
                    predict, flat[part].to(device), given, empty, streams[part], bar
                )
                broken = ~torch.isfinite(seen.flatten(1)).all(1)
                if broken.any():  # zeros, which no gradient follows: their images are missing, and so are their scores
                    seen, found = seen.clone(), found.clone()
                    seen[broken], found[broken] = 0.0, 0.0
                lost.append(broken)
                states.append(seen)
                log_probs.append(found)
                if decode:
                    pictures = self.backbone.decode_latents(seen[:, -1].to(device))
                    pictures = [
                        Missing(NOT_FINITE) if bad else picture
                        for picture, bad in zip(pictures, broken.tolist(), strict=True)
                    ]
                    images += pictures
                    if on_images is not None:
                        on_images(first, pictures)
        grouped = [images[i * k : (i + 1) * k] for i in range(g)] if decode else []
        parts = [torch.cat(values).unflatten(0, (g, k)) for values in (states, log_probs, lost)]
        return Trajectories(parts[0], parts[1], grouped, parts[2])

    def _initial(self, batch: Batch, k: int, shape: Any, purpose: str) -> Tensor:
        draws = []
        for generator in batch.generators(f"{purpose}-start"):
            noise = torch.randn((1 if self.config.shared_init else k, *shape), generator=generator)
            draws.append(noise.expand(k, *shape))
        return torch.stack(draws)

    def _chunk(
        self,
        predict: Predict,
        sample: Tensor,
        condition: Mapping[str, Tensor],
        unconditional: Mapping[str, Tensor] | None,
        streams: list[torch.Generator],
        bar: Any,
    ) -> tuple[Tensor, Tensor]:
        config, grid, n = self.config, self.grid, len(sample)
        states, log_probs = [sample.float().cpu()], []
        for t, after, trainable in zip(grid.times, grid.next_times, grid.trainable, strict=True):
            times, next_times = t.expand(n), after.expand(n)
            output = guide(
                predict,
                self.process,
                sample,
                times,
                condition,
                unconditional,
                config.guidance_scale,
            )
            mean, std = transition(self.process, output, sample, times, next_times, config.eta)
            sample = mean.float()
            if bool((std > 0).any()):
                noise = torch.stack([torch.randn(sample.shape[1:], generator=g) for g in streams])
                sample = (mean + std * noise.to(mean)).float()
            if trainable and bool((std >= MIN_STD).all()):
                log_probs.append(gaussian_log_prob(sample, mean, std, config.reduce).float().cpu())
            else:
                log_probs.append(torch.full((n,), float("nan")))
            states.append(sample.cpu())
            bar.update(n)
        return torch.stack(states, dim=1), torch.stack(log_probs, dim=1)


@contextmanager
def sampling_mode(network: Any) -> Any:
    """The network without dropout while it samples."""
    was = network.training
    without_dropout(network)
    try:
        yield network
    finally:
        network.train(was)
