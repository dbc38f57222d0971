"""Read prompts to compare models on, from a named set or a file.

Only the set `shapes` is part of this package. The published sets are read from the
user's own files: either the file itself, or a folder with the published name in it.
Their checksum shows whether they are the published ones.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.section import suggestion
from ..errors import ConfigError, UserError
from ..runtime import text_files
from ..runtime.hashing import bytes_hash, text_hash
from .dataset import PreferenceDataset
from .schema import CATEGORY_KEYS

PROMPT_KEYS = ("prompt", "prompts", "caption", "text")
ENVIRONMENT = "DIFFALIGN_PROMPTS"
SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class NamedSet:
    """Describe a published set of prompts.

    Attributes:
        files (`tuple[str, ...]`): Names of its files. Several are read one after the
            other, each its own category.
        licence (`str`): As its publisher states it.
        source (`str`): Where to get it.
        sha256 (`str`, *optional*): Checksum of the published file, where we could read
            one.
    """

    files: tuple[str, ...]
    licence: str
    source: str
    sha256: str | None = None


NAMED: dict[str, NamedSet] = {
    "partiprompts": NamedSet(
        ("PartiPrompts.tsv",),
        "Apache-2.0",
        "https://github.com/google-research/parti",
        "fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb",
    ),
    "drawbench": NamedSet(
        ("drawbench.csv",),
        "not stated by its authors",
        "https://arxiv.org/abs/2205.11487 (supplement)",
    ),
    "hpdv2": NamedSet(
        ("anime.json", "concept-art.json", "paintings.json", "photo.json"),
        "Apache-2.0",
        "https://huggingface.co/datasets/zhwang/HPDv2 (benchmark/)",
    ),
    "geneval": NamedSet(
        ("evaluation_metadata.jsonl",),
        "MIT",
        "https://github.com/djghosh13/geneval (prompts/)",
        "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
    ),
    "pickapic-test": NamedSet(
        ("test_unique.parquet",),
        "MIT",
        "https://huggingface.co/datasets/yuvalkirstain/pickapic_v2_no_images "
        "(data/test_unique-*.parquet)",
    ),
}
EMBEDDED = "shapes"


@dataclass
class PromptSet:
    """Hold distinct prompts in order, and where they come from.

    Attributes:
        name (`str`): Name of the set or file.
        prompts (`list[str]`): P prompts.
        categories (`list[str | None]`): P categories, None where there is none.
        metadata (`list[dict[str, Any]]`): P mappings with the columns beside the
            prompt, for scorers that read them.
        licence (`str`): As published, empty where unknown.
        source (`str`): As published, empty where unknown.
        sha256 (`str`): Checksum of the files.
        published (`bool`, *optional*): Whether the checksum is the published one. None
            where that is not known.
        notes (`list[str]`): What was left out and why.
    """

    name: str
    prompts: list[str]
    categories: list[str | None]
    metadata: list[dict[str, Any]] = field(repr=False)
    licence: str = ""
    source: str = ""
    sha256: str = ""
    published: bool | None = None
    notes: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """Return what a report says about the set, as plain types."""
        names = ("name", "licence", "source", "sha256", "published", "notes")
        return {**{name: getattr(self, name) for name in names}, "prompts": len(self.prompts)}


def load_prompts(
    source: str | Iterable[str], *, path: str | Path | None = None, limit: int | None = None
) -> PromptSet:
    """Load a named set, a file, or prompts as they are.

    Args:
        source (`str` or `Iterable[str]`): `shapes` (the held-out prompts of the
            embedded world), a name of `NAMED`, a `.txt`, `.csv`, `.tsv`, `.json`,
            `.jsonl` or `.parquet` file, prompts, rows with a column of prompts, or a
            dataset.
        path (`str` or `Path`, *optional*): The file of a named set, or a folder that
            holds it. None looks into the folder that DIFFALIGN_PROMPTS names.
        limit (`int`, *optional*): Largest number of prompts. They are taken evenly over
            the set, so that every category keeps its share.

    Returns:
        `PromptSet`.

    Raises:
        ConfigError: `limit` is less than 1.
        UserError: There is no such set or file, or no prompt in it.

    Example:
        >>> from diffalign.data.prompt_sets import load_prompts
        >>> len(load_prompts("shapes", limit=24).prompts)
        24
    """
    if limit is not None and limit < 1:
        raise ConfigError("max_prompts", f"expected int >= 1, got {limit}")
    if not isinstance(source, (str, Path)):
        prompt_set = _finish("prompts", _given_rows(source), "")
    elif str(source) in NAMED and not Path(source).is_file():
        prompt_set = _named(str(source), path)
    elif str(source) in (EMBEDDED, "shapes-held-out") and not Path(source).is_file():
        prompt_set = _embedded()
    else:
        prompt_set = _file(Path(source).expanduser(), str(source))
    if limit is None or limit >= len(prompt_set.prompts):
        return prompt_set
    return _thinned(prompt_set, limit)


def _given_rows(source: Any) -> list[Mapping[str, Any]]:
    """Read prompts that are given in Python: texts, rows with a prompt, or a dataset.

    Raises:
        ConfigError: something else is among them.
    """
    if isinstance(source, PreferenceDataset):
        return [{"prompt": prompt} for prompt in source.distinct_prompts()]
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # pandas
        source = source.to_dict("records")
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise ConfigError(
            "prompts", f"expected a name, a file or texts, got {type(source).__name__}"
        )
    rows: list[Mapping[str, Any]] = []
    for number, value in enumerate(source):
        row = value if isinstance(value, Mapping) else {"prompt": value}
        key = next((key for key in row if str(key).lower() in PROMPT_KEYS), None)
        if key is None or not isinstance(row[key], str):
            shown = (
                f"the columns {', '.join(map(str, row))}" if key is None else repr(row[key])[:60]
            )
            raise ConfigError("prompts", f"number {number} must be text, got {shown}")
        rows.append({**{k: v for k, v in row.items() if k != key}, "prompt": row[key]})
    return rows


def _thinned(prompt_set: PromptSet, limit: int) -> PromptSet:
    picks = [i * len(prompt_set.prompts) // limit for i in range(limit)]
    note = f"{limit} of {len(prompt_set.prompts)} prompts, evenly spaced"
    return dataclasses.replace(
        prompt_set,
        prompts=[prompt_set.prompts[i] for i in picks],
        categories=[prompt_set.categories[i] for i in picks],
        metadata=[prompt_set.metadata[i] for i in picks],
        notes=[*prompt_set.notes, note],
    )


def _embedded() -> PromptSet:
    from ..shapes.prompts import held_out_prompts, parse_prompt

    prompts = held_out_prompts()
    digest = text_hash("\n".join(prompts))
    categories: list[str | None] = [parse_prompt(prompt).shape for prompt in prompts]
    return PromptSet(
        EMBEDDED,
        prompts,
        categories,
        [{} for _ in prompts],
        "Apache-2.0",
        "embedded, held-out",
        digest,
        True,
    )


def _named(name: str, path: str | Path | None) -> PromptSet:
    known = NAMED[name]
    place = path or os.environ.get(ENVIRONMENT)
    if not place:
        raise UserError(
            f"--prompts: {name} is not part of this package ({known.licence}); get "
            f"{', '.join(known.files)} from {known.source} and give --prompts_path "
            f"FILE_OR_FOLDER, or set {ENVIRONMENT} to the folder"
        )
    place = Path(place).expanduser()
    alone = place.is_file() and len(known.files) == 1
    files = [place] if alone else [_below(place, name, file) for file in known.files]
    rows: list[Mapping[str, Any]] = []
    for file in files:
        file_rows = _rows(file)
        if len(files) > 1:
            file_rows = [{"category": file.stem, **row} for row in file_rows]
        rows += file_rows
    prompt_set = _finish(name, rows, bytes_hash(*(file.read_bytes() for file in files)))
    prompt_set.licence, prompt_set.source = known.licence, known.source
    prompt_set.published = None if known.sha256 is None else prompt_set.sha256 == known.sha256
    if prompt_set.published is False:
        prompt_set.notes.append(
            f"not the published file: sha256 {prompt_set.sha256[:12]}, published "
            f"{str(known.sha256)[:12]}"
        )
    return prompt_set


def _below(folder: Path, name: str, file: str) -> Path:
    if not folder.is_dir():
        raise UserError(f"--prompts_path: there is no file or folder {str(folder)!r}")
    for candidate in (
        folder / file,
        folder / name / file,
        folder / "benchmark" / file,
        folder / "prompts" / file,
    ):
        if candidate.is_file():
            return candidate
    raise UserError(
        f"--prompts_path: {str(folder)!r} holds no {file}, which {name} is made of; get it from "
        f"{NAMED[name].source}"
    )


def _file(path: Path, name: str) -> PromptSet:
    names = [EMBEDDED, *NAMED]
    if not path.is_file():
        hint = suggestion(name, names)
        raise UserError(
            f"--prompts: {name!r} is neither a file{hint} nor a prompt set; there are "
            f"{', '.join(names)}, or give a file of {', '.join(SUFFIXES)}"
        )
    return _finish(path.name, _rows(path), bytes_hash(path.read_bytes()))


def _rows(path: Path) -> list[Mapping[str, Any]]:
    """Read one mapping per prompt, with a key `prompt`.

    Raises:
        UserError: The file has an unknown form, is unreadable, or has no column of
            prompts.
    """
    suffix, what = path.suffix.lower(), "--prompts: "
    if suffix not in SUFFIXES:
        raise UserError(
            f"--prompts: {str(path)!r} has the ending {suffix!r}; expected one of "
            f"{', '.join(SUFFIXES)}"
        )
    try:
        return [_row(row, path, place) for place, row in _values(path, suffix, what)]
    except _PromptFileError:
        raise
    except UserError as error:
        if isinstance(error.__context__, OSError):
            raise  # the message names the file already
        reason = str(error).removeprefix(what)
        raise UserError(f"--prompts: {str(path)!r} cannot be read ({reason})") from None


class _PromptFileError(UserError):
    """A fault of a prompt file, with a message that needs no more words."""


def _values(path: Path, suffix: str, what: str) -> Iterator[tuple[str, Any]]:
    """Yield (place for messages, row) of every row of a file."""
    if suffix == ".parquet":
        import pyarrow.parquet as pq

        try:
            names = pq.read_schema(path).names
            rows = pq.read_table(
                path, columns=[n for n in names if not n.startswith("jpg_")]
            ).to_pylist()
        except (OSError, ValueError) as error:
            raise _PromptFileError(
                f"--prompts: {str(path)!r} cannot be read ({' '.join(str(error).split())[:200]})"
            ) from None
        yield from ((f"row {i}", row) for i, row in enumerate(rows, start=1))
    elif suffix == ".txt":
        yield from (
            (f"line {i}", line.strip())
            for i, line in enumerate(text_files.read_lines(path, what), start=1)
        )
    elif suffix in (".csv", ".tsv"):
        # Tab-separated files have no quoting: a quotation mark belongs to the prompt.
        yield from (
            (f"row {row.number} (line {row.line})", row.cells)
            for row in text_files.read_table(path, what).rows
        )
    elif suffix == ".jsonl":
        yield from (
            (f"line {number}", value) for number, value in text_files.read_json_lines(path, what)
        )
    else:
        rows = text_files.read_json(path, what=what)
        if not isinstance(rows, list):
            raise _PromptFileError(f"--prompts: {str(path)!r} cannot be read (holds no list)")
        yield from ((f"entry {i}", row) for i, row in enumerate(rows, start=1))


def _row(row: object, path: Path, place: str) -> Mapping[str, Any]:
    if isinstance(row, str):
        return {"prompt": row}
    if not isinstance(row, Mapping):
        raise _PromptFileError(
            f"--prompts: {str(path)!r} has no column of prompts: {place} is {str(row)[:40]!r}, "
            "expected text or an object"
        )
    for key in row:
        if str(key).lower() in PROMPT_KEYS:
            if row[key] is None and path.suffix.lower() in (".csv", ".tsv"):
                return {"prompt": ""}  # counted as an empty prompt
            if not isinstance(row[key], str):
                shown = "null" if row[key] is None else str(row[key])[:40]
                raise _PromptFileError(
                    f"--prompts: {str(path)!r} cannot be read ({place}: {key} is {shown}, "
                    "expected text; write a prompt or remove it)"
                )
            return {**{k: v for k, v in row.items() if k != key}, "prompt": row[key]}
    columns = ", ".join(map(str, row)) or "nothing"
    raise _PromptFileError(
        f"--prompts: {str(path)!r} has no column {' or '.join(PROMPT_KEYS)} in {place}; it has "
        f"{columns}"
    )


def _finish(name: str, rows: Iterable[Mapping[str, Any]], digest: str) -> PromptSet:
    row_of: dict[str, Mapping[str, Any]] = {}
    empty = repeated = 0
    for row in rows:
        prompt = str(row["prompt"]).strip()
        empty += not prompt
        repeated += prompt in row_of
        if prompt:
            row_of.setdefault(prompt, row)
    if not row_of:
        raise UserError(f"--prompts: {name} holds no prompt")
    notes = [f"{empty} empty prompts left out"] * (empty > 0) + [
        f"{repeated} repeated prompts taken once"
    ] * (repeated > 0)
    categories: list[str | None] = []
    for row in row_of.values():
        key = _category_key(row)
        categories.append(None if key is None else str(row[key]))
    metadata = [_without_prompt(row) for row in row_of.values()]
    digest = digest or text_hash("\n".join(row_of))
    return PromptSet(name, list(row_of), categories, metadata, sha256=digest, notes=notes)


def _without_prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in row.items() if key != "prompt"}


def _category_key(row: Mapping[str, Any]) -> str | None:
    """Return the row's first filled column that names a category."""
    for name in CATEGORY_KEYS:
        key = next((key for key in row if str(key).lower() == name and row[key]), None)
        if key is not None:
            return key
    return None


