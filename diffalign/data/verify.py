"""Go over a dataset once and decide which rows are used.

Prompts, labels and scores are read as whole columns. Images are read only to be
verified, by worker processes where there are many rows. `datasets` remembers what they
found, by the fingerprint of the dataset.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.data import images as image_cells
from diffalign.data.groups import build_group, lazy_cell
from diffalign.data.images import ImagePlaces, Undecoded
from diffalign.data.judgements import classify_row
from diffalign.data.load_report import LoadReport
from diffalign.data.memory import walk
from diffalign.data.schema import Layout

if TYPE_CHECKING:
    import datasets
    import numpy as np
    import pyarrow

_SAMPLE = 1_000  # rows
_IMAGE_BATCH = 256
_MOST_WORKERS = 16


def check_image(image: Undecoded, verify: str) -> None:
    """Check that an image can be used.

    Args:
        image: As `diffalign.data.images.resolve` returns it.
        verify (`str`): `auto` and `header` open it, `full` decodes it, `none` trusts
            it.

    Raises:
        BrokenImage: It cannot be used.
    """
    if verify == "full":
        image_cells.decode(image)
    elif verify in ("auto", "header"):
        image_cells.header(image)


def usable_rows(
    dataset: datasets.Dataset, layout: Layout, report: LoadReport, places: ImagePlaces, verify: str
) -> np.ndarray:
    """Find the rows to use, and count all others in the report.

    Args:
        dataset (`datasets.Dataset`): The dataset.
        layout (`Layout`): How its columns are read.
        report (`LoadReport`): Gets the counts.
        places (`ImagePlaces`): Where image cells may point to.
        verify (`str`): `auto`, `header`, `full` or `none`. `auto` opens the images of
            up to 20,000 rows, and of larger data those of 1,000 rows. It always notices
            cells without an image.

    Returns:
        `np.ndarray`: Row ids, int64, ascending.
    """
    import numpy as np

    from diffalign.data.columns import MANY_ROWS

    report.rows = len(dataset)
    rows, reasons, absent = _judged_rows(dataset, layout, report, verify != "none")
    checked = rows
    if verify == "none":
        checked = rows[:0]
    elif verify == "auto" and len(dataset) > MANY_ROWS:
        places_of_sample = np.linspace(0, max(len(rows) - 1, 0), min(_SAMPLE, len(rows)))
        sample = rows[np.unique(places_of_sample.astype(np.int64))]
        checked = np.union1d(sample, absent)
        report.notes.append(
            f"images of {len(sample):,} rows opened (data.verify_images: header opens all)"
        )
    reasons |= _broken_images(dataset, layout, places, verify, checked)
    for row_id in sorted(reasons):
        report.add_broken(row_id, reasons[row_id])
    if reasons:
        broken = np.fromiter(reasons, dtype=np.int64)
        rows = rows[~np.isin(rows, broken)]
    report.kept = len(rows)
    return rows


def _judged_rows(
    dataset: datasets.Dataset, layout: Layout, report: LoadReport, look_for_images: bool
) -> tuple[np.ndarray, dict[int, str], np.ndarray]:
    """Judge all rows by their light cells.

    Returns:
        The rows to use, why others are broken, and which rows lack an image.
    """
    import numpy as np

    from diffalign.data.columns import (
        ASK,
        KEEP,
        TIE,
        UNLABELLED,
        absent_images,
        judge_columns,
        list_parts,
    )

    light = layout.light_columns
    images = layout.image_columns if look_for_images or "images" in layout.mapping else {}
    kept: list[np.ndarray] = []
    without: list[np.ndarray] = []
    reasons: dict[int, str] = {}
    start = 0
    for table in walk(dataset, [*light.values(), *images.values()]):
        columns = {role: table[column] for role, column in light.items()}
        judged = judge_columns(layout, columns)
        admitted = (judged.status == KEEP) | ((judged.status == TIE) & report.ties_kept)
        ask = judged.status == ASK
        for role, column in images.items():
            if role == "images":
                parts = list_parts(table[column])
                scores = next(r for r in ("scores", "human_preference", "rank") if r in columns)
                lengths = list_parts(columns[scores])
                if parts is not None and lengths is not None:
                    odd = parts[0] != lengths[0]
                else:
                    odd = np.ones(len(table), bool)
                reasons |= _wrong_lengths(table, layout, np.flatnonzero(admitted & odd), start)
            elif look_for_images:
                absent = np.flatnonzero(admitted & absent_images(table[column]))
                without.append(absent.astype(np.int64) + start)
        report.ties += int((judged.status == TIE).sum())
        report.unlabelled += int((judged.status == UNLABELLED).sum())
        report.first_wins += int((judged.second_wins[~ask] == 0).sum())
        report.second_wins += int((judged.second_wins[~ask] == 1).sum())
        for offset in np.flatnonzero(ask).tolist():
            cells = {role: column[offset].as_py() for role, column in columns.items()}
            verdict = classify_row(layout, cells)
            if verdict.status == "broken":
                reasons[start + offset] = verdict.reason
            else:
                admitted[offset] = report.admit(start + offset, verdict)
                if admitted[offset] and "images" in images:
                    reasons |= _wrong_lengths(table, layout, [offset], start)
        kept.append(np.flatnonzero(admitted).astype(np.int64) + start)
        start += len(table)
    none = np.empty(0, np.int64)
    return np.concatenate([none, *kept]), reasons, np.concatenate([none, *without])


def _wrong_lengths(
    table: pyarrow.Table, layout: Layout, offsets: Sequence[int] | np.ndarray, start: int
) -> dict[int, str]:
    """Say which ranked rows have other numbers of images and scores.

    This is checked even where images are trusted.
    """
    reasons: dict[int, str] = {}
    for offset in map(int, offsets):
        cells = {r: table[c][offset].as_py() for r, c in layout.light_columns.items()}
        expected = len(classify_row(layout, cells).prompts)
        images = table[layout.image_columns["images"]][offset]
        count = len(images.values) if images.is_valid else 0
        if count != expected:
            reasons[start + offset] = f"has {count} images and {expected} scores"
    return reasons


def _broken_images(
    dataset: datasets.Dataset,
    layout: Layout,
    places: ImagePlaces,
    verify: str,
    rows: np.ndarray,
) -> dict[int, str]:
    """Check the images of some rows. Many rows are shared among worker processes."""
    from datasets import Features, Value

    from diffalign.data.columns import MANY_ROWS

    if not len(rows):
        return {}
    columns = list(dict.fromkeys(layout.mapping.values()))
    chosen = dataset.select_columns(columns).with_format("arrow")
    check = functools.partial(_check_batch, layout=layout, places=places, verify=verify)
    if len(rows) <= MANY_ROWS:
        found: dict[int, str] = {}
        tables = chosen if len(rows) == len(dataset) else chosen.select(rows)
        start = 0
        for table in tables.iter(batch_size=_IMAGE_BATCH):
            numbers = rows[start : start + len(table)].tolist()
            result = check(table, numbers)
            found |= dict(zip(result["row"], result["reason"], strict=True))
            start += len(table)
        return found
    # All rows, so that the result belongs to the dataset alone and is found again.
    check = functools.partial(check, files=_files_digest(dataset, layout, places))
    folder = _cache_folder(dataset)
    with _one_process_at_a_time(folder):
        checked = chosen.map(
            check,
            with_indices=True,
            batched=True,
            batch_size=_IMAGE_BATCH,
            remove_columns=columns,
            num_proc=max(1, min(os.cpu_count() or 1, _MOST_WORKERS)),
            keep_in_memory=folder is None,
            features=Features({"row": Value("int64"), "reason": Value("string")}),
            desc="checking images",
        ).with_format(None)
    used = set(rows.tolist())
    return {
        row: reason
        for row, reason in zip(checked["row"], checked["reason"], strict=True)
        if row in used
    }


def _files_digest(dataset: datasets.Dataset, layout: Layout, places: ImagePlaces) -> str:
    """Hash size and time of every image file that the cells point to."""
    digest = hashlib.sha256()
    columns = list(dict.fromkeys(layout.image_columns.values()))
    for table in walk(dataset, columns):
        for name in columns:
            for path in _paths(table[name]):
                with contextlib.suppress(image_cells.BrokenImage, OSError):
                    place: Any = image_cells.resolve(path, places)
                    facts = os.stat(place["path"])
                    digest.update(f"{path} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _paths(column: Any) -> list[str]:
    """List the paths of an image column's cells that hold no bytes."""
    import pyarrow.compute as compute
    from pyarrow import types

    kind = column.type
    if types.is_list(kind) or types.is_large_list(kind):
        return _paths(compute.list_flatten(column))
    if types.is_string(kind) or types.is_large_string(kind):
        return column.drop_null().to_pylist()
    if types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}:
        empty = compute.is_null(compute.struct_field(column, "bytes"))
        return compute.struct_field(column, "path").filter(empty).drop_null().to_pylist()
    return []


