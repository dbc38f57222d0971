"""Where batches come from when the policy draws its own images.

A round of batches is drawn ahead, sampled by the policy of that moment, and trained on one after
another. What is left of a round is part of every checkpoint, so that a run stopped in its middle
goes on with the same samples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import UserError
from ...runtime import files
from ..batch import Batch
from ..data_pipeline import DataPipeline

_TENSORS = ("x0", "noise", "times", "weights", "scores", "reference_errors", "noisy")
_DICTS = ("condition", "extra")
_PLAIN = ("row_ids", "prompts", "epochs", "seed")


class RolloutSource:
    """Batches of samples that the policy draws round by round.

    Args:
        make: (round number, batches as the data give them) -> batches to train on, in order.
        batches_per_round (`int`): data batches of this process that a round samples.

    Attributes:
        number: rounds begun.
        drawn: data batches of this process taken so far.
    """

    def __init__(
        self, make: Callable[[int, list[Batch]], list[Batch]], batches_per_round: int
    ) -> None:
        self.make, self.batches_per_round = make, batches_per_round
        self.queue: list[Batch] = []
        self.number = self.drawn = 0

    def batches(self, data: DataPipeline, samples_seen: int) -> Iterator[Batch]:
        """The batches to train on, from where the rounds are; a new round begins when one is used up.

        Args:
            data: gives the prompts.
            samples_seen (`int`): not read: the rounds know their own position.
        """
        source = self.unsampled(data)
        while True:
            if not self.queue:
                batches = [next(source) for _ in range(self.batches_per_round)]
                self.queue = self.make(self.number, batches)
                self.number += 1
                self.drawn += self.batches_per_round
            yield self.queue.pop(0)

    def unsampled(self, data: DataPipeline) -> Iterator[Batch]:
        """The data's own batches from where the rounds are."""
        start = self.drawn * data.args.per_device_train_batch_size * data.accelerator.num_processes
        return (data.builder(examples) for examples in data.batches(start))

    def save(self, folder: Path, rank: int) -> None:
        """Write what is left of the round, a file per process."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        plain = []
        for i, batch in enumerate(self.queue):
            tensors |= {f"{i}.{name}": value for name, value in flat_tensors(batch).items()}
            plain.append({name: getattr(batch, name) for name in _PLAIN})
        facts = {"number": self.number, "drawn": self.drawn, "batches": plain}
        save_file(
            tensors, folder / f"rollout-{rank}.safetensors", metadata={"rounds": json.dumps(facts)}
        )

    def load(self, folder: Path, rank: int, device: Any) -> None:
        """Read it back.

        Raises:
            UserError: the checkpoint has none for this process.
        """
        path = folder / f"rollout-{rank}.safetensors"
        if not path.is_file():
            raise UserError(
                f"{folder} holds no rollouts of process {rank}; resume with as many "
                "processes as before, or from another checkpoint"
            )
        tensors, facts = read_tensors(path)
        self.number, self.drawn = facts["number"], facts["drawn"]
        self.queue = [
            batch_from(tensors, f"{i}.", plain, device) for i, plain in enumerate(facts["batches"])
        ]


def flat_tensors(batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch by name, on the CPU."""
    tensors = {name: getattr(batch, name) for name in _TENSORS if getattr(batch, name) is not None}
    for section in _DICTS:
        tensors |= {f"{section}/{name}": value for name, value in getattr(batch, section).items()}
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def batch_from(
    tensors: dict[str, Tensor], prefix: str, plain: dict[str, Any], device: Any
) -> Batch:
    """A batch from `flat_tensors` under a prefix; times stay on the CPU."""
    own = {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
    values: dict[str, Any] = {
        name: own[name] if name == "times" else own[name].to(device)
        for name in _TENSORS
        if name in own
    }
    for section in _DICTS:
        start = f"{section}/"
        # Trajectories stay on the CPU until they are trained on.
        place = (lambda t: t.to(device)) if section == "condition" else (lambda t: t)
        values[section] = {
            name.removeprefix(start): place(t) for name, t in own.items() if name.startswith(start)
        }
    return Batch(**values, **plain)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, facts) of a file that `RolloutSource.save` wrote."""
    tensors, facts = files.read_tensors(path)
    return tensors, json.loads(facts["rounds"])
