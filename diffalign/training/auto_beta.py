"""Move beta while training, so that pairs keep a gradient of a chosen size."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from .step_mean import StepMean

RATE = 0.1
"""Change of log(beta) per step, for a gradient factor that is off by 1."""
SPAN = 100.0
"""beta stays within this factor of where it started."""


class AutoBeta:
    """Steers beta towards a mean gradient factor sigmoid(-z).

    After each optimizer step, log(beta) changes by `RATE` times the mean factor of the
    step's pairs minus the target. A factor above the target means that the margins are
    small for this beta, so beta rises. A factor below it means that most pairs are
    learned and have little gradient left, so beta falls. It stays within `SPAN` times
    its start.

    Args:
        start (`float`): First beta.
        target (`float`): Mean factor to hold, in (0, 1).

    Attributes:
        value (`float`): Beta of the current step.

    Example:
        ```python
        import torch
        from accelerate import Accelerator

        from diffalign.training.auto_beta import AutoBeta

        beta = AutoBeta(start=2000.0, target=0.45)
        beta.add(torch.tensor([0.2, 0.3]), weights=torch.ones(2))
        beta.step(Accelerator())
        assert beta.value < 2000
        ```
    """

    def __init__(self, start: float, target: float) -> None:
        self.start, self.target, self.value = start, target, start
        self.mean = StepMean()

    def add(self, factors: Tensor, weights: Tensor) -> None:
        """Count the pairs of a micro-batch.

        Args:
            factors (`Tensor`): sigmoid(-z) of each pair, (g,).
            weights (`Tensor`): Weight of each pair in the loss, (g,). Ties have 0.
        """
        self.mean.add(factors, weights)

    def step(self, accelerator: Accelerator) -> None:
        """Move beta, equally on all processes.

        Args:
            accelerator (`Accelerator`): Sums over the processes.
        """
        factor = self.mean.take(accelerator)
        if factor is None:
            return
        moved = self.value * math.exp(RATE * (factor - self.target))
        self.value = min(max(moved, self.start / SPAN), self.start * SPAN)

    def save(self, folder: Path, rank: int) -> None:
        """Write beta into a checkpoint's folder. See `CheckpointPart`."""
        if rank == 0:
            (folder / "auto_beta.json").write_text(json.dumps({"beta": self.value}))

    def load(self, folder: Path, rank: int, device: torch.device) -> None:
        """Read beta from a checkpoint's folder. See `CheckpointPart`."""
        self.value = float(json.loads((folder / "auto_beta.json").read_text())["beta"])
