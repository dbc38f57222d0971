"""Read what a diffusers scheduler means by its latents.

The conventions are those of diffusers 0.42. Variance-preserving schedulers index
``alphas_cumprod`` by timestep. The family of DPM-Solver turns its sigmas into
(alpha, sigma) itself. Euler's family keeps ``y = x0 + sigma eps``. Flow matching is ``y
= (1 - s) x0 + s eps``, with the velocity ``eps - x0``.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import UserError
from ..likelihood.schedules import clip_range
from ..runtime.protocols import Pipeline, Scheduler
from ..runtime.seeds import seeded

T = TypeVar("T")

UNREACHABLE = {
    "CogVideoXDPMScheduler": "the pipeline keeps the previous prediction in a variable of its own",
    "CogVideoXDPMPipeline": "the pipeline keeps the previous prediction in a variable of its own",
}
"""Schedulers with per-particle state that cannot be reordered from outside."""


@dataclass(frozen=True)
class Coordinates:
    """The noise level of a latent: ``y = alpha x0 + sigma eps``.

    Attributes:
        alpha (`float`): share of the clean sample.
        sigma (`float`): share of the noise.
        prediction (`str`): what the model predicts: ``epsilon``, ``v_prediction``,
            ``sample``, ``flow`` or ``edm``.
        kind (`str`): ``vp``, ``ve`` or ``flow``.
    """

    alpha: float
    sigma: float
    prediction: str
    kind: str


def _names(scheduler: object) -> list[str]:
    return [cls.__name__ for cls in type(scheduler).__mro__]


def _kind(scheduler: Any) -> str | None:
    """Return which convention a scheduler follows, or None for an unknown one."""
    names = _names(scheduler)
    if hasattr(scheduler, "precondition_outputs"):
        return "edm"
    if any("FlowMatch" in name or "AncestralRF" in name for name in names):
        return "flow"
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t") and hasattr(scheduler, "sigmas"):
        return "solver"
    if scheduler.config.get("prediction_type") == "flow_prediction":
        return "flow" if hasattr(scheduler, "sigmas") else None
    if hasattr(scheduler, "sigmas") and hasattr(scheduler, "alphas_cumprod"):
        return "ve"
    if hasattr(scheduler, "alphas_cumprod") and not hasattr(scheduler, "sigmas"):
        return "vp"
    return None


def step_index(scheduler: Any, timestep: Tensor | float) -> int:
    """Return the scheduler's position in its sigmas.

    Args:
        scheduler: of diffusers.
        timestep: what the pipeline hands to its step.
    """
    if getattr(scheduler, "step_index", None) is None:
        scheduler._init_step_index(timestep)
    return int(scheduler.step_index)


def read_coordinates(
    scheduler: Any, timestep: Tensor | float, position: int
) -> tuple[Coordinates, Coordinates]:
    """Read the noise levels at both ends of a step.

    Args:
        scheduler: of diffusers, with its timesteps set.
        timestep: what the pipeline hands to its step.
        position (`int`): of this step in ``scheduler.timesteps``.

    Returns:
        `tuple[Coordinates, Coordinates]`: now, and at the next point of the time grid.

    Raises:
        UserError: a scheduler whose convention is not known.
    """
    kind = _kind(scheduler)
    prediction = str(scheduler.config.get("prediction_type", "epsilon") or "epsilon")
    prediction = {"original_sample": "sample", "flow_prediction": "flow"}.get(
        prediction, prediction
    )
    if kind == "vp":
        times = scheduler.timesteps
        after = times[position + 1] if position + 1 < len(times) else None
        final = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
        bars = [
            float(scheduler.alphas_cumprod[int(timestep)]),
            final if after is None else float(scheduler.alphas_cumprod[int(after)]),
        ]
        now, then = (Coordinates(bar**0.5, (1 - bar) ** 0.5, prediction, "vp") for bar in bars)
        return now, then
    if kind is None:
        raise UserError(
            f"scheduler: the clean prediction of {type(scheduler).__name__} is not known here; "
            "give predict_x0=, or use DDIM, Euler ancestral, "
            "DPM-Solver SDE or a flow-matching scheduler"
        )
    index = step_index(scheduler, timestep)
    sigmas = [
        float(scheduler.sigmas[min(index + shift, len(scheduler.sigmas) - 1)]) for shift in (0, 1)
    ]
    if kind == "flow":
        now, then = (Coordinates(1 - s, s, "flow", "flow") for s in sigmas)
    elif kind == "solver":
        flow = bool(scheduler.config.get("use_flow_sigmas", False))
        pairs = [
            tuple(
                float(x)
                for x in scheduler._sigma_to_alpha_sigma_t(torch.tensor(s, dtype=torch.float64))
            )
            for s in sigmas
        ]
        now, then = (Coordinates(a, s, prediction, "flow" if flow else "vp") for a, s in pairs)
    else:
        now, then = (
            Coordinates(1.0, s, "edm" if kind == "edm" else prediction, "ve") for s in sigmas
        )
    return now, then


def clean_prediction(
    scheduler: Any, model_output: Tensor, sample: Tensor, at: Coordinates
) -> Tensor:
    """Compute the clean prediction of one step, before any clipping.

    It is Tweedie's formula in each parametrisation.

    Args:
        scheduler: of diffusers.
        model_output (`Tensor`): (n, ...). A learned variance in the second half of the
            channels is dropped.
        sample (`Tensor`): (n, ...).
        at (`Coordinates`): of this step.

    Returns:
        `Tensor`: x0hat (n, ...), float32 or wider.

    Raises:
        UserError: a prediction type that is not known.
    """
    dtype = torch.promote_types(sample.dtype, torch.float32)
    y, out = sample.to(dtype), model_output.to(dtype)
    if out.shape != y.shape and out.ndim > 1 and out.shape[1] == 2 * y.shape[1]:
        out = out[:, : y.shape[1]]
    if at.prediction == "edm":
        return scheduler.precondition_outputs(
            y, out, torch.tensor(at.sigma, dtype=dtype, device=y.device)
        )
    if at.prediction == "sample":
        return out
    if at.prediction == "flow":
        return y - at.sigma * out
    if at.prediction == "epsilon":
        return (y - at.sigma * out) / at.alpha
    if at.prediction == "v_prediction":
        # In variance-exploding coordinates the model still speaks of the
        # variance-preserving ones.
        norm = (at.alpha**2 + at.sigma**2) ** 0.5
        return (at.alpha * y / norm - at.sigma * out) / norm
    raise UserError(
        f"scheduler: prediction_type {at.prediction!r} is not known here; give predict_x0="
    )


def as_clipped(scheduler: Any, x0: Tensor) -> Tensor:
    """Clip a clean prediction as the scheduler does it.

    Args:
        scheduler: of diffusers. It thresholds or clamps where its configuration says so
            and its class does it.
        x0 (`Tensor`): (n, ...).

    Returns:
        `Tensor`: (n, ...).
    """
    takes = inspect.signature(type(scheduler).__init__).parameters
    solver = str(scheduler.config.get("algorithm_type", "dpmsolver++"))
    if "thresholding" in takes and scheduler.config.get("thresholding") and solver.endswith("++"):
        return scheduler._threshold_sample(x0)
    limit = clip_range(scheduler)
    return x0 if limit is None else x0.clamp(-limit, limit)


def check_reachable(pipe: Pipeline) -> None:
    """Refuse a pipeline with state of each particle that cannot be reordered.

    Args:
        pipe: of diffusers.

    Raises:
        UserError: a scheduler or pipeline with hidden state, or a model cache that is
            switched on.
    """
    scheduler = pipe.scheduler
    for name in _names(scheduler):
        if name in UNREACHABLE:
            raise UserError(
                f"scheduler: {name} cannot be steered, {UNREACHABLE[name]}; use kernel='ddim' on "
                "another scheduler"
            )
    if "old_pred_original_sample" in inspect.signature(type(scheduler).step).parameters:
        raise UserError(
            f"scheduler: {type(scheduler).__name__} cannot be steered, the pipeline keeps the "
            "previous prediction itself"
        )
    for name in ("unet", "transformer", "transformer_2"):
        model = getattr(pipe, name, None)
        if getattr(model, "is_cache_enabled", False):
            raise UserError(
                f"{name}: its feature cache holds values per particle that resampling would mix "
                f"up; call pipe.{name}.disable_cache()"
            )


def refuse_replaced_noise(scheduler: Scheduler) -> None:
    """Refuse flow matching with ``stochastic_sampling=True``.

    Such a sampler never converges to the model's distribution.

    Args:
        scheduler: of diffusers.

    Raises:
        UserError: names what to use instead.
    """
    if scheduler.config.get("stochastic_sampling", False):
        raise UserError(
            "scheduler: stochastic_sampling=True replaces all noise at every step and does not "
            "sample the model's distribution at any number of steps; "
            "use kernel='ddim' or kernel='euler_maruyama' on this scheduler"
        )


def detached(scheduler: T) -> T:
    """Copy a scheduler as its class made it, without a hook on its ``step``."""
    clone = object.__new__(type(scheduler))
    clone.__dict__.update(
        {name: copy.deepcopy(value) for name, value in vars(scheduler).items() if name != "step"}
    )
    return clone


def is_stochastic(scheduler: Scheduler, arguments: Mapping[str, Any], position: int = 0) -> bool:
    """Test whether a scheduler adds noise as it is called.

    The rest of the time grid is walked twice, with different seeds, on copies of the
    scheduler, until the results differ. Some add noise in a part of the grid alone, and
    second-order schedulers in the second half of an interval.

    Args:
        scheduler: of diffusers, with its timesteps set.
        arguments (`Mapping`): of its step by name, as the pipeline gave them. Only the
            first row is used.
        position (`int`, *optional*, defaults to `0`): of this step in
            ``scheduler.timesteps``.

    Returns:
        `bool`: whether the results differ.
    """
    walks = [_walk(scheduler, arguments, position, seed) for seed in (1, 2)]
    return any(not torch.equal(*pair) for pair in zip(*walks, strict=True))


def _walk(
    scheduler: Scheduler, arguments: Mapping[str, Any], position: int, seed: int
) -> Iterator[Tensor]:
    """Walk the rest of the time grid with the first row, and yield its samples."""
    clone, row = detached(scheduler), dict(arguments)
    for name in ("model_output", "sample"):
        row[name] = row[name][:1]
    if "generator" in step_parameters(scheduler):
        row["generator"] = torch.Generator("cpu").manual_seed(seed)
    row["return_dict"] = False
    for number, timestep in enumerate(clone.timesteps[position:]):
        # The two walks take turns, so each step sets the global generator.
        with seeded(1_000 * seed + number, row["sample"].device):
            row["sample"] = type(clone).step(clone, **{**row, "timestep": timestep})[0]
        yield row["sample"]


def step_parameters(scheduler: Scheduler) -> list[str]:
    """List the names of the arguments of the scheduler's step."""
    return list(inspect.signature(type(scheduler).step).parameters)
