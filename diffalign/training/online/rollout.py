"""Draw trajectories with their log-probabilities.

A sampler step is Gaussian: DDIM with eta for variance-preserving models (Song et al.
2021, arXiv 2010.02502, eq. 12 and 16), or a stochastic step of a flow, see `DYNAMICS`.
D3PO and GRPO train on such steps (Yang et al. 2023, arXiv 2311.13231). Methods that
need the final latents alone can draw with a deterministic solver. Every random number
belongs to a seed, row, epoch and image. It depends neither on the batch nor on the
number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ...backbones import Backbone
from ...backbones.conditions import joined
from ...backbones.guidance_rules import CLASSIFIER_FREE, GuidanceRule
from ...config.ranges import not_a_choice
from ...errors import ConfigError
from ...likelihood.schedules import NoiseSchedule, RectifiedFlow, VariancePreserving
from ...likelihood.transitions import (
    MIN_STD,
    cps_step,
    dance_sde_step,
    ddim_step,
    flow_sde_step,
    gaussian_log_prob,
    unscaled_log_prob,
)
from ...runtime.missing import NOT_FINITE, MaybeImage, Missing
from ...runtime.progress import Bar, note, progress_bar
from ..batch import Batch
from ..reference import without_dropout
from .solvers import SOLVERS, build_solver

Predict = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]

KEEP = ("states", "means", "final")
DYNAMICS = ("auto", "ddim", "flow_sde", "dance_sde", "cps")
"""Stochastic steps by name. `auto` is `ddim` for variance-preserving models and
`flow_sde` for flows. The other two are for flows."""


@dataclass(frozen=True)
class SamplerConfig:
    """Settings of a sampler.

    Attributes:
        num_inference_steps (`int`, defaults to `20`): Number of steps.
        guidance_scale (`float`, defaults to `5.0`): Classifier-free guidance. At 1 or
            below only the conditional branch runs.
        eta (`float`, defaults to `1.0`): Stochasticity of a step. 0 is deterministic.
        batch_size (`int`, defaults to `8`): Images per forward pass.
        shared_init (`bool`, defaults to `True`): Start all images of a prompt from one
            noise.
        reduce (`str`, defaults to `"mean"`): `mean` or `sum` of log-probabilities over
            the elements of a latent.
        dynamics (`str`, defaults to `"auto"`): See `DYNAMICS`.
        keep (`str`, defaults to `"states"`): What a trajectory holds: `states` and
            log-probabilities, `means` of the steps as well, or the `final` latents.
        solver (`str`, defaults to `"default"`): `default` takes the steps above.
            Anything else is a deterministic solver of diffusers, see `SOLVERS`. It
            needs `keep="final"`.

    Raises:
        ConfigError: A value is out of range.
    """

    num_inference_steps: int = 20
    guidance_scale: float = 5.0
    eta: float = 1.0
    batch_size: int = 8
    shared_init: bool = True
    reduce: str = "mean"
    dynamics: str = "auto"
    keep: str = "states"
    solver: str = "default"

    def __post_init__(self) -> None:
        if self.num_inference_steps < 2:
            raise ConfigError(
                "num_inference_steps", f"expected int >= 2, got {self.num_inference_steps}"
            )
        if self.batch_size < 1:
            raise ConfigError("rollout_batch_size", f"expected int >= 1, got {self.batch_size}")
        if not self.eta >= 0:
            raise ConfigError("eta", f"expected float >= 0, got {self.eta}")
        if self.dynamics == "cps" and self.eta > 1:
            raise ConfigError("eta", f"expected float in [0, 1] for cps, got {self.eta}")
        for name, choices in (("dynamics", DYNAMICS), ("keep", KEEP), ("solver", SOLVERS)):
            if getattr(self, name) not in choices:
                raise ConfigError(name, not_a_choice(getattr(self, name), choices))
        if self.solver != "default" and self.keep != "final":
            raise ConfigError(
                "solver", f"{self.solver} has no log-probabilities; it can only keep final latents"
            )


@dataclass
class Grid:
    """The times of a sampler, from noisy to clean.

    Attributes:
        times (`Tensor`): Time before each step, (S,).
        next_times (`Tensor`): Time after each step, (S,). -1 is the clean sample.
        trainable (`Tensor`): Whether a step has a density, (S,), bool.
    """

    times: Tensor
    next_times: Tensor
    trainable: Tensor

    def __len__(self) -> int:
        return len(self.times)


@dataclass
class Trajectories:
    """Trajectories of a batch, on the CPU.

    Attributes:
        states (`Tensor`): Latents from the initial noise to the sample, (g, k, S + 1,
            C, h, w), float32. If only some steps are stochastic, those before and after
            them and the sample. Only the sample, (g, k, 1, C, h, w), if `keep` is
            `final`.
        log_probs (`Tensor`): Log-probability of each step under the policy that drew
            it, (g, k, S). NaN for a deterministic step. (g, k, 0) if `keep` is `final`.
        images (`list[list[PIL.Image.Image]]`): g lists of k images, if they were
            decoded. Some may be `diffalign.runtime.missing.Missing`.
        broken (`Tensor`, *optional*): Trajectories that were not finite, (g, k), bool.
            Their states are zero.
        means (`Tensor`, *optional*): Mean of each step, (g, k, S, C, h, w), float32, if
            `keep` is `means`. Those of the stochastic steps, if only some are.
        state_numbers (`Tensor`, *optional*): Which states are held, in order, from 0
            for the initial noise to S for the sample, (p,). None means all, or only the
            sample.
        mean_numbers (`Tensor`, *optional*): The steps whose means are held, in order.
            None means all.
    """

    states: Tensor
    log_probs: Tensor
    images: list[list[MaybeImage]]
    broken: Tensor | None = None
    means: Tensor | None = None
    state_numbers: Tensor | None = None
    mean_numbers: Tensor | None = None

    @property
    def final(self) -> Tensor:
        """The samples, (g, k, C, h, w)."""
        return self.states[:, :, -1]


SAMPLER_RULE = 2
"""Rule by which trajectories are drawn.

