"""Checkpoints of a run: written whole or not at all, and readable by plain diffusers.

A folder `checkpoint-<step>` holds:

- what accelerate saves: optimizer, scaler and random states
- weights for inference: a LoRA file, or the network's folder for full fine-tuning
- the average of the weights, if there is one
- `trainer_state.json`: the run's position and identity, and the size of every file
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.nn import Module

from ..errors import UserError, one_line
from ..runtime.distributed import copy_whole, local_part, whole
from ..runtime.files import save_tensors, write_atomically
from .build import trainable_parameters
from .callbacks import TrainerState
from .sharding import check_state, is_fsdp, load_optimizer, save_optimizer, without_weights
from .trained_weights import FullWeights, TrainedWeights

_NAME = re.compile(r"^checkpoint-(\d+)$")
_TEMPORARY = ".tmp-checkpoint-"
STATE_FILE = "trainer_state.json"
DONE_FILE = "done.json"
_LATER_FACTS = (
    "lora_form",
    "start_lora",
    "reference",
    "autoencoder",
    "scheduler",
    "text_encoders",
    "precision",
    "sampler_rule",
    "data_seed",
    "optimizer",
)
EMA_FILE = "ema.safetensors"


class NonFiniteWeights(RuntimeError):
    """Weights are NaN or infinite, so they are not saved.

    The message names the last good checkpoint.
    """


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. The message says which checkpoint is left."""


def checkpoint_step(path: Path) -> int:
    """Return the step in a checkpoint's folder name, or -1 for any other name."""
    match = _NAME.match(path.name)
    return int(match.group(1)) if match else -1


def list_checkpoints(output_dir: Path) -> list[Path]:
    """List the complete checkpoints of a run, oldest first.

    A folder gets its name when everything in it is written.

    Args:
        output_dir (`Path`): Folder of the run.
    """
    checkpoints = [
        p
        for p in output_dir.glob("checkpoint-*")
        if _NAME.match(p.name) and (p / STATE_FILE).is_file()
    ]
    return sorted(checkpoints, key=checkpoint_step)


def find_checkpoint(output_dir: Path, request: str) -> Path:
    """Find the checkpoint to resume from.

    Args:
        output_dir (`Path`): Folder of the run.
        request (`str`): `latest`, a path, or a name in the folder of the run.

    Raises:
        UserError: There is none, or the path is no checkpoint.
    """
    if request == "latest":
        checkpoints = list_checkpoints(output_dir)
        if not checkpoints:
            raise UserError(
                f"train.resume_from_checkpoint: {str(output_dir)!r} holds no checkpoint to "
                "resume; leave the option out to start"
            )
        return checkpoints[-1]
    path = Path(request)
    if not (path / STATE_FILE).is_file():
        inside = output_dir / request
        if (inside / STATE_FILE).is_file():
            return inside
        raise UserError(
            f"train.resume_from_checkpoint: {request!r} is no checkpoint of diffalign (it "
            f"has no {STATE_FILE})"
        )
    return path


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether all values are finite, with one wait per device.

    Args:
        tensors (`Iterable[Tensor]`): Any shapes and devices.
    """
    answers: dict[torch.device, Tensor] = {}
    for tensor in tensors:
        finite = torch.isfinite(tensor.detach()).all()
        answers[tensor.device] = (
            finite if tensor.device not in answers else answers[tensor.device] & finite
        )
    return all(bool(answer) for answer in answers.values())


@contextlib.contextmanager
def _without_optimizers(accelerator: Accelerator) -> Iterator[None]:
    """Hide the optimizers from accelerate while it loads a checkpoint."""
    optimizers, accelerator._optimizers = accelerator._optimizers, []
    try:
        yield
    finally:
        accelerator._optimizers = optimizers


def check_archives(folder: Path, names: Iterable[str]) -> None:
    """Compare the checksums in files of `torch.save`. torch does not check them.

    Args:
        folder (`Path`): Folder of the checkpoint.
        names (`Iterable[str]`): Files in it. Other formats are skipped.

    Raises:
        UserError: A file is damaged.
    """
    import zipfile

    for name in names:
        with (folder / name).open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                continue
        try:
            with zipfile.ZipFile(folder / name) as archive:
                damaged = archive.testzip()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            damaged = str(error)
        if damaged is not None:
            raise UserError(
                f"{folder} is damaged: {name} has a wrong checksum ({damaged}); resume from "
                "an earlier checkpoint"
            )


def read_state(values: Any) -> TrainerState:
    """Read the position of a run from a checkpoint's plain values.

    Args:
        values (`dict`): Part `state` of the state file.

    Raises:
        ValueError, TypeError: No trainer wrote these values.
    """
    state = TrainerState(**values)
    if not {"global_step", "samples_seen", "epoch"} <= set(values):
        raise ValueError("the run's position is missing")
    for name in ("global_step", "samples_seen", "max_steps"):
        value = getattr(state, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} is {value!r}")
    return state


@runtime_checkable
class CheckpointPart(Protocol):
    """Something else that belongs to a run and is saved in every checkpoint."""

    def save(self, folder: Path, rank: int) -> None:
        """Write the part of process `rank` into a checkpoint's folder."""

    def load(self, folder: Path, rank: int, device: torch.device) -> None:
        """Read the part of process `rank` from a checkpoint's folder."""


