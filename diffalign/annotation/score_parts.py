"""Scoring in chunks, shared among processes: each chunk's scores are a file named by everything they depend on, so that finished work is not done
again and nothing stale is read."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.files import write_atomically

if TYPE_CHECKING:
    from ..rewards.base import Scorer
    from ..rewards.panel import Panel
    from ..runtime.distributed import Processes
    from .score_source import Chunk, Record


@dataclass
class Table:
    """What was scored: one record per image, per scorer the values (NaN = missing) and why some are missing, and its fingerprint."""

    records: list[Record]
    columns: dict[str, list[float]]
    errors: dict[str, dict[int, str]]
    fingerprints: dict[str, str]


@dataclass
class ScoreWork:
    """The chunks of a source, and what is known of them."""

    panel: Panel
    source: Any
    chunks: list[range]
    parts: Path
    records: dict[int, list[Record]] = field(default_factory=dict)
    files: dict[tuple[str, int], str] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)

    def add(self, found: Any) -> None:
        """What one process found: (chunk, its records), or (column, fingerprint, {chunk: file})."""
        if len(found) == 2:
            self.records[found[0]] = found[1]
        else:
            name, self.fingerprints[name], files = found[0], found[1], found[2]
            self.files.update({(name, number): file for number, file in files.items()})

    def table(self) -> Table:
        """Everything, in the source's order."""
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


def score_share(work: ScoreWork, processes: Processes) -> list[Any]:
    """Scores this process's chunks, scorer by scorer; what `ScoreWork.add` takes."""
    from tqdm.auto import tqdm

    mine = range(processes.rank, len(work.chunks), processes.world)
    total = sum(len(work.chunks[number]) for number in mine)
    contents: dict[int, str] = {}
    found: list[Any] = []
    for entry in work.panel.entries:
        files: dict[int, str] = {}
        unit = "image" if work.source.kind in ("folder", "single") else "row"
        with (
            work.panel.using(entry.name) as scorer,
            tqdm(total=total, desc=entry.name, unit=unit, disable=processes.rank > 0) as bar,
        ):
            for number in mine:
                chunk = None
                if number not in contents:
                    chunk = work.source.read(work.chunks[number])
                    contents[number] = chunk.fingerprint()
                    found.append((number, chunk.records))
                files[number] = part_name(scorer, contents[number])
                if not is_finished(work.parts / files[number]):
                    chunk = chunk or work.source.read(work.chunks[number])
                    score_chunk(scorer, chunk, entry.on_error, work.parts / files[number])
                bar.update(len(work.chunks[number]))
            found.append((entry.name, scorer.fingerprint(), files))
    return found


def score_all(work: ScoreWork, processes: Processes) -> Table:
    """Scores everything, each process its share; all of them get the whole table.

    Raises:
        UserError: in the process that met the mistake.
    """
    for found in processes.gather(score_share(work, processes)):
        work.add(found)
    return work.table()


def part_name(scorer: Scorer, content: str) -> str:
    """The file of a chunk's scores."""
    digest = hashlib.sha256(f"{scorer.fingerprint()}:{content}".encode()).hexdigest()[:24]
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', scorer.name)}-{scorer.fingerprint()}-{digest}.json"


def is_finished(path: Path) -> bool:
    """Whether the chunk is scored; one with missing scores is tried again."""
    return path.is_file() and None not in json.loads(path.read_text("utf-8"))["values"]


def score_chunk(scorer: Scorer, chunk: Chunk, on_error: str, path: Path) -> None:
    """Scores a chunk and writes its file."""
    from ..rewards.model_scorer import ModelScorer

    if isinstance(scorer, ModelScorer):
        # Prompts are encoded in batches, and a batch's rounding depends on its size: remembered ones would make a chunk's last digits
        # depend on the chunks before it, and an interrupted run differ from one that was not.
        scorer._texts.clear()
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
    for given in chunk.inputs:
        given.release()
    write_atomically(path, json.dumps({"values": values, "errors": errors}).encode())
