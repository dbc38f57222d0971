"""What the loader returns: groups of undecoded images with their prompts, scores and weight."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from diffalign.data import images as image_cells
from diffalign.data.images import NO_FOLDERS, ImagePlaces
from diffalign.data.judgements import Verdict, judge
from diffalign.data.schema import KINDS, Layout
from diffalign.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

LISTED_BROKEN_ROWS = 20


@dataclass
class Group:
    """The images of one prompt that are compared with each other.

    Attributes:
        row_id: index of the row in the source.
        prompts: one per image (all equal unless each image has its own); a single one for kind `prompt`.
        images: undecoded, `{"bytes": bytes | None, "path": str | None}` or a PIL image; the chosen one first in a pair.
        scores: one per image of a ranked group, higher is better; None where the data have none.
        weight: of the group in the loss; 0 for a kept tie.
    """

    row_id: int
    prompts: tuple[str, ...]
    images: list[Any]
    scores: tuple[float, ...] | None = None
    weight: float = 1.0

    def open_images(self) -> list[Image.Image]:
        """RGB images, turned as their EXIF says, transparency on white.

        Raises:
            UserError: an image cannot be decoded; names the row.
        """
        return [self.open_image(place) for place in range(len(self.images))]

    def open_image(self, place: int) -> Image.Image:
        """One of `open_images`."""
        return self._or_name_row(image_cells.decode, self.images[place])

    def image_hashes(self) -> list[str]:
        """sha256 of every image's encoded bytes, as hexadecimal digits."""
        return [self._or_name_row(image_cells.content_hash, image) for image in self.images]

    def image_sizes(self) -> list[tuple[int, int]]:
        """(height, width) in pixels of every image as displayed, read from the headers."""
        return [self._or_name_row(image_cells.header, image)[0] for image in self.images]

    def _or_name_row(self, function: Callable[[Any], Any], image: Any) -> Any:
        try:
            return function(image)
        except image_cells.BrokenImage as error:
            raise UserError(f"dataset row {self.row_id}: {error}") from error


