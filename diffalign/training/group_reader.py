"""Read groups of images as tensors, from disk, a stream or the latent cache."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import PreferenceDataset
from ..data.cache import TensorCache
from ..data.groups import Group, group_number
from ..data.streaming import JUDGED_AFTER, StreamingPreferenceDataset
from ..data.transforms import Geometry, GroupTransform
from ..errors import UserError
from ..runtime.hashing import text_hash
from ..runtime.seeds import row_generator


@dataclass
class Example:
    """One group as the data loader delivers it, with latents or pixels.

    Attributes:
        row_id (`int`): Row of the source dataset.
        epoch (`int`): Pass over the data.
        prompts (`tuple[str, ...]`): Prompt of each image.
        geometry (`Geometry`): Sizes and crop of the images.
        weight (`float`): Weight in the loss.
        scores (`tuple[float, ...]`, *optional*): Scores of ranked data.
        pixels (`Tensor`, *optional*): Images, (k, 3, H, W), if latents are not cached.
        mean (`Tensor`, *optional*): Mean of the cached latents, (k, C, h, w).
        std (`Tensor`, *optional*): Standard deviation of the cached latents, (k, C, h,
            w).
        place (`int`): Which image of its row a labelled image is.
        user (`str`, *optional*): Who judged the row.
        control (`Tensor`, *optional*): Condition image in [0, 1], (1, 3, H, W).
        cache_key (`str`, *optional*): Key under which its latents are to be cached.
    """

    row_id: int
    epoch: int
    prompts: tuple[str, ...]
    geometry: Geometry
    weight: float
    scores: tuple[float, ...] | None
    pixels: Tensor | None = None  # (k, 3, H, W)
    mean: Tensor | None = None  # (k, C, h, w)
    std: Tensor | None = None
    place: int = 0
    user: str | None = None
    control: Tensor | None = None
    cache_key: str | None = None

    @property
    def key(self) -> int:
        """A number that no other group of the dataset has."""
        return group_number(self.row_id, self.place)


def check_broken(broken: int, rows: int, most: float, reason: str) -> None:
    """Refuse a dataset with too many broken rows.

    Args:
        broken (`int`): Rows that cannot be used.
        rows (`int`): All rows.
        most (`float`): Share of them that may be broken.
        reason (`str`): What is wrong with one of them.

    Raises:
        UserError: Too many rows are broken.
    """
    if broken > most * rows:
        raise UserError(
            f"{broken} of {rows} rows cannot be used, more than data.max_broken_fraction: {reason}"
        )


class GroupReader(torch.utils.data.Dataset):
    """Reads a group by its epoch and index.

    A row whose image cannot be decoded is replaced by the next row. A warning names it.

    Args:
        dataset: The groups.
        transform (`GroupTransform`): Crops and resizes the images.
        seed (`int`): Seed of random crops.
        max_broken_fraction (`float`, *optional*, defaults to `0.05`): Share of broken
            rows above which reading fails.
        buckets (`Sequence[int]`, *optional*): Bucket of each row. A row is replaced by
            one of its bucket.
    """

    def __init__(
        self,
        dataset: PreferenceDataset,
        transform: GroupTransform,
        seed: int,
        max_broken_fraction: float = 0.05,
        buckets: Sequence[int] | None = None,
    ) -> None:
        self.buckets = buckets
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.max_broken_fraction = max_broken_fraction
        self.latents: TensorCache | None = None
        self.broken: dict[int, str] = {}

    def __getitem__(self, key: tuple[int, int]) -> Example:
        epoch, index = key
        count, place = len(self.dataset), index
        for _ in range(count):
            is_alike = self.buckets is None or self.buckets[place] == self.buckets[index]
            if is_alike and place not in self.broken:
                try:
                    return self._of_bucket(self.read(self.dataset[place], epoch), place)
                except UserError as error:
                    self.skip(place, str(error))
            place = (place + 1) % count
        raise UserError(f"no row can take the place of row {index}: {self.broken[index]}")

    def _of_bucket(self, example: Example, index: int) -> Example:
        """Check that a decoded image has the size that its header says.

        Raises:
            UserError: It has that of another bucket.
        """
        if self.buckets is not None and example.pixels is not None:
            size = self.transform.sizes[self.buckets[index]]
            if tuple(example.pixels.shape[-2:]) != tuple(size):
                raise UserError(f"dataset row {index}: its image has another size than its header")
        return example

    def skip(self, index: int, reason: str) -> None:
        """Count a broken row.

        Args:
            index (`int`): Index of the row.
            reason (`str`): What is wrong with it.

        Raises:
            UserError: Too many rows are broken.
        """
        if index not in self.broken:
            warnings.warn(f"{reason}; the next row takes its place", stacklevel=2)
        self.broken[index] = reason
        check_broken(len(self.broken), len(self.dataset), self.max_broken_fraction, reason)

    def read_streamed(self, group: Group, epoch: int) -> Example:
        """Read one group of a stream, whose latents may not be cached yet.

        Args:
            group: The group.
            epoch (`int`): Pass over the stream.

        Raises:
            UserError: An image cannot be decoded.
        """
        if self.latents is None or not group.images:
            return self.read(group, epoch)
        key = group_key(group.image_hashes())
        latents, self.latents = self.latents, None
        try:
            if key in latents:
                self.latents = latents
            example = self.read(group, epoch)
        finally:
            self.latents = latents
        if example.mean is None:
            example.cache_key = key
        return example

    def read(self, group: Group, epoch: int) -> Example:
        """Read one group, from the cache or from its images.

        Args:
            group: The group.
            epoch (`int`): Pass over the data, which decides random crops.

        Raises:
            UserError: An image cannot be decoded.
        """
        example = Example(
            group.row_id,
            epoch,
            tuple(group.prompts),
            Geometry((0, 0), (0, 0), (0, 0)),
            group.weight,
            group.scores,
            place=group.place,
            user=group.user,
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
            if self.dataset.kind == "conditioned":
                example.control = (example.pixels[1:] + 1) / 2
                example.pixels, example.prompts = example.pixels[:1], example.prompts[:1]
        return example


def group_key(hashes: Sequence[str]) -> str:
    """Return the cache key of a group's latents.

    The bucket and the crop of an image depend on its whole group.

    Args:
        hashes (`Sequence[str]`): Hash of each image.
    """
    return text_hash("+".join(hashes))


@dataclass
class StreamPosition:
    """Where one worker of one process is in a stream.

    Attributes:
        epoch (`int`, defaults to `0`): Pass over the stream.
        source (`dict`, *optional*): Position in that pass, see
            `StreamingPreferenceDataset.state_dict`. None is its begin.
    """

    epoch: int = 0
    source: dict[str, Any] | None = None


class StreamReader(torch.utils.data.IterableDataset):
    """Reads this process's share of a stream, without end.

    Every micro-batch comes with the worker that read it and the position after it.

    Args:
        dataset (`StreamingPreferenceDataset`): The share of this process.
        reader (`GroupReader`): Reads a row.
        batch_size (`int`): Groups per micro-batch.
        positions (`Sequence[StreamPosition]`): Where each worker begins.
        turn (`int`): Worker whose micro-batch is the next one. A DataLoader begins with
            worker 0, so those before it first deliver None.
        skip (`int`): Groups to leave out at the beginning.
    """

    def __init__(
        self,
        dataset: StreamingPreferenceDataset,
        reader: GroupReader,
        batch_size: int,
        positions: Sequence[StreamPosition],
        turn: int = 0,
        skip: int = 0,
    ) -> None:
        self.dataset, self.reader, self.batch_size = dataset, reader, batch_size
        self.positions, self.turn, self.skip = list(positions), turn, skip

    def __iter__(self) -> Iterator[tuple[list[Example], int, StreamPosition] | None]:
        info = torch.utils.data.get_worker_info()
        worker = 0 if info is None else info.id
        if worker < self.turn:
            yield None
        position = self.positions[worker]
        epoch, batch, skip = position.epoch, [], self.skip
        self.dataset.set_epoch(epoch)
        self.dataset.load_state_dict(position.source)
        is_fresh = position.source is None
        while True:
            is_empty = True
            for group in self.dataset:
                is_empty = False
                if skip:
                    skip -= 1
                    continue
                try:
                    batch.append(self.reader.read_streamed(group, epoch))
                except UserError as error:
                    self._skip(group.row_id, str(error))
                    continue
                if len(batch) == self.batch_size:
                    yield batch, worker, StreamPosition(epoch, self.dataset.state_dict())
                    batch = []
            if is_empty and is_fresh:
                raise UserError("data.dataset_name: the stream has no usable rows")
            epoch, is_fresh = epoch + 1, True
            self.dataset.set_epoch(epoch)

    def _skip(self, row_id: int, reason: str) -> None:
        """Count a row that looked right and cannot be decoded."""
        warnings.warn(f"{reason}; the next row takes its place", stacklevel=2)
        report = self.dataset.report
        report.add_broken(row_id, reason.removeprefix(f"dataset row {row_id}: "))
        report.kept -= 1
        if report.rows >= JUDGED_AFTER:
            report.check(self.reader.max_broken_fraction)


def prompt_key(prompt: str) -> str:
    """Return the cache key of a prompt."""
    return text_hash(prompt)
