"""Read text, JSON, JSON lines and tables: prompts, captions, votes and datasets.

Text is UTF-8, or UTF-16 and UTF-32 with a byte order mark. A line ends at a line feed,
a carriage return or both, and nowhere else. Cells of a .csv may hold line breaks, cells
of a .tsv may not. Every error names the file, the line and the remedy.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError

_DEEPEST = 100
_LONGEST_CELL = 1 << 27
# UTF-32's little-endian mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class BadLine:
    """A line that was left out, and why."""

    number: int
    reason: str

    def __str__(self) -> str:
        return f"line {self.number}: {self.reason}"


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        number (`int`): counted from 1, without the header.
        line (`int`): of the file, where it begins.
        cells (`dict[str, str | None]`): column -> text. None for an empty cell.
    """

    number: int
    line: int
    cells: dict[str, str | None]


@dataclass(frozen=True)
class Table:
    """The content of a .csv or .tsv file."""

    columns: list[str]
    rows: list[Row]


def decode(data: bytes, name: str) -> str:
    """Decode bytes into text without its byte order mark.

    Args:
        data (`bytes`): of the file.
        name (`str`): of the file, for messages.

    Returns:
        `str`: the text.

    Raises:
        UserError: another encoding. Names the line.
    """
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding.startswith(("utf-16", "utf-32")):
            raise UserError(
                f"{name}: is cut off or damaged {encoding.upper()}; save it as UTF-8"
            ) from None
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}: byte 0x{data[error.start]:02x} in line {line} is not UTF-8; save the file "
            "as UTF-8"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(
            f"{name}: line {line} holds NUL characters, so it is no text file, or UTF-16 without "
            "a byte order mark; save it as UTF-8"
        )
    return text


def read_text(path: str | Path, what: str = "") -> str:
    """Read a text file.

    Args:
        path (`str` or `Path`): the file.
        what (`str`, *optional*, defaults to `""`): put in front of messages, such as
            ``"--prompts: "``.

    Returns:
        `str`: its text.

    Raises:
        UserError: it cannot be read, or is no text.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{what}there is no file {str(path)[:200]!r}") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{what}{str(path)[:200]} cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from None
    return decode(data, f"{what}{path}")


def split_lines(text: str) -> list[str]:
    """Split a text into lines.

    Other separators, such as U+2028, belong to the line.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def read_lines(path: str | Path, what: str = "") -> list[str]:
    """Read the lines of a text file, see `read_text`."""
    return split_lines(read_text(path, what))


def parse_json(text: str) -> Any:
    """Parse a JSON text.

    Args:
        text (`str`): JSON.

    Returns:
        The value.

    Raises:
        ValueError: with a short reason: no JSON, a key that occurs twice, too deep,
            half a character, or a number of thousands of digits.
    """
    if text.count("[") + text.count("{") > _DEEPEST and _depth(text) > _DEEPEST:
        raise ValueError("nested too deeply")
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg}, column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        digits = "digits" in str(error)
        raise ValueError("a number of more than 4300 digits" if digits else str(error)) from None
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("holds half a character (an unpaired surrogate)") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return values


def _depth(text: str) -> int:
    """Compute the deepest nesting, outside of texts."""
    depth = deepest = 0
    quoted = escaped = False
    for character in text:
        if quoted:
            quoted = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            quoted = True
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


def read_json(path: str | Path, kind: type | None = None, what: str = "") -> Any:
    """Read a JSON file.

    Args:
        path (`str` or `Path`): the file.
        kind (`type`, *optional*): that the value must have, such as `dict`.
        what (`str`, *optional*, defaults to `""`): put in front of messages.

    Returns:
        The value.

    Raises:
        UserError: it cannot be read, is no JSON, or of another type.
    """
    text = read_text(path, what)
    try:
        value = parse_json(text)
    except ValueError as error:
        raise UserError(f"{what}{path}: {error}") from None
    if kind is not None and not isinstance(value, kind):
        names: dict[type, str] = {dict: "a JSON object", list: "a JSON list"}
        raise UserError(
            f"{what}{path}: expected {names.get(kind, kind.__name__)}, got {_json_name(value)}"
        )
    return value


