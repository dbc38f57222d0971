"""Read what a training run has written so far, while it goes on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..training.callbacks import NO_SCORES
from ..training.run_folder import sample_pictures
from ..training.trained_weights import FINAL_FILES

METRICS = Path("logs") / "metrics.jsonl"
PREFERRED = (
    "train/loss",
    "rewards/accuracies",
    "reward",
    "validation/",
    "judge/",
    "online/",
    "change/chosen",
)
"""Metrics, or their beginnings, that are shown before anybody chooses."""

_NOT_FIRST = (*NO_SCORES, "online/ties")


@dataclass(frozen=True)
class RunState:
    """A run at one moment.

    Attributes:
        curves (`dict[str, list[tuple[int, float]]]`): Metric -> its (step, value).
        samples (`list[Path]`): Pictures of validation, the newest first.
        step (`int`): Step of the last entry.
        last_step (`int`, *optional*): Step at which the run ends, where it is known.
        age (`float`, *optional*): Seconds since the last entry.
        finished (`bool`): Whether the final weights are there.
        title (`str`): Method and model.
    """

    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    samples: list[Path] = field(default_factory=list)
    step: int = 0
    last_step: int | None = None
    age: float | None = None
    finished: bool = False
    title: str = ""

    def describe(self) -> str:
        """Return one line about the run."""
        if self.age is None:
            return f"{self.title}: nothing is logged yet."
        of = f" of {self.last_step}" if self.last_step else ""
        if self.finished:
            return f"{self.title}: finished at step {self.step}{of}."
        return f"{self.title}: step {self.step}{of}, last entry {duration(self.age)} ago."


class RunReader:
    """Follow the folder of a run.

    Only what was added since the last call is read. Several visitors may ask at once.

    Args:
        folder (`Path`): `train.output_dir` of the run. It may not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._size = 0
        self._rest = b""
        self._curves: dict[str, list[tuple[int, float]]] = {}

    def read(self) -> RunState:
        """Return the run as it is now."""
        with self._lock:
            return self._read()

    def _read(self) -> RunState:
        config = self._config()
        file = self.folder / METRICS
        try:
            status = file.stat()
        except OSError:
            self._forget()
            return RunState(title=self._title(config))
        if status.st_size < self._size:  # a run began anew, or went on from a checkpoint
            self._forget()
        with file.open("rb") as stream:
            stream.seek(self._size)
            content = stream.read()
        self._size += len(content)
        *lines, self._rest = (self._rest + content).split(b"\n")
        for line in lines:
            self._add(line)
        step = max((points[-1][0] for points in self._curves.values()), default=0)
        final = [self.folder / name for name in FINAL_FILES if (self.folder / name).is_file()]
        return RunState(
            curves={name: list(points) for name, points in self._curves.items()},
            samples=sample_pictures(self.folder),
            step=step,
            last_step=config.get("train", {}).get("max_steps"),
            age=max(0.0, time.time() - status.st_mtime),
            finished=any(path.stat().st_mtime >= status.st_mtime for path in final),
            title=self._title(config),
        )

    def _forget(self) -> None:
        self._size, self._rest, self._curves = 0, b"", {}

    def _add(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
        except ValueError:  # the last line of a killed run
            return
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            return
        for name, value in entry.items():
            if name != "step" and isinstance(value, (int, float)):
                points = self._curves.setdefault(name, [])
                if points and points[-1][0] >= entry["step"]:  # resumed from before
                    points[:] = [point for point in points if point[0] < entry["step"]]
                points.append((entry["step"], float(value)))

    def _config(self) -> dict[str, Any]:
        try:
            config = yaml.safe_load((self.folder / "config.yaml").read_text("utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        usable = isinstance(config, dict) and isinstance(config.get("train", {}), dict)
        return config if usable else {}

    def _title(self, config: dict[str, Any]) -> str:
        what = config.get("method") or ("reward" if config else "")
        model = config.get("model")
        name = f"**{self.folder.name}**"
        return f"{name} ({what} on {model})" if what and model else name


def duration(seconds: float) -> str:
    """Write a duration with one unit.

    Args:
        seconds (`float`): The duration.
    """
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def default_metrics(names: Sequence[str], count: int) -> list[str]:
    """Choose the metrics that most people look at first.

    Args:
        names (`Sequence[str]`): Metrics of the run.
        count (`int`): How many at most.
    """
    chosen: list[str] = []
    for start in PREFERRED:
        matches = [name for name in names if name == start]
        if start.endswith("/"):
            matches = [n for n in names if n.startswith(start) and n not in _NOT_FIRST]
        chosen += [name for name in matches[:2] if name not in chosen]
    return (chosen or list(names))[:count]


def find_runs(folders: Sequence[Path]) -> dict[str, Path]:
    """Name the runs of these folders, for a list on the page.

    Args:
        folders (`Sequence[Path]`): Folders of runs, or folders that hold such folders.

    Returns:
        `dict[str, Path]`: Name -> folder, the newest first.

    Raises:
        UserError: A folder is a file.
    """
    runs: list[Path] = []
    for folder in folders:
        if folder.is_file():
            raise UserError(f"--runs: {str(folder)!r} is a file; name the folder of a run")
        inside = sorted(path.parent for path in folder.glob("*/config.yaml"))
        is_run = (folder / "config.yaml").is_file() or not inside
        runs += [folder] if is_run else inside
    runs = sorted(dict.fromkeys(runs), key=_last_change, reverse=True)
    names = [run.name for run in runs]
    return {(run.name if names.count(run.name) == 1 else str(run)): run for run in runs}


def _last_change(folder: Path) -> float:
    for path in (folder / METRICS, folder / "config.yaml"):
        try:
            return path.stat().st_mtime
        except OSError:
            continue
    return 0.0