Rule 1 is that of earlier versions, which always used leading timesteps. A checkpoint of
such a run goes on with it.
"""


def make_grid(
    schedule: NoiseSchedule,
    scheduler: Any,
    steps: int,
    eta: float,
    *,
    arguments: Mapping[str, Any] | None = None,
    rule: int = SAMPLER_RULE,
    offset: int | None = None,
) -> Grid:
    """Build the times of a pipeline's sampler.

    These are the timesteps of a DDIM scheduler with the model's settings, or the
    shifted sigmas of a flow scheduler.

    Args:
        schedule (`NoiseSchedule`): Noise schedule of the model.
        scheduler: Scheduler of the pipeline. Its spacing, offset and last alpha are
            used, as in D3PO's code.
        steps (`int`): Number of steps, at most the model's timesteps.
        eta (`float`): Stochasticity. At 0 no step is trainable.
        arguments (`Mapping[str, Any]`, *optional*): What the model's pipeline passes to
            `set_timesteps` of a flow scheduler, see `Backbone.sampler_arguments`.
        rule (`int`, *optional*, defaults to `2`): See `SAMPLER_RULE`.
        offset (`int`, *optional*): Offset of timesteps under rule 1. Defaults to the
            scheduler's.

    Returns:
        `Grid`: The times.

    Raises:
        ConfigError: There are more steps than timesteps.
    """
    if isinstance(schedule, VariancePreserving):
        count = schedule.num_timesteps
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
            from diffusers import DDIMScheduler

            sampler = DDIMScheduler.from_config(scheduler.config)
            sampler.set_timesteps(steps)
            times = sampler.timesteps.clamp(max=count - 1)
            next_times = times - ratio  # DDIM does so on irregular grids too
            next_times[next_times < 0] = -1 if sampler.config.set_alpha_to_one else 0
        # A step to the clean sample, or to the same time, has no density.
        return Grid(times, next_times, (next_times >= 0) & (next_times < times) & (eta > 0))
    sampler = type(scheduler).from_config(scheduler.config)
    sampler.set_timesteps(**({"num_inference_steps": steps} if arguments is None else arguments))
    sigmas = sampler.sigmas.double()
    return Grid(sigmas[:-1], sigmas[1:], torch.full((len(sigmas) - 1,), eta > 0))


def grid_for_size(
    backbone: Backbone, size: tuple[int, int], steps: int, eta: float, rule: int = SAMPLER_RULE
) -> Grid:
    """Build the times of a model's own sampler for images of one size.

    Args:
        backbone (`Backbone`): The model.
        size (`tuple[int, int]`): Height and width of the images.
        steps (`int`): Number of steps.
        eta (`float`): Stochasticity of a step.
        rule (`int`, *optional*, defaults to `2`): See `SAMPLER_RULE`.
    """
    arguments = backbone.sampler_arguments(steps, *size)
    offset = int(backbone.given_scheduler.get("steps_offset", 0)) if rule == 1 else None
    return make_grid(
        backbone.schedule,
        backbone.scheduler,
        steps,
        eta,
        arguments=arguments,
        rule=rule,
        offset=offset,
    )


def transition(
    schedule: NoiseSchedule,
    output: Tensor,
    sample: Tensor,
    times: Tensor,
    next_times: Tensor,
    eta: float,
    dynamics: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute the Gaussian of a sampler step.

    Args:
        schedule (`NoiseSchedule`): Noise schedule of the model.
        output (`Tensor`): Output of the network, (n, C, h, w).
        sample (`Tensor`): Latents before the step, (n, C, h, w).
        times (`Tensor`): Times before the step, (n,).
        next_times (`Tensor`): Times after the step, (n,).
        eta (`float`): Stochasticity.
        dynamics (`str`, *optional*, defaults to `"auto"`): See `DYNAMICS`.

    Returns:
        `tuple[Tensor, Tensor]`: Mean (n, C, h, w), and a standard deviation that
        broadcasts to it.
    """
    if isinstance(schedule, VariancePreserving):
        now, then = schedule.alphas_cumprod[times], schedule.alphas_cumprod[next_times.clamp(min=0)]
        return ddim_step(
            model_output=output,
            sample=sample,
            alpha_bar=now,
            alpha_bar_prev=torch.where(next_times < 0, torch.ones_like(then), then),
            eta=eta,
            prediction_type=schedule.prediction_type,
            clip_range=schedule.clip_range,
        )
    sigmas: dict[str, Any] = {"sigma": times, "sigma_prev": next_times, "eta": eta}
    if dynamics in ("dance_sde", "cps"):
        of_flow = dance_sde_step if dynamics == "dance_sde" else cps_step
        return of_flow(model_output=output, sample=sample, **sigmas)
    first = isinstance(schedule, RectifiedFlow) and schedule.legacy_first_step
    return flow_sde_step(model_output=output, sample=sample, legacy_first_step=first, **sigmas)


