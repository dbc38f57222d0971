"""From anything a user has to groups of the canonical schema."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.data.config import TIES, VERIFY_IMAGES
from diffalign.data.dataset import Group, LoadReport, PreferenceDataset
from diffalign.data.judgements import number
from diffalign.data.schema import Layout, recognise
from diffalign.data.sources import open_source
from diffalign.data.verify import usable_rows
from diffalign.errors import ConfigError, UserError

__all__ = ["Group", "LoadReport", "PreferenceDataset", "load_preferences"]


def load_preferences(
    source: Any,
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    columns: Mapping[str, str] | None = None,
    ties: str = "drop",
    verify_images: str = "header",
    max_broken_fraction: float = 0.05,
    kind: str | None = None,
    score_columns: Sequence[str] = (),
    data_dir: str | Path | None = None,
    allow_remote_images: bool = False,
    allow_outside_paths: bool = False,
    verbose: bool = True,
) -> PreferenceDataset:
    """Reads preference data of any layout of `diffalign.data.schema`.

    Args:
        source: one of

            * a Hub id;
            * a `.parquet`, `.jsonl`, `.json`, `.csv` or `.tar` (WebDataset) file;
            * a folder: written by `save_to_disk`; an imagefolder with `metadata.jsonl`/`.csv`; `chosen/` and `rejected/` (or
              `w/` and `l/`) with equal file stems, captions as `.txt` beside the chosen image, or in `captions.json`
              (`{stem: caption}`) or `prompts.jsonl` (`{"file_name": ..., "prompt": ...}` per line) beside the two folders;
              parquet or tar shards; jsonl, json or csv tables with image paths relative to the table;
            * a `datasets` object, or a list of dicts;
            * None, to read `data_dir`.
        split: of a dataset that has several; ignored for a `Dataset` and a list.
        config, revision: of a Hub dataset.
        streaming: read rows as they come; the result has no length and no index.
        columns: canonical column name -> column of the dataset, where the names are not recognised.
        ties: `drop` or `keep` (with weight 0).
        verify_images: `header`, `full` or `none`.
        max_broken_fraction: largest share of broken rows that is skipped.
        kind: what the groups shall be, see `PreferenceDataset.as_kind`; None = what the data are.
        score_columns: columns of scores per image, one per scorer: a ranked row's scores become its win rates over them.
        data_dir: a folder in which relative image paths are looked up first.
        allow_remote_images: fetch web addresses in image columns (public http and https only), each once.
        allow_outside_paths: open image files outside the dataset's folder, which its cells name by absolute paths or `..`. Rows that
            were made in code may always name them.
        verbose: print the report.

    Returns:
        `PreferenceDataset`, or its streaming sibling.

    Raises:
        UserError: the source is missing, unreadable, of an unknown layout, empty, all ties, too broken, or not of `kind`.
    """
    for name, value, choices in (
        ("ties", ties, TIES),
        ("verify_images", verify_images, VERIFY_IMAGES),
    ):
        if value not in choices:
            raise ConfigError(
                f"data.{name}", f"expected one of {', '.join(choices)}, got {value!r}"
            )
    import datasets

    from diffalign.data.streaming import StreamingPreferenceDataset, guarded

    opened = open_source(
        source,
        split=split,
        config=config,
        revision=revision,
        streaming=streaming,
        data_dir=data_dir,
    )
    data = opened.dataset
    names = data.column_names or next(
        (list(row) for row in guarded(data.take(1), opened.name)), None
    )
    if score_columns:
        data, columns = with_win_rates(data, score_columns, columns or {})
        names = data.column_names
    report = LoadReport(opened.name, "", "", {}, ties_kept=ties == "keep")
    if not names or (isinstance(data, datasets.Dataset) and len(data) == 0):
        report.check(max_broken_fraction)
    gathers = kind not in ("single", "prompt")  # those take rows of one image as they are
    layout: Layout = recognise(
        names or (), columns or {}, list_columns(data), rows_to_lists=gathers
    )
    report.direction, report.unused = layout.direction, list(layout.unused)
    if layout.name == "image_rows":
        if not isinstance(data, datasets.Dataset):
            raise ConfigError(
                "data.dataset_streaming",
                "one image per row with a rank is gathered into lists, which a stream cannot; set it to false",
            )
        data, layout = with_lists(data, layout, report)
    report.layout, report.kind, report.mapping = layout.name, layout.kind, layout.mapping
    places = dataclasses.replace(
        opened.places,
        anywhere=opened.places.anywhere or allow_outside_paths,
        remote=allow_remote_images,
    )
    if isinstance(data, datasets.Dataset):
        verify = (
            "none" if kind == "prompt" else verify_images
        )  # prompts alone: their images are never looked at
        row_ids = usable_rows(data, layout, report, places, verify)
        report.check(max_broken_fraction)
        result = PreferenceDataset(data, layout, report, row_ids, places)
    else:
        result = StreamingPreferenceDataset(
            data,
            layout,
            report,
            places,
            verify_images=verify_images,
            max_broken_fraction=max_broken_fraction,
        )
    result = result if kind is None else result.as_kind(kind)
    if verbose:
        print(
            report.summary()
            if len(report.mapping) and report.rows
            else "; ".join(
                filter(
                    None,
                    (
                        f"dataset {opened.name}: streaming, layout {layout.name}",
                        report.unused_columns(),
                    ),
                )
            )
        )
    elif report.unused:
        warnings.warn(f"dataset {opened.name}: {report.unused_columns()}", stacklevel=2)
    return result


_LOOKED_AT = 100  # rows of a stream that has no features


def list_columns(data: Any) -> dict[str, bool]:
    """Column -> whether its cells are lists, for the columns of a `datasets` object whose type is known."""
    import datasets

    if data.features is not None:
        known = {
            name: kind
            for name, kind in data.features.items()
            if getattr(kind, "dtype", "") != "null"
        }
        return {
            name: isinstance(kind, (datasets.List, datasets.LargeList, list, tuple))
            for name, kind in known.items()
        }
    kinds: dict[str, bool] = {}
    for row in itertools.islice(data, _LOOKED_AT):
        for name, value in row.items():
            if value is not None:
                kinds.setdefault(name, isinstance(value, (list, tuple)))
    return kinds


def with_lists(data: Any, layout: Layout, report: LoadReport) -> tuple[Any, Layout]:
    """Rows of one image with a rank or score as one list per prompt.

    Images with the same `prompt_id` (or, without that column, the same prompt) make a list, in the order of their rows.

    Args:
        data: a `datasets.Dataset` of layout `image_rows`.
        layout: its layout.
        report: gets a note of what was gathered.

    Returns:
        The dataset of lists, with the columns prompt, images and rank or scores, and its layout.
    """
    import datasets
    import pyarrow

    role = "rank" if "rank" in layout.mapping else "scores"
    columns = list(dict.fromkeys(layout.mapping.values()))
    table = data.select_columns(columns).with_format("arrow")
    light = {
        name: table[column].to_pylist()
        for name, column in layout.mapping.items()
        if name != "image"
    }
    by = layout.mapping.get("prompt_id", layout.mapping["prompt"])
    groups: dict[Any, list[int]] = {}
    unranked = 0
    for row, prompt in enumerate(light["prompt"]):
        if number(light[role][row]) is None:
            unranked += 1
            continue
        key = light["prompt_id"][row] if "prompt_id" in light else None
        groups.setdefault(
            (json.dumps(key, default=str), json.dumps(prompt, default=str)), []
        ).append(row)
    several = [rows for rows in groups.values() if len(rows) > 1]
    if not several:
        raise UserError(
            f"dataset {report.source}: its {len(data)} rows have one image each and a {role}, but no two rows of one {by!r} can be compared; "
            "load it as single images (a method such as sft, or kind='single')"
        )
    order = [row for rows in several for row in rows]
    offsets = pyarrow.array(
        [0, *itertools.accumulate(len(rows) for rows in several)], pyarrow.int32()
    )
    numbers = pyarrow.array([number(light[role][row]) for row in order], pyarrow.float64())
    lists = {
        "prompt": [light["prompt"][rows[0]] for rows in several],
        "images": pyarrow.ListArray.from_arrays(
            offsets, _cells(table, layout.mapping["image"], order)
        ),
        role: pyarrow.ListArray.from_arrays(offsets, numbers),
    }
    gathered = datasets.Dataset(
        datasets.table.InMemoryTable(pyarrow.table(lists)),
        fingerprint=hashlib.sha256(data._fingerprint.encode()).hexdigest()[:16],
    )
    alone = len(data) - unranked - len(order)
    report.notes.append(
        f"{len(data)} rows of one image became {len(several)} lists by {by!r}"
        + (f"; {alone} rows have nothing to be compared with" if alone else "")
        + (f"; {unranked} rows have no {role}" if unranked else "")
    )
    return gathered, recognise(["prompt", "images", role], {})


def _cells(table: Any, name: str, order: list[int]) -> Any:
    """The cells of a column in another order, undecoded."""
    import pyarrow

    column = table[order][name]
    return (
        pyarrow.concat_arrays(column.chunks) if isinstance(column, pyarrow.ChunkedArray) else column
    )


def _are_numbers(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(
        v is None or isinstance(v, (int, float)) for v in values
    )


WIN_RATES = "win_rates"


def with_win_rates(
    data: Any, score_columns: Sequence[str], columns: Mapping[str, str]
) -> tuple[Any, dict[str, str]]:
    """The dataset with a column of win rates over several columns of scores, and the column mapping that reads it.

    Args:
        data: a `datasets.Dataset`.
        score_columns: each a list of numbers per row, one per image, higher is better; missing ones are left out.
        columns: the user's mapping.

    Raises:
        ConfigError: a column that is not there, a stream, lists of different lengths in a row.
    """
    import datasets
    import torch

    from diffalign.rewards.ensemble import win_rates

    if not isinstance(data, datasets.Dataset):
        raise ConfigError(
            "data.score_columns", "a stream has no column to add; set data.dataset_streaming: false"
        )
    for name in score_columns:
        if name not in data.column_names:
            raise ConfigError(
                "data.score_columns",
                f"the dataset has no column {name!r}; it has {', '.join(data.column_names)}",
            )
    rows = []
    table = data.select_columns(list(score_columns))
    for place, row in enumerate(table):
        lists = [row[name] or [] for name in score_columns]
        odd = next(
            (
                name
                for name, values in zip(score_columns, lists, strict=True)
                if not _are_numbers(values)
            ),
            None,
        )
        if odd is not None:
            raise ConfigError(
                "data.score_columns", f"row {place} of {odd!r} is no list of numbers, one per image"
            )
        if len({len(values) for values in lists}) != 1:
            raise ConfigError(
                "data.score_columns",
                f"row {place} has {', '.join(str(len(v)) for v in lists)} scores; expected one per image in each",
            )
        scores = torch.tensor(
            [[float("nan") if x is None else x for x in values] for values in lists],
            dtype=torch.float64,
        )
        rows.append(win_rates(scores.T[None])[0].tolist() if scores.numel() else [])
    return data.add_column(WIN_RATES, rows), {**columns, "scores": WIN_RATES}
