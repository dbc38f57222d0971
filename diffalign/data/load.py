"""Load preference data from anything a user has into groups of the canonical schema.

`load_preferences` is the entry. It opens the source, recognises its layout, and checks
its rows.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.data.config import CALIBRATE, TIES, VERIFY_IMAGES
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.groups import Group
from diffalign.data.images import ImagePlaces
from diffalign.data.judgements import number
from diffalign.data.load_report import LoadReport
from diffalign.data.schema import Layout, recognise
from diffalign.data.sources import Rows, SourceLike, open_source
from diffalign.data.verify import usable_rows
from diffalign.errors import ConfigError, UserError
from diffalign.runtime.hashing import text_hash

if TYPE_CHECKING:
    import datasets
    import pyarrow

__all__ = ["Group", "LoadReport", "PreferenceDataset", "load_preferences"]


def load_preferences(
    source: SourceLike,
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    columns: Mapping[str, str] | None = None,
    ties: str = "drop",
    verify_images: str = "auto",
    max_broken_fraction: float = 0.05,
    kind: str | None = None,
    score_columns: Sequence[str] = (),
    calibrate: str = "wins",
    like_threshold: float | None = None,
    wanted: str | None = None,
    data_dir: str | Path | None = None,
    allow_remote_images: bool = False,
    allow_outside_paths: bool = False,
    verbose: bool = True,
) -> PreferenceDataset:
    """Read preference data of any layout that `diffalign.data.schema` knows.

    A source is one of:

    * a Hub id;
    * a `.parquet`, `.jsonl`, `.json`, `.csv` or `.tar` (WebDataset) file;
    * a folder that `save_to_disk` wrote;
    * an imagefolder with `metadata.jsonl` or `metadata.csv`;
    * a folder with `chosen/` and `rejected/` (or `w/` and `l/`) whose files have equal
      stems. Captions are `.txt` files beside the chosen images, or lie beside the two
      folders in `captions.json` (`{stem: caption}`) or `prompts.jsonl` (`{"file_name":
      ..., "prompt": ...}` per line);
    * a folder of parquet or tar shards, or of jsonl, json or csv tables whose image
      paths are relative to the table;
    * a `datasets` object, or a list of dicts.

    Args:
        source: The source. None reads `data_dir`.
        split (`str`, *optional*, defaults to `"train"`): Split of a dataset that has
            several. It is ignored for a `Dataset` and a list.
        config (`str`, *optional*): Configuration of a Hub dataset.
        revision (`str`, *optional*): Revision of a Hub dataset.
        streaming (`bool`, *optional*, defaults to `False`): Read rows as they come. The
            result has no length and no index.
        columns (`Mapping[str, str]`, *optional*): Canonical column name -> column of
            the dataset, where the names are not recognised.
        ties (`str`, *optional*, defaults to `"drop"`): `drop` ties, or `keep` them with
            weight 0.
        verify_images (`str`, *optional*, defaults to `"auto"`): How images are
            checked: `auto`, `header`, `full` or `none`. `auto` opens the images of up
            to 20,000 rows, and those of a sample of larger data.
        max_broken_fraction (`float`, *optional*, defaults to `0.05`): Largest share of
            broken rows that is skipped.
        kind (`str`, *optional*): Kind of the groups, see `PreferenceDataset.as_kind`.
            None keeps the data's own.
        score_columns (`Sequence[str]`, *optional*, defaults to `()`): Columns of scores
            per image, one per scorer. A ranked row's scores become its win rates over
            them.
        calibrate (`str`, *optional*, defaults to `"wins"`): How they become win rates:
            `wins` or `sigmoid`, see `diffalign.rewards.win_rates`.
        like_threshold (`float`, *optional*): Images with a column of ratings are liked
            from here on. None reads no ratings.
        wanted (`str`, *optional*): Kind that a method trains on. It decides what
            columns such as `label` mean, see `recognise`.
        data_dir (`str` or `Path`, *optional*): A folder in which relative image paths
            are looked up first.
        allow_remote_images (`bool`, *optional*, defaults to `False`): Fetch the web
            addresses in image columns (public http and https only), each once.
        allow_outside_paths (`bool`, *optional*, defaults to `False`): Open image files
            outside the dataset's folder, which cells name by absolute paths or `..`.
            Rows that were made in code may always name them.
        verbose (`bool`, *optional*, defaults to `True`): Print the report.

    Returns:
        `PreferenceDataset`, or `StreamingPreferenceDataset` for a stream.

    Raises:
        ConfigError: An option has an unknown value, or does not fit the columns.
        UserError: The source is missing, unreadable, of an unknown layout, empty, all
            ties, too broken, or not of `kind`.

    Example:
        >>> from PIL import Image
        >>> from diffalign.data import load_preferences
        >>> red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
        >>> row = {"caption": "a red image", "jpg_0": blue, "jpg_1": red, "label_0": 0}
        >>> dataset = load_preferences([row], verbose=False)
        >>> chosen, rejected = dataset[0].open_images()
        >>> chosen.getpixel((0, 0))
        (255, 0, 0)
    """
    from diffalign.data.columns import MANY_ROWS
    from diffalign.data.memory import forget_pages

    _check_choice("ties", ties, TIES)
    _check_choice("verify_images", verify_images, VERIFY_IMAGES)
    _check_choice("calibrate", calibrate, CALIBRATE)
    opened = open_source(
        source,
        split=split,
        config=config,
        revision=revision,
        streaming=streaming,
        data_dir=data_dir,
    )
    data, columns = opened.dataset, columns or {}
    if not _is_stream(data) and len(data) > MANY_ROWS:
        forget_pages(data)  # of opening the files
    names = _column_names(data, opened.name)
    if score_columns:
        data, columns = with_win_rates(data, score_columns, columns, calibrate)
        names = data.column_names
    report = LoadReport(opened.name, "", "", {}, ties_kept=ties == "keep")
    if not names or _is_empty(data):
        report.check(max_broken_fraction)
    data, layout = _with_layout(
        data,
        names,
        columns,
        kind or wanted,
        report,
        like_threshold,
        gathers=kind not in ("single", "prompt"),
    )
    places = dataclasses.replace(
        opened.places,
        anywhere=opened.places.anywhere or allow_outside_paths,
        remote=allow_remote_images,
    )
    # The images of prompts are never looked at.
    verify = "none" if kind == "prompt" and not _is_stream(data) else verify_images
    dataset = _verified(data, layout, report, places, verify, max_broken_fraction)
    if kind is not None:
        dataset = dataset.as_kind(kind)
    _tell(dataset.report, verbose)
    return dataset


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"data.{name}", f"expected one of {', '.join(choices)}, got {value!r}")


def _is_stream(data: Rows) -> bool:
    import datasets

    return not isinstance(data, datasets.Dataset)


def _is_empty(data: Rows) -> bool:
    return not _is_stream(data) and len(data) == 0


def _column_names(data: Rows, source: str) -> Sequence[str]:
    """Return the column names, from the first row of a stream that has no features."""
    from diffalign.data.streaming import guarded

    return data.column_names or next((list(row) for row in guarded(data.take(1), source)), ())


def _with_layout(
    data: Rows,
    names: Sequence[str],
    columns: Mapping[str, str],
    kind: str | None,
    report: LoadReport,
    like_threshold: float | None,
    gathers: bool,
) -> tuple[Rows, Layout]:
    """Recognise the layout, gather rows of one image into lists, and report both."""
    # Kinds of one image or none take rows of one image as they are.
    gathers = gathers and kind != "labelled"
    layout = recognise(
        [name for name in names if name in columns.values() or not _is_class(data, name)],
        columns,
        list_columns(data),
        rows_to_lists=gathers,
        like_threshold=like_threshold,
        wanted=kind,
        flags=flag_columns(data),
    )
    report.direction, report.unused = layout.direction, list(layout.unused)
    if layout.name == "image_rows":
        if _is_stream(data):
            raise ConfigError(
                "data.dataset_streaming",
                "one image per row with a rank is gathered into lists, which a stream cannot; "
                "set it to false",
            )
        data, layout = with_lists(data, layout, report)
    report.layout, report.kind, report.mapping = layout.name, layout.kind, layout.mapping
    return data, layout


def _is_class(data: Rows, name: str) -> bool:
    """Whether a column holds classes of images, which are no judgements."""
    import datasets

    return name == "label" and isinstance((data.features or {}).get(name), datasets.ClassLabel)


def _verified(
    data: Rows,
    layout: Layout,
    report: LoadReport,
    places: ImagePlaces,
    verify: str,
    max_broken_fraction: float,
) -> PreferenceDataset:
    """Check every row now, or in a stream when it is read."""
    if _is_stream(data):
        from diffalign.data.streaming import StreamingPreferenceDataset

        return StreamingPreferenceDataset(
            data,
            layout,
            report,
            places,
            verify_images=verify,
            max_broken_fraction=max_broken_fraction,
        )
    row_ids = usable_rows(data, layout, report, places, verify)
    report.check(max_broken_fraction)
    return PreferenceDataset(data, layout, report, row_ids, places)


def _tell(report: LoadReport, verbose: bool) -> None:
    """Print the report, or only warn of columns that look useful and are not read."""
    unused = report.unused_columns()
    if verbose and report.mapping and report.rows:
        print(report.summary())
    elif verbose:
        streaming = f"dataset {report.source}: streaming, layout {report.layout}"
        print("; ".join(filter(None, (streaming, unused))))
    elif unused:
        warnings.warn(f"dataset {report.source}: {unused}", stacklevel=3)


_LOOKED_AT = 100  # rows of a stream without features


def flag_columns(data: Rows) -> set[str]:
    """Name the columns of true and false.

    Args:
        data: A `datasets.Dataset` or `IterableDataset`.
    """
    if data.features is not None:
        return {n for n, kind in data.features.items() if getattr(kind, "dtype", "") == "bool"}
    rows = list(itertools.islice(data, _LOOKED_AT))
    return {n for row in rows for n, value in row.items() if isinstance(value, bool)}


def list_columns(data: Rows) -> dict[str, bool]:
    """Say which columns of a `datasets` object hold lists.

    Args:
        data: A `datasets.Dataset` or `IterableDataset`.

    Returns:
        `dict[str, bool]`: Column -> whether its cells are lists. Columns of unknown
        type are left out.
    """
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


def with_lists(
    data: datasets.Dataset, layout: Layout, report: LoadReport
) -> tuple[datasets.Dataset, Layout]:
    """Gather rows of one image with a rank or score into one list per prompt.

    Images with the same `prompt_id` (or, without that column, the same prompt) make a
    list, in the order of their rows.

    Args:
        data (`datasets.Dataset`): A dataset of layout `image_rows`.
        layout (`Layout`): Its layout.
        report (`LoadReport`): Gets a note of what was gathered.

    Returns:
        `tuple[datasets.Dataset, Layout]`: The lists, with the columns prompt, images
        and rank or scores, and their layout.

    Raises:
        UserError: No two rows can be compared.
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
    groups: dict[tuple[str, str], list[int]] = {}
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
            f"dataset {report.source}: its {len(data)} rows have one image each and a {role}, "
            f"but no two rows of one {by!r} can be compared; load it as single images (a method "
            "such as sft, or kind='single')"
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
        fingerprint=text_hash(data._fingerprint)[:16],
    )
    alone = len(data) - unranked - len(order)
    report.notes.append(
        f"{len(data)} rows of one image became {len(several)} lists by {by!r}"
        + (f"; {alone} rows have nothing to be compared with" if alone else "")
        + (f"; {unranked} rows have no {role}" if unranked else "")
    )
    return gathered, recognise(["prompt", "images", role], {})