def read_prompts(source: str, limit: int | None = None) -> tuple[list[str], list[str]]:
    """Read the prompts that data are made from.

    Args:
        source (`str`): `shapes` for the training prompts of the embedded world, a text
            file, a named set, or a dataset with prompts.
        limit (`int`, *optional*): Largest number of prompts, from the first on.

    Returns:
        `tuple[list[str], list[str]]`: The distinct prompts in their order, and what was
        left out and why.

    Raises:
        UserError: There is no such source, or no prompt in it.
    """
    path = Path(source).expanduser()
    if source == "shapes" and not path.exists():
        from ..shapes import train_prompts

        prompts = train_prompts()
    elif (path.is_file() and path.suffix.lower() in (".txt", ".tsv")) or (
        source in {*NAMED, "shapes-held-out"} and not path.exists()
    ):
        prompt_set = load_prompts(source)
        return prompt_set.prompts[:limit], prompt_set.notes
    else:
        from .load import load_preferences

        prompts = [
            prompt
            for group in load_preferences(source, ties="keep", verbose=False)
            for prompt in group.prompts
        ]
    distinct = list(dict.fromkeys(prompt for prompt in prompts if prompt.strip()))
    empty = sum(not prompt.strip() for prompt in prompts)
    notes = [f"{empty} empty prompts left out"] * (empty > 0)
    repeated = len(prompts) - empty - len(distinct)
    notes += [f"{repeated} repeated prompts taken once"] * (repeated > 0)
    if not distinct:
        raise UserError(f"--prompts: {source!r} holds no prompt")
    return distinct[:limit], notes
