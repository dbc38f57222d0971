"""The tensors of one training step: groups of images, with all random numbers drawn."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from ..runtime.seeds import row_generator


class LoopBatch(Protocol):
    """What the loop knows of a micro-batch of g groups.

    Attributes:
        weights (`Tensor`): Weight of each group in the loss, (g,).
        row_ids (`list[int]`): Rows of the data, for messages.
    """

    weights: Tensor
    row_ids: list[int]

    def without_tensors(self) -> LoopBatch:
        """Return a small copy, which is kept for a message."""
        ...

    def place(self, groups: list[int]) -> str:
        """Name some groups in a message."""
        ...


@dataclass
class Batch:
    """A micro-batch of g groups, each with k images of one prompt.

    Attributes:
        x0 (`Tensor`): Clean latents, (g, k, C, H, W), float32, on the device.
        noise (`Tensor`): Noise, (g, k, C, H, W). The images of a group share it unless
            `shared_noise` is false.
        times (`Tensor`): One time per group, (g,), on the CPU: int64 timesteps or
            float64 sigmas.
        condition (`dict[str, Tensor]`): What the network is conditioned on, g * k rows
            each.
        weights (`Tensor`): Weight of each group in the loss, (g,), float32. Ties have
            weight 0.
        row_ids (`list[int]`): Rows of the source dataset, for messages.
        scores (`Tensor`, *optional*): Scores of ranked data, (g, k). NaN marks a
            missing score.
        reference_errors (`Tensor`, *optional*): Errors of the reference, (g, k), if
            they were computed before training.
        noisy (`Tensor`, *optional*): Noisy samples at `times`, (g, k, C, H, W), set by
            methods that make their own in `prepare`.
        prompts (`list[str]`): Prompt of each group, as in the dataset.
        extra (`dict[str, Tensor]`): What a method adds in `prepare`, g rows each.
        users (`list[str | None]`): Who judged each group, where the data say it.
        epochs (`list[int]`): Epoch of each group. Seeds the random numbers of its row.
        seed (`int`, *optional*, defaults to `0`): Seed of the run.
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
    users: list[str | None] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    seed: int = 0

    def generators(self, purpose: str) -> list[torch.Generator]:
        """Return one random generator per group for a method's own draws.

        A generator depends on the seed, the row and the epoch alone. It gives the same
        numbers in any batch, on any process and in a resumed run.

        Args:
            purpose (`str`): Name of the random stream. Different names give independent
                numbers.

        Returns:
            `list[torch.Generator]`: g generators on the CPU.
        """
        return [
            row_generator(self.seed, row, epoch, purpose)
            for row, epoch in zip(self.row_ids, self.epochs, strict=True)
        ]

    def without_tensors(self) -> Batch:
        """Return a copy without its large tensors. See `LoopBatch`."""
        empty = torch.empty(0)
        return replace(self, x0=empty, noise=empty, condition={}, noisy=None, extra={})

    def place(self, groups: list[int]) -> str:
        """Name rows and timesteps of some groups. See `LoopBatch`."""
        rows, times = [self.row_ids[i] for i in groups], [float(self.times[i]) for i in groups]
        return f"dataset rows {rows} at timesteps {times}"

    def __len__(self) -> int:
        return len(self.x0)

    @property
    def k(self) -> int:
        """Number of images per group."""
        return self.x0.shape[1]
