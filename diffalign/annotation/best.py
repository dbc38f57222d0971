"""The best images of a whole dataset, as single images to train on.

Diffusion-DRO trains on the 500 best images of Pick-a-Pic by a reward model (Wu et al.
2025, arXiv 2510.18353). SFT takes such images, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError
from .dataset_files import write_dataset

if TYPE_CHECKING:
    from ..rewards.panel import Panel
    from .score_parts import Table
    from .score_source import DatasetSource, FolderSource


def ranked_images(panel: Panel, columns: Mapping[str, Sequence[float]]) -> list[int]:
    """Order the images of all prompts together.

    Rules such as win-rates compare the images of one prompt. Here every scorer ranks
    all images, and the weighted mean of the ranks decides. With one scorer that is the
    order of its scores.

    Args:
        panel (`Panel`): Its scorers of role `train`, with their weights.
        columns: Scorer -> N scores.

    Returns:
        `list[int]`: Image indices, best first; of equal ones the first one. Images
        without a score are left out.
    """
    names, weights = panel.combined_entries()
    scores = panel.signed(columns, names, len(columns[names[0]]))
    usable = scores.isfinite().all(1).nonzero()[:, 0].tolist()
    total = torch.zeros(len(usable), dtype=torch.float64)
    for column, weight in enumerate(weights):
        values = scores[usable, column].contiguous()
        ordered = values.sort().values
        # Equal scores share the mean of their ranks.
        first = torch.searchsorted(ordered, values)
        after = torch.searchsorted(ordered, values, right=True)
        total += weight * (first + after)
    return [usable[i] for i in total.argsort(descending=True, stable=True).tolist()]


def write_best(
    target: Path,
    images: Callable[[], Iterator[tuple[int, str, bytes, str]]],
    count: int,
    columns: Mapping[str, Sequence[float]],
    origin: str,
) -> None:
    """Write images as a dataset of single images with prompts.

    Args:
        target (`Path`): Folder of the dataset.
        images: Function that gives index, prompt, encoded image and origin of each.
        count (`int`): How many it gives.
        columns: Scorer -> scores of all images, by their indices.
        origin (`str`): Name of the column that says where an image is from.
    """
    from datasets import Image, Value

    def rows() -> Iterator[dict[str, Any]]:
        for i, prompt, content, name in images():
            row = {"prompt": prompt, "image": {"bytes": content, "path": None}, origin: name}
            scores = {key: values[i] for key, values in columns.items()}
            yield row | {k: v if math.isfinite(v) else None for k, v in scores.items()}

    # Plain names: a column named "score" would look like a judgement that is not read.
    features = {"prompt": Value("string"), "image": Image(), origin: Value("string")}
    features |= {name: Value("float64") for name in columns}
    write_dataset(target, rows, count, features)


def write_best_of_source(
    target: Path,
    source: FolderSource | DatasetSource,
    chunks: Sequence[range],
    table: Table,
    panel: Panel,
    count: int,
) -> str:
    """Write the best images of a source that was scored.

    An image that is there several times under one prompt, as in Pick-a-Pic, counts
    once.

    Args:
        target (`Path`): Folder of the dataset.
        source (`FolderSource` or `DatasetSource`): What was scored.
        chunks (`Sequence[range]`): Its rows, in the order of the table.
        table (`Table`): The scores.
        panel (`Panel`): The scorers.
        count (`int`): How many images.

    Returns:
        `str`: What was written, a line for the summary.

    Raises:
        UserError: No image has a score of every scorer of role `train`.
    """
    from ..data.images import BrokenImage, raw_bytes
    from ..runtime.hashing import bytes_hash
    from .score_source import as_cell

    def contents(wanted: set[int]) -> Iterator[tuple[int, bytes]]:
        start = 0
        for rows in chunks:
            inputs = source.read(rows).inputs
            for i, image in enumerate(inputs, start):
                if i in wanted:
                    try:
                        yield i, bytes(raw_bytes(as_cell(image.source)))
                    except BrokenImage:  # changed since it was scored
                        continue
            start += len(inputs)

    ranked = ranked_images(panel, table.columns)
    if not ranked:
        raise UserError("--best: no image has a score, so none is the best")
    chosen: dict[tuple[str | None, str], int] = {}
    for start in range(0, len(ranked), 2 * count):  # the rest is not read again
        part = ranked[start : start + 2 * count]
        digests = {i: bytes_hash(content) for i, content in contents(set(part))}
        for i in part:
            if i in digests and len(chosen) < count:
                chosen.setdefault((table.records[i].prompt, digests[i]), i)
        if len(chosen) == count:
            break
    best = set(chosen.values())

    def rows() -> Iterator[tuple[int, str, bytes, str]]:
        # In the source's order, so that one shard at most is in memory.
        for i, content in contents(best):
            record = table.records[i]
            yield i, record.prompt or "", content, record.image

    write_best(target, rows, len(best), table.columns, "source")
    prompts = len({table.records[i].prompt for i in best})
    return f"{len(best)} best images of {prompts} prompts: {target}"
