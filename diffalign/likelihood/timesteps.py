"""How times are drawn. Every sampler is a map of uniform numbers in [0, 1), so randomness is an argument and never hidden."""

from __future__ import annotations

import torch
from torch import Tensor

from .schedules import NoisingProcess, RectifiedFlow, VariancePreserving

TIMESTEP_SAMPLERS = ("uniform", "logit_normal", "turbo", "refiner")


def turbo_timesteps(timesteps: Tensor) -> Tensor:
    """250 (t mod 4) + 249: the four timesteps 249, 499, 749, 999 of SDXL-Turbo."""
    return 250 * (timesteps % 4) + 249


def refiner_timesteps(timesteps: Tensor) -> Tensor:
    """t mod 200: the low-noise end on which the SDXL refiner works."""
    return timesteps % 200


def sample_times(
    process: NoisingProcess,
    uniforms: Tensor,
    sampler: str = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
) -> Tensor:
    """Maps uniform numbers to times of `process`.

    Args:
        process: decides what a time is: int64 timesteps (variance preserving) or float64 sigmas in (0, 1] (flow, shift applied).
        uniforms (`Tensor`): (n,) in [0, 1).
        sampler (`str`): ``uniform``; ``logit_normal`` (sigmoid of N(`logit_mean`, `logit_std`^2), SD3, Esser et al. 2024);
            ``turbo`` and ``refiner`` (variance preserving only).

    Raises:
        ValueError: on an unknown sampler, or one that the process does not have.
    """
    if sampler not in TIMESTEP_SAMPLERS:
        raise ValueError(
            f"timestep_sampling: expected one of {', '.join(TIMESTEP_SAMPLERS)}, got {sampler!r}"
        )
    uniforms = uniforms.double()
    if sampler == "logit_normal":
        # The inverse normal distribution is infinite at 0.
        quantiles = torch.special.ndtri(uniforms.clamp(1e-9, 1 - 1e-9))
        uniforms = torch.sigmoid(logit_mean + logit_std * quantiles)
    if isinstance(process, RectifiedFlow):
        if sampler in ("turbo", "refiner"):
            raise ValueError(
                f"timestep_sampling: {sampler!r} belongs to SDXL, not to flow-matching models; use uniform or logit_normal"
            )
        sigma = uniforms.clamp(min=1 / process.num_timesteps)
        return process.shift * sigma / (1 + (process.shift - 1) * sigma)
    assert isinstance(process, VariancePreserving)
    timesteps = (uniforms * process.num_timesteps).long().clamp(max=process.num_timesteps - 1)
    if sampler == "turbo":
        return turbo_timesteps(timesteps)
    return refiner_timesteps(timesteps) if sampler == "refiner" else timesteps
