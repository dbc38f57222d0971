"""The record of one scored step of a steered run."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image
from torch import Tensor


@dataclass
class StepTrace:
    """One scored step, P prompts by K particles.

    Attributes:
        index (`int`): of the step, 0 at pure noise.
        timestep (`float`): the scheduler's.
        rewards (`Tensor`): at x0hat, before resampling, float64 (P, K). NaN where the
            scorer gave none.
        log_potentials (`Tensor`): log G as applied, (P, K).
        log_weights (`Tensor`): after weighting, before resampling, (P, K).
        ess (`Tensor`): effective sample size, (P,).
        ancestors (`Tensor`): int64 (P, K). Slot k goes on from slot ``ancestors[p,
            k]``. The identity where not resampled.
        resampled (`Tensor`): bool (P,).
        thumbnails: small images of x0hat before resampling, [prompt][particle]. None
            where nothing was decoded.
    """

    index: int
    timestep: float
    rewards: Tensor
    log_potentials: Tensor
    log_weights: Tensor
    ess: Tensor
    ancestors: Tensor
    resampled: Tensor
    thumbnails: list[list[Image.Image | None]] | None = None
