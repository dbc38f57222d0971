"""Score a source in chunks that several processes share.

The scores of a chunk are a file whose name depends on everything that they depend on.
So finished work is not done again, and nothing outdated is read.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ..runtime.files import write_atomically
from ..runtime.hashing import text_hash

if TYPE_CHECKING:
    from ..rewards.base import Scorer
    from ..rewards.panel import Panel
    from ..runtime.distributed import DistributedContext
    from .score_source import Chunk, DatasetSource, FolderSource, Record

Share: TypeAlias = "tuple[int, list[Record]] | tuple[str, str, dict[int, str]]"
"""What one process found: (chunk, its records), or (column, fingerprint, files)."""


@dataclass
class Table:
    """Hold what was scored.

    Attributes:
        records (`list[Record]`): One per image.
        columns (`dict[str, list[float]]`): Scorer -> one score per image, NaN where it
            is missing.
        errors (`dict[str, dict[int, str]]`): Scorer -> index of an image -> why its
            score is missing.
        fingerprints (`dict[str, str]`): Scorer -> fingerprint.
    """

    records: list[Record]
    columns: dict[str, list[float]]
    errors: dict[str, dict[int, str]]
    fingerprints: dict[str, str]


@dataclass
class ScoreWork:
    """Hold the chunks of a source, and what is known of them so far.

    Attributes:
        panel (`Panel`): The scorers.
        source (`FolderSource` or `DatasetSource`): What to score.
        chunks (`list[range]`): The rows of each chunk.
        parts (`Path`): Folder of the chunks' files.
        records (`dict[int, list[Record]]`): Chunk -> its records.
        files (`dict[tuple[str, int], str]`): (column, chunk) -> file.
        fingerprints (`dict[str, str]`): Column -> fingerprint of its scorer.
    """

    panel: Panel
    source: FolderSource | DatasetSource
    chunks: list[range]
    parts: Path
    records: dict[int, list[Record]] = field(default_factory=dict)
    files: dict[tuple[str, int], str] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)

    def add(self, share: Share) -> None:
        """Add what one process found.

        Args:
            share: (chunk, its records), or (column, fingerprint, {chunk: file}).
        """
        if len(share) == 2:
            self.records[share[0]] = share[1]
        else:
            name, self.fingerprints[name], files = share[0], share[1], share[2]
            self.files.update({(name, number): file for number, file in files.items()})

    def table(self) -> Table:
        """Return the scores of all chunks, in the source's order."""
        numbers = range(len(self.chunks))
        records = [record for number in numbers for record in self.records[number]]
        columns: dict[str, list[float]] = {}
        errors: dict[str, dict[int, str]] = {}
        for name in self.panel.names:
            columns[name], errors[name] = [], {}
            for number in numbers:
                part = json.loads((self.parts / self.files[name, number]).read_text("utf-8"))
                start = len(columns[name])
                errors[name] |= {start + int(i): sentence for i, sentence in part["errors"].items()}
                columns[name] += [
                    float("nan") if value is None else value for value in part["values"]
                ]
        return Table(records, columns, errors, self.fingerprints)


def score_share(work: ScoreWork, processes: DistributedContext) -> list[Share]:
    """Score this process's chunks, one scorer after the other.

    Args:
        work (`ScoreWork`): The chunks.
        processes (`DistributedContext`): The processes that share the work.

    Returns:
        `list`: What `ScoreWork.add` takes.
    """
    from ..runtime.progress import progress_bar

    mine = range(processes.rank, len(work.chunks), processes.world)
    total = sum(len(work.chunks[number]) for number in mine)
    contents: dict[int, str] = {}
    shares: list[Share] = []
    for entry in work.panel.entries:
        files: dict[int, str] = {}
        unit = "image" if work.source.kind in ("folder", "single") else "row"
        with (
            work.panel.using(entry.name) as scorer,
            progress_bar(
                total=total, desc=entry.name, unit=unit, disable=processes.rank > 0
            ) as bar,
        ):
            for number in mine:
                chunk = None
                if number not in contents:
                    chunk = work.source.read(work.chunks[number])
                    contents[number] = chunk.fingerprint()
                    shares.append((number, chunk.records))
                files[number] = part_name(scorer, contents[number])
                if not is_finished(work.parts / files[number]):
                    chunk = chunk or work.source.read(work.chunks[number])
                    score_chunk(scorer, chunk, entry.on_error, work.parts / files[number])
                bar.update(len(work.chunks[number]))
            shares.append((entry.name, scorer.fingerprint(), files))
    return shares


def score_all(work: ScoreWork, processes: DistributedContext) -> Table:
    """Score everything, each process its share.

    Args:
        work (`ScoreWork`): The chunks.
        processes (`DistributedContext`): The processes that share the work.

    Returns:
        `Table`: The whole table, in every process.

    Raises:
        UserError: An input or a scorer is faulty. The process that met the fault raises
            it.
    """
    for share in processes.gather(score_share(work, processes)):
        work.add(share)
    return work.table()


def part_name(scorer: Scorer, content: str) -> str:
    """Return the name of the file of a chunk's scores.

    Args:
        scorer (`Scorer`): The scorer.
        content (`str`): Fingerprint of the chunk.
    """
    digest = text_hash(f"{scorer.fingerprint()}:{content}")[:24]
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', scorer.name)}-{scorer.fingerprint()}-{digest}.json"


def is_finished(path: Path) -> bool:
    """Whether a chunk has all its scores. Missing ones are tried again.

    Args:
        path (`Path`): The chunk's file.
    """
    return path.is_file() and None not in json.loads(path.read_text("utf-8"))["values"]


def score_chunk(scorer: Scorer, chunk: Chunk, on_error: str, path: Path) -> None:
    """Score a chunk and write its file.

    Args:
        scorer (`Scorer`): The scorer.
        chunk (`Chunk`): The images.
        on_error (`str`): What the scorer does with an image that it cannot score.
        path (`Path`): The file.
    """
    # Prompts are encoded in batches, and rounding depends on the size of a batch. With
    # remembered prompts the last digits would depend on earlier chunks, and an
    # interrupted run would differ from one that was not.
    scorer.forget_prompts()
    prompts = [record.prompt for record in chunk.records]
    texts = prompts if "prompt" in scorer.spec.requires else None
    metadata = chunk.metadata if "metadata" in scorer.spec.requires else None
    result = scorer.score(chunk.inputs, texts, metadata, on_error=on_error)  # type: ignore[arg-type]
    values = [None if value != value else value for value in result.values.tolist()]
    errors = {
        str(i): result.errors.get(i, "the scorer gave no number")
        for i, value in enumerate(values)
        if value is None
    }
    for image in chunk.inputs:
        image.release()
    write_atomically(path, json.dumps({"values": values, "errors": errors}).encode())
