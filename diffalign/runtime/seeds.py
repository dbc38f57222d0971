"""Randomness that belongs to a row of the data, not to a batch, a process or a moment.

Every draw for a row (noise, timestep, prompt dropout, flip) comes from a generator seeded by (seed, row, epoch). One process, two
processes and gradient accumulation therefore see the same draws, and a resumed run continues them without stored state.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def row_seed(seed: int, row: int, epoch: int, purpose: str) -> int:
    """A 63-bit seed for one purpose. torch's CPU generator reads 32 bits of it, so two streams meet once in 2^32 pairs."""
    digest = hashlib.blake2b(f"{seed}:{row}:{epoch}:{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def row_generator(seed: int, row: int, epoch: int, purpose: str) -> torch.Generator:
    """A CPU generator with that seed."""
    import torch

    return torch.Generator().manual_seed(row_seed(seed, row, epoch, purpose))


@contextmanager
def undisturbed() -> Iterator[None]:
    """The global generators afterwards stand where they stood before."""
    import numpy as np
    import torch

    python, numbers = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)


def image_seed(seed: int, prompt: str, number: int) -> int:
    """Seed of image `number` of a prompt: the same under every model, whatever the order or number of prompts."""
    text = f"{seed}:{number}:".encode() + prompt.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:6], "big")
