"""Read groups of images as tensors, from disk, a stream or the latent cache."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.cache import TensorCache
from ..data.transforms import Geometry, GroupTransform
from ..errors import UserError
from ..runtime.seeds import row_generator


@dataclass
class Example:
    """One group as the data loader delivers it; latents where they were cached, pixels otherwise."""

    row_id: int
    epoch: int
    prompts: tuple[str, ...]
    geometry: Geometry
    weight: float
    scores: tuple[float, ...] | None
    pixels: Tensor | None = None  # (k, 3, H, W)
    mean: Tensor | None = None  # (k, C, h, w)
    std: Tensor | None = None


class GroupReader(torch.utils.data.Dataset):
    """Map-style access by (epoch, index), in a worker or not.

    A row whose image turns out to be undecodable (headers were checked on loading, pixels were not) is replaced by the next row,
    named in a warning and counted; above `max_broken_fraction` of all rows it is an error.
    """

    def __init__(
        self, dataset: Any, transform: GroupTransform, seed: int, max_broken_fraction: float = 0.05
    ) -> None:
        self.dataset, self.transform, self.seed, self.max_broken_fraction = (
            dataset,
            transform,
            seed,
            max_broken_fraction,
        )
        self.latents: TensorCache | None = None
        self.broken: dict[int, str] = {}

    def __getitem__(self, key: tuple[int, int]) -> Example:
        epoch, index = key
        try:
            return self.read(self.dataset[index], epoch)
        except UserError as error:
            self.skip(index, str(error))
            return self[(epoch, (index + 1) % len(self.dataset))]

    def skip(self, index: int, reason: str) -> None:
        """Counts a broken row.

        Raises:
            UserError: when there are too many.
        """
        if index not in self.broken:
            warnings.warn(f"{reason}; the next row takes its place", stacklevel=2)
        self.broken[index] = reason
        if len(self.broken) > self.max_broken_fraction * len(self.dataset):
            raise UserError(
                f"{len(self.broken)} of {len(self.dataset)} rows cannot be used, more than "
                f"data.max_broken_fraction: {reason}"
            )

    def read(self, group: Any, epoch: int) -> Example:
        example = Example(
            group.row_id,
            epoch,
            tuple(group.prompts),
            Geometry((0, 0), (0, 0), (0, 0)),
            group.weight,
            group.scores,
        )
        if not group.images:
            example.geometry = Geometry(self.transform.sizes[0], (0, 0), self.transform.sizes[0])
        elif self.latents is not None:
            cached = group_key(group.image_hashes())
            if cached not in self.latents:
                raise UserError(f"dataset row {group.row_id}: its latents could not be cached")
            entry = self.latents[cached]
            example.mean, example.std = entry["mean"], entry["std"]
            values = entry["geometry"].tolist()
            example.geometry = Geometry(
                (values[0], values[1]), (values[2], values[3]), (values[4], values[5])
            )
        else:
            generator = row_generator(self.seed, group.row_id, epoch, "transform")
            example.pixels, example.geometry = self.transform(group.open_images(), generator)
        return example


def group_key(hashes: Sequence[str]) -> str:
    """Key of a group's latents: the bucket and crop of an image depend on its whole group."""
    return hashlib.sha256("+".join(hashes).encode()).hexdigest()


class StreamReader(torch.utils.data.IterableDataset):
    """Streaming rows: every process walks the stream and keeps its own positions. The order is the stream's."""

    def __init__(
        self, dataset: Any, reader: GroupReader, start: int, batch_size: int, rank: int, world: int
    ) -> None:
        self.dataset, self.reader = dataset, reader
        self.start, self.batch_size, self.rank, self.world = start, batch_size, rank, world

    def __iter__(self) -> Iterator[list[Example]]:
        position, epoch, batch = 0, 0, []
        while True:
            before = position
            for group in self.dataset:
                owner = (position - self.start) // self.batch_size % self.world
                if position >= self.start and owner == self.rank:
                    batch.append(self.reader.read(group, epoch))
                    if len(batch) == self.batch_size:
                        yield batch
                        batch = []
                position += 1
            if position == before:
                raise UserError("data.dataset_name: the stream has no usable rows")
            epoch += 1


def prompt_key(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()
