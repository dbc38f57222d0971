"""Average a number over all rows of an optimizer step."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from torch import Tensor


class StepMean:
    """The mean over the micro-batches and processes of one optimizer step.

    Example:
        ```python
        import torch
        from accelerate import Accelerator

        from diffalign.training.step_mean import StepMean

        mean = StepMean()
        mean.add(torch.tensor([1.0, 2.0, 9.0]), weights=torch.tensor([1.0, 1.0, 0.0]))
        assert mean.take(Accelerator()) == 1.5
        ```
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, values: Tensor, weights: Tensor) -> None:
        """Count the rows of a micro-batch.

        Args:
            values (`Tensor`): One per row, (g,).
            weights (`Tensor`): Weight of each row in the loss, (g,). Rows of weight 0,
                which are ties, do not count.
        """
        counts = weights > 0
        # A product with 0 would keep a value that is not finite.
        values = torch.where(counts, values.detach().double(), 0.0)
        sums = torch.stack([values.sum(), counts.double().sum()])
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self, accelerator: Accelerator) -> float | None:
        """Return the mean, and start anew. All processes must call this.

        Args:
            accelerator (`Accelerator`): Sums over the processes.

        Returns:
            `float`, *optional*: None if no row counted, or a value was not finite.
        """
        sums = torch.zeros(2, dtype=torch.float64) if self._sums is None else self._sums
        total, rows = accelerator.reduce(sums.to(accelerator.device), "sum").tolist()
        self._sums = None
        return total / rows if rows and math.isfinite(total) else None
