"""Preference data as a stream: a torch `IterableDataset`, as a DataLoader expects."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from torch.utils.data import IterableDataset, get_worker_info

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.groups import Group, build_group, labelled_image
from diffalign.data.images import NO_FOLDERS, BrokenImage, ImagePlaces
from diffalign.data.judgements import classify_row
from diffalign.data.load_report import LoadReport
from diffalign.data.schema import EXTRAS, Layout
from diffalign.data.verify import check_image
from diffalign.errors import UserError
from diffalign.runtime.hashing import text_hash

if TYPE_CHECKING:
    import datasets

T = TypeVar("T")

JUDGED_AFTER = 100  # rows; the share of broken ones says little before


def guarded(rows: Iterable[T], name: str) -> Iterator[T]:
    """Yield the rows of a stream, and explain its readers' errors in one sentence.

    Args:
        rows (`Iterable`): The stream.
        name (`str`): What the message calls it.

    Raises:
        UserError: A row cannot be read.
    """
    import datasets

    try:
        yield from rows
    except UserError:
        raise
    except (ValueError, OSError, RecursionError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise UserError(
            f"dataset {name}: a row cannot be read ({' '.join(str(cause).split())[:300]})"
        ) from error


class StreamingPreferenceDataset(PreferenceDataset, IterableDataset):
    """A `PreferenceDataset` over a `datasets.IterableDataset`, without length or index.

    Iterating drops ties and broken rows, and counts them in `report` anew in every
    pass. Row ids count the rows of the stream. Where workers of a DataLoader share its
    shards, each worker counts its own.

    Args:
        dataset (`datasets.IterableDataset`): The stream.
        layout (`Layout`): How its columns are read.
        report (`LoadReport`): Gets the counts.
        places (`ImagePlaces`, *optional*): Where image cells may point to.
        verify_images (`str`, *optional*, defaults to `"auto"`): `auto`, `header`,
            `full` or `none`.
        max_broken_fraction (`float`, *optional*, defaults to `0.05`): Largest share of
            broken rows that is skipped.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        layout: Layout,
        report: LoadReport,
        places: ImagePlaces = NO_FOLDERS,
        *,
        verify_images: str = "auto",
        max_broken_fraction: float = 0.05,
    ) -> None:
        super().__init__(
            dataset.decode(False) if dataset.features is not None else dataset,
            layout,
            report,
            None,
            places,
        )
        self._verify, self._max_broken_fraction = verify_images, max_broken_fraction
        self._rank, self._world = 0, 1
        self._position: dict[str, Any] | None = None
        self._rows_read = self._groups_of_row = 0
        self._before_row: dict[str, Any] | None = None

    def __len__(self) -> int:
        raise TypeError("a streamed dataset has no length; set train.max_steps")

    def __getitem__(self, index: int) -> NoReturn:
        raise TypeError(
            "a streamed dataset has no index; iterate over it, or load it without streaming"
        )

    def select(self, indices: Sequence[int]) -> NoReturn:
        """Refuse to select groups, because a stream has no index.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "a streamed dataset has no index; load it without streaming to select groups"
        )

    def share(self, rank: int, world: int) -> StreamingPreferenceDataset:
        """Return this process's share of the stream.

        Where the number of shards is a multiple of the number of processes, each
        process reads its own shards. Otherwise each reads all and keeps its rows.

        Args:
            rank (`int`): Number of the process.
            world (`int`): How many processes there are.
        """
        from datasets.distributed import split_dataset_by_node

        view = copy.copy(self)
        view.dataset = (
            split_dataset_by_node(self.dataset, rank, world) if world > 1 else self.dataset
        )
        view._rank, view._world = rank, world
        return view

    @property
    def num_shards(self) -> int:
        """Number of parts that workers can read independently."""
        return self.dataset.num_shards

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last group, as plain values.

        In a worker of a DataLoader it is the position of the worker.
        """
        within = self._groups_of_row  # the row is read again for its other group
        source = self._before_row if within else self.dataset.state_dict()
        return {"rows": self._rows_read - within, "groups_of_row": within, "source": source}

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew, if the stream was given shuffled.

        Args:
            epoch (`int`): Pass over the stream.
        """
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from a position at the next iteration.

        Args:
            state (`dict`, *optional*): Of `state_dict`. None begins at the first row.
        """
        self._position = state

    def __iter__(self) -> Iterator[Group]:
        fresh = LoadReport(
            self.report.source, self.report.layout, self.report.kind, self.report.mapping
        )
        for counter in dataclasses.fields(fresh):
            if counter.name != "ties_kept":
                setattr(self.report, counter.name, getattr(fresh, counter.name))
        worker = get_worker_info()
        # `datasets` deals its shards to the workers. Each counts in steps of the number
        # of workers, so that row ids stay unique. So do the processes.
        first, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        position, self._position = self._position, None
        self._rows_read = skipped = self._groups_of_row = 0
        self._before_row = None
        if position is not None:
            self._rows_read, skipped = position["rows"], position["groups_of_row"]
            self._before_row = position["source"]
        self.dataset.load_state_dict(self._before_row)
        for row in guarded(self.dataset, self.report.source):
            row_id = (self._rows_read * workers + first) * self._world + self._rank
            self._rows_read += 1
            self.report.rows += 1
            group = self._admitted(row_id, row)
            if self.report.rows >= JUDGED_AFTER and self.report.kept:
                self.report.check(self._max_broken_fraction)
            if group is None or self._is_left_out(group):
                self._remember_row()
                continue
            if self._is_unrolled:
                for place in range(skipped, 2):
                    self._groups_of_row = 1 if place == 0 else 0
                    if place == 1:
                        self._remember_row()
                    yield labelled_image(group, place)
                skipped = 0
            else:
                yield group
        if worker is None and self._world == 1 and position is None:
            self.report.check(self._max_broken_fraction)

    def _remember_row(self) -> None:
        """Keep the position after a row, in case a batch ends within the next one."""
        if self._is_unrolled:
            self._before_row = self.dataset.state_dict()

    def _is_left_out(self, group: Group) -> bool:
        """Whether it is a disliked image, and single images are asked for."""
        return self.kind == "single" and self.layout.kind == "labelled" and group.scores == (-1.0,)

    def _admitted(self, row_id: int, row: dict[str, Any]) -> Group | None:
        """Return the group of a row, or None for a row that is left out."""
        verdict = classify_row(
            self.layout,
            {role: row.get(column) for role, column in self.layout.light_columns.items()},
        )
        if not self.report.admit(row_id, verdict):
            return None
        try:
            cells = {
                role: row.get(column)
                for role, column in self._columns.items()
                if role in self.layout.image_columns
            }
            group = build_group(self.layout, verdict, row_id, cells, self.places)
            for image in group.images:
                check_image(image, self._verify)
        except BrokenImage as error:
            self.report.add_broken(row_id, str(error))
            return None
        self.report.kept += 1
        return self._viewed(group)

    @property
    def fingerprint(self) -> str:
        """The sha256 of the source's name, layout, mapping and kind.

        The content of a stream is not known before it is read.
        """
        mapping = sorted(self.layout.mapping.items())
        parts: list[object] = [
            "stream",
            self.report.source,
            self.layout.name,
            [pair for pair in mapping if pair[0] not in EXTRAS or pair[0] in self._extras],
            self.kind,
        ]
        if self.layout.like_threshold is not None:
            parts.append(self.layout.like_threshold)
        if self._inverted:
            parts.append("inverted")
        return text_hash(repr(parts))

    def __copy__(self) -> StreamingPreferenceDataset:
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        view.report = copy.deepcopy(self.report)
        return view
