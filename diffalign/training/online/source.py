"""Sources of batches that are drawn in rounds.

A round of images is drawn by the policy or its reference and trained on batch by batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ...runtime import files
from ..batch import Batch
from ..data_pipeline import DataPipeline

_TENSORS = ("x0", "noise", "times", "weights", "scores", "reference_errors", "noisy")
_DICTS = ("condition", "extra")
_PLAIN = ("row_ids", "prompts", "epochs", "seed")


class RoundSource:
    """Yields batches that are drawn round by round from batches of the dataset.

    Its position is `samples_seen`. So each round must have as many batches as it was
    made from, and an optimizer step must end with a round.

    Args:
        make (`Callable`): Turns the number of a round and its batches of the dataset
            into batches to train on.
        batches_per_round (`int`): Batches of the dataset per round and process.

    Attributes:
        number (`int`): Rounds begun.
        drawn (`int`): Batches of the dataset that this process has used.
    """

    def __init__(
        self, make: Callable[[int, list[Batch]], list[Batch]], batches_per_round: int
    ) -> None:
        self.make, self.batches_per_round = make, batches_per_round
        self.queue: list[Batch] = []
        self.number = self.drawn = 0

    def go_to(self, data: DataPipeline, samples_seen: int) -> None:
        """Set the position.

        Args:
            data (`DataPipeline`): Gives the size of a batch.
            samples_seen (`int`): Groups consumed so far, over all processes.
        """
        size = data.args.per_device_train_batch_size * data.accelerator.num_processes
        self.drawn = samples_seen // size
        self.number = self.drawn // self.batches_per_round

    def batches(self, data: DataPipeline, samples_seen: int) -> Iterator[Batch]:
        """Yield batches without end. A new round begins when the last one is used up.

        Args:
            data (`DataPipeline`): Reads the dataset.
            samples_seen (`int`): Groups consumed so far, over all processes.
        """
        self.go_to(data, samples_seen)
        source = self.unsampled(data)
        while True:
            if not self.queue:
                batches = [next(source) for _ in range(self.batches_per_round)]
                self.queue = self.make(self.number, batches)
                self.number += 1
                self.drawn += self.batches_per_round
            yield self.queue.pop(0)

    def unsampled(self, data: DataPipeline) -> Iterator[Batch]:
        """Return the batches of the dataset from the current position on.

        Args:
            data (`DataPipeline`): Reads the dataset.
        """
        start = self.drawn * data.args.per_device_train_batch_size * data.accelerator.num_processes
        return (data.builder(examples) for examples in data.batches(start))


class RolloutSource(RoundSource):
    """Yields batches of images that the policy draws round by round.

    Every checkpoint holds the rest of its round. A run stopped in the middle goes on
    with the same images. See `RoundSource` for the arguments.
    """

    _layout: tuple[int, int] | None = None
    """Groups per batch and number of processes that `drawn` counts in."""

    def go_to(self, data: DataPipeline, samples_seen: int) -> None:
        """Count in the batches of this run. The source knows its own position.

        Raises:
            UserError: The checkpoint is in the middle of a round of another size.
        """
        size, processes = data.args.per_device_train_batch_size, data.accelerator.num_processes
        if self._layout not in (None, (size, processes)):
            before, ranks = self._layout
            self.drawn, rest = divmod(self.drawn * before * ranks, size * processes)
            if self.queue or rest:
                raise UserError(
                    "train.resume_from_checkpoint: the checkpoint is in the middle of a round that "
                    f"was drawn with per_device_train_batch_size {before} and {ranks} processes, "
                    f"here they are {size} and {processes}; resume with these, or from a "
                    "checkpoint at the end of a round"
                )
        self._layout = size, processes

    def save(self, folder: Path, rank: int) -> None:
        """Write the rest of the round into a checkpoint, one file per process.

        Args:
            folder (`Path`): Folder of the checkpoint.
            rank (`int`): Number of this process.
        """
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        plain = []
        for i, batch in enumerate(self.queue):
            tensors |= {f"{i}.{name}": value for name, value in flat_tensors(batch).items()}
            plain.append({name: getattr(batch, name) for name in _PLAIN})
        facts = {"number": self.number, "drawn": self.drawn, "batches": plain}
        facts["layout"] = self._layout
        save_file(
            tensors, folder / f"rollout-{rank}.safetensors", metadata={"rounds": json.dumps(facts)}
        )

    def load(self, folder: Path, rank: int, device: torch.device) -> None:
        """Read the rest of the round from a checkpoint.

        Args:
            folder (`Path`): Folder of the checkpoint.
            rank (`int`): Number of this process.
            device (`torch.device`): Device of the batches.

        Raises:
            UserError: The checkpoint has no file for this process.
        """
        path = folder / f"rollout-{rank}.safetensors"
        if not path.is_file():
            raise UserError(
                f"{folder} holds no rollouts of process {rank}; resume with as many "
                "processes as before, or from another checkpoint"
            )
        tensors, facts = read_tensors(path)
        self.number, self.drawn = facts["number"], facts["drawn"]
        # Earlier versions did not write it.
        self._layout = tuple(facts["layout"]) if facts.get("layout") else None
        self.queue = [
            batch_from(tensors, f"{i}.", plain, device) for i, plain in enumerate(facts["batches"])
        ]


def flat_tensors(batch: Batch) -> dict[str, Tensor]:
    """Return the tensors of a batch by name, on the CPU.

    Args:
        batch (`Batch`): The batch.
    """
    tensors = {name: getattr(batch, name) for name in _TENSORS if getattr(batch, name) is not None}
    for section in _DICTS:
        tensors |= {f"{section}/{name}": value for name, value in getattr(batch, section).items()}
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def batch_from(
    tensors: dict[str, Tensor], prefix: str, plain: dict[str, Any], device: torch.device
) -> Batch:
    """Build a batch from the tensors that `flat_tensors` returned.

    Args:
        tensors (`dict[str, Tensor]`): Tensors of several batches.
        prefix (`str`): Start of this batch's names.
        plain (`dict[str, Any]`): The fields that are no tensors.
        device (`torch.device`): Device of the batch. Its times stay on the CPU.
    """
    members = {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
    values: dict[str, Any] = {
        name: members[name] if name == "times" else members[name].to(device)
        for name in _TENSORS
        if name in members
    }
    for section in _DICTS:
        start = f"{section}/"
        # Trajectories stay on the CPU until training needs them.
        place = (lambda t: t.to(device)) if section == "condition" else (lambda t: t)
        values[section] = {
            name.removeprefix(start): place(t)
            for name, t in members.items()
            if name.startswith(start)
        }
    return Batch(**values, **plain)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that `RolloutSource.save` wrote.

    Args:
        path (`Path`): The file.

    Returns:
        `tuple[dict[str, Tensor], dict[str, Any]]`: Tensors and facts.
    """
    tensors, facts = files.read_tensors(path)
    return tensors, json.loads(facts["rounds"])
