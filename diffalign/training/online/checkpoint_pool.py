"""A bounded pool of past weights, one of which is the reference (SePPO).

Each member's trainable weights are in a file `pool/<step>.safetensors`. Those of the
current members are in memory as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Module

from ...errors import UserError
from ...runtime.distributed import whole
from ...runtime.files import read_tensors, save_tensors
from ...runtime.seeds import row_generator
from ..reference import SnapshotReference

STRATEGIES = ("random", "initial", "latest")


class CheckpointPool(SnapshotReference):
    """Past weights of a network. One of them is the reference at a time.

    Args:
        network: Its current trainable weights become the first member, of step 0.
        folder (`Path`): Folder of the files.
        size (`int`): Most members. Beyond, the oldest leaves, except the first.
        strategy (`str`): Which member `choose` takes: `random`, `initial` or `latest`.

    Attributes:
        members (`list[int]`): Optimizer step of each member, oldest first.
        kept (`dict[int, dict[str, Tensor]]`): Weights of each member.
        current (`int`): Step of the member that is the reference.
    """

    description = "a pool of past checkpoints"

    def __init__(self, network: Module, folder: Path, size: int, strategy: str) -> None:
        super().__init__(network)
        self.folder, self.size, self.strategy = folder, size, strategy
        self.members: list[int] = [0]
        self.kept: dict[int, dict[str, Tensor]] = {}
        self.current = 0
        # A file on the disk may be of another attempt, which went on from an earlier
        # checkpoint.
        self._written: set[int] = set()

    def start(self) -> None:
        """Make the starting weights the initial member."""
        super().start()
        self.kept[0] = self._kept(self.weights)

    def choose(self, seed: int, step: int) -> int:
        """Make a member the reference, the same one on every process.

        Args:
            seed (`int`): Seed of the run.
            step (`int`): The optimizer step.

        Returns:
            `int`: Step of the member.
        """
        if self.strategy == "random":
            draw = row_generator(seed, step, 0, "pool")
            chosen = self.members[int(torch.randint(len(self.members), (1,), generator=draw))]
        else:
            chosen = self.members[0 if self.strategy == "initial" else -1]
        if chosen != self.current:
            self.current, self.weights = chosen, self._placed(chosen)
        return chosen

    def _kept(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy weights to the CPU, where all but one member wait. Shards stay."""
        if self.shards:
            return {name: weight.detach().clone() for name, weight in weights.items()}
        return {name: w.detach().to("cpu", copy=True) for name, w in weights.items()}

    def _placed(self, step: int) -> dict[str, Tensor]:
        """Weights of a member on the device of the network."""
        return {n: w.to(self.parameters[n].device) for n, w in self.kept[step].items()}

    def append(self, step: int, is_main: bool) -> None:
        """Add the current weights as a member.

        Args:
            step (`int`): Optimizer steps done.
            is_main (`bool`): Whether this process writes the file.
        """
        self.members.append(step)
        self.kept[step] = self._kept(self.parameters)
        self._write(is_main)
        while len(self.members) > self.size:
            gone = self.members.pop(1)
            self.kept.pop(gone)

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}.safetensors"

    def _write(self, is_main: bool) -> None:
        """Write the members that this run has not written yet.

        Files of former members stay, because an older checkpoint may need them.
        """
        for step in self.members:
            if step in self._written:
                continue
            # Gathered on all processes, written by the first one.
            tensors = {name: whole(w).cpu().contiguous() for name, w in self.kept[step].items()}
            if is_main:
                self.folder.mkdir(parents=True, exist_ok=True)
                save_tensors(tensors, self._path(step))
            self._written.add(step)

    def save(self, folder: Path, rank: int) -> None:
        """Write the list of members into a checkpoint.

        The weights are in the pool's own files, which all checkpoints share.

        Args:
            folder (`Path`): Folder of the checkpoint.
            rank (`int`): Number of this process. The first one writes.
        """
        self._write(rank == 0)
        if rank == 0:
            (folder / "pool.json").write_text(
                json.dumps({"members": self.members, "current": self.current})
            )

    def load(self, folder: Path, rank: int, device: torch.device) -> None:
        """Read the members from a checkpoint and their weights from the pool's files.

        Args:
            folder (`Path`): Folder of the checkpoint.
            rank (`int`): Number of this process.
            device (`torch.device`): Device of the weights.

        Raises:
            UserError: The checkpoint has no pool, or a member's file is missing.
        """
        record = folder / "pool.json"
        if not record.is_file():
            raise UserError(
                f"{folder} holds no pool of past checkpoints; it was saved by a run with "
                "another setting"
            )
        values = json.loads(record.read_text())
        missing = [step for step in values["members"] if not self._path(step).is_file()]
        if missing:
            raise UserError(
                f"{self.folder}: the pool's {self._path(missing[0]).name} is missing "
                f"({len(missing)} of {len(values['members'])}); put the "
                "folder back, or start a new run"
            )
        self.members, self.current = values["members"], values["current"]
        self._written = set(self.members)
        self.kept = {step: dict(read_tensors(self._path(step))[0]) for step in self.members}
        self.weights = self._placed(self.current if self.current in self.kept else 0)
