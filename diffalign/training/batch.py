"""What a method sees: groups of k images of one prompt, with everything random already drawn."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..runtime.seeds import row_generator


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
        noisy (`Tensor`, *optional*): (g, k, C, H, W) noisy samples at `times`, of methods that make them in `prepare`.
        prompts (`list[str]`): of the groups, as they are in the data.
        extra (`dict[str, Tensor]`): what a method adds in `prepare`, leading dimension g.
        epochs (`list[int]`), seed (`int`): with `row_ids`, where the rows' own draws come from.
    """

    x0: Tensor
    noise: Tensor
    times: Tensor
    condition: dict[str, Tensor]
    weights: Tensor
    row_ids: list[int] = field(default_factory=list)
    scores: Tensor | None = None
    reference_errors: Tensor | None = None
    noisy: Tensor | None = None
    prompts: list[str] = field(default_factory=list)
    extra: dict[str, Tensor] = field(default_factory=dict)
    epochs: list[int] = field(default_factory=list)
    seed: int = 0

    def generators(self, purpose: str) -> list[torch.Generator]:
        """One CPU generator per row for a method's own draws, the same in any batch, process and resumed run."""
        return [
            row_generator(self.seed, row, epoch, purpose)
            for row, epoch in zip(self.row_ids, self.epochs, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.x0)

    @property
    def k(self) -> int:
        """Images per group."""
        return self.x0.shape[1]
