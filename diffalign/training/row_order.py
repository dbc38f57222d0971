"""The order of the rows as a function of the position, so that a run can resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..runtime.seeds import row_generator


class RowOrder:
    """Maps a position to an epoch and a row index. Every epoch is shuffled anew.

    Args:
        count (`int`): Number of rows.
        seed (`int`): Seed of the shuffles.
        buckets (`Sequence[int]`, *optional*): Bucket of each row, (count,). Each
            `chunk` positions then lie in one bucket, and the last chunk of a bucket is
            filled up with its first rows.
        chunk (`int`, *optional*, defaults to `1`): Groups per process and forward pass.
    """

    def __init__(
        self, count: int, seed: int, buckets: Sequence[int] | None = None, chunk: int = 1
    ) -> None:
        self.count, self.seed, self.chunk = count, seed, chunk
        self.buckets = None if buckets is None or len(set(buckets)) < 2 else torch.tensor(buckets)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)
        self.length = len(self._shuffled(0))

    def _shuffled(self, epoch: int) -> Tensor:
        generator = row_generator(self.seed, 0, epoch, "order")
        order = torch.randperm(self.count, generator=generator)
        if self.buckets is None:
            return order
        chunks = []
        for bucket in self.buckets.unique():
            rows = order[self.buckets[order] == bucket]
            short = -len(rows) % self.chunk
            chunks += list(
                torch.cat([rows, rows.repeat(short // len(rows) + 1)[:short]]).split(self.chunk)
            )
        return torch.cat([chunks[i] for i in torch.randperm(len(chunks), generator=generator)])

    def __getitem__(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, self.length)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return epoch, int(self._order[offset])


class PositionSampler:
    """Yields the micro-batches of one process, from any position.

    Optimizer step s, pass a, process r reads the positions `start + ((s A + a) W + r) b
    + j` for j < b, with A passes, W processes and batch size b.

    Args:
        order (`RowOrder`): Maps positions to rows.
        start (`int`): First position, in groups over all processes.
        batch_size (`int`): Groups per micro-batch.
        rank (`int`): Number of this process.
        world (`int`): Number of processes.
    """

    def __init__(self, order: RowOrder, start: int, batch_size: int, rank: int, world: int) -> None:
        self.order, self.start, self.batch_size = order, start, batch_size
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        base = self.start + self.rank * self.batch_size
        while True:
            yield [self.order[base + j] for j in range(self.batch_size)]
            base += self.world * self.batch_size


def endless_loader(
    data: Any, sampler: PositionSampler, collate: Callable[[Any], Any], **workers: Any
) -> torch.utils.data.DataLoader[Any]:
    """Read the micro-batches of a sampler.

    Args:
        data: Maps epoch and row to an example.
        sampler (`PositionSampler`): The positions of this process.
        collate (`Callable`): Makes a batch of examples.
        **workers: Of torch's loader.
    """
    # The loader draws its workers' seeds when it starts. From the global generator, a
    # resumed run would draw once more than an uninterrupted one.
    generator = torch.Generator()
    return torch.utils.data.DataLoader(
        data,
        batch_sampler=sampler,  # type: ignore[arg-type]
        collate_fn=collate,
        generator=generator,
        **workers,
    )