@dataclass
class LoadReport:
    """What was read and what was left out; stored in the run's config and model card.

    Attributes:
        source: name, path or type of the source.
        layout, kind: recognised layout and the kind of its rows.
        mapping: role -> column.
        rows, kept: rows of the source; groups that can be used.
        ties, ties_kept: tied rows; whether they are among `kept`, with weight 0.
        unlabelled: rows dropped because nobody judged them.
        broken_count, broken: number of unusable rows; (row id, reason) of the first 20.
        first_wins, second_wins: how often a label preferred the first or the second image column.
        direction: which way the judgements are read, in words.
        unused: columns that look like judgements or images and are not read.
        notes: what else was done to read the source.
    """

    source: str
    layout: str
    kind: str
    mapping: dict[str, str]
    rows: int = 0
    kept: int = 0
    ties: int = 0
    ties_kept: bool = False
    unlabelled: int = 0
    broken_count: int = 0
    broken: list[tuple[int, str]] = field(default_factory=list)
    first_wins: int = 0
    second_wins: int = 0
    direction: str = ""
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One paragraph for the terminal and the model card."""
        columns = ", ".join(
            role if role == column else f"{role} = {column}"
            for role, column in self.mapping.items()
        )
        text = f"dataset {self.source}: layout {self.layout} ({columns}), kind {self.kind}; {self.kept} of {self.rows} rows used"
        if self.ties:
            text += f"; {self.ties} ties {'kept with weight 0' if self.ties_kept else 'dropped'}"
        if self.unlabelled:
            text += f"; {self.unlabelled} rows without a label dropped"
        if self.broken_count:
            text += f"; {self.broken_count} broken rows skipped ({self.first_broken()})"
        for remark in (*self.notes, self.unused_columns()):
            text += f"; {remark}" if remark else ""
        return text

    def unused_columns(self) -> str:
        """A sentence about columns that look like judgements or images and are not read; empty where there are none."""
        if not self.unused:
            return ""
        names = ", ".join(self.unused)
        return f"not read, although they look like judgements or images: {names} (data.columns says what a column is)"

    def first_broken(self, count: int = 3) -> str:
        """The first broken rows with their reasons, for a message."""
        rows = "; ".join(f"row {row_id}: {reason}" for row_id, reason in self.broken[:count])
        return rows + ("; ..." if self.broken_count > count else "")

    def as_dict(self) -> dict[str, Any]:
        """Plain types only, for JSON and YAML."""
        return dataclasses.asdict(self) | {"broken": [list(row) for row in self.broken]}

    def add_broken(self, row_id: int, reason: str) -> None:
        """Counts an unusable row."""
        self.broken_count += 1
        if len(self.broken) < LISTED_BROKEN_ROWS:
            self.broken.append((row_id, reason))

    def admit(self, row_id: int, verdict: Verdict) -> bool:
        """Counts a row that was judged (all but its use); True if its group is to be used."""
        if verdict.status == "broken":
            self.add_broken(row_id, verdict.reason)
        self.unlabelled += verdict.status == "unlabelled"
        self.ties += verdict.status == "tie"
        self.first_wins += verdict.second_wins is False
        self.second_wins += verdict.second_wins is True
        return verdict.status == "keep" or (verdict.status == "tie" and self.ties_kept)

    def check(self, max_broken_fraction: float) -> None:
        """Raises `UserError` when too many rows are broken or none can be used."""
        if self.broken_count > max_broken_fraction * self.rows:
            raise UserError(
                f"dataset {self.source}: {self.broken_count} of {self.rows} rows are broken, more than "
                f"data.max_broken_fraction = {max_broken_fraction:g} allows ({self.first_broken()})"
            )
        if self.rows == 0:
            raise UserError(f"dataset {self.source}: has no rows")
        if self.kept == 0 and self.ties == self.rows:
            raise UserError(
                f"dataset {self.source}: all {self.rows} rows are ties; nothing is left to learn from"
            )
        if self.kept == 0:
            raise UserError(
                f"dataset {self.source}: none of its {self.rows} rows can be used ({self.ties} ties, {self.unlabelled} without "
                f"a label, {self.broken_count} broken{': ' + self.first_broken() if self.broken_count else ''})"
            )


def build_group(
    layout: Layout, verdict: Verdict, row_id: int, cells: dict[str, Any], places: ImagePlaces
) -> Group:
    """The group of a judged row.

    Args:
        cells: role -> image cell (a list of them for `images`); roles that are missing leave the group without images.

    Raises:
        BrokenImage: an image is missing, or their number is not that of the scores.
    """
    found = [cells[role] for role in verdict.image_roles if role in cells]
    if "images" in cells:
        found = cells["images"] or []
        if len(found) != len(verdict.prompts):
            raise image_cells.BrokenImage(
                f"has {len(found)} images and {len(verdict.prompts)} scores"
            )
    images = [image_cells.resolve(cell, places) for cell in found]
    return Group(row_id, verdict.prompts, images, verdict.scores, verdict.weight)


def lazy_cell(scalar: Any) -> Any:
    """A pyarrow scalar as Python values, but bytes as a view of the (memory-mapped) table: nothing large is copied."""
    from pyarrow import types

    if not scalar.is_valid:
        return None
    if types.is_struct(scalar.type):
        return {name: lazy_cell(value) for name, value in scalar.items()}
    if types.is_binary(scalar.type) or types.is_large_binary(scalar.type):
        return memoryview(scalar.as_buffer())
    if types.is_list(scalar.type) or types.is_large_list(scalar.type):
        return [lazy_cell(value) for value in scalar.values]
    return scalar.as_py()


class PreferenceDataset:
    """Groups of a dataset that is on disk or in memory; a row is normalised when it is asked for.

    Attributes:
        dataset: the underlying `datasets.Dataset`, with the source's columns.
        layout (`Layout`): how its columns are read.
        kind (`str`): what the groups are: `pair`, `ranked`, `single` or `prompt`.
        report (`LoadReport`): what was left out.
        row_ids (`np.ndarray` of int64): the rows in use, ascending.
        places (`ImagePlaces`): where its image cells may point to.
    """

    def __init__(
        self,
        dataset: Any,
        layout: Layout,
        report: LoadReport,
        row_ids: np.ndarray | None,
        places: ImagePlaces = NO_FOLDERS,
    ) -> None:
        self.dataset, self.layout, self.report, self.places = dataset, layout, report, places
        self.row_ids = row_ids
        self.kind = layout.kind
        self._views: tuple[str, ...] = ()
        self._inverted = self._one_prompt = False

    @property
    def _columns(self) -> dict[str, str]:
        """The roles that are read: without images once only prompts are wanted."""
        return self.layout.light_columns if self.kind == "prompt" else self.layout.mapping

    def _tables(self) -> Any:
        """The needed columns as Arrow: undecoded, whatever their feature types say."""
        if "_arrow" not in self.__dict__:
            self._arrow = self.dataset.select_columns(
                list(dict.fromkeys(self._columns.values()))
            ).with_format("arrow")
        return self._arrow

    def _derived(self) -> PreferenceDataset:
        """A copy without what was computed from the kind and the rows."""
        view = copy.copy(self)
        for computed in ("_fingerprint", "_arrow"):
            view.__dict__.pop(computed, None)
        return view

    def _group(self, row_id: int, cells: dict[str, Any]) -> Group:
        light = {role: cells[role] for role in self.layout.light_columns}
        images = {role: cells[role] for role in self.layout.image_columns if role in cells}
        try:
            group = build_group(self.layout, judge(self.layout, light), row_id, images, self.places)
        except image_cells.BrokenImage as error:
            raise UserError(f"dataset row {row_id}: {error}") from error
        return self._viewed(group)

    def _viewed(self, group: Group) -> Group:
        """The group as the kind that `as_kind` asked for, its preference and prompts as asked."""
        if self._one_prompt:
            group = dataclasses.replace(group, prompts=group.prompts[:1] * len(group.prompts))
        if self._inverted:
            group = _inverted(group, self.layout.kind)
        for source, kind in pairwise((self.layout.kind, *self._views)):
            group = _prompt_only(group) if kind == "prompt" else _VIEWS[source, kind](group)
        return group

    def __len__(self) -> int:
        assert self.row_ids is not None
        return len(self.row_ids)

    def __getitem__(self, index: int) -> Group:
        """The group at `index` of the rows in use.

        Raises:
            IndexError: out of range.
            UserError: an image file is gone.
        """
        assert self.row_ids is not None
        row_id = int(self.row_ids[index])
        row = self._tables()[row_id].to_pylist()[0]
        return self._group(row_id, {role: row[column] for role, column in self._columns.items()})

    def __iter__(self) -> Iterator[Group]:
        for index in range(len(self)):
            yield self[index]

    def select(self, indices: Sequence[int]) -> PreferenceDataset:
        """The same dataset with only these groups (positions as in `dataset[i]`)."""
        import numpy as np

        assert self.row_ids is not None
        view = self._derived()
        view.row_ids = self.row_ids[np.asarray(indices, dtype=np.int64)]
        return view

    def as_kind(self, kind: str) -> PreferenceDataset:
        """The groups as another kind: ranked as pair (best against worst score), pair and ranked as single (the best), anything
        as prompt.

        Raises:
            UserError: the data do not hold what the kind needs.
        """
        if kind == self.kind:
            return self
        if kind not in KINDS:
            raise UserError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        if kind != "prompt" and (self.kind, kind) not in _VIEWS:
            raise UserError(
                f"dataset {self.report.source}: the method needs {kind} data, but this dataset is of kind {self.kind} "
                f"(layout {self.layout.name})"
            )
        view = self._derived()
        # Prompts are read without images, which the views between would ask for.
        view.kind, view._views = kind, (kind,) if kind == "prompt" else (*self._views, kind)
        return view

    @property
    def has_two_prompts(self) -> bool:
        """Whether every image of a pair has a caption of its own."""
        return {"chosen_prompt", "rejected_prompt"} <= self.layout.mapping.keys() or {
            "caption_0",
            "caption_1",
        } <= self.layout.mapping.keys()

    @property
    def score_name(self) -> str:
        """What the numbers of a ranked row are called in the data: `rank` or `score`."""
        return "rank" if "rank" in self.layout.mapping else "score"

    def score_range(self) -> tuple[float, float] | None:
        """(lowest, highest) score of all groups in use; None where the data have none, or are a stream that is not read beforehand."""
        if self.row_ids is None or self.kind != "ranked":
            return None
        wanted, start, found = set(self.row_ids.tolist()), 0, []
        light = self.layout.light_columns
        tables = self.dataset.select_columns(list(dict.fromkeys(light.values()))).with_format(
            "arrow"
        )
        for table in tables.iter(batch_size=1024):
            columns = {role: table[column].to_pylist() for role, column in light.items()}
            for offset in range(len(table)):
                if start + offset in wanted:
                    verdict = judge(
                        self.layout, {role: values[offset] for role, values in columns.items()}
                    )
                    group = Group(
                        start + offset,
                        verdict.prompts,
                        [None] * len(verdict.prompts),
                        verdict.scores,
                    )
                    found += [
                        score
                        for score in self._viewed(group).scores or ()
                        if score is not None and not math.isnan(score)
                    ]
            start += len(table)
        return (min(found), max(found)) if found else None

    def with_first_prompt(self) -> PreferenceDataset:
        """The same groups, all images under the chosen one's prompt."""
        view = self._derived()
        view._one_prompt = True
        return view

    def with_inverted_preferences(self) -> PreferenceDataset:
        """The same groups with the opposite preference: pairs exchanged, scores turned round (those within [0, 1] stay there).

        Raises:
            UserError: the data hold no preference.
        """
        if self.layout.kind not in ("pair", "ranked"):
            raise UserError(
                f"dataset {self.report.source}: {self.layout.kind} data hold no preference to invert; give pairs or ranked lists"
            )
        view = self._derived()
        view._inverted = not self._inverted
        return view

    @property
    def fingerprint(self) -> str:
        """sha256 of what is learned from: layout, mapping, kind and, per group, row id, prompts, scores, weight and the size and
        first and last 4 KiB of every image. The same content gives the same fingerprint in any place and process. Not seen: an
        edit in the middle of an image file that keeps its size and both ends."""
        if "_fingerprint" not in self.__dict__:
            self._fingerprint = self._compute_fingerprint()
        return self._fingerprint

    def _compute_fingerprint(self) -> str:
        assert self.row_ids is not None
        digest = hashlib.sha256(
            repr([self.layout.name, sorted(self.layout.mapping.items()), self.kind]).encode()
        )
        wanted = set(self.row_ids.tolist())
        start = 0
        for table in self._tables().iter(batch_size=256):
            for offset in range(len(table)):
                if start + offset in wanted:
                    group = self._group(
                        start + offset,
                        {r: lazy_cell(table[c][offset]) for r, c in self._columns.items()},
                    )
                    digest.update(
                        json.dumps(
                            [group.row_id, group.prompts, group.scores, group.weight]
                        ).encode()
                    )
                    for image in group.images:
                        digest.update(image_cells.sampled_digest(image))
            start += len(table)
        return digest.hexdigest()


