"""Steer one call of a pipeline: the work at every ``scheduler.step``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError, UserError
from ..generation.micro_batches import Batches
from ..runtime.missing import MaybeImage, Missing, check_any, read_output
from ..runtime.protocols import Pipeline
from ..runtime.seeds import seeded, state_key, stream_seed
from .decoding import LatentDecoder
from .kernels import AUTO, draw, transition
from .noise_levels import (
    as_clipped,
    clean_prediction,
    is_stochastic,
    read_coordinates,
    step_index,
    step_parameters,
)
from .resampling import ess
from .result import SteeringResult
from .reward_fn import Rewarder
from .schedule import check_temperatures, schedule
from .scheduler_hook import Step, permute_buffers
from .smc import ParticleWeights
from .step_trace import StepTrace
from .streams import Streams

if TYPE_CHECKING:
    from PIL import Image

THUMBNAIL = 96


@dataclass(frozen=True)
class SteeringOptions:
    """The options of `FKSteering` that a `SteeredRun` needs, explained there."""

    pipe: Pipeline
    num_particles: int
    resample_steps: Sequence[int | float] | None
    predict_x0: Callable[[Any, Tensor, Any, Tensor], Tensor] | None
    kernel: str | None
    eta: float | None
    mode: str
    eta_given: bool
    unscored: str


class SteeredRun:
    """Counts the steps of one call, and scores and resamples at the scheduled ones.

    It steps with the scheduler, or with a kernel of `diffalign.steering.kernels`.

    Args:
        options (`SteeringOptions`): of the sampler.
        weighting (`dict`): options of `ParticleWeights`.
        rewarder (`Rewarder`): of this call.
        decoder (`LatentDecoder`): of this call.
        streams (`Streams`): of this call.
        models (`Batches`): counts and splits the forward passes of the model.
        groups (`int`): prompts.
        on_step (*optional*): called with a `StepTrace` after every scored step.
    """

    def __init__(
        self,
        options: SteeringOptions,
        weighting: dict[str, Any],
        rewarder: Rewarder,
        decoder: LatentDecoder,
        streams: Streams,
        models: Batches,
        groups: int,
        on_step: Callable[[StepTrace], None] | None = None,
    ) -> None:
        self.on_step = on_step
        self.options, self.weighting, self.rewarder, self.decoder = (
            options,
            weighting,
            rewarder,
            decoder,
        )
        self.streams, self.models, self.groups, self.k = (
            streams,
            models,
            groups,
            options.num_particles,
        )
        self.scheduler = options.pipe.scheduler
        self.kernel = options.kernel
        self.rows = groups * self.k
        self.calls = self.intervals = 0
        self.first_position = 0
        self.num_steps = 0
        self.steps: list[int] = []
        self.weights: ParticleWeights | None = None
        self.trace: list[StepTrace] = []
        self.latents: Tensor | None = None
        self.decode_seconds = 0.0

    def step(self, arguments: dict[str, Any], original: Step) -> Any:
        """Replace the scheduler's step: score and resample first, then propose.

        Args:
            arguments (`dict`): of the step by name.
            original: the scheduler's own step.

        Returns:
            The output of the step, as the scheduler's own would be.

        Raises:
            UserError: a sampler that cannot be steered, more steps than announced, or
                rewards that do not fit.
        """
        sample = arguments["sample"]
        if sample.shape[0] != self.rows:
            raise UserError(
                f"pipe: its scheduler stepped {sample.shape[0]} rows where {self.rows} (prompts x "
                "particles) were asked for; "
                "it cannot be steered from outside"
            )
        second_half = not getattr(self.scheduler, "state_in_first_order", True)
        if self.calls == 0:
            self._begin(arguments)
        position = self.first_position + self.calls
        self.calls += 1
        if not second_half:
            i, self.intervals = self.intervals, self.intervals + 1
            if i >= self.num_steps:
                raise UserError(
                    f"pipe: its scheduler stepped more often than the {self.num_steps} steps of "
                    "its time grid; it cannot be steered from outside"
                )
            if i in self.steps:
                self._score(arguments, position, i)
        result = self._propose(arguments, original, position)
        self.latents = result[0] if isinstance(result, tuple) else result.prev_sample
        return result

    def _begin(self, arguments: dict[str, Any]) -> None:
        """Read the time grid at the first step, and refuse what cannot be steered."""
        times = torch.as_tensor(self.scheduler.timesteps).double().tolist()
        now = float(torch.as_tensor(arguments["timestep"]).flatten()[0])
        if now not in times:
            raise UserError(
                f"pipe: it steps at timestep {now:g}, which is not in its scheduler's time grid; "
                "it cannot be steered from outside"
            )
        self.first_position = times.index(now)
        calls = (
            getattr(self.options.pipe, "num_timesteps", None) or len(times) - self.first_position
        )
        # Second-order schedulers list every inner point twice, except the first.
        self.num_steps = (
            (calls + 1) // 2 if hasattr(self.scheduler, "state_in_first_order") else calls
        )
        self.steps = schedule(self.options.resample_steps, self.num_steps)
        weighting = dict(self.weighting)
        weighting["temperatures"] = check_temperatures(
            weighting["potential"], weighting["temperatures"], len(self.steps)
        )
        self.weights = ParticleWeights(
            self.groups,
            self.k,
            generator=self.streams.resampling,
            unscored=self.options.unscored,
            names=self.rewarder.prompts[:: self.k],
            **weighting,
        )
        resampling = self.k > 1 and bool(self.steps) and self.weighting["ess_threshold"] != 0
        if self.kernel == AUTO:
            replaced = self.scheduler.config.get("stochastic_sampling", False)
            own = not replaced and is_stochastic(self.scheduler, arguments, self.first_position)
            self.kernel = None if own else "ddim"
            if own and self.options.eta_given:
                raise ConfigError(
                    "eta",
                    f"{type(self.scheduler).__name__} adds its own noise, which has none; leave "
                    "eta out, or give kernel='ddim'",
                )
        elif resampling and self.kernel is None:
            self._check_noise(arguments)

    def _check_noise(self, arguments: dict[str, Any]) -> None:
        """Refuse resampling without noise, and pruning with noise."""
        random = is_stochastic(self.scheduler, arguments, self.first_position)
        name = type(self.scheduler).__name__
        if self.options.mode == "prune":
            if random:
                raise UserError(
                    f"mode: prune is for deterministic samplers, and {name} adds noise as it is "
                    "called; use mode='resample'"
                )
            self.models.same_as = torch.arange(self.rows)
        elif not random:
            takes_eta = "eta" in step_parameters(self.scheduler) and "CogVideo" not in name
            remedy = (
                "pass eta=1.0 to the call, or use kernel='ddim'"
                if takes_eta
                else "use kernel='ddim'"
            )
            raise UserError(
                f"scheduler: {name} is deterministic as it is called, so copies of a particle "
                f"would stay equal; {remedy} "
                "(or mode='prune' to only drop the worst)"
            )

    def _score(self, arguments: dict[str, Any], position: int, i: int) -> None:
        assert self.weights is not None
        x0 = self._clean(arguments, position)
        thumbnails = blank = None
        if self.rewarder.intermediate is not None:
            rewards = self.rewarder.of_latents(x0)
        else:
            started = time.perf_counter()
            images = self.decoder.images(x0)
            self.decode_seconds += time.perf_counter() - started
            rewards = self.rewarder.of_images(images)
            blank = self._blank(images)
            thumbnails = [
                [_thumbnail(image) for image in images[p * self.k : (p + 1) * self.k]]
                for p in range(self.groups)
            ]
        log_g = self.weights.update(rewards, blank)
        log_weights = self.weights.log_weights
        ancestors = self.weights.resample()
        identity = torch.arange(self.k).expand(self.groups, -1)
        self.trace.append(
            StepTrace(
                index=i,
                timestep=float(torch.as_tensor(arguments["timestep"]).flatten()[0]),
                rewards=rewards,
                log_potentials=log_g,
                log_weights=log_weights,
                ess=ess(log_weights),
                ancestors=identity if ancestors is None else ancestors,
                resampled=self.weights.resampled,
                thumbnails=thumbnails,
            )
        )
        if ancestors is not None:
            self._permute(arguments, ancestors)
        if self.on_step is not None:
            self.on_step(self.trace[-1])

    def _blank(self, images: Sequence[object]) -> Tensor:
        """Return where there is no image, bool (groups, k)."""
        return torch.tensor([isinstance(image, Missing) for image in images]).unflatten(
            0, (self.groups, self.k)
        )

    def _clean(self, arguments: dict[str, Any], position: int) -> Tensor:
        """Return the clean predictions as the scheduler uses them."""
        output, sample, timestep = (
            arguments[name] for name in ("model_output", "sample", "timestep")
        )
        if self.options.predict_x0 is not None:
            return self.options.predict_x0(self.scheduler, output, timestep, sample)
        now, _ = read_coordinates(self.scheduler, timestep, position)
        return as_clipped(self.scheduler, clean_prediction(self.scheduler, output, sample, now))

    def _permute(self, arguments: dict[str, Any], ancestors: Tensor) -> None:
        """Move every tensor of a particle to the slots of its descendants.

        These are latents, model output and the scheduler's buffers.
        """
        rows = (ancestors + torch.arange(self.groups)[:, None] * self.k).flatten()
        for name in ("model_output", "sample"):
            arguments[name] = arguments[name][rows.to(arguments[name].device)]
        permute_buffers(self.scheduler, rows, arguments["sample"])
        if self.models.same_as is not None:
            lineage = self.models.same_as[rows]
            first = {int(value): row for row, value in reversed(list(enumerate(lineage.tolist())))}
            self.models.same_as = torch.tensor([first[int(value)] for value in lineage])

    def _propose(self, arguments: dict[str, Any], original: Step, position: int) -> Any:
        if self.kernel is not None:
            return self._own_step(arguments, position)
        device = arguments["sample"].device
        if "generator" not in step_parameters(self.scheduler):
            seed = stream_seed(state_key(self.streams.steps[0]), self.calls)
            with seeded(seed, device):
                return original(**arguments)
        if self.streams.replace or arguments.get("generator") is None:
            arguments["generator"] = self.streams.steps if self.rows > 1 else self.streams.steps[0]
        return original(**arguments)

    def _own_step(self, arguments: dict[str, Any], position: int) -> Any:
        """Take a step of the kernel, and advance the scheduler's position."""
        if getattr(self.scheduler, "order", 1) != 1:
            raise UserError(
                f"kernel: {type(self.scheduler).__name__} calls the model twice per step; use a "
                "first-order scheduler, e.g. DDIM or Euler"
            )
        output, sample, timestep = (
            arguments[name] for name in ("model_output", "sample", "timestep")
        )
        now, then = read_coordinates(self.scheduler, timestep, position)
        x0 = self._clean(arguments, position)
        # DDIM keeps the model's noise estimate, whatever is clipped. Other schedulers
        # derive it from the clipped prediction.
        keeps = self.options.predict_x0 is None and "DDIM" in type(self.scheduler).__name__
        raw = clean_prediction(self.scheduler, output, sample, now) if keeps else None
        assert self.kernel is not None and self.options.eta is not None
        mean, std = transition(self.kernel, self.options.eta, output, sample, x0, now, then, raw)
        generator = arguments.get("generator")
        moved = draw(
            mean,
            std,
            self.streams.steps if self.streams.replace or generator is None else generator,
            sample.dtype,
        )
        if hasattr(self.scheduler, "_step_index"):
            self.scheduler._step_index = step_index(self.scheduler, timestep) + 1
        if not arguments.get("return_dict", True):
            return (moved,)
        from diffusers.schedulers.scheduling_utils import SchedulerOutput

        return SchedulerOutput(prev_sample=moved)

    def result(
        self, output: object, prompts: list[str], seconds: float, finite: Sequence[bool] = ()
    ) -> SteeringResult:
        """Finish the weights with the rewards of the returned images.

        Args:
            output: what the pipeline returned.
            prompts (`list[str]`): of this call.
            seconds (`float`): time the pipeline took.
            finite (sequence of `bool`, *optional*): which images have finite pixels,
                from `watched`.

        Returns:
            `SteeringResult`: of this call.

        Raises:
            UserError: the pipeline made no step, stopped before a scored one, or did
                not return its images.
        """
        if self.weights is None or self.latents is None:
            raise UserError(
                "pipe: it never called the step of pipe.scheduler, so it cannot be steered from "
                "outside"
            )
        missed = [i for i in self.steps if i >= self.intervals]
        if missed:
            raise UserError(
                f"resample_steps: {missed[0]} was never reached, the pipeline stopped after "
                f"{self.intervals} steps; give earlier steps"
            )
        images = read_output(output, self.rows, finite)
        check_any(images, type(self.options.pipe).__name__)
        started = time.perf_counter()
        rewards = self.rewarder.of_images(images)
        self.weights.finish(rewards, self._blank(images))
        seconds += time.perf_counter() - started
        weights = self.weights
        return SteeringResult(
            prompts=prompts,
            images=[list(images[p * self.k : (p + 1) * self.k]) for p in range(self.groups)],
            rewards=rewards,
            log_weights=weights.log_weights,
            log_z=weights.log_z,
            lmbda=weights.lmbda,
            roots=weights.roots,
            applied=weights.applied,
            degenerate=weights.degenerate,
            steps=self.trace,
            final_ess=ess(weights.log_weights),
            latents=self.latents.detach().unflatten(0, (self.groups, self.k)),
            counts={
                "model_rows": self.models.computed,
                "model_calls": self.models.calls,
                "decodes": self.decoder.decoded,
                "reward_calls": self.rewarder.calls,
                "scored_images": self.rewarder.images,
            },
            seconds={
                "total": seconds,
                "decode": self.decode_seconds,
                "reward": self.rewarder.seconds,
            },
            nan_count=weights.nan_count,
            kernel=self.kernel,
        )


def _thumbnail(image: MaybeImage) -> Image.Image | None:
    if isinstance(image, Missing):
        return None
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return small
