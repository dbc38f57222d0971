"""Read local .jsonl, .json, .csv and .txt files as a `datasets.Dataset`.

`diffalign.runtime.text_files` parses them. The readers of `datasets` guess types: they
put quotation marks around every prompt when one is a number, read `None` in a CSV as no
value, shift columns when a row is too long, and crash the process at a line that says
`null`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.errors import UserError
from diffalign.runtime import text_files
from diffalign.runtime.hashing import bytes_digest, bytes_hash

if TYPE_CHECKING:
    import datasets
    import pyarrow

_CHUNK = 10_000


def read_tables(paths: Sequence[Path], name: str) -> datasets.Dataset:
    """Read the rows of text files, one file after the other.

    Args:
        paths (`Sequence[Path]`): .jsonl, .json, .csv or .txt files.
        name (`str`): What messages call them.

    Returns:
        `datasets.Dataset` with the union of their columns. Cells of a .csv are text.

    Raises:
        UserError: A file cannot be read. The message names the line.
    """
    import datasets
    import pyarrow

    rows: list[dict[str, Any]] = []
    digests: list[bytes] = []
    for path in paths:
        content = path.read_bytes()
        digests.append(bytes_digest(content))
        rows += _rows(path, content)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if not columns:
        raise UserError(f"dataset {name!r}: has no rows")
    arrays = {column: _array([row.get(column) for row in rows], str(column)) for column in columns}
    try:
        table = pyarrow.table(arrays)
    except (pyarrow.ArrowInvalid, UnicodeEncodeError) as error:
        raise UserError(f"dataset {name!r}: {' '.join(str(error).split())[:300]}") from error
    return datasets.Dataset(
        datasets.table.InMemoryTable(table), fingerprint=bytes_hash(*digests)[:16]
    )


def _rows(path: Path, content: bytes) -> list[dict[str, Any]]:
    """Read a file's rows from its content. The reader of tables opens the file."""
    what, suffix = "dataset ", path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return [row.cells for row in text_files.read_table(path, what).rows]
    text = text_files.decode(content, f"{what}{path}")
    if suffix == ".txt":
        lines = [line.strip() for line in text_files.split_lines(text)]
        return [{"text": line} for line in lines if line]
    if (
        suffix == ".json"
        or text.lstrip().startswith("[")
        or not _is_json(text.lstrip().partition("\n")[0])
    ):
        if not text.lstrip().startswith("{"):
            return [
                _object(value, f"{what}{path}, row {i}")
                for i, value in enumerate(_list(path, text))
            ]
        whole = _whole(text)
        if whole is not None:
            return [whole]
    return _json_lines(text, f"{what}{path}")


def _json_lines(text: str, name: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text_files.split_lines(text), start=1):
        if line.strip():
            try:
                value = text_files.parse_json(line)
            except ValueError as error:
                raise UserError(f"{name}, line {number}: {error}") from None
            rows.append(_object(value, f"{name}, line {number}"))
    return rows


def _is_json(text: str) -> bool:
    """Whether a first line is a value of its own, as in JSON lines."""
    try:
        text_files.parse_json(text)
    except ValueError:
        return False
    return True


def _list(path: Path, text: str) -> list[object]:
    try:
        values = text_files.parse_json(text)
    except ValueError as error:
        raise UserError(f"dataset {path}: {error}") from None
    if not isinstance(values, list):
        raise UserError(f"dataset {path}: expected a list of objects or one object per line")
    return values


def _whole(text: str) -> dict[str, Any] | None:
    """Return the one object that a .json file holds, None for one object per line."""
    try:
        value = text_files.parse_json(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _object(value: object, where: str) -> dict[str, Any]:
    """Turn a value into a row: `null` has no cells, text is a prompt."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise UserError(
            f'{where}: expected an object such as {{"prompt": ...}}, got {str(value)[:40]}'
        )
    return value


def _array(values: Sequence[object], column: str) -> pyarrow.Array:
    """Convert a column to Arrow, with one type for all its cells.

    The types are text, whole numbers, numbers, booleans, lists and structures. In a
    column of text a number or boolean is written out, as a CSV has it. In a column of
    prompts or images it becomes null, so that its row counts as broken.
    """
    import pyarrow

    kinds = {type(value) for value in values if value is not None}
    if str in kinds:
        texts = [_as_text(value, column) for value in values]
        large = sum(len(text) for text in texts if text is not None) > 1 << 30
        return pyarrow.array(texts, pyarrow.large_string() if large else pyarrow.string())
    for prepared in (_one_number_type, _with_floats, _as_json):
        try:
            return pyarrow.array([None if value is None else prepared(value) for value in values])
        except (OverflowError, TypeError, pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):
            continue
    raise UserError(f"column {column!r} holds values that cannot be read")


_TEXT_ROLES = (
    "prompt",
    "caption",
    "text",
    "txt",
    "image",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "chosen",
    "rejected",
    "file_name",
    "path",
)


def _as_text(value: object, column: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    is_content = any(word in column.lower() for word in _TEXT_ROLES)
    return None if is_content or not isinstance(value, (bool, int, float)) else json.dumps(value)


def _one_number_type(value: object) -> object:
    return value


def _with_floats(value: object) -> object:
    """Turn numbers into floats, also within lists and structures.

    This is for numbers that are mixed, or too large for whole ones.
    """
    if isinstance(value, (list, tuple)):
        return [_with_floats(item) for item in value]
    if isinstance(value, dict):
        return {key: _with_floats(item) for key, item in value.items()}
    return (
        float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
    )


def _as_json(value: object) -> str:
    return json.dumps(value)
