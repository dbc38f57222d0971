"""Local .jsonl, .json, .csv and .txt files as a `datasets.Dataset`, read by `diffalign.text_files`.

The readers of `datasets` would guess types: quotation marks around every prompt when one is a number, `None` in a CSV as no value,
columns that shift when a row is too long, and a crash of the process at a line that says `null`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign import text_files
from diffalign.exceptions import UserError

_CHUNK = 10_000


def read_tables(paths: Sequence[Path], name: str) -> Any:
    """The rows of text files, one below the other.

    Args:
        paths: .jsonl, .json, .csv or .txt files.
        name: for messages.

    Returns:
        `datasets.Dataset` with the union of their columns; cells of a .csv are text.

    Raises:
        UserError: a file that cannot be read; names the line.
    """
    import datasets
    import pyarrow

    rows: list[dict[str, Any]] = []
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
        rows += _rows(path)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if not columns:
        raise UserError(f"dataset {name!r}: has no rows")
    arrays = {column: _array([row.get(column) for row in rows]) for column in columns}
    try:
        table = pyarrow.table(arrays)
    except (pyarrow.ArrowInvalid, UnicodeEncodeError) as error:
        raise UserError(f"dataset {name!r}: {' '.join(str(error).split())[:300]}") from error
    return datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint=digest.hexdigest()[:16])


def _rows(path: Path) -> list[dict[str, Any]]:
    what, suffix = "dataset ", path.suffix.lower()
    if suffix == ".txt":
        return [{"text": line.strip()} for line in text_files.read_lines(path, what) if line.strip()]
    if suffix == ".csv":
        return [row.cells for row in text_files.read_table(path, what).rows]
    if suffix == ".json":
        text = text_files.read_text(path, what)
        if not text.lstrip().startswith("{"):
            return [_object(value, f"{what}{path}, row {i}") for i, value in enumerate(_list(path, text))]
        whole = _whole(text)
        if whole is not None:
            return [whole]
    return [_object(value, f"{what}{path}, line {line}") for line, value in text_files.read_json_lines(path, what)]


def _list(path: Path, text: str) -> list[Any]:
    try:
        values = text_files.parse_json(text)
    except ValueError as error:
        raise UserError(f"dataset {path}: {error}") from None
    if not isinstance(values, list):
        raise UserError(f"dataset {path}: expected a list of objects or one object per line")
    return values


def _whole(text: str) -> dict[str, Any] | None:
    """The one object that a .json file holds, or None for one object per line."""
    try:
        value = text_files.parse_json(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _object(value: Any, where: str) -> dict[str, Any]:
    """A row; `null` is a row without cells, text is a prompt."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise UserError(f'{where}: expected an object such as {{"prompt": ...}}, got {str(value)[:40]}')
    return value


def _array(values: list[Any]) -> Any:
    """A column as Arrow.

    One type for all cells: text, whole numbers, numbers, booleans, lists or structures. In a column of text, a cell of another type is
    no text: it becomes null, and its row is then counted as broken.
    """
    import pyarrow

    kinds = {type(value) for value in values if value is not None}
    if str in kinds:
        return pyarrow.array(
            [value if isinstance(value, str) else None for value in values],
            pyarrow.large_string() if _is_large(values) else pyarrow.string(),
        )
    if kinds == {int, float}:
        return pyarrow.array([None if value is None else float(value) for value in values], pyarrow.float64())
    try:
        return pyarrow.array(values)
    except OverflowError:
        return pyarrow.array([None if value is None else float(value) for value in values], pyarrow.float64())
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):  # lists or structures of several types, which no role reads
        return pyarrow.array([None if value is None else json.dumps(value) for value in values], pyarrow.string())


def _is_large(values: list[Any]) -> bool:
    return sum(len(value) for value in values if isinstance(value, str)) > 1 << 30
