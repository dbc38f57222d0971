"""Give back the memory of files that were read through."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets
    import pyarrow

_DONT_NEED = 4  # MADV_DONTNEED


_BATCH = 65_536  # rows


def walk(
    dataset: datasets.Dataset, columns: Iterable[str], batch_size: int = _BATCH
) -> Iterator[pyarrow.Table]:
    """Read some columns as Arrow tables, and forget what was read.

    Args:
        dataset (`datasets.Dataset`): The dataset.
        columns (`Iterable[str]`): Columns to read.
        batch_size (`int`, *optional*, defaults to `65536`): Rows per table.

    Returns:
        `Iterator[pyarrow.Table]`: The tables, in order.
    """
    chosen = dataset.select_columns(list(dict.fromkeys(columns))).with_format("arrow")
    for table in chosen.iter(batch_size=batch_size):
        yield table
        if len(dataset) > batch_size:
            forget_pages(dataset)


def forget_pages(dataset: datasets.Dataset) -> None:
    """Unmap the pages of a dataset's files that this process has read.

    A walk over a column of a large dataset leaves much of its files counted as this
    process's memory, until the system needs it. The pages come back when they are read
    again. Does nothing on other systems than Linux.

    Args:
        dataset (`datasets.Dataset`): Its files are mapped into memory.
    """
    files = {os.path.realpath(str(file["filename"])) for file in dataset.cache_files}
    if not files or sys.platform != "linux":
        return
    with contextlib.suppress(OSError, ValueError):
        advise = ctypes.CDLL(None, use_errno=True).madvise
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, flags, *_, name = line.split(maxsplit=5)
            # A written page of a private mapping would be lost.
            if name in files and "w" not in flags:
                low, high = (int(end, 16) for end in span.split("-"))
                advise(low, high - low, _DONT_NEED)
