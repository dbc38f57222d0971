"""``diffalign score``: a table of scores for a folder of images or a dataset, resumable, on any number of processes."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..exceptions import ConfigError, UserError

if TYPE_CHECKING:
    from .base import Scorer
    from .panel import Panel
    from .panel_config import RewardEntry
    from .score_source import Chunk, Record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--images", required=True, help="folder of images, or a dataset: Hub id, folder or file")
    parser.add_argument("--scorers", help="names with commas between, e.g. imagereward,pickscore")
    parser.add_argument("--config", type=Path, help="YAML with rewards: and combine: instead of --scorers")
    parser.add_argument("--prompts", type=Path, help="of a folder: one line per image in the order of names, or .json, .jsonl")
    parser.add_argument("--prompt", help="of a folder: one for all images")
    parser.add_argument("--split", default="train", help="of a dataset (default: train)")
    parser.add_argument("--columns", help="canonical names to your columns, e.g. '{prompt: text, chosen: good, rejected: bad}'")
    parser.add_argument("--output_dir", type=Path, default=Path("diffalign-scores"), help="default: diffalign-scores")
    parser.add_argument("--cache", type=Path, help="file that keeps scores across output folders")
    parser.add_argument("--batch_size", type=int, help="images per forward pass (default: the scorer's)")
    parser.add_argument("--chunk_size", type=int, default=256, help="images after which work is safe (default: 256)")
    parser.add_argument("--device", help="auto (default), cpu, cuda, cuda:1")
    parser.add_argument("--dtype", help="of the towers (default: float32, the reference)")
    parser.add_argument("--combine", help="how scorers are combined, e.g. winrate, zscore, weighted_sum")
    parser.add_argument("--placement", help="resident (default), offload, or exclusive: one scorer in memory at a time")
    parser.add_argument(
        "--on_error", choices=("raise", "nan"), help="an unreadable image stops (raise, default) or is missing (nan)"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="allow scorers of ./file.py:Class, which runs that file")
    parser.add_argument("--scorer_args", help="options by scorer, e.g. '{pickscore: {model: FOLDER}, mps: {threshold: 0.01}}'")


def run(options: argparse.Namespace) -> int:
    """Scores, and writes scores.parquet, errors.jsonl and summary.json into the output folder.

    Finished chunks lie in its `parts` folder under names made of the scorer's fingerprint and the content scored, so that an interrupted
    run goes on, another scorer can be added, and a changed image, prompt, weight or setting is scored anew.

    Raises:
        UserError: options, images, prompts or scorers that do not fit; an unreadable image under ``on_error=raise``.
    """
    for name in ("chunk_size", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name}", f"expected int >= 1, got {value}")
    config = panel_config(
        scorers=options.scorers,
        file=options.config,
        scorer_args=options.scorer_args,
        combine=options.combine,
        trust_remote_code=options.trust_remote_code,
        overrides={name: getattr(options, name) for name in ("batch_size", "dtype", "on_error")},
    )
    config |= {name: getattr(options, name) for name in ("placement", "cache") if getattr(options, name) is not None}
    processes = Processes.start(options.device)
    from .panel import Panel
    from .registry import get_spec
    from .score_report import write_report
    from .score_source import open_images

    source = open_images(
        options.images,
        prompt=options.prompt,
        prompts=options.prompts,
        split=options.split,
        columns=_mapping(options.columns, "--columns", "{prompt: text}"),
        skip_broken=options.on_error == "nan",
    )
    entries: list[RewardEntry] = config["rewards"]
    specs = [get_spec(entry.scorer, trust_remote_code=options.trust_remote_code) for entry in entries]
    source.check(*([s.key for s in specs if need in s.requires] for need in ("prompt", "metadata")))
    if options.output_dir.resolve().is_relative_to(Path(options.images).expanduser().resolve()):
        raise UserError(f"--output_dir: {str(options.output_dir)!r} lies inside --images; name a folder elsewhere")
    (options.output_dir / "parts").mkdir(parents=True, exist_ok=True)
    panel = Panel.from_config(config, device=processes.device, trust_remote_code=options.trust_remote_code)
    work = _Work(panel, source, source.chunks(options.chunk_size), options.output_dir / "parts")
    try:
        mine = _score_share(work, processes)
    except UserError as error:
        processes.say(error)
        raise
    for found in processes.gather(mine):
        work.add(found)
    processes.stop()
    if processes.rank == 0:
        print(write_report(work.table(), panel, source, options.output_dir, combine_asked="combine" in config))
    return 0


# Options


def panel_config(
    *,
    scorers: str | None,
    file: Path | None,
    file_option: str = "--config",
    scorer_args: str | None = None,
    combine: str | None = None,
    trust_remote_code: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `Panel.from_config` takes, from the options of a command: its rewards as entries with the command line's options in them.

    Args:
        scorers: names with commas between; or
        file: YAML with `rewards` and `combine`, given as the option `file_option`.
        scorer_args: YAML, options by scorer.
        combine: method.
        overrides: `on_error`, and `batch_size` and `dtype` for entries without their own.

    Raises:
        UserError: both or neither are given, or anything in them does not fit.
    """
    from ..config import build_section
    from .panel_config import RewardEntry, parse_rewards
    from .score_report import COLUMNS

    if (scorers is None) == (file is None):
        raise UserError(f"--scorers, {file_option}: give one of them, e.g. --scorers imagereward,pickscore")
    given = scorers if file is None else _read(file, file_option)
    overrides = overrides or {}
    config: dict[str, Any] = dict(given) if isinstance(given, Mapping) and "rewards" in given else {"rewards": given}
    entries = parse_rewards(config["rewards"], trust_remote_code=trust_remote_code)
    extra = _mapping(scorer_args, "--scorer_args", "{pickscore: {model: FOLDER}}") or {}
    for name in extra:
        if name not in [entry.name for entry in entries]:
            raise ConfigError(f"--scorer_args.{name}", f"no such scorer; there are {', '.join(entry.name for entry in entries)}")
    fields = {f.name for f in dataclasses.fields(RewardEntry)} - {"name", "scorer"}
    for i, entry in enumerate(entries):
        if entry.name in COLUMNS:
            raise ConfigError(f"rewards[{i}].name", f"{entry.name!r} is a column of the output; choose another name")
        own = extra.get(entry.name) or {}
        if not isinstance(own, Mapping):
            raise ConfigError(f"--scorer_args.{entry.name}", f"expected a mapping of options, got {own!r}")
        values = {f: getattr(entry, f) for f in ("name", "scorer", *fields)}
        values |= {key: value for key, value in own.items() if key in fields}
        values["args"] = {
            **entry.args,
            **{key: value for key, value in own.items() if key not in fields},
            **(own.get("args") or {}),
        }
        for key in ("batch_size", "dtype"):
            values[key] = overrides.get(key) if values[key] is None else values[key]
        values["on_error"] = overrides.get("on_error") or values["on_error"]
        entries[i] = build_section(RewardEntry, values, f"--scorer_args.{entry.name}")
    config["rewards"] = entries
    if combine is not None:
        rule = config.get("combine") or {}
        config["combine"] = {**({"method": rule} if isinstance(rule, str) else rule), "method": combine}
    return config


