"""Average metrics over steps and processes, and write them to disk and to trackers."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from ..config.ranges import suggestion
from ..errors import ConfigError, one_line
from ..runtime.files import write_atomically
from .loop_config import LoopConfig


def _precision(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


class MetricWindow:
    """Collects the metrics since the last log.

    NaN does not count. A metric of one third of the times is the average over the pairs
    in that third, on all processes.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add the metrics of some groups.

        Args:
            metrics (`dict[str, Tensor]`): Values of any shape. NaN does not count.
        """
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
        """Return sum and count of every metric over all processes, for a checkpoint.

        All processes must call this.

        Args:
            accelerator (`Accelerator`): Sums over the processes.
        """
        names, total = self._total(accelerator)
        return {name: row.tolist() for name, row in zip(names, total, strict=True)}

    def restore(self, values: dict[str, list[float]], accelerator: Accelerator) -> None:
        """Restore what `dump` returned. The other processes start from zero.

        Args:
            values (`dict[str, list[float]]`): Sum and count of every metric.
            accelerator (`Accelerator`): Processes of the run.
        """
        if accelerator.is_main_process:
            device = accelerator.device
            for name, (total, count) in values.items():
                self.sums[name] = torch.tensor(total, dtype=_precision(device), device=device)
                self.counts[name] = torch.tensor(count, dtype=_precision(device), device=device)

    def _total(self, accelerator: Accelerator) -> tuple[list[str], Tensor]:
        names = sorted(self.sums)
        if accelerator.num_processes > 1:
            # A process may have had no row or no round of samples in this window.
            names = sorted(set(gather_object(names)))
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
        """Return the averages over all processes, and start anew.

        All processes must call this.

        Args:
            accelerator (`Accelerator`): Sums over the processes.

        Returns:
            `dict[str, float]`: NaN for a metric without values.
        """
        names, total = self._total(accelerator)
        self.sums, self.counts = {}, {}
        return {
            n: (float(s / c) if c else math.nan) for n, (s, c) in zip(names, total, strict=True)
        }


class MetricLog:
    """Writes metrics to `logs/metrics.jsonl` and to the trackers.

    Args:
        accelerator (`Accelerator`): Holds the trackers.
        output_dir (`Path`): Folder of the run.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path) -> None:
        self.accelerator, self.path = accelerator, output_dir / "logs" / "metrics.jsonl"

    def start(self, step: int, undone: tuple[str, ...] = ()) -> list[dict[str, float]]:
        """Prepare the file, and drop what a killed run logged after its checkpoint.

        Args:
            step (`int`): Step of the checkpoint. 0 for a new run.
            undone (`tuple[str, ...]`, *optional*, defaults to `()`): Prefixes of
                metrics of this step that will be computed again.

        Returns:
            `list[dict[str, float]]`: The remaining entries, on all processes.
        """
        history = [self._cut(step, undone) if self.accelerator.is_main_process else []]
        broadcast_object_list(history)
        return history[0]

    def _cut(self, step: int, undone: tuple[str, ...]) -> list[dict[str, float]]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        history = []
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
                    continue  # computed again
                history.append(entry)
        write_atomically(self.path, "".join(json.dumps(entry) + "\n" for entry in history).encode())
        return history

    def write(self, metrics: dict[str, float], step: int) -> None:
        """Write metrics to the file and to the trackers. NaN is left out.

        Args:
            metrics (`dict[str, float]`): The metrics.
            step (`int`): Optimizer step.
        """
        finite = {name: value for name, value in metrics.items() if not math.isnan(value)}
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **finite}) + "\n")
        self._send(lambda tracker: tracker.log(finite, step=step))

    def _send(self, send: Callable[[Any], None]) -> None:
        """Give something to every tracker. One that fails is left out from then on."""
        if not self.accelerator.is_main_process:
            return
        for tracker in list(self.accelerator.trackers):
            try:
                send(tracker)
            except Exception as error:  # of any library, a network's for instance
                self.accelerator.trackers.remove(tracker)
                warnings.warn(
                    f"train.report_to: {tracker.name} failed ({one_line(error)}); the run goes on "
                    f"without it, and the metrics are in {self.path}",
                    stacklevel=2,
                )

    def images(self, name: str, image: Any, step: int) -> None:
        """Send an image to every tracker that can show one.

        Args:
            name (`str`): Name in the tracker.
            image (`PIL.Image.Image`): The image.
            step (`int`): Optimizer step.
        """
        import numpy as np

        def send(tracker: Any) -> None:
            if tracker.name == "trackio":
                import trackio

                trackio.log({name: trackio.Image(np.asarray(image))}, step=step)
            elif hasattr(tracker, "log_images"):
                payload = [image] if tracker.name == "wandb" else np.asarray(image)[None]
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: payload}, step=step, **layout)

        self._send(send)


def tracker_config(args: LoopConfig) -> dict[str, Any]:
    """Return the config as plain values, because tensorboard takes no others."""
    return {
        k: v if isinstance(v, (int, float, str, bool)) else str(v)
        for k, v in dataclasses.asdict(args).items()
    }


def tracker_options(args: LoopConfig) -> dict[str, Any]:
    """Return the options that give a tracker's run its name."""
    return (
        {args.report_to: {"name": args.run_name}}
        if args.run_name and args.report_to in ("wandb", "trackio")
        else {}
    )


def start_trackers(accelerator: Accelerator, args: LoopConfig) -> None:
    """Start the tracker that `report_to` names.

    Args:
        accelerator (`Accelerator`): Processes of the run.
        args (`LoopConfig`): Settings of the run.

    Raises:
        ConfigError: The tracker cannot be started.
    """
    if args.report_to == "none":
        return
    try:
        accelerator.init_trackers(
            args.project, config=tracker_config(args), init_kwargs=tracker_options(args)
        )
    except Exception as error:  # of any library: no login, no server
        raise ConfigError(
            "train.report_to", f"{args.report_to} could not start ({one_line(error)})"
        ) from error


def finish_trackers(accelerator: Accelerator) -> None:
    """End the trackers. One that fails loses what it had not sent, and nothing else.

    Args:
        accelerator (`Accelerator`): Processes of the run.
    """
    for tracker in accelerator.trackers:
        try:
            tracker.finish()
        except Exception as error:
            warnings.warn(
                f"train.report_to: {tracker.name} failed at the end ({one_line(error)})",
                stacklevel=2,
            )
    accelerator.trackers = []


def check_tracker(name: str) -> None:
    """Refuse a tracker that is not installed, before weights are loaded.

    Args:
        name (`str`): `train.report_to`.

    Raises:
        ConfigError: There is no such tracker, or its package is missing.
    """
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    names = sorted(str(each.value) for each in LoggerType)
    if name == "none":
        return
    if name not in names:
        raise ConfigError(
            "train.report_to",
            f"expected one of none, {', '.join(names)}, got {name!r}{suggestion(name, names)}",
        )
    if name != "all" and name not in [str(each.value) for each in get_available_trackers()]:
        raise ConfigError(
            "train.report_to", f"{name} is not installed; pip install {name}, or set it to none"
        )