def _cells(table: datasets.Dataset, name: str, order: list[int]) -> pyarrow.Array:
    """Return the cells of a column in another order, undecoded."""
    import pyarrow

    column = table[order][name]
    return (
        pyarrow.concat_arrays(column.chunks) if isinstance(column, pyarrow.ChunkedArray) else column
    )


def _are_numbers(values: object) -> bool:
    return isinstance(values, (list, tuple)) and all(
        v is None or isinstance(v, (int, float)) for v in values
    )


def _with_nan(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


WIN_RATES = "win_rates"


def with_win_rates(
    data: Rows, score_columns: Sequence[str], columns: Mapping[str, str], calibrate: str = "wins"
) -> tuple[Rows, dict[str, str]]:
    """Add a column of win rates over several columns of scores.

    Args:
        data (`datasets.Dataset`): The dataset.
        score_columns (`Sequence[str]`): Columns that hold a list of numbers per row,
            one per image, higher is better. Missing numbers are left out.
        columns (`Mapping[str, str]`): The user's column mapping.
        calibrate (`str`, *optional*, defaults to `"wins"`): `wins` or `sigmoid`.

    Returns:
        `tuple[datasets.Dataset, dict[str, str]]`: The dataset with the new column, and
        the mapping that reads it.

    Raises:
        ConfigError: A column is not there, the data are a stream, or the lists of a row
            differ in length.
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
                f"row {place} has {', '.join(str(len(v)) for v in lists)} scores; expected one "
                "per image in each",
            )
        numbers = [_with_nan(values) for values in lists]
        scores = torch.tensor(numbers, dtype=torch.float64)
        rates = win_rates(scores.T[None], calibrate=calibrate) if scores.numel() else None
        rows.append([] if rates is None else rates[0].tolist())
    return data.add_column(WIN_RATES, rows), {**columns, "scores": WIN_RATES}