def _best(group: Group) -> int:
    return (
        0 if group.scores is None else max(range(len(group.scores)), key=group.scores.__getitem__)
    )


def _pick(group: Group, picked: list[int]) -> Group:
    return dataclasses.replace(
        group,
        prompts=tuple(group.prompts[i] for i in picked),
        images=[group.images[i] for i in picked],
        scores=None if group.scores is None else tuple(group.scores[i] for i in picked),
    )


def _best_and_worst(group: Group) -> Group:
    assert group.scores is not None
    # the last of equally bad ones, so that two different images make the pair even in a kept tie
    worst = min(reversed(range(len(group.scores))), key=group.scores.__getitem__)
    return _pick(group, [_best(group), worst])


_VIEWS: dict[tuple[str, str], Callable[[Group], Group]] = {
    ("ranked", "pair"): _best_and_worst,
    ("ranked", "single"): lambda group: _pick(group, [_best(group)]),
    ("pair", "single"): lambda group: _pick(group, [0]),
}


def _inverted(group: Group, kind: str) -> Group:
    if kind == "pair":
        return dataclasses.replace(group, prompts=group.prompts[::-1], images=group.images[::-1])
    scores = group.scores or ()
    top = 1.0 if scores and min(scores) >= 0 and max(scores) <= 1 else 0.0
    return dataclasses.replace(group, scores=tuple(top - score for score in scores))


def _prompt_only(group: Group) -> Group:
    return dataclasses.replace(group, prompts=group.prompts[:1], images=[], scores=None)
