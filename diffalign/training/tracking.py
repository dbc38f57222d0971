"""Collects per-group metrics over a logging window, averages them over processes, writes them to disk and to trackers."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from ..runtime.files import write_atomically
from .config import TrainingConfig


def _precision(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


class MetricWindow:
    """Sums of per-group values since the last log. NaN entries do not count: a metric of a timestep third is averaged over the
    pairs that fell into it, on all processes."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        for name, values in metrics.items():
            values = values.detach().flatten().to(_precision(values.device))
            finite = ~values.isnan()
            total, count = (
                values.nan_to_num(0.0, math.inf, -math.inf).sum(),
                finite.sum().to(values.dtype),
            )
            self.sums[name] = self.sums[name] + total if name in self.sums else total
            self.counts[name] = self.counts[name] + count if name in self.counts else count

    def dump(self, accelerator: Accelerator) -> dict[str, list[float]]:
        """[sum, count] of every metric over all processes, for a checkpoint. All processes must call this."""
        names, total = self._total(accelerator)
        return {name: row.tolist() for name, row in zip(names, total, strict=True)}

    def restore(self, values: dict[str, list[float]], accelerator: Accelerator) -> None:
        """Takes back what `dump` gave: on the main process, the others start from nothing."""
        if accelerator.is_main_process:
            device = accelerator.device
            for name, (total, count) in values.items():
                self.sums[name] = torch.tensor(total, dtype=_precision(device), device=device)
                self.counts[name] = torch.tensor(count, dtype=_precision(device), device=device)

    def _total(self, accelerator: Accelerator) -> tuple[list[str], Tensor]:
        names = sorted(self.sums)
        if accelerator.num_processes > 1:
            names = sorted(
                set(gather_object(names))
            )  # a process may have had no row, or no round of samples, in this window
        if not names:
            return [], torch.empty(0, 2)
        device = accelerator.device
        none = torch.zeros((), dtype=_precision(device), device=device)
        columns = [
            torch.stack([sums.get(n, none).to(device) for n in names])
            for sums in (self.sums, self.counts)
        ]
        stacked = torch.stack(columns, dim=1)
        return names, accelerator.reduce(stacked, reduction="sum").cpu()

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over the window and over processes; empties the window. All processes must call this."""
        names, total = self._total(accelerator)
        self.sums, self.counts = {}, {}
        return {
            n: (float(s / c) if c else math.nan) for n, (s, c) in zip(names, total, strict=True)
        }


class MetricLog:
    """``logs/metrics.jsonl`` and the trackers. A resumed run continues the file from the checkpoint's step."""

    def __init__(self, accelerator: Accelerator, output_dir: Path) -> None:
        self.accelerator, self.path = accelerator, output_dir / "logs" / "metrics.jsonl"

    def start(self, step: int, undone: tuple[str, ...] = ()) -> list[dict[str, float]]:
        """Keeps the entries up to `step` and returns them, to all processes; what an interrupted run logged after its checkpoint is dropped."""
        kept = [self._cut(step, undone) if self.accelerator.is_main_process else []]
        broadcast_object_list(kept)
        return kept[0]

    def _cut(self, step: int, undone: tuple[str, ...]) -> list[dict[str, float]]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if step and self.path.is_file():
            for line in self.path.read_bytes().split(b"\n"):
                try:
                    entry = json.loads(line)
                except ValueError:  # the last line of a killed run; UnicodeDecodeError is one too
                    continue
                at = entry.get("step") if isinstance(entry, dict) else None
                if not isinstance(at, int) or at > step:
                    continue
                if (
                    at == step
                    and undone
                    and all(name == "step" or name.startswith(undone) for name in entry)
                ):
                    continue  # made up for
                kept.append(entry)
        write_atomically(self.path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
        return kept

    def write(self, metrics: dict[str, float], step: int) -> None:
        finite = {name: value for name, value in metrics.items() if not math.isnan(value)}
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **finite}) + "\n")
        self.accelerator.log(finite, step=step)

    def images(self, name: str, image: Any, step: int) -> None:
        """A PIL image to every tracker that can show one."""
        import numpy as np

        for tracker in self.accelerator.trackers:
            if tracker.name == "trackio":
                import trackio

                trackio.log({name: trackio.Image(np.asarray(image))}, step=step)
            elif hasattr(tracker, "log_images"):
                payload = [image] if tracker.name == "wandb" else np.asarray(image)[None]
                tracker.log_images({name: payload}, step=step)


def tracker_config(args: TrainingConfig) -> dict[str, Any]:
    """Plain values: tensorboard takes nothing else."""
    return {
        k: v if isinstance(v, (int, float, str, bool)) else str(v)
        for k, v in dataclasses.asdict(args).items()
    }


def tracker_options(args: TrainingConfig) -> dict[str, Any]:
    return (
        {args.report_to: {"name": args.run_name}}
        if args.run_name and args.report_to in ("wandb", "trackio")
        else {}
    )
