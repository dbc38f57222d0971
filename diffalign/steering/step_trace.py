"""What one scored step of a steered run was."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image
from torch import Tensor


@dataclass
class StepTrace:
    """One scored step, P prompts by K particles.

    Attributes:
        index: of the step, 0 at pure noise.
        timestep: the scheduler's.
        rewards: (P, K) float64, at x0hat, before resampling; NaN where the scorer gave none.
        log_potentials: (P, K), log G as applied.
        log_weights: (P, K), after weighting, before resampling.
        ess: (P,).
        ancestors: (P, K) int64: slot k goes on from slot ``ancestors[p, k]``; identity where not resampled.
        resampled: (P,) bool.
        thumbnails: small images of x0hat before resampling, [prompt][particle]; None where nothing was decoded.
    """

    index: int
    timestep: float
    rewards: Tensor
    log_potentials: Tensor
    log_weights: Tensor
    ess: Tensor
    ancestors: Tensor
    resampled: Tensor
    thumbnails: list[list[Image.Image]] | None = None