class CheckpointManager:
    """Saves and loads the checkpoints of one run.

    Args:
        accelerator (`Accelerator`): Holds the prepared network and optimizer.
        network: The network as it was before accelerate prepared it.
        prepared: The network as accelerate prepared it.
        trained (`TrainedWeights`): Writes and reads what trains.
        output_dir (`Path`): Folder of the run.
        limit (`int`, *optional*): Newest checkpoints to keep. None keeps all.
        identity (`dict[str, Any]`): Method, model, data and settings. Only a run with
            the same values resumes a checkpoint.
        ema (`EMAModel`, *optional*): Average of the weights.

    Attributes:
        parts (`list[CheckpointPart]`): What else to save.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        network: Any,
        prepared: Module,
        trained: TrainedWeights,
        output_dir: Path,
        limit: int | None,
        identity: dict[str, Any],
        ema: Any = None,
    ) -> None:
        self.accelerator, self.network = accelerator, network
        self.prepared, self.trained = prepared, trained
        self.output_dir, self.limit, self.identity, self.ema = output_dir, limit, identity, ema
        self.parts: list[CheckpointPart] = []
        accelerator.register_save_state_pre_hook(self._save_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)

    def _save_weights(
        self, models: list[Any], weights: list[dict[str, Tensor]], output_dir: str
    ) -> None:
        # What accelerate gathered of a whole network is not gathered twice.
        state = weights[0] if weights else None
        weights.clear()
        if state is None or not isinstance(self.trained, FullWeights):
            state = self.trained.gather(self.accelerator, self.prepared)
        if self.accelerator.is_main_process:
            self.trained.write_checkpoint(Path(output_dir), state)

    def _load_weights(self, models: list[Any], input_dir: str) -> None:
        self.trained.read_checkpoint(Path(input_dir))
        models.clear()

    def check_weights(self, step: int) -> None:
        """Check the weights before they replace good ones. All processes hold the same.

        Args:
            step (`int`): Optimizer step, for the message.

        Raises:
            NonFiniteWeights: A weight is not finite.
        """
        shadow = [] if self.ema is None else self.ema.shadow_params
        if self._all_finite([*trainable_parameters(self.network), *shadow]):
            return
        checkpoints = list_checkpoints(self.output_dir)
        survives = (
            f"the last checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint"
        )
        raise NonFiniteWeights(
            f"step {step}: the weights are not finite, so they are not saved; {survives}; "
            "lower train.learning_rate"
        )

    def _all_finite(self, tensors: Iterable[Tensor]) -> bool:
        """Whether all values are finite. Processes with other shards agree."""
        finite = all_finite(local_part(tensor)[0] for tensor in tensors)
        if not is_fsdp(self.accelerator):
            return finite
        broken = torch.tensor([0.0 if finite else 1.0], device=self.accelerator.device)
        return float(self.accelerator.reduce(broken, reduction="sum")) == 0

    def take_over(self, checkpoint: Path | None, state: TrainerState) -> list[str]:
        """Prepare the folder of the run for going on from a checkpoint in it.

        Args:
            checkpoint (`Path`, *optional*): The checkpoint that was loaded. One of
                another folder, or None, changes nothing.
            state (`TrainerState`): Its position.

        Returns:
            `list[str]`: Work of its step that is not done.
        """
        if checkpoint is None or checkpoint.resolve().parent != self.output_dir.resolve():
            return []
        undone = self.undone(checkpoint, state.due)
        self.retire_later(state.global_step)
        return undone

    def undone(self, folder: Path, due: list[str]) -> list[str]:
        """List the work of a checkpoint's step that a killed run did not finish.

        Args:
            folder (`Path`): The checkpoint.
            due (`list[str]`): Work of its step.

        Returns:
            `list[str]`: The same on all processes.
        """
        shared: list[Any] = [None]
        if self.accelerator.is_main_process:
            done = self._done(folder)
            shared = [[name for name in due if name not in done]]
        broadcast_object_list(shared)
        return shared[0]

    def mark_done(self, folder: Path, name: str) -> None:
        """Note beside a checkpoint that some work of its step is done.

        Args:
            folder (`Path`): The checkpoint.
            name (`str`): The work.
        """
        if self.accelerator.is_main_process and folder.is_dir():
            write_atomically(folder / DONE_FILE, json.dumps([*self._done(folder), name]).encode())

    def _done(self, folder: Path) -> list[str]:
        try:
            names = json.loads((folder / DONE_FILE).read_text("utf-8"))
        except (OSError, ValueError):
            return []
        return [str(name) for name in names] if isinstance(names, list) else []

    def retire_later(self, step: int) -> None:
        """Rename the checkpoints after `step`, from which the run goes on.

        The run will write its own checkpoints, and `latest` must find those.

        Args:
            step (`int`): Step of the resumed checkpoint.
        """
        if self.accelerator.is_main_process:
            for path in list_checkpoints(self.output_dir):
                if int(path.name.rpartition("-")[2]) > step:
                    retired = path.with_name(f"abandoned-{path.name}")
                    shutil.rmtree(retired, ignore_errors=True)
                    os.replace(path, retired)
                    self.accelerator.print(
                        f"{path.name} is of a later step than this run goes on from; it is "
                        f"now {retired.name}"
                    )
        self.accelerator.wait_for_everyone()

    def clean(self) -> None:
        """Remove the unfinished checkpoints of a killed run."""
        if self.accelerator.is_main_process:
            for path in self.output_dir.glob(f"{_TEMPORARY}*"):
                shutil.rmtree(path, ignore_errors=True)

    def save(self, state: TrainerState) -> Path:
        """Write a checkpoint, then remove the oldest ones beyond the limit.

        All processes must call this.

        Args:
            state (`TrainerState`): Position of the run.

        Returns:
            `Path`: Folder of the checkpoint.

        Raises:
            NonFiniteWeights: A weight is not finite.
            CheckpointError: Writing failed, for example because the disk is full. The
                earlier checkpoints are unchanged.
        """
        self.check_weights(state.global_step)
        final = self.output_dir / f"checkpoint-{state.global_step}"
        temporary = self.output_dir / f"{_TEMPORARY}{state.global_step}"
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            with without_weights(self.accelerator):
                self.accelerator.save_state(str(temporary))
            save_optimizer(self.accelerator, self.prepared, temporary)
            self._save_ema(temporary, main)
            for part in self.parts:
                part.save(temporary, self.accelerator.process_index)
            self.accelerator.wait_for_everyone()
            if main:
                self._seal(temporary, state)
                shutil.rmtree(final, ignore_errors=True)
                os.replace(temporary, final)
        except Exception as error:  # safetensors and torch wrap an OSError
            shutil.rmtree(temporary, ignore_errors=True)
            checkpoints = list_checkpoints(self.output_dir)
            survives = (
                f"the last complete checkpoint is {checkpoints[-1]}"
                if checkpoints
                else "there is no earlier checkpoint"
            )
            reason = one_line(error)
            raise CheckpointError(
                f"checkpoint-{state.global_step} could not be written ({reason}); {survives}"
            ) from error
        if main and self.limit is not None:
            for old in list_checkpoints(self.output_dir)[: -self.limit]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
        return final

    def _save_ema(self, folder: Path, main: bool) -> None:
        if self.ema is None:
            return
        device = self.accelerator.device  # offloaded shards cannot be gathered by NCCL
        tensors = {
            f"{i:05d}": whole(p.detach().to(device)).cpu().contiguous()
            for i, p in enumerate(self.ema.shadow_params)
        }
        if main:
            save_tensors(tensors, folder / EMA_FILE)

    def _seal(self, folder: Path, state: TrainerState) -> None:
        """Write the state file, then flush everything to the disk.

        After a power cut a folder must not look complete and hold empty files.
        """
        files = {
            str(p.relative_to(folder)): p.stat().st_size
            for p in sorted(folder.rglob("*"))
            if p.is_file()
        }
        values = dataclasses.asdict(state)
        values.pop("log_history")
        record = {"state": values, "identity": self.identity, "files": files}
        if self.ema is not None:
            record["ema_steps"] = self.ema.optimization_step
        write_atomically(folder / STATE_FILE, (json.dumps(record, indent=2) + "\n").encode())
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())

    def load(self, folder: Path, force: bool) -> TrainerState:
        """Restore weights, optimizer and random states from a checkpoint.

        Args:
            folder (`Path`): The checkpoint.
            force (`bool`): Accept a checkpoint of another run.

        Returns:
            `TrainerState`: Position of the run. The caller moves the data there.

        Raises:
            UserError: The checkpoint is damaged, or it belongs to another run.
        """
        record = self.check(folder, force)
        try:
            random_states = [f"random_states_{self.accelerator.process_index}.pkl"]
            names = (
                record["files"]
                if self.accelerator.is_main_process
                else [name for name in random_states if name in record["files"]]
            )
            check_archives(folder, names)
            self._check_random_state(folder, record["files"])
            check_state(self.accelerator, folder)
            same = self._has_this_optimizer(record)
            hidden = contextlib.nullcontext() if same else _without_optimizers(self.accelerator)
            with without_weights(self.accelerator), hidden:
                self.accelerator.load_state(str(folder))
            if same:
                load_optimizer(self.accelerator, self.prepared, folder)
            if self.ema is not None:
                self._load_ema(folder, record)
            elif (folder / EMA_FILE).is_file():
                self.accelerator.print(
                    f"train.use_ema: {folder} holds an average of the weights, which is dropped"
                )
            for part in self.parts:
                part.load(folder, self.accelerator.process_index, self.accelerator.device)
        except UserError:
            raise
        except Exception as error:
            reason = one_line(error)
            raise UserError(
                f"{folder} cannot be read ({reason}); resume from an earlier checkpoint"
            ) from error
        if not self._all_finite(trainable_parameters(self.network)):
            raise UserError(
                f"{folder} holds weights that are not finite; resume from an earlier checkpoint"
            )
        return record["state"]

    def _has_this_optimizer(self, record: dict[str, Any]) -> bool:
        """Whether a checkpoint's optimizer state is of the run's optimizer.

        It can be another one only with `force_resume`.
        """
        before = record["identity"].get("optimizer")
        mine = self.identity.get("optimizer")
        if before is None or before == mine:
            return True
        self.accelerator.print(f"the state of {before} is dropped; {mine} starts anew")
        return False

    def _check_random_state(self, folder: Path, files: dict[str, int]) -> None:
        """Raise `UserError` for a damaged file. accelerate would hide the error."""
        from accelerate.utils.other import load

        name = f"random_states_{self.accelerator.process_index}.pkl"
        if name not in files:
            self.accelerator.print(
                f"{folder} has no random states of process {self.accelerator.process_index}; "
                "they start anew"
            )
            return
        try:
            if not {"random_state", "numpy_random_seed", "torch_manual_seed"} <= set(
                load(folder / name)
            ):
                raise ValueError("a state is missing")
        except Exception as error:
            reason = one_line(error, 100)
            raise UserError(
                f"{folder} is damaged: the random state {name} cannot be read ({reason}); "
                "resume from an earlier checkpoint"
            ) from error

    def _load_ema(self, folder: Path, record: dict[str, Any]) -> None:
        from safetensors.torch import load_file

        if not (folder / EMA_FILE).is_file():
            raise UserError(
                f"train.use_ema: {folder} holds no average of the weights; resume without use_ema"
            )
        saved = load_file(folder / EMA_FILE)
        for i, shadow in enumerate(self.ema.shadow_params):
            copy_whole(shadow.data, saved[f"{i:05d}"])
        self.ema.optimization_step = record["ema_steps"]

    def check(self, folder: Path, force: bool) -> dict[str, Any]:
        """Check a checkpoint's state file, file sizes and identity before loading it.

        Args:
            folder (`Path`): The checkpoint.
            force (`bool`): Accept a checkpoint of another run.

        Returns:
            `dict[str, Any]`: Content of the state file, its `state` as `TrainerState`.

        Raises:
            UserError: The checkpoint is damaged, or it belongs to another run.
        """
        try:
            record = json.loads((folder / STATE_FILE).read_text("utf-8"))
            files, identity = dict(record["files"]), dict(record["identity"])
            record["state"] = read_state(record["state"])
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise UserError(
                f"{folder / STATE_FILE} is damaged ({error}); resume from an earlier checkpoint"
            ) from error
        for name, size in files.items():
            actual = (folder / name).stat().st_size if (folder / name).is_file() else None
            if actual != size:
                state = "is missing" if actual is None else f"has {actual} bytes instead of {size}"
                raise UserError(
                    f"{folder} is damaged: {name} {state}; resume from an earlier checkpoint"
                )
        # Checkpoints of earlier versions lack the later facts.
        different = [
            k
            for k in self.identity
            if self.identity[k] != identity.get(k) and (k in identity or k not in _LATER_FACTS)
        ]
        if different and not force:
            details = "; ".join(
                f"{k} is {self.identity[k]!r}, there {identity.get(k)!r}" for k in different
            )
            raise UserError(
                f"{folder} belongs to another run ({details}); use the same settings, or "
                "--train.force_resume true"
            )
        return record
