"""Work that the processes of a run share, with the results on the first one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator

T = TypeVar("T")


class SharedBatches:
    """Deals batches of items to the processes in turn.

    A batch holds the same items whatever the number of processes, because the last bit
    of an image may depend on the images drawn with it.

    Args:
        accelerator (`Accelerator`): Processes of the run.
        count (`int`): Number of items.
        size (`int`): Items per batch.
    """

    def __init__(self, accelerator: Accelerator, count: int, size: int) -> None:
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.main, self.device = accelerator.is_main_process, accelerator.device
        starts = range(0, count, size)
        self.batches = [list(range(start, min(start + size, count))) for start in starts]

    def mine(self) -> list[int]:
        """Return the indices of this process's items, in order."""
        return self._dealt(self.rank)

    def _dealt(self, rank: int) -> list[int]:
        return [index for batch in self.batches[rank :: self.world] for index in batch]

    def idle(self) -> list[int]:
        """Return the items of a batch to do again, where others have a batch more.

        Networks that are spread over the processes run on all of them or not at all.
        """
        most = len(self.batches[:: self.world])
        return self.batches[0] if len(self.batches[self.rank :: self.world]) < most else []

    def gather(self, results: Sequence[T]) -> list[T]:
        """Collect the results of all items, in order. All processes must call this.

        Args:
            results (`Sequence`): One per item of `mine`.

        Returns:
            `list`: Empty on all but the first process.
        """
        if self.world == 1:
            return list(results)
        parts: list[Any] | None = [None] * self.world if self.main else None
        torch.distributed.gather_object(list(results), parts)
        if parts is None:
            return []
        places = [index for rank in range(self.world) for index in self._dealt(rank)]
        values = [value for part in parts for value in part]
        ordered = sorted(zip(places, values, strict=True), key=lambda pair: pair[0])
        return [value for _, value in ordered]

    def scatter(self, items: Sequence[T]) -> list[T]:
        """Give every process its items. All processes must call this.

        Args:
            items (`Sequence`): All items on the first process, ignored on the others.

        Returns:
            `list`: The items of `mine`.
        """
        if self.world == 1:
            return list(items)
        parts: list[Any] = [None]
        shares = None
        if self.main:
            shares = [[items[index] for index in self._dealt(r)] for r in range(self.world)]
        torch.distributed.scatter_object_list(parts, shares)
        return parts[0]
