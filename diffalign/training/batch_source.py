"""Where the batches of a run come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from .batch import Batch
from .data_pipeline import DataPipeline, ReferenceErrors


class BatchSource(Protocol):
    """Where the batches of a run come from.

    A source may also have `save(folder, rank)` and `load(folder, rank, device)`. Then
    it is saved in every checkpoint. It needs them if `samples_seen` alone does not give
    its position.
    """

    def batches(self, data: DataPipeline, samples_seen: int) -> Iterator[Batch]:
        """Yield the batches of this process without end.

        Args:
            data (`DataPipeline`): Reads the dataset.
            samples_seen (`int`): Groups consumed so far, over all processes.
        """
        ...


class DatasetSource:
    """Yields batches of the dataset's own images.

    Args:
        precomputed (`ReferenceErrors`, *optional*): Reference errors, set on every
            batch.
    """

    def __init__(self, precomputed: ReferenceErrors | None = None) -> None:
        self.precomputed = precomputed

    def batches(self, data: DataPipeline, samples_seen: int) -> Iterator[Batch]:
        """Yield batches of this process without end. See `BatchSource.batches`."""
        for examples in data.batches(samples_seen):
            batch = data.builder(examples)
            if self.precomputed is not None:
                self.precomputed.attach(batch, examples)
            yield batch
