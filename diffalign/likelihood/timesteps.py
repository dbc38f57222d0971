"""How training times are drawn.

Every sampler maps uniform numbers in [0, 1) to times. The randomness is thus an
argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .schedules import NoiseSchedule, RectifiedFlow, VariancePreserving

TIMESTEP_SAMPLERS = ("uniform", "logit_normal", "turbo", "refiner")


def turbo_timesteps(timesteps: Tensor) -> Tensor:
    """Map timesteps to the four of SDXL-Turbo: 250 (t mod 4) + 249.

    Args:
        timesteps (`Tensor`): int64, any shape.

    Returns:
        `Tensor`: int64, same shape.

    Example:
        ```python
        assert turbo_timesteps(torch.arange(4)).tolist() == [249, 499, 749, 999]
        ```
    """
    return 250 * (timesteps % 4) + 249


def refiner_timesteps(timesteps: Tensor) -> Tensor:
    """Map timesteps to the low-noise end on which the SDXL refiner works: t mod 200.

    Args:
        timesteps (`Tensor`): int64, any shape.

    Returns:
        `Tensor`: int64, same shape.

    Example:
        ```python
        assert refiner_timesteps(torch.tensor([450])).item() == 50
        ```
    """
    return timesteps % 200


def sample_times(
    schedule: NoiseSchedule,
    uniforms: Tensor,
    sampler: str = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    *,
    shift: float | None = None,
    window: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Map uniform numbers to times of a noise schedule.

    Args:
        schedule (`NoiseSchedule`): decides what a time is.
        uniforms (`Tensor`): (n,) in [0, 1).
        sampler (`str`, *optional*, defaults to `"uniform"`): ``uniform``;
            ``logit_normal``, the sigmoid of N(logit_mean, logit_std^2) (Esser et al.
            2024, arXiv 2403.03206, section 3.1); ``turbo`` or ``refiner``, for
            variance-preserving models only.
        logit_mean (`float`, *optional*, defaults to `0.0`): of ``logit_normal``.
        logit_std (`float`, *optional*, defaults to `1.0`): of ``logit_normal``.
        shift (`float`, *optional*): resolution shift of flow models, in place of the
            schedule's own. 1 is no shift.
        window (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`): shares of
            the schedule between which the times lie, 0 is clean. Within it they are
            distributed as without it.

    Returns:
        `Tensor`: (n,), int64 timesteps (variance preserving) or float64 sigmas in (0,
            1], shifted (flow).

    Raises:
        ValueError: unknown sampler, or one that the schedule does not have, or a window
            of one that draws single timesteps.

    Example:
        ```python
        sigmas = sample_times(RectifiedFlow(), torch.rand(16), "logit_normal")
        assert sigmas.min() > 0 and sigmas.max() <= 1
        ```
    """
    if sampler not in TIMESTEP_SAMPLERS:
        raise ValueError(
            f"timestep_sampling: expected one of {', '.join(TIMESTEP_SAMPLERS)}, got {sampler!r}"
        )
    if window != (0.0, 1.0) and sampler in ("turbo", "refiner"):
        raise ValueError(
            f"timestep_sampling: {sampler!r} has its own timesteps; leave out min_timestep and "
            "max_timestep"
        )
    if not isinstance(schedule, RectifiedFlow):
        shift = 1.0
    elif shift is None:
        shift = schedule.shift
    uniforms = uniforms.double()
    if window != (0.0, 1.0):
        low, high = _quantiles(window, sampler, logit_mean, logit_std, shift)
        uniforms = low + (high - low) * uniforms
    if sampler == "logit_normal":
        # The inverse normal distribution is infinite at 0.
        quantiles = torch.special.ndtri(uniforms.clamp(1e-9, 1 - 1e-9))
        uniforms = torch.sigmoid(logit_mean + logit_std * quantiles)
    if isinstance(schedule, RectifiedFlow):
        if sampler in ("turbo", "refiner"):
            raise ValueError(
                f"timestep_sampling: {sampler!r} belongs to SDXL, not to flow-matching models; "
                "use uniform or logit_normal"
            )
        sigma = uniforms.clamp(min=1 / schedule.num_timesteps)
        return shift * sigma / (1 + (shift - 1) * sigma)
    assert isinstance(schedule, VariancePreserving)
    timesteps = (uniforms * schedule.num_timesteps).long().clamp(max=schedule.num_timesteps - 1)
    if sampler == "turbo":
        return turbo_timesteps(timesteps)
    return refiner_timesteps(timesteps) if sampler == "refiner" else timesteps


def _quantiles(
    window: tuple[float, float], sampler: str, logit_mean: float, logit_std: float, shift: float
) -> tuple[float, float]:
    """Which uniform numbers a sampler maps to the ends of a window."""
    ends = torch.tensor(window, dtype=torch.float64)
    ends = ends / (shift - (shift - 1) * ends)
    if sampler == "logit_normal":
        ends = torch.special.ndtr((torch.logit(ends) - logit_mean) / logit_std)
    low, high = ends.tolist()
    return low, high
