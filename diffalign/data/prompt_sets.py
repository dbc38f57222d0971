"""Prompts to compare models on: named sets with licence and checksum, or a file.

None but the embedded one is part of this package: the published files are read from where the user has them, either the file itself or
a folder with the published name in it, and their checksum says whether they are the published ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.section import suggestion
from ..errors import ConfigError, UserError
from ..runtime import text_files

PROMPT_KEYS = ("prompt", "prompts", "caption", "text")
CATEGORY_KEYS = ("category", "tag", "challenge", "style", "type")
ENVIRONMENT = "DIFFALIGN_PROMPTS"
SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class NamedSet:
    """A published set.

    Attributes:
        files: names of its files; several are read one after the other, each its own category.
        licence: as its publisher states it.
        source: where to get it.
        sha256: of the published file, where we could read one.
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
        "https://huggingface.co/datasets/yuvalkirstain/pickapic_v2_no_images (data/test_unique-*.parquet)",
    ),
}
EMBEDDED = "shapes"


@dataclass
class PromptSet:
    """Prompts, in order, without repetition.

    Attributes:
        name: of the set or file.
        prompts: P of them.
        categories: P, None where there is none.
        metadata: P mappings with the columns beside the prompt, for scorers that read them.
        licence, source: as published, empty where unknown.
        sha256: of the files.
        published: whether the checksum is the published one; None where that is not known.
        notes: what was left out and why.
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
        """What a report says of it."""
        names = ("name", "licence", "source", "sha256", "published", "notes")
        return {**{name: getattr(self, name) for name in names}, "prompts": len(self.prompts)}


def load_prompts(
    source: str | Iterable[str], *, path: str | Path | None = None, limit: int | None = None
) -> PromptSet:
    """A named set, a file (.txt, .csv, .tsv, .json, .jsonl, .parquet), or prompts as they are.

    Args:
        source: ``shapes`` (the held-out prompts of the embedded world), a name of `NAMED`, a file, or prompts.
        path: of a named set: its file, or a folder that holds it; None looks into the folder that DIFFALIGN_PROMPTS names.
        limit: at most so many prompts, taken evenly over the set, so that every category keeps its share.

    Raises:
        UserError: no such set or file, or no prompt in it.
    """
    if limit is not None and limit < 1:
        raise ConfigError("max_prompts", f"expected int >= 1, got {limit}")
    if not isinstance(source, (str, Path)):
        found = _finish("prompts", [{"prompt": prompt} for prompt in source], "")
    elif str(source) in NAMED and not Path(source).is_file():
        found = _named(str(source), path)
    elif str(source) in (EMBEDDED, "shapes-held-out") and not Path(source).is_file():
        found = _embedded()
    else:
        found = _file(Path(source).expanduser(), str(source))
    return found if limit is None or limit >= len(found.prompts) else _thinned(found, limit)


def _thinned(given: PromptSet, limit: int) -> PromptSet:
    picks = [i * len(given.prompts) // limit for i in range(limit)]
    note = f"{limit} of {len(given.prompts)} prompts, evenly spaced"
    return dataclasses.replace(
        given,
        prompts=[given.prompts[i] for i in picks],
        categories=[given.categories[i] for i in picks],
        metadata=[given.metadata[i] for i in picks],
        notes=[*given.notes, note],
    )


def _embedded() -> PromptSet:
    from ..shapes.prompts import held_out_prompts, parse_prompt

    prompts = held_out_prompts()
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
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
    place = (
        Path(path or os.environ.get(ENVIRONMENT, "")).expanduser()
        if (path or os.environ.get(ENVIRONMENT))
        else None
    )
    if place is None:
        raise UserError(
            f"--prompts: {name} is not part of this package ({known.licence}); get {', '.join(known.files)} from {known.source} and "
            f"give --prompts_path FILE_OR_FOLDER, or set {ENVIRONMENT} to the folder"
        )
    alone = place.is_file() and len(known.files) == 1
    files = [place] if alone else [_below(place, name, file) for file in known.files]
    rows: list[Mapping[str, Any]] = []
    digest = hashlib.sha256()
    for file in files:
        own = _rows(file)
        if len(files) > 1:
            own = [{"category": file.stem, **row} for row in own]
        rows += own
        digest.update(file.read_bytes())
    found = _finish(name, rows, digest.hexdigest())
    found.licence, found.source = known.licence, known.source
    found.published = None if known.sha256 is None else found.sha256 == known.sha256
    if found.published is False:
        found.notes.append(
            f"not the published file: sha256 {found.sha256[:12]}, published {str(known.sha256)[:12]}"
        )
    return found


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
        f"--prompts_path: {str(folder)!r} holds no {file}, which {name} is made of; get it from {NAMED[name].source}"
    )


def _file(path: Path, given: str) -> PromptSet:
    names = [EMBEDDED, *NAMED]
    if not path.is_file():
        hint = suggestion(given, names)
        raise UserError(
            f"--prompts: {given!r} is neither a file{hint} nor a prompt set; there are {', '.join(names)}, or give a file of {', '.join(SUFFIXES)}"
        )
    return _finish(path.name, _rows(path), hashlib.sha256(path.read_bytes()).hexdigest())


def _rows(path: Path) -> list[Mapping[str, Any]]:
    """One mapping per prompt, with a key ``prompt``.

    Raises:
        UserError: of an unknown form, unreadable, or without a column of prompts.
    """
    suffix, what = path.suffix.lower(), "--prompts: "
    if suffix not in SUFFIXES:
        raise UserError(
            f"--prompts: {str(path)!r} has the ending {suffix!r}; expected one of {', '.join(SUFFIXES)}"
        )
    try:
        return [_row(row, path, place) for place, row in _values(path, suffix, what)]
    except UserError as error:
        if (
            str(error).startswith(what)
            and "cannot be read" not in str(error)
            and "no column" not in str(error)
        ):
            raise UserError(
                f"--prompts: {str(path)!r} cannot be read ({str(error).removeprefix(what)})"
            ) from None
        raise


def _values(path: Path, suffix: str, what: str) -> Iterator[tuple[str, Any]]:
    """(place for messages, row) of every row of a file."""
    if suffix == ".parquet":
        import pyarrow.parquet as pq

        try:
            names = pq.read_schema(path).names
            rows: Any = pq.read_table(
                path, columns=[n for n in names if not n.startswith("jpg_")]
            ).to_pylist()
        except (OSError, ValueError) as error:
            raise UserError(
                f"--prompts: {str(path)!r} cannot be read ({' '.join(str(error).split())[:200]})"
            ) from None
        yield from ((f"row {i}", row) for i, row in enumerate(rows, start=1))
    elif suffix == ".txt":
        yield from (
            (f"line {i}", line.strip())
            for i, line in enumerate(text_files.read_lines(path, what), start=1)
        )
    elif suffix in (".csv", ".tsv"):
        # No quoting in tab-separated files: a quotation mark in a prompt is one.
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
            raise UserError(f"--prompts: {str(path)!r} cannot be read (holds no list)")
        yield from ((f"entry {i}", row) for i, row in enumerate(rows, start=1))


def _row(row: Any, path: Path, place: str) -> Mapping[str, Any]:
    if isinstance(row, str):
        return {"prompt": row}
    if not isinstance(row, Mapping):
        raise UserError(
            f"--prompts: {str(path)!r} has no column of prompts: {place} is {str(row)[:40]!r}, expected text or an object"
        )
    for key in row:
        if str(key).lower() in PROMPT_KEYS:
            if row[key] is None and path.suffix.lower() in (".csv", ".tsv"):
                return {"prompt": ""}  # counted with the empty ones
            if not isinstance(row[key], str):
                shown = "null" if row[key] is None else str(row[key])[:40]
                raise UserError(
                    f"--prompts: {str(path)!r} cannot be read ({place}: {key} is {shown}, expected text; write a prompt or remove it)"
                )
            return {**{k: v for k, v in row.items() if k != key}, "prompt": row[key]}
    columns = ", ".join(map(str, row)) or "nothing"
    raise UserError(
        f"--prompts: {str(path)!r} has no column {' or '.join(PROMPT_KEYS)} in {place}; it has {columns}"
    )


def _finish(name: str, rows: Iterable[Mapping[str, Any]], digest: str) -> PromptSet:
    kept: dict[str, Mapping[str, Any]] = {}
    empty = repeated = 0
    for row in rows:
        prompt = str(row["prompt"]).strip()
        empty += not prompt
        repeated += prompt in kept
        if prompt:
            kept.setdefault(prompt, row)
    if not kept:
        raise UserError(f"--prompts: {name} holds no prompt")
    notes = [f"{empty} empty prompts left out"] * (empty > 0) + [
        f"{repeated} repeated prompts taken once"
    ] * (repeated > 0)
    categories: list[str | None] = []
    for row in kept.values():
        key = next(
            (k for want in CATEGORY_KEYS for k in row if str(k).lower() == want and row[k]), None
        )
        categories.append(None if key is None else str(row[key]))
    metadata = [{str(k): v for k, v in row.items() if k != "prompt"} for row in kept.values()]
    digest = digest or hashlib.sha256("\n".join(kept).encode()).hexdigest()
    return PromptSet(name, list(kept), categories, metadata, sha256=digest, notes=notes)


def read_prompts(source: str, limit: int | None = None) -> tuple[list[str], list[str]]:
    """(distinct prompts in their order, what was left out and why): ``shapes``, its training prompts, here, where data are made.

    A text file or a named set is read as for a comparison; anything else is a dataset with prompts.

    Raises:
        UserError: no such source, or no prompt in it.
    """
    path = Path(source).expanduser()
    if source == "shapes" and not path.exists():
        from ..shapes import train_prompts

        given = train_prompts()
    elif (path.is_file() and path.suffix.lower() in (".txt", ".tsv")) or (
        source in {*NAMED, "shapes-held-out"} and not path.exists()
    ):
        found = load_prompts(source)
        return found.prompts[:limit], found.notes
    else:
        from .load import load_preferences

        given = [
            prompt
            for group in load_preferences(source, ties="keep", verbose=False)
            for prompt in group.prompts
        ]
    kept = list(dict.fromkeys(prompt for prompt in given if prompt.strip()))
    empty = sum(not prompt.strip() for prompt in given)
    notes = [f"{empty} empty prompts left out"] * (empty > 0)
    repeated = len(given) - empty - len(kept)
    notes += [f"{repeated} repeated prompts taken once"] * (repeated > 0)
    if not kept:
        raise UserError(f"--prompts: {source!r} holds no prompt")
    return kept[:limit], notes
