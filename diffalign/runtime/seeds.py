"""Seeds: every number that starts a random generator is derived here.

A draw belongs to a row of the data, to an image of a prompt or to a stream of a
steering call, never to a batch, a process or a moment. One process, two processes and
gradient accumulation therefore see the same draws, and a resumed run continues them
without stored state.

Results depend on these formulas. A change of one changes every run that used it.
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
    """Derive the seed of one draw for a row of the training data.

    torch's CPU generator reads 32 bits of it, so two streams meet once in 2^32 pairs.

    Args:
        seed (`int`): seed of the run.
        row (`int`): number of the row.
        epoch (`int`): number of the pass over the data.
        purpose (`str`): what is drawn, such as ``noise`` or ``time``.

    Returns:
        `int`: 63 bits.
    """
    digest = hashlib.blake2b(f"{seed}:{row}:{epoch}:{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def row_generator(seed: int, row: int, epoch: int, purpose: str) -> torch.Generator:
    """Make a CPU generator seeded by `row_seed`, which explains the arguments."""
    import torch

    return torch.Generator().manual_seed(row_seed(seed, row, epoch, purpose))


def image_seed(seed: int, prompt: str, number: int) -> int:
    """Derive the seed of one image of a prompt.

    It is the same under every model, whatever the order and number of prompts.

    Args:
        seed (`int`): seed of the run.
        prompt (`str`): the prompt.
        number (`int`): number of the image among those of the prompt.

    Returns:
        `int`: 48 bits.
    """
    return text_seed(f"{seed}:{number}:{prompt}")


def text_seed(text: str) -> int:
    """Derive a seed from a text.

    Args:
        text (`str`): names what is drawn. Half characters (unpaired surrogates) are
            allowed.

    Returns:
        `int`: 48 bits.
    """
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big")


def stream_seed(*parts: int | str | bytes) -> int:
    """Derive the seed of a stream from everything that names it.

    Args:
        *parts (`int`, `str` or `bytes`): what names the stream. Other parts give an
            unrelated seed.

    Returns:
        `int`: 63 bits.
    """
    text = b"\0".join(part if isinstance(part, bytes) else str(part).encode() for part in parts)
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def stream(*parts: int | str | bytes) -> torch.Generator:
    """Make a CPU generator seeded by `stream_seed`, which explains the arguments."""
    import torch

    return torch.Generator("cpu").manual_seed(stream_seed(*parts))


def state_key(generator: torch.Generator) -> bytes:
    """Hash the present state of a generator, without advancing it.

    Args:
        generator (`torch.Generator`): on any device.

    Returns:
        `bytes`: 32 of them, a part of `stream_seed`.
    """
    return hashlib.sha256(generator.get_state().numpy().tobytes()).digest()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators for a block, and restore them afterwards.

    For code that takes no generator, such as some schedulers of diffusers.

    Args:
        seed (`int`): the seed.
        device (`torch.device`): where the block draws.
    """
    import torch

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """Restore the global generators of Python, numpy and torch after a block."""
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
