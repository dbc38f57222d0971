"""Deterministic solvers of diffusers, for methods that need final latents alone."""

from __future__ import annotations

from typing import Any

import torch

from ...likelihood.schedules import NoiseSchedule, VariancePreserving

SOLVERS = ("default", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
"""`default` is the sampler's own step of first order: DDIM, or Euler for flows. The
others are schedulers of diffusers of second order, which need fewer steps."""


_EPSILON = 1e-6  # that of diffusers' UniPC


def build_solver(name: str, schedule: NoiseSchedule, times: torch.Tensor) -> Any:
    """Build a solver that steps from noise through given times to the clean sample.

    Args:
        name (`str`): Name of a scheduler class of diffusers, see `SOLVERS`.
        schedule (`NoiseSchedule`): Noise schedule of the model.
        times (`Tensor`): Time before each step, from noisy to clean, (S,).

    Returns:
        A scheduler with `timesteps` and `step`.
    """
    import diffusers

    of_noise = isinstance(schedule, VariancePreserving)
    solver = getattr(diffusers, name)(
        num_train_timesteps=schedule.num_timesteps,
        prediction_type=schedule.prediction_type if of_noise else "flow_prediction",
        use_flow_sigmas=not of_noise,
    )
    solver.set_timesteps(len(times))
    if isinstance(schedule, VariancePreserving):
        # At a terminal SNR of zero the first sigma would be infinite. The solvers of
        # diffusers begin at this one.
        bars = schedule.alphas_cumprod[times].double().clamp(min=2**-24)
        sigmas = ((1 - bars) / bars).sqrt()
        solver.timesteps = times.clone()
    else:
        # At pure noise the logarithm of the signal is infinite, and not every LAPACK
        # solves UniPC's linear system. diffusers' UniPC starts below 1 as well.
        sigmas = times.double().clamp(max=1 - _EPSILON)
        # Only the order of these is read, the network gets its own times.
        solver.timesteps = sigmas * schedule.num_timesteps
    solver.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)]).float()
    solver.set_begin_index(0)
    return solver