def _read(path: Path, option: str) -> Any:
    if not path.is_file():
        raise UserError(f"{option}: there is no file {str(path)!r}")
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{option}: {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not values:
        raise UserError(f"{option}: {path} is empty; write for example rewards: [imagereward, pickscore]")
    return values


def _mapping(text: str | None, option: str, example: str) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{option}: expected a mapping such as '{example}', got {text!r}")
    return value


# Processes


@dataclass
class Processes:
    """This process among those of torchrun or accelerate; alone where there are none."""

    rank: int
    world: int
    device: Any
    state: Any = None

    @classmethod
    def start(cls, device: Any) -> Processes:
        """Joins the others."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(0, 1, device)
        from datetime import timedelta

        import torch
        from accelerate import PartialState

        # Started by torchrun on a machine without accelerators, accelerate would let every process work for itself.
        on_cpu = device == "cpu" or not torch.accelerator.is_available()
        # A process whose share was scored before waits for the others at the end, however long they need.
        state = PartialState(cpu=on_cpu, timeout=timedelta(days=30))
        return cls(state.process_index, state.num_processes, str(state.device), state)

    def gather(self, mine: list[Any]) -> list[Any]:
        """The items of all processes, in the order of their ranks."""
        if self.world == 1:
            return mine
        from accelerate.utils import gather_object

        return gather_object(mine)

    def wait(self) -> None:
        """For all processes to come here."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def say(self, error: UserError) -> None:
        """The command line lets only the first process speak; a mistake that another one met must be read too."""
        if self.rank > 0:
            print(f"diffalign: process {self.rank}: {error}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Leaves the others."""
        if self.state is not None:
            self.state.destroy_process_group()


# Work


@dataclass
class Table:
    """What was scored: one record per image, per scorer the values (NaN = missing) and why some are missing, and its fingerprint."""

    records: list[Record]
    columns: dict[str, list[float]]
    errors: dict[str, dict[int, str]]
    fingerprints: dict[str, str]


@dataclass
class _Work:
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
                columns[name] += [float("nan") if value is None else value for value in part["values"]]
        return Table(records, columns, errors, self.fingerprints)


def _score_share(work: _Work, processes: Processes) -> list[Any]:
    """Scores this process's chunks, scorer by scorer; what `_Work.add` takes."""
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
                files[number] = _part_name(scorer, contents[number])
                if not _finished(work.parts / files[number]):
                    chunk = chunk or work.source.read(work.chunks[number])
                    _score_chunk(scorer, chunk, entry.on_error, work.parts / files[number])
                bar.update(len(work.chunks[number]))
            found.append((entry.name, scorer.fingerprint(), files))
    return found


def _part_name(scorer: Scorer, content: str) -> str:
    digest = hashlib.sha256(f"{scorer.fingerprint()}:{content}".encode()).hexdigest()[:24]
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', scorer.name)}-{scorer.fingerprint()}-{digest}.json"


def _finished(path: Path) -> bool:
    """Whether the chunk is scored; one with missing scores is tried again."""
    return path.is_file() and None not in json.loads(path.read_text("utf-8"))["values"]


def _score_chunk(scorer: Scorer, chunk: Chunk, on_error: str, path: Path) -> None:
    from .model_scorer import ModelScorer

    if isinstance(scorer, ModelScorer):
        # Prompts are encoded in batches, and a batch's rounding depends on its size: remembered ones would make a chunk's last digits
        # depend on the chunks before it, and an interrupted run differ from one that was not.
        scorer._texts.clear()
    prompts = [record.prompt for record in chunk.records]
    texts = prompts if "prompt" in scorer.spec.requires else None
    metadata = chunk.metadata if "metadata" in scorer.spec.requires else None
    result = scorer.score(chunk.inputs, texts, metadata, on_error=on_error)  # type: ignore[arg-type]
    values = [None if value != value else value for value in result.values.tolist()]
    errors = {str(i): result.errors.get(i, "the scorer gave no number") for i, value in enumerate(values) if value is None}
    for given in chunk.inputs:
        given.release()
    write_atomically(path, json.dumps({"values": values, "errors": errors}).encode())


def write_atomically(path: Path, content: bytes) -> None:
    """A file that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