def check_dynamics(schedule: NoiseSchedule, dynamics: str, field: str) -> None:
    """Check that a model can take a kind of steps.

    Args:
        schedule (`NoiseSchedule`): Noise schedule of the model.
        dynamics (`str`): See `DYNAMICS`.
        field (`str`): Name of the setting, for the message.

    Raises:
        ConfigError: It cannot.
    """
    of_noise = isinstance(schedule, VariancePreserving)
    if dynamics != "auto" and (dynamics == "ddim") != of_noise:
        kind, fitting = (
            ("predicts noise", "ddim") if of_noise else ("is a flow", "flow_sde, dance_sde or cps")
        )
        raise ConfigError(field, f"{dynamics} is not for this model, which {kind}; give {fitting}")


def log_prob_of(
    next_sample: Tensor, mean: Tensor, std: Tensor, reduce: str = "mean", dynamics: str = "auto"
) -> Tensor:
    """Compute the log-probability of a stored step from its Gaussian.

    For `cps` it is minus the squared distance, see `unscaled_log_prob`.

    Args:
        next_sample (`Tensor`): Latents after the step, (n, C, h, w).
        mean (`Tensor`): Mean of the step, (n, C, h, w).
        std (`Tensor`): Deviation of the step, broadcastable to the mean.
        reduce (`str`, *optional*, defaults to `"mean"`): `mean` or `sum` over the
            elements of a latent.
        dynamics (`str`, *optional*, defaults to `"auto"`): See `DYNAMICS`.

    Returns:
        `Tensor`: Log-probabilities, (n,).

    Raises:
        ValueError: The step is deterministic.
    """
    if dynamics == "cps":
        return unscaled_log_prob(next_sample, mean)
    return gaussian_log_prob(next_sample, mean, std, reduce)


