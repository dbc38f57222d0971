"""Write datasets as parquet shards."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ..runtime.files import replacing_folder

_SHARD_ROWS = 200


def write_dataset(
    target: Path, rows: Callable[[], Iterator[dict[str, Any]]], count: int, features: dict[str, Any]
) -> None:
    """Write a dataset as parquet shards and replace the one that was there before.

    The folder is written whole or not at all. Without a row there is no folder.

    Args:
        target (`Path`): Folder of the dataset.
        rows: Function that gives the rows.
        count (`int`): Number of rows.
        features: Column -> type of the values.
    """
    from datasets import Dataset, Features

    shards = -(-count // _SHARD_ROWS)
    if not shards:
        shutil.rmtree(target, ignore_errors=True)
        return
    with replacing_folder(target) as temporary:
        source = rows()
        for number in range(shards):
            part = list(islice(source, _SHARD_ROWS))
            name = f"train-{number:05d}-of-{shards:05d}.parquet"
            Dataset.from_list(part, features=Features(features)).to_parquet(temporary / name)
