"""Judge whole columns at once, so that a million rows are read in seconds.

`diffalign.data.judgements` decides one row and explains what is wrong with it. Here
numpy decides the rows that are plainly usable, tied or without a label. Every other row
is left to `classify_row`, so both always agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from diffalign.data.memory import walk
from diffalign.data.schema import Layout

if TYPE_CHECKING:
    import datasets

KEEP, TIE, UNLABELLED, ASK = 0, 1, 2, 3
"""What the columns say about a row. `ASK`: its cells must be read one by one."""

MANY_ROWS = 20_000
"""Larger data are not read image by image before a run, see `verify_images: auto`."""

Column = Any
"""A `pyarrow.ChunkedArray`."""

_PROMPTS = ("prompt", "chosen_prompt", "rejected_prompt", "caption_0", "caption_1")


@dataclass
class Judged:
    """What the light columns say about n rows.

    Attributes:
        status (`np.ndarray`): `KEEP`, `TIE`, `UNLABELLED` or `ASK`, (n,), int8.
        second_wins (`np.ndarray`): 1 where a label preferred the second image, 0 for
            the first, -1 where the columns are ordered, (n,), int8.
        liked (`np.ndarray`): 1 for liked images, -1 for disliked ones, 0 in other
            layouts, (n,), int8.
    """

    status: np.ndarray
    second_wins: np.ndarray
    liked: np.ndarray


def judge_columns(layout: Layout, columns: Mapping[str, Column]) -> Judged:
    """Decide the rows of a table from its light columns.

    Args:
        layout (`Layout`): How the columns are read.
        columns (`Mapping[str, pyarrow.ChunkedArray]`): Role -> column, for
            `layout.light_columns`.

    Returns:
        `Judged`: With `ASK` for all rows where a column has an unusual type.
    """
    count = len(next(iter(columns.values())))
    judged = Judged(np.zeros(count, np.int8), np.full(count, -1, np.int8), np.zeros(count, np.int8))
    if not _decide(layout, columns, judged):
        judged.status[:] = ASK
    return judged


def _decide(layout: Layout, columns: Mapping[str, Column], judged: Judged) -> bool:
    """Fill in what the columns say. False if their types are unusual."""
    ask = np.zeros(len(judged.status), bool)
    for role in _PROMPTS:
        if role in columns:
            if not _is_text(columns[role]):
                return False
            ask |= _nulls(columns[role])
    bad = np.zeros(len(ask), bool)
    if "weight" in columns:
        weights = _numbers(columns["weight"])
        if weights is None:
            return False
        bad = (weights < 0) | np.isinf(weights)
    if not _JUDGES.get(layout.name, _JUDGES.get(layout.kind, _keep_all))(
        layout, columns, judged, ask
    ):
        return False
    judged.status[ask | bad] = ASK
    return True


def _keep_all(
    layout: Layout, columns: Mapping[str, Column], judged: Judged, ask: np.ndarray
) -> bool:
    return True


def _never(layout: Layout, columns: Mapping[str, Column], judged: Judged, ask: np.ndarray) -> bool:
    return False


def _compare(judged: Judged, first: np.ndarray, second: np.ndarray) -> None:
    judged.status[:] = np.where(first == second, TIE, KEEP)
    judged.second_wins[:] = np.where(first == second, -1, first < second)


def _labels(layout: Layout, columns: Mapping[str, Column], judged: Judged, ask: np.ndarray) -> bool:
    first = _numbers(columns["label_0"])
    second = _numbers(columns["label_1"]) if "label_1" in columns else None
    judged_at_all = _numbers(columns["has_label"]) if "has_label" in columns else None
    if first is None or ("label_1" in columns and second is None):
        return False
    if "has_label" in columns and judged_at_all is None:
        return False
    unlabelled = np.isnan(first)
    opposite = 1 - first
    second = opposite if second is None else np.where(np.isnan(second), opposite, second)
    bad = ~unlabelled & ~((first >= 0) & (first <= 1) & (second >= 0) & (second <= 1))
    if judged_at_all is not None:
        known = ~np.isnan(judged_at_all)
        bad |= known & (judged_at_all != 0) & (judged_at_all != 1)
        without = known & (judged_at_all == 0)
        unlabelled |= without
        bad &= ~without
    with np.errstate(invalid="ignore"):
        _compare(judged, first, second)
    judged.status[unlabelled] = UNLABELLED
    judged.second_wins[unlabelled] = -1
    # A row without a label needs no prompt.
    ask &= ~unlabelled
    ask |= bad
    return True


def _two_scores(
    layout: Layout, columns: Mapping[str, Column], judged: Judged, ask: np.ndarray
) -> bool:
    first, second = _numbers(columns["score_0"]), _numbers(columns["score_1"])
    if first is None or second is None:
        return False
    unlabelled = np.isnan(first) | np.isnan(second)
    with np.errstate(invalid="ignore"):
        _compare(judged, first, second)
    judged.status[unlabelled] = UNLABELLED
    judged.second_wins[unlabelled] = -1
    ask &= ~unlabelled
    ask |= ~unlabelled & (np.isinf(first) | np.isinf(second))
    return True


def _lists(layout: Layout, columns: Mapping[str, Column], judged: Judged, ask: np.ndarray) -> bool:
    role = next(role for role in ("scores", "human_preference", "rank") if role in columns)
    parts = list_parts(columns[role])
    if parts is None:
        return False
    lengths, values = parts
    numbers = _numbers(values)
    if numbers is None:
        return False
    null = _nulls(columns[role])
    short = ~null & (lengths < 2)
    ends = np.cumsum(lengths)
    filled = lengths > 0
    lowest, highest = np.zeros(len(lengths)), np.zeros(len(lengths))
    unclear = np.zeros(len(lengths), bool)
    if len(numbers):
        starts = (ends - lengths)[filled]
        lowest[filled] = np.fmin.reduceat(numbers, starts)
        highest[filled] = np.fmax.reduceat(numbers, starts)
        odd = ~np.isfinite(numbers)
        unclear[filled] = np.add.reduceat(odd.astype(np.int64), starts) > 0
    judged.status[:] = np.where(lowest == highest, TIE, KEEP)
    judged.status[null] = UNLABELLED
    ask &= ~null
    ask |= short | unclear
    return True


def _likes(layout: Layout, columns: Mapping[str, Column], judged: Judged, ask: np.ndarray) -> bool:
    role = "label" if "label" in columns else "rating"
    values = _numbers(columns[role])
    if values is None:
        return False
    missing = np.isnan(values)
    known = np.isin(values, (-1.0, 0.0, 1.0)) if role == "label" else ~np.isinf(values)
    odd = ~missing & ~known
    threshold = 1.0 if layout.like_threshold is None else layout.like_threshold
    judged.liked[:] = np.where(values >= threshold, 1, -1)
    judged.status[missing] = UNLABELLED
    judged.liked[missing] = 0
    ask &= ~missing
    ask |= odd
    return True


_JUDGES = {
    "dcpo": _labels,
    "pickapic": _labels,
    "genai_bench": _never,
    "rapidata": _two_scores,
    "ranked": _lists,
    "labelled": _likes,
}


def _is_text(column: Column) -> bool:
    from pyarrow import types

    return types.is_string(column.type) or types.is_large_string(column.type)


def _nulls(column: Column) -> np.ndarray:
    return column.is_null().to_numpy()


def _numbers(column: Column) -> np.ndarray | None:
    """Return a column as float64 with NaN for nulls, or None if it holds no numbers."""
    import pyarrow
    from pyarrow import types

    kind = column.type
    if types.is_boolean(kind):
        column, kind = column.cast(pyarrow.int8()), pyarrow.int8()
    if types.is_null(kind):
        return np.full(len(column), np.nan)
    if not (types.is_integer(kind) or types.is_floating(kind)):
        return None
    values = column.cast(pyarrow.float64(), safe=False)
    return np.asarray(values.to_numpy(), dtype=np.float64)


def list_parts(column: Column) -> tuple[np.ndarray, Column] | None:
    """Return the length of each list and all values, or None if there are no lists.

    Args:
        column (`pyarrow.ChunkedArray`): Lists. A null has length 0.
    """
    import pyarrow.compute
    from pyarrow import types

    if not (types.is_list(column.type) or types.is_large_list(column.type)):
        return None
    lengths = pyarrow.compute.list_value_length(column).fill_null(0).to_numpy()
    return np.asarray(lengths, dtype=np.int64), pyarrow.compute.list_flatten(column)


def absent_images(column: Column) -> np.ndarray:
    """Tell which cells of an image column hold no image, without reading any.

    Args:
        column (`pyarrow.ChunkedArray`): Structs of bytes and path, paths, or lists.

    Returns:
        `np.ndarray`: (n,), bool.
    """
    import pyarrow.compute as compute
    from pyarrow import types

    absent = _nulls(column)
    if types.is_struct(column.type):
        fields = [field.name for field in column.type]
        empty = [_nulls(compute.struct_field(column, name)) for name in fields]
        absent |= np.logical_and.reduce(empty)
    return absent


def column_range(column: Column, rows: np.ndarray) -> tuple[float, float] | None:
    """Return the smallest and the largest number of some rows of a column.

    Args:
        column (`pyarrow.ChunkedArray`): Numbers, or lists of numbers.
        rows (`np.ndarray`): Indices of the rows.

    Returns:
        `tuple[float, float]`, or None where the column holds other cells or no number.
    """
    import pyarrow

    taken = column.take(pyarrow.array(rows))
    parts = list_parts(taken)
    values = _numbers(taken if parts is None else parts[1])
    if values is None or not np.isfinite(values).any():
        return None
    finite = values[np.isfinite(values)]
    return float(finite.min()), float(finite.max())


def digest_columns(
    digest: Any, dataset: datasets.Dataset, columns: Sequence[str], rows: np.ndarray
) -> None:
    """Add some rows of some columns to a hash, the same however Arrow has cut them.

    Args:
        digest: Of `hashlib`.
        dataset (`datasets.Dataset`): The data.
        columns (`Sequence[str]`): Its columns to read.
        rows (`np.ndarray`): Indices of the rows, ascending.
    """
    start = 0
    for table in walk(dataset, columns):
        low, high = np.searchsorted(rows, [start, start + len(table)])
        for name in columns:
            column = table[name]
            if high - low < len(table):
                column = _chosen_rows(column, rows[low:high] - start)
            update_digest(digest, column)
        start += len(table)


def _chosen_rows(column: Column, rows: np.ndarray) -> Column:
    """Return some rows, ascending. Bytes are not copied: `take` fails above 2 GiB."""
    import pyarrow

    if not _holds_bytes(column.type):
        return column.take(pyarrow.array(rows))
    runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1) if len(rows) else []
    slices = [column.slice(run[0], len(run)) for run in runs]
    chunks = [chunk for part in slices for chunk in getattr(part, "chunks", [part])]
    return pyarrow.chunked_array(chunks, column.type)


def _holds_bytes(kind: Any) -> bool:
    """Tell whether cells of an Arrow type hold bytes anywhere inside."""
    from pyarrow import types

    if types.is_struct(kind):
        return any(_holds_bytes(part.type) for part in kind)
    if types.is_list(kind) or types.is_large_list(kind):
        return _holds_bytes(kind.value_type)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def update_digest(digest: Any, column: Column) -> None:
    """Add a column's cells to a hash, however Arrow has cut it into pieces.

    Of images it takes the lengths, and not the bytes.

    Args:
        digest: Of `hashlib`.
        column (`pyarrow.ChunkedArray`): The column.
    """
    import pyarrow.compute as compute
    from pyarrow import types

    kind = column.type
    digest.update(np.packbits(_nulls(column)).tobytes())
    if types.is_struct(kind):
        for part in kind:
            digest.update(part.name.encode())
            update_digest(digest, compute.struct_field(column, part.name))
    elif types.is_list(kind) or types.is_large_list(kind):
        parts = list_parts(column)
        assert parts is not None
        digest.update(parts[0].tobytes())
        update_digest(digest, parts[1])
    elif _is_text(column):
        digest.update(_lengths(column).tobytes())
        _update_texts(digest, column)
    elif types.is_binary(kind) or types.is_large_binary(kind):
        digest.update(_lengths(column).tobytes())
    elif types.is_null(kind):
        return
    else:
        values = _numbers(column)
        if values is None:
            digest.update(repr(column.to_pylist()).encode())
        else:
            digest.update(values.tobytes())


def _lengths(column: Column) -> np.ndarray:
    import pyarrow.compute as compute

    return np.asarray(compute.binary_length(column).fill_null(0).to_numpy(), dtype=np.int64)


def _update_texts(digest: Any, column: Column) -> None:
    """Add the texts of a column, one after the other, without a copy."""
    from pyarrow import types

    for chunk in getattr(column, "chunks", [column]):
        texts = chunk.drop_null()
        if not len(texts):
            continue
        _, offsets, data = texts.buffers()
        width = np.int64 if types.is_large_string(texts.type) else np.int32
        places = np.frombuffer(offsets, width)[texts.offset : texts.offset + len(texts) + 1]
        if data is not None:
            digest.update(memoryview(data)[places[0] : places[-1]])