def _json_name(value: object) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "text", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def read_json_lines(path: str | Path, what: str = "") -> Iterator[tuple[int, Any]]:
    """Read a file of JSON lines.

    Args:
        path (`str` or `Path`): the file.
        what (`str`, *optional*, defaults to `""`): put in front of messages.

    Yields:
        `tuple[int, Any]`: line number and value of every line that is not blank.

    Raises:
        UserError: the file cannot be read, or a line is no JSON.
    """
    for number, line in enumerate(split_lines(read_text(path, what)), start=1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except ValueError as error:
                raise UserError(f"{what}{path}, line {number}: {error}") from None


def read_json_objects(path: str | Path, what: str = "") -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a file of JSON lines that must all be objects, see `read_json_lines`."""
    for number, value in read_json_lines(path, what):
        if not isinstance(value, dict):
            raise UserError(
                f'{what}{path}, line {number}: expected a JSON object such as {{"prompt": ...}}, '
                f"got {_json_name(value)}"
            )
        yield number, value


def journal(path: str | Path) -> tuple[list[tuple[int, Any]], list[BadLine]]:
    """Read a file that is appended to, such as votes.

    A line that is torn or no JSON is left out.

    Args:
        path (`str` or `Path`): the file.

    Returns:
        `tuple[list[tuple[int, Any]], list[BadLine]]`: line numbers and values, and the
        lines that were left out.

    Raises:
        UserError: the file cannot be read, or is UTF-16, to which UTF-8 must not be
            appended.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path}: is UTF-16; save it as UTF-8")
    entries: list[tuple[int, Any]] = []
    left_out: list[BadLine] = []
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            entries.append((number, parse_json(line.decode())))
        except UnicodeDecodeError as error:
            left_out.append(BadLine(number, f"byte 0x{line[error.start]:02x} is not UTF-8"))
        except ValueError as error:
            left_out.append(BadLine(number, str(error)))
    return entries, left_out


def read_table(path: str | Path, what: str = "") -> Table:
    """Read a .csv or .tsv file with a header.

    A .csv may have semicolons or tabs in place of commas, and a first line `sep=;`.

    Args:
        path (`str` or `Path`): the file.
        what (`str`, *optional*, defaults to `""`): put in front of messages.

    Returns:
        `Table`: columns and rows.

    Raises:
        UserError: it cannot be read; a column occurs twice; a quotation mark is never
            closed; a row has more cells than the header.
    """
    text = read_text(path, what)
    name, is_tsv = f"{what}{path}", str(path).lower().endswith(".tsv")
    csv.field_size_limit(_LONGEST_CELL)
    lines = split_lines(text)
    skipped = 0
    delimiter = "\t" if is_tsv else ","
    if lines and not is_tsv:
        if lines[0].lower().startswith("sep=") and len(lines[0]) == 5:
            delimiter, skipped = lines[0][4], 1
        elif "," not in lines[0]:
            delimiter = next((mark for mark in (";", "\t") if mark in lines[0]), ",")
    body = text.split("\n", 1)[1] if skipped and "\n" in text else ("" if skipped else text)
    records = _tab_records(lines) if is_tsv else _quoted_records(body, delimiter, skipped, name)
    header = next(records, None)
    if header is None:
        raise UserError(f"{name}: the file is empty")
    columns = [column.strip() for column in header[1]]
    for column in columns:
        if column and columns.count(column) > 1:
            raise UserError(f"{name}: the column {column!r} occurs twice; rename one of them")
    rows = []
    for number, (line, cells) in enumerate(records, start=1):
        extra = [cell for cell in cells[len(columns) :] if cell.strip()]
        if extra:
            raise UserError(
                f"{name}: row {number} (line {line}) has {len(cells)} cells for {len(columns)} "
                "columns; put text that holds the "
                "separator in quotation marks"
            )
        padded = [*cells, *[""] * (len(columns) - len(cells))]
        rows.append(
            Row(
                number,
                line,
                {
                    column: cell or None
                    for column, cell in zip(columns, padded, strict=False)
                    if column
                },
            )
        )
    return Table([column for column in columns if column], rows)


def _tab_records(lines: list[str]) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, line.split("\t")


_SENTINEL = "\ue000end of file\ue000"


def _quoted_records(
    text: str, delimiter: str, skipped: int, name: str
) -> Iterator[tuple[int, list[str]]]:
    """Read the records of a .csv as (line, cells).

    A sentinel line is added at the end. It ends up inside a cell when a quotation mark
    is never closed.
    """
    newline = "" if text.endswith("\n") or text.endswith("\r") or not text else "\n"
    reader = csv.reader(
        io.StringIO(f"{text}{newline}{_SENTINEL}\n", newline=""), delimiter=delimiter
    )
    line = skipped + 1
    try:
        for cells in reader:
            start, line = line, reader.line_num + skipped + 1
            if cells == [_SENTINEL]:
                return
            if any(_SENTINEL in cell for cell in cells):
                raise UserError(
                    f"{name}: the quotation mark in the row that begins in line {start} is never "
                    "closed"
                )
            if any(cell.strip() for cell in cells):
                yield start, cells
    except csv.Error as error:
        raise UserError(f"{name}: line {line}: {error}") from None