def step_log_prob(
    schedule: NoiseSchedule,
    output: Tensor,
    sample: Tensor,
    next_sample: Tensor,
    times: Tensor,
    next_times: Tensor,
    eta: float,
    reduce: str = "mean",
    dynamics: str = "auto",
) -> Tensor:
    """Compute the log-probability of a stored step.

    The gradient flows through `output` alone.

    Args:
        schedule (`NoiseSchedule`): Noise schedule of the model.
        output (`Tensor`): Output of the network, (n, C, h, w).
        sample (`Tensor`): Latents before the step, (n, C, h, w).
        next_sample (`Tensor`): Latents after the step, (n, C, h, w).
        times (`Tensor`): Times before the step, (n,).
        next_times (`Tensor`): Times after the step, (n,).
        eta (`float`): Stochasticity.
        reduce (`str`, *optional*, defaults to `"mean"`): `mean` or `sum` over the
            elements of a latent.
        dynamics (`str`, *optional*, defaults to `"auto"`): See `DYNAMICS`.

    Returns:
        `Tensor`: Log-probabilities, (n,).

    Raises:
        ValueError: The step is deterministic.
    """
    mean, std = transition(schedule, output, sample, times, next_times, eta, dynamics)
    return log_prob_of(next_sample, mean, std, reduce, dynamics)


def guide(
    predict: Predict,
    schedule: NoiseSchedule,
    sample: Tensor,
    times: Tensor,
    condition: Mapping[str, Tensor],
    unconditional: Mapping[str, Tensor] | None,
    scale: float,
    rule: GuidanceRule = CLASSIFIER_FREE,
    unconditional_gradient: bool = True,
) -> Tensor:
    """Run the network with guidance, both branches in one pass of 2n rows.

    Args:
        predict (`Callable`): Runs the network on latents, model times and condition.
        schedule (`NoiseSchedule`): Noise schedule of the model.
        sample (`Tensor`): Noisy latents, (n, C, h, w).
        times (`Tensor`): Times, (n,).
        condition (`Mapping[str, Tensor]`): n rows each.
        unconditional (`Mapping[str, Tensor]`, *optional*): n rows each. None means no
            guidance.
        scale (`float`): Guidance scale.
        rule (`GuidanceRule`, *optional*): How the model's pipelines guide. Defaults to
            classifier-free guidance. Where a scale needs no unconditional branch, only
            the conditional one runs.
        unconditional_gradient (`bool`, *optional*, defaults to `True`): Whether a
            gradient flows through the unconditional branch. Without it the branches run
            one after the other.

    Returns:
        `Tensor`: (n, C, h, w), float32.
    """
    model_times = schedule.model_times(times).to(sample.device)
    if unconditional is None or not rule.active(scale):
        return predict(sample, model_times, dict(condition)).float()
    if not unconditional_gradient:
        with torch.no_grad():
            empty = predict(sample, model_times, dict(unconditional)).float()
        # Before torch 2.11 autocast would give the next pass the weights that it has
        # cast here, without a graph.
        torch.clear_autocast_cache()
        full = predict(sample, model_times, dict(condition)).float()
        return rule.combine(full, empty, scale)
    both = joined(unconditional, condition)
    out = predict(torch.cat([sample, sample]), torch.cat([model_times, model_times]), both).float()
    empty, full = out.chunk(2)
    return rule.combine(full, empty, scale)


