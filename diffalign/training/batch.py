"""What a method sees: groups of k images of one prompt, with everything random already drawn."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Batch:
    """A micro-batch of g groups of k images.

    Attributes:
        x0 (`Tensor`): clean latents, (g, k, C, H, W), float32 on the device.
        noise (`Tensor`): (g, k, C, H, W), shared within a group unless the run says otherwise.
        times (`Tensor`): (g,) on the CPU: int64 timesteps or float64 sigmas, one per group.
        condition (`dict[str, Tensor]`): what the network is conditioned on, leading dimension g * k.
        weights (`Tensor`): (g,) float32; 0 for kept ties.
        row_ids (`list[int]`): rows of the source dataset, for messages.
        scores (`Tensor`, *optional*): (g, k) scores of ranked data, NaN = missing.
        reference_errors (`Tensor`, *optional*): (g, k), when they were computed before training.
    """

    x0: Tensor
    noise: Tensor
    times: Tensor
    condition: dict[str, Tensor]
    weights: Tensor
    row_ids: list[int] = field(default_factory=list)
    scores: Tensor | None = None
    reference_errors: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x0)

    @property
    def k(self) -> int:
        """Images per group."""
        return self.x0.shape[1]
