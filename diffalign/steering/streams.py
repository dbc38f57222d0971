"""Independent random streams from one seed: initial noise, step noise and resampling never touch each other."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: int | str | bytes) -> int:
    """A 63-bit seed that depends on every part: streams of different parts are unrelated."""
    text = b"\0".join(part if isinstance(part, bytes) else str(part).encode() for part in parts)
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def stream(*parts: int | str | bytes) -> torch.Generator:
    """A CPU generator seeded by `derive_seed`."""
    return torch.Generator("cpu").manual_seed(derive_seed(*parts))


def state_key(generator: torch.Generator) -> bytes:
    """What tells a generator's present state from any other, without advancing it."""
    return hashlib.sha256(generator.get_state().numpy().tobytes()).digest()
