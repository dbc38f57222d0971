"""A bounded pool of past checkpoints, one of which is the reference (SePPO; random checkpoint replay).

The trainable weights of every member lie in a file, ``pool/<step>.safetensors``; those in use are kept in memory as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ...runtime.files import read_tensors, save_tensors
from ...runtime.seeds import row_generator
from ..reference import SnapshotReference

STRATEGIES = ("random", "initial", "latest")


class CheckpointPool(SnapshotReference):
    """Past weights of a network; `predict` runs the one that `choose` took.

    Args:
        network: whose trainable weights are kept. Its weights of now are the initial member, step 0.
        folder: for the files.
        size: members at most; the oldest but the initial one is forgotten first.
        strategy: which one `choose` takes: ``random``, ``initial`` or ``latest``.
    """

    description = "a pool of past checkpoints"

    def __init__(self, network: Any, folder: Path, size: int, strategy: str) -> None:
        super().__init__(network)
        self.folder, self.size, self.strategy = folder, size, strategy
        self.members: list[int] = [0]
        self.kept: dict[int, dict[str, Tensor]] = {0: self.weights}
        self.current = 0
        # Not "is there a file": a run that goes on from an earlier checkpoint must not read what its first try wrote.
        self._written: set[int] = set()

    def choose(self, seed: int, step: int) -> int:
        """Makes a member the reference of optimizer step `step`; the same one on every process. Returns its step."""
        if self.strategy == "random":
            draw = row_generator(seed, step, 0, "pool")
            chosen = self.members[int(torch.randint(len(self.members), (1,), generator=draw))]
        else:
            chosen = self.members[0 if self.strategy == "initial" else -1]
        self.current, self.weights = chosen, self.kept[chosen]
        return chosen

    def append(self, step: int, is_main: bool) -> None:
        """The weights of now join as member `step`."""
        self.members.append(step)
        self.kept[step] = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._write(is_main)
        while len(self.members) > self.size:
            gone = self.members.pop(1)
            self.kept.pop(gone)

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}.safetensors"

    def _write(self, is_main: bool) -> None:
        """Members that this run has not written yet; whole or not at all. Files of forgotten members stay: an older checkpoint may need them."""
        if not is_main:
            return
        for step in self.members:
            path = self._path(step)
            if step not in self._written:
                self.folder.mkdir(parents=True, exist_ok=True)
                save_tensors(
                    {name: w.cpu().contiguous() for name, w in self.kept[step].items()}, path
                )
                self._written.add(step)

    def save(self, folder: Path, rank: int) -> None:
        """Part of a checkpoint: who is in the pool. The weights are in the pool's own files, which checkpoints share."""
        if rank == 0:
            self._write(True)
            (folder / "pool.json").write_text(
                json.dumps({"members": self.members, "current": self.current})
            )

    def load(self, folder: Path, rank: int, device: Any) -> None:
        """Reads the pool back.

        Raises:
            UserError: files of members are gone.
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
        self.kept = {
            step: {n: w.to(device) for n, w in read_tensors(self._path(step))[0].items()}
            for step in self.members
        }
        self.weights = self.kept.get(self.current, self.kept[0])
