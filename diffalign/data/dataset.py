"""A dataset of groups of images, read lazily.

`PreferenceDataset` returns a `Group` per row. Its images stay undecoded until asked
for.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from diffalign.data import images as image_cells
from diffalign.data.groups import (
    VIEWS,
    Group,
    build_group,
    inverted_group,
    labelled_image,
    lazy_cell,
    prompt_only,
)
from diffalign.data.images import NO_FOLDERS, ImagePlaces
from diffalign.data.judgements import Verdict, classify_row, user_name
from diffalign.data.load_report import LoadReport
from diffalign.data.memory import forget_pages, walk
from diffalign.data.schema import CATEGORY_KEYS, EXTRAS, KINDS, Layout
from diffalign.errors import UserError

if TYPE_CHECKING:
    import datasets
    import numpy as np
    import pyarrow

_SAMPLED_ROWS = 1_000


class PreferenceDataset:
    """Groups of a dataset on disk or in memory, each read when it is asked for.

    `load_preferences` makes it. It has a length and an index, so a torch `DataLoader`
    can use it.

    Attributes:
        dataset (`datasets.Dataset`): The underlying dataset, with the source's columns.
        layout (`Layout`): How its columns are read.
        kind (`str`): What the groups are: `pair`, `ranked`, `labelled`, `conditioned`,
            `single` or `prompt`.
        report (`LoadReport`): What was left out.
        row_ids (`np.ndarray`): The row of each group, int64, ascending. None for a
            stream.
        places (`ImagePlaces`): Where image cells may point to.

    Example:
        >>> from PIL import Image
        >>> from diffalign.data import load_preferences
        >>> colors = ("red", "green", "blue")
        >>> images = [Image.new("RGB", (8, 8), color) for color in colors]
        >>> rows = [{"prompt": "blue", "images": images, "scores": [2, 1, 3]}]
        >>> dataset = load_preferences(rows, verbose=False)
        >>> len(dataset), dataset.kind, dataset[0].scores
        (1, 'ranked', (2.0, 1.0, 3.0))
        >>> dataset.as_kind("pair")[0].scores
        (3.0, 1.0)
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
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
        self._extras: frozenset[str] = frozenset()
        # Image of the row, per group, where pairs are read as two labelled images.
        self._image_of_row: np.ndarray | None = None

    @property
    def _columns(self) -> dict[str, str]:
        """The roles that are read, without images when only prompts are asked for."""
        return self.layout.light_columns if self.kind == "prompt" else self.layout.mapping

    def _tables(self) -> datasets.Dataset:
        """The needed columns as Arrow: undecoded, whatever their feature types are."""
        if "_arrow" not in self.__dict__:
            self._arrow = self.dataset.select_columns(
                list(dict.fromkeys(self._columns.values()))
            ).with_format("arrow")
        return self._arrow

    def _derived(self) -> PreferenceDataset:
        """Copy the dataset without what was computed from its kind and rows."""
        view = copy.copy(self)
        for computed in ("_fingerprint", "_arrow"):
            view.__dict__.pop(computed, None)
        return view

    def _group(self, row_id: int, cells: dict[str, Any]) -> Group:
        light = {role: cells[role] for role in self.layout.light_columns}
        images = {role: cells[role] for role in self.layout.image_columns if role in cells}
        try:
            group = build_group(
                self.layout, classify_row(self.layout, light), row_id, images, self.places
            )
        except image_cells.BrokenImage as error:
            raise UserError(f"dataset row {row_id}: {error}") from error
        return self._viewed(group)

    def _viewed(self, group: Group) -> Group:
        """Turn a group into the kind, preference and prompts that were asked for."""
        if self._one_prompt:
            group = dataclasses.replace(group, prompts=group.prompts[:1] * len(group.prompts))
        if self._inverted:
            group = inverted_group(group, self.layout.kind)
        for source, kind in pairwise((self.layout.kind, *self._views)):
            group = prompt_only(group) if kind == "prompt" else VIEWS[source, kind](group)
        return group

    @property
    def _is_unrolled(self) -> bool:
        """Whether each image of a pair is a labelled group of its own."""
        return self.kind == "labelled" and self.layout.kind != "labelled"

    def __len__(self) -> int:
        assert self.row_ids is not None
        return len(self.row_ids)

    def __getitem__(self, index: int) -> Group:
        """Return the group at `index` of the rows in use.

        Raises:
            IndexError: The index is out of range.
            UserError: An image file is gone.
        """
        assert self.row_ids is not None
        row_id = int(self.row_ids[index])
        row = self._tables()[row_id].to_pylist()[0]
        group = self._group(row_id, {role: row[column] for role, column in self._columns.items()})
        if self._image_of_row is None:
            return group
        return labelled_image(group, int(self._image_of_row[index]))

    def __iter__(self) -> Iterator[Group]:
        for index in range(len(self)):
            yield self[index]

    def select(self, indices: Sequence[int]) -> PreferenceDataset:
        """Return the same dataset with only some of its groups.

        Args:
            indices (`Sequence[int]`): Positions, as in `dataset[i]`.
        """
        import numpy as np

        assert self.row_ids is not None
        view, places = self._derived(), np.asarray(indices, dtype=np.int64)
        view.row_ids = self.row_ids[places]
        if self._image_of_row is not None:
            view._image_of_row = self._image_of_row[places]
        return view

    def as_kind(self, kind: str) -> PreferenceDataset:
        """Return the same dataset with its groups as another kind.

        Ranked groups become pairs of the best and the worst score. Pairs and ranked
        groups become single images, the best one, or two labelled images, a liked and
        a disliked one. Labelled images become single ones if they are liked.
        Conditioned images become single ones without their condition. Every kind
        becomes prompts.

        Args:
            kind (`str`): `pair`, `ranked`, `labelled`, `conditioned`, `single` or
                `prompt`.

        Raises:
            UserError: The data do not hold what the kind needs.
        """
        if kind == self.kind:
            return self
        if kind not in KINDS:
            raise UserError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        if kind != "prompt" and (self.kind, kind) not in VIEWS:
            remedy = ""
            if kind == "conditioned":
                remedy = "; add a column conditioning_image with an image per row"
            if kind == "labelled":
                remedy = (
                    "; add a column label (true or false), or a column rating and "
                    "data.like_threshold"
                )
            raise UserError(
                f"dataset {self.report.source}: the method needs {kind} data, but this dataset "
                f"is of kind {self.kind} (layout {self.layout.name}){remedy}"
            )
        view = self._derived()
        # Prompts are read directly: the views in between would ask for images.
        before = self._views[:-1] if self._is_unrolled else self._views
        view.kind, view._views = kind, (kind,) if kind == "prompt" else (*before, kind)
        if self.kind == "labelled":
            view._take_rows_once(liked=kind == "single")
        if view._is_unrolled:
            view._unroll()
        return view

    def _unroll(self) -> None:
        """Make two groups of every row."""
        import numpy as np

        if self.row_ids is None:
            return
        rows = len(self.row_ids)
        self.row_ids = np.repeat(self.row_ids, 2)
        self._image_of_row = np.tile(np.array([0, 1]), rows)

    def _take_rows_once(self, liked: bool) -> None:
        """Undo `_unroll`, and leave disliked images out if liked ones are asked."""
        import numpy as np

        if self.row_ids is None:
            return
        rows = self.row_ids
        if self._image_of_row is not None:
            rows = rows[self._image_of_row == 0] if liked else np.unique(rows)
            self._image_of_row = None
        elif liked:
            sign = -1 if self._inverted else 1
            rows = rows[self._liked()[rows] == sign]
            left_out = len(self.row_ids) - len(rows)
            self.report = copy.deepcopy(self.report)
            self.report.notes.append(f"{left_out} disliked images left out")
            self.report.kept = len(rows)
            if not len(rows):
                raise UserError(
                    f"dataset {self.report.source}: none of its images is liked, so nothing is "
                    "left to train on"
                )
        self.row_ids = rows

    def _light_tables(self) -> Iterator[pyarrow.Table]:
        """The columns of prompts and judgements, as Arrow."""
        return walk(self.dataset, self.layout.light_columns.values())

    def _light_column(self, role: str) -> Any:
        """The column of a role, for all rows of the source, as Arrow."""
        return self._column(self.layout.light_columns[role])

    def _column(self, name: str) -> Any:
        """A column for all rows of the source, as Arrow."""
        import pyarrow

        chunks = [chunk for table in walk(self.dataset, [name]) for chunk in table[name].chunks]
        return (
            pyarrow.chunked_array(chunks) if chunks else pyarrow.chunked_array([], pyarrow.null())
        )

    def _liked(self) -> np.ndarray:
        """1 for each liked image of the source, -1 for others, (rows,)."""
        import numpy as np

        from diffalign.data.columns import ASK, judge_columns

        parts = []
        for table in self._light_tables():
            columns = {role: table[name] for role, name in self.layout.light_columns.items()}
            judged = judge_columns(self.layout, columns)
            for offset in np.flatnonzero(judged.status == ASK).tolist():
                cells = {role: column[offset].as_py() for role, column in columns.items()}
                scores = classify_row(self.layout, cells).scores or (-1.0,)
                judged.liked[offset] = 1 if scores[0] > 0 else -1
            parts.append(judged.liked)
        return np.concatenate(parts)

    def _verdicts(self) -> Iterator[tuple[int, Verdict]]:
        """Yield row id and verdict of all rows in use."""
        assert self.row_ids is not None
        row_ids, start = set(self.row_ids.tolist()), 0
        light = self.layout.light_columns
        for table in self._light_tables():
            columns = {role: table[column].to_pylist() for role, column in light.items()}
            for offset in range(len(table)):
                if start + offset in row_ids:
                    cells = {role: values[offset] for role, values in columns.items()}
                    yield start + offset, classify_row(self.layout, cells)
            start += len(table)

    @property
    def has_two_prompts(self) -> bool:
        """Whether every image of a pair has a caption of its own."""
        return {"chosen_prompt", "rejected_prompt"} <= self.layout.mapping.keys() or {
            "caption_0",
            "caption_1",
        } <= self.layout.mapping.keys()

    def reversed_scores(self) -> int:
        """Count the pairs in use whose rejected image has the higher score."""
        light = self.layout.light_columns
        if not {"chosen_score", "rejected_score"} <= light.keys() or self.row_ids is None:
            return 0
        pairs = (verdict.scores or (0.0, 0.0) for _, verdict in self._verdicts())
        return sum(chosen < rejected for chosen, rejected in pairs)

    def liked_share(self) -> float | None:
        """Return the share of liked images of labelled rows in use, None for others."""
        if self.layout.kind != "labelled" or self.row_ids is None:
            return None
        return float((self._liked()[self.row_ids] > 0).mean())

    def using(self, *roles: str) -> PreferenceDataset:
        """Return the same dataset, whose fingerprint covers what a method also reads.

        Args:
            *roles (`str`): Of `diffalign.data.schema.EXTRAS`.
        """
        view = self._derived()
        view._extras = self._extras | set(roles)
        return view

    @property
    def has_users(self) -> bool:
        """Whether the rows say who judged them."""
        return "user_id" in self.layout.mapping

    def users(self) -> list[str]:
        """Return the users of all groups in use, each once, sorted.

        Groups without one have no part.
        """
        return sorted({user for user in self.user_of_groups() if user is not None})

    def user_of_groups(self) -> list[str | None]:
        """Return the user of each group in use, in order."""
        import pyarrow

        assert self.row_ids is not None
        if not self.has_users:
            return [None] * len(self.row_ids)
        cells = self._light_column("user_id").take(pyarrow.array(self.row_ids)).to_pylist()
        return [user_name(cell) for cell in cells]

    def categories_of_prompts(self) -> dict[str, str]:
        """Return the category of each prompt in use.

        It is read from a column `category`, `tag`, `challenge`, `style` or `type`. The
        first row of a prompt counts. Empty without such a column.
        """
        import pyarrow

        assert self.row_ids is not None
        names = {str(name).lower(): name for name in self.dataset.column_names}
        column = next((names[key] for key in CATEGORY_KEYS if key in names), None)
        if column is None or "prompt" not in self.layout.light_columns:
            return {}
        rows = pyarrow.array(self.row_ids)
        prompts = self._light_column("prompt").take(rows).to_pylist()
        cells = self._column(column).take(rows).to_pylist()
        categories: dict[str, str] = {}
        for prompt, cell in zip(prompts, cells, strict=True):
            if isinstance(cell, str) and cell:
                categories.setdefault(prompt, cell)
        return categories

    def distinct_prompts(self) -> list[str]:
        """Return the prompts of all groups in use, each once, sorted."""
        import pyarrow

        assert self.row_ids is not None
        if "prompt" not in self.layout.light_columns:
            return sorted({prompt for group in self for prompt in group.prompts})
        column = self._light_column("prompt").take(pyarrow.array(self.row_ids))
        prompts = sorted(column.unique().to_pylist())
        forget_pages(self.dataset)
        return prompts

    @property
    def has_scores(self) -> bool:
        """Whether the images of a pair or a ranked list have scores."""
        return self.kind in ("pair", "ranked") and (
            self.layout.kind == "ranked"
            or {"chosen_score", "rejected_score"} <= self.layout.mapping.keys()
        )

    @property
    def score_name(self) -> str:
        """What the data call the numbers of a ranked row: `rank` or `score`."""
        return "rank" if "rank" in self.layout.mapping else "score"

    def score_range(self) -> tuple[float, float] | None:
        """Return the (lowest, highest) score of all groups in use.

        Returns:
            `tuple[float, float]`, or None where the data have no scores or are a
            stream.
        """
        if self.row_ids is None or not self.has_scores:
            return None
        columns = self._score_range_of_columns()
        if columns is not None:
            return columns
        all_scores: list[float] = []
        for row_id, verdict in self._verdicts():
            unread: list[Any] = [None] * len(verdict.prompts)
            group = Group(row_id, verdict.prompts, unread, verdict.scores)
            scores = self._viewed(group).scores or ()
            all_scores += [s for s in scores if s is not None and not math.isnan(s)]
        return (min(all_scores), max(all_scores)) if all_scores else None

    def _score_range_of_columns(self) -> tuple[float, float] | None:
        """The range of the scores as the columns hold them, if no view changes it."""
        from diffalign.data.columns import column_range

        assert self.row_ids is not None
        if self._inverted or self._views not in ((), ("pair",)):
            return None
        light = self.layout.light_columns
        roles: list[str]
        if self.layout.kind == "ranked":
            roles = [next(r for r in ("scores", "human_preference", "rank") if r in light)]
        else:
            roles = ["chosen_score", "rejected_score"]
        ranges = [column_range(self._light_column(role), self.row_ids) for role in roles]
        if any(each is None for each in ranges):
            return None
        low = min(each[0] for each in ranges if each is not None)
        high = max(each[1] for each in ranges if each is not None)
        return (-high, -low) if roles == ["rank"] else (low, high)

    def with_first_prompt(self) -> PreferenceDataset:
        """Return the same groups, with the chosen image's prompt for all images."""
        view = self._derived()
        view._one_prompt = True
        return view

    def with_inverted_preferences(self) -> PreferenceDataset:
        """Return the same groups with the opposite preference.

        The images of pairs are exchanged. Scores within [0, 1] become 1 minus the
        score, other scores are negated. Disliked images become liked ones.

        Raises:
            UserError: The data hold no preference.
        """
        if self.layout.kind not in ("pair", "ranked", "labelled"):
            raise UserError(
                f"dataset {self.report.source}: {self.layout.kind} data hold no preference to "
                "invert; give pairs, ranked lists or likes and dislikes"
            )
        if self.layout.kind == "labelled" and self.kind == "single":
            raise UserError(
                f"dataset {self.report.source}: invert likes and dislikes before they are read as "
                "single images"
            )
        view = self._derived()
        view._inverted = not self._inverted
        return view

    @property
    def fingerprint(self) -> str:
        """The sha256 of what is learned from, the same in every place and process.

        It covers layout, mapping and kind. Of every group it covers row id, prompts,
        scores and weight, and of every image its size and its first and last 4 KiB. It
        misses an edit in the middle of an image file that changes neither its size nor
        its ends. Of more than 20,000 rows it covers all cells, the size of all images
        in them, and the ends of the images of 1,000 rows.
        """
        if "_fingerprint" not in self.__dict__:
            self._fingerprint = self._compute_fingerprint()
        return self._fingerprint

    def _compute_fingerprint(self) -> str:
        assert self.row_ids is not None
        mapping = {
            role: column
            for role, column in self.layout.mapping.items()
            if role not in EXTRAS or role in self._extras
        }
        digest = hashlib.sha256(
            repr([self.layout.name, sorted(mapping.items()), self.kind]).encode()
        )
        if self._image_of_row is not None:
            digest.update(self._image_of_row.tobytes())
        from diffalign.data.columns import MANY_ROWS

        if len(self.dataset) > MANY_ROWS:
            self._digest_columns(digest, mapping)
            return digest.hexdigest()
        self._digest_groups(digest, set(self.row_ids.tolist()))
        return digest.hexdigest()

    def _digest_columns(self, digest: Any, mapping: Mapping[str, str]) -> None:
        """Add the cells of all rows in use, and the images of some."""
        import numpy as np

        from diffalign.data.columns import digest_columns

        assert self.row_ids is not None
        rows = self.row_ids
        if self._image_of_row is not None:  # each row is there twice
            rows = rows[np.append(True, rows[1:] != rows[:-1])]
        facts = ["by columns", self._views, self._inverted, self._one_prompt]
        digest.update(repr([*facts, self.layout.like_threshold]).encode())
        digest.update(rows.tobytes())
        read = [mapping[role] for role in sorted(self._columns) if role in mapping]
        digest_columns(digest, self.dataset, read, rows)
        sample = np.linspace(0, len(rows) - 1, min(_SAMPLED_ROWS, len(rows)))
        chosen = rows[np.unique(sample.astype(np.int64))]
        if self.kind != "prompt":
            self._digest_groups(digest, set(chosen.tolist()), self._tables().select(chosen), chosen)

    def _digest_groups(
        self,
        digest: Any,
        row_ids: set[int],
        tables: datasets.Dataset | None = None,
        numbers: np.ndarray | None = None,
    ) -> None:
        """Add groups with their images. `numbers` are the row ids of `tables`."""
        start = 0
        for table in (self._tables() if tables is None else tables).iter(batch_size=256):
            for offset in range(len(table)):
                row_id = start + offset if numbers is None else int(numbers[start + offset])
                if row_id in row_ids:
                    group = self._group(
                        row_id,
                        {r: lazy_cell(table[c][offset]) for r, c in self._columns.items()},
                    )
                    facts: list[Any] = [group.row_id, group.prompts, None, group.weight]
                    if self.layout.kind != "pair" or "chosen_score" in self._extras:
                        facts[2] = group.scores
                    if "user_id" in self._extras:
                        facts.append(group.user)
                    digest.update(json.dumps(facts).encode())
                    for image in group.images:
                        digest.update(image_cells.sampled_digest(image))
            start += len(table)
