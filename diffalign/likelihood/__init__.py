"""Noise schedules, errors, rewards and log-probabilities, below every method.

Everything here is a pure function of tensors. Nothing knows a model, a trainer or a
dataset.
"""

from .errors import (
    convert_errors,
    denoising_errors,
    effective_beta,
    group_noise,
    implicit_rewards,
    min_snr_weight,
    winner_safeguard,
)
from .schedules import (
    NoiseSchedule,
    RectifiedFlow,
    VariancePreserving,
    schedule_from_scheduler,
    with_zero_terminal_snr,
)
from .timesteps import TIMESTEP_SAMPLERS, refiner_timesteps, sample_times, turbo_timesteps
from .transitions import (
    cps_step,
    dance_sde_step,
    ddim_step,
    ddim_step_log_prob,
    flow_sde_step,
    flow_sde_step_log_prob,
    gaussian_log_prob,
    unscaled_log_prob,
)

__all__ = [
    "TIMESTEP_SAMPLERS",
    "NoiseSchedule",
    "RectifiedFlow",
    "VariancePreserving",
    "convert_errors",
    "cps_step",
    "dance_sde_step",
    "ddim_step",
    "ddim_step_log_prob",
    "denoising_errors",
    "effective_beta",
    "flow_sde_step",
    "flow_sde_step_log_prob",
    "gaussian_log_prob",
    "group_noise",
    "implicit_rewards",
    "min_snr_weight",
    "refiner_timesteps",
    "sample_times",
    "schedule_from_scheduler",
    "turbo_timesteps",
    "unscaled_log_prob",
    "winner_safeguard",
    "with_zero_terminal_snr",
]