class Rollout:
    """Draws trajectories.

    Args:
        backbone (`Backbone`): Decodes the latents.
        schedule (`NoiseSchedule`): Noise schedule of the model.
        config (`SamplerConfig`): Settings of the sampler.
        description (`str`, *optional*, defaults to `"sampling"`): Text of the progress
            bar.
        grid (`Grid`, *optional*): Times of the steps. Defaults to those of `config`.
        fixed_batch_size (`bool`, *optional*, defaults to `False`): Whether to raise
            where the images do not fit into memory. Processes that share the weights of
            the network must run it equally often.

    Attributes:
        batch_size (`int`): Images drawn at once. It is halved where they do not fit
            into the memory of the GPU, which changes no image.
    """

    def __init__(
        self,
        backbone: Backbone,
        schedule: NoiseSchedule,
        config: SamplerConfig,
        description: str = "sampling",
        *,
        grid: Grid | None = None,
        fixed_batch_size: bool = False,
    ) -> None:
        self.backbone, self.schedule = backbone, schedule
        self.fixed_batch_size = fixed_batch_size
        self.config, self.description = config, description
        self.batch_size = config.batch_size
        steps = config.num_inference_steps
        self.grid = (
            make_grid(schedule, backbone.scheduler, steps, config.eta) if grid is None else grid
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
        on_images: Callable[[int, list[MaybeImage]], None] | None = None,
        progress: bool = True,
        stochastic: Tensor | None = None,
    ) -> Trajectories:
        """Draw k trajectories for every prompt of a batch.

        Args:
            predict (`Callable`): Runs the network on latents, model times and
                condition.
            batch (`Batch`): g prompts, with one row of condition each.
            k (`int`): Trajectories per prompt.
            unconditional (`Mapping[str, Tensor]`, *optional*): Condition of the empty
                prompt, g rows each. None means no guidance.
            purpose (`str`, *optional*, defaults to `"rollout"`): Name of the random
                streams.
            decode (`bool`, *optional*, defaults to `True`): Decode the images.
            on_images (`Callable`, *optional*): Receives the index of a chunk's first
                image and the chunk's images, as soon as they are decoded.
            progress (`bool`, *optional*, defaults to `True`): Show a progress bar.
            stochastic (`Tensor`, *optional*): Which steps are stochastic, (S,), bool.
                The others are deterministic, and states that belong to none of them are
                not kept. None makes all of them so, if eta is above 0.

        Returns:
            `Trajectories`: The trajectories, on the CPU.
        """
        shape, g, device = batch.x0.shape[2:], len(batch), batch.x0.device
        start = self._initial(batch, k, shape, purpose)
        streams = [generator for i in range(k) for generator in batch.generators(f"{purpose}-{i}")]
        streams = [streams[i * g + row] for row in range(g) for i in range(k)]
        flat, steps = start.flatten(0, 1), len(self.grid)
        etas = [
            self.config.eta if stochastic is None or bool(stochastic[i]) else 0.0
            for i in range(steps)
        ]
        state_numbers, mean_numbers = self._kept(stochastic)
        states, log_probs, means, images, lost = [], [], [], [], []
        with progress_bar(
            total=len(flat) * steps,
            desc=self.description,
            unit="step",
            disable=not progress,
            leave=False,
        ) as bar:
            first = 0
            while first < len(flat):
                part = slice(first, min(first + self.batch_size, len(flat)))
                rows = torch.arange(part.start, part.stop, device=device) // k
                condition = {name: value[rows] for name, value in batch.condition.items()}
                empty = (
                    None
                    if unconditional is None
                    else {name: value[rows] for name, value in unconditional.items()}
                )
                before = [stream.get_state() for stream in streams[part]], bar.n
                try:
                    path, path_log_probs, path_means = self._chunk(
                        predict,
                        flat[part].to(device),
                        condition,
                        empty,
                        streams[part],
                        etas,
                        (state_numbers, mean_numbers),
                        bar,
                    )
                    broken = ~torch.isfinite(path.flatten(1)).all(1)
                    pictures = self._pictures(path[:, -1].to(device), broken) if decode else []
                except torch.OutOfMemoryError:
                    if part.stop - part.start == 1 or self.fixed_batch_size:
                        raise
                    self._halve(part.stop - part.start)
                    # The same noise again, so that the size changes no image.
                    for stream, state in zip(streams[part], before[0], strict=True):
                        stream.set_state(state)
                    bar.update(before[1] - bar.n)
                    continue
                if broken.any():
                    # Zeros give no gradient. Images and scores of these are missing.
                    path, path_log_probs = path.clone(), path_log_probs.clone()
                    path[broken], path_log_probs[broken] = 0.0, 0.0
                    for part_means in path_means:
                        part_means[broken] = 0.0
                lost.append(broken)
                states.append(path)
                log_probs.append(path_log_probs)
                means += path_means
                images += pictures
                if decode and on_images is not None:
                    on_images(first, pictures)
                first = part.stop
        grouped = [images[i * k : (i + 1) * k] for i in range(g)] if decode else []
        parts = [torch.cat(values).unflatten(0, (g, k)) for values in (states, log_probs, lost)]
        kept_means = torch.cat(means).unflatten(0, (g, k)) if means else None
        return Trajectories(
            parts[0], parts[1], grouped, parts[2], kept_means, state_numbers, mean_numbers
        )

    def _kept(self, stochastic: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the numbers of the states and of the means that are kept.

        None each if all of them are, or only the sample.
        """
        if stochastic is None or self.config.keep == "final":
            return None, None
        steps = stochastic.nonzero()[:, 0]
        end = torch.tensor([len(self.grid)])
        return torch.cat([steps, steps + 1, end]).unique(), steps

    def _pictures(self, latents: Tensor, broken: Tensor) -> list[MaybeImage]:
        return [
            Missing(NOT_FINITE) if bad else picture
            for picture, bad in zip(
                self.backbone.decode_latents(latents), broken.tolist(), strict=True
            )
        ]

    def _halve(self, size: int) -> None:
        """Draw fewer images at once from now on."""
        self.batch_size = (size + 1) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        note(
            f"{self.description}: {size} images at once do not fit into the GPU's memory; "
            f"going on with {self.batch_size}"
        )

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
        etas: list[float],
        kept: tuple[Tensor | None, Tensor | None],
        bar: Bar,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Draw some trajectories. Returns states, log-probabilities and means."""
        config, grid, n = self.config, self.grid, len(sample)
        state_numbers, mean_numbers = (
            range(len(grid) + 1) if numbers is None else numbers.tolist() for numbers in kept
        )
        if config.solver != "default":
            path = self._solved(predict, sample, condition, unconditional, bar)
            return path, path.new_zeros(n, 0), []
        whole = config.keep != "final"
        states, log_probs, means = [], [], []
        if whole and 0 in state_numbers:
            states.append(sample.float().cpu())
        for number, eta in enumerate(etas):
            times, next_times = grid.times[number].expand(n), grid.next_times[number].expand(n)
            output = self._output(predict, sample, times, condition, unconditional)
            mean, std = transition(
                self.schedule, output, sample, times, next_times, eta, config.dynamics
            )
            sample = mean.float()
            if bool((std > 0).any()):
                noise = torch.stack([torch.randn(sample.shape[1:], generator=g) for g in streams])
                sample = (mean + std * noise.to(mean)).float()
            bar.update(n)
            if not whole:
                continue
            if bool(grid.trainable[number]) and eta > 0 and bool((std >= MIN_STD).all()):
                log_probs.append(
                    log_prob_of(sample, mean, std, config.reduce, config.dynamics).float().cpu()
                )
            else:
                log_probs.append(torch.full((n,), float("nan")))
            if number + 1 in state_numbers:
                states.append(sample.cpu())
            if config.keep == "means" and number in mean_numbers:
                means.append(mean.float().cpu())
        if not whole:
            return sample.float().cpu()[:, None], torch.zeros(n, 0), []
        kept_means = [torch.stack(means, dim=1)] if means else []
        return torch.stack(states, dim=1), torch.stack(log_probs, dim=1), kept_means

    def _output(
        self,
        predict: Predict,
        sample: Tensor,
        times: Tensor,
        condition: Mapping[str, Tensor],
        unconditional: Mapping[str, Tensor] | None,
    ) -> Tensor:
        return guide(
            predict,
            self.schedule,
            sample,
            times,
            condition,
            unconditional,
            self.config.guidance_scale,
            self.backbone.guidance_rule,
        )

    def _solved(
        self,
        predict: Predict,
        sample: Tensor,
        condition: Mapping[str, Tensor],
        unconditional: Mapping[str, Tensor] | None,
        bar: Bar,
    ) -> Tensor:
        """Draw final latents with a solver of diffusers, (n, 1, C, h, w)."""
        solver = build_solver(self.config.solver, self.schedule, self.grid.times)
        for number, t in enumerate(solver.timesteps):
            times = self.grid.times[number].expand(len(sample))
            output = self._output(predict, sample, times, condition, unconditional)
            sample = solver.step(output, t, sample, return_dict=False)[0].float()
            bar.update(len(sample))
        return sample.cpu()[:, None]


@contextmanager
def sampling_mode(network: Module) -> Any:
    """Turn the dropout of a network off while the block runs.

    Args:
        network: Gets its mode back afterwards.
    """
    modes = [(module, module.training) for module in network.modules()]
    without_dropout(network)
    try:
        yield network
    finally:
        # One by one, since an evaluation has turned dropout off alone.
        for module, was in modes:
            module.training = was