def _cache_folder(dataset: datasets.Dataset) -> Path | None:
    """Return where `datasets` may keep results beside the data, or None."""
    files = dataset.cache_files
    folder = Path(files[0]["filename"]).parent if files else None
    return folder if folder is not None and os.access(folder, os.W_OK) else None


def _one_process_at_a_time(folder: Path | None) -> Any:
    """Let one process of several check the data, and the others find the result."""
    from filelock import FileLock

    if folder is None:
        return contextlib.nullcontext()
    return FileLock(str(folder / ".diffalign-check.lock"))


def _check_batch(
    table: pyarrow.Table,
    numbers: Sequence[int],
    *,
    layout: Layout,
    places: ImagePlaces,
    verify: str,
    files: str = "",
) -> dict[str, list[Any]]:
    """Return the numbers of the rows with a broken image, and what is wrong.

    `datasets` compares all arguments before it uses an earlier result, so changed files
    are checked again.
    """
    light = {role: table[column].to_pylist() for role, column in layout.light_columns.items()}
    found: dict[str, list[Any]] = {"row": [], "reason": []}
    for offset, row_id in enumerate(numbers):
        verdict = classify_row(layout, {role: values[offset] for role, values in light.items()})
        if verdict.status in ("broken", "unlabelled"):
            continue
        cells = {
            role: lazy_cell(table[column][offset]) for role, column in layout.image_columns.items()
        }
        try:
            for image in build_group(layout, verdict, row_id, cells, places).images:
                check_image(image, verify)
        except image_cells.BrokenImage as error:
            found["row"].append(row_id)
            found["reason"].append(str(error))
    return found
