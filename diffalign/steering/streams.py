"""Independent random streams from one seed: initial noise, step noise and resampling never touch each other."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from .resampling import Generators


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


def resampling_stream(generator: Generators) -> Generators:
    """A stream for resampling that depends on `generator`'s state and does not advance it: one per group where `generator` is a list."""
    if generator is None:
        return stream(int(torch.randint(2**62, ()).item()), "resampling")
    if isinstance(generator, torch.Generator):
        return stream(state_key(generator), "resampling")
    return [stream(state_key(one), "resampling") for one in generator]


@dataclass
class Streams:
    """The random streams of one call.

    Attributes:
        initial: what the pipeline gets as `generator`.
        steps: one generator per slot for step noise the pipeline does not draw itself.
        resampling: one, or one per prompt.
        replace: whether `steps` also replaces a generator that the pipeline hands to its scheduler.
    """

    initial: Any
    steps: list[torch.Generator]
    resampling: Generators
    replace: bool

    @classmethod
    def make(
        cls, generator: Any, seeds: list[int] | None, resampling: Any, k: int, groups: int
    ) -> Streams:
        """From the user's generator (or one per row), or from one seed per prompt."""
        if seeds is not None:
            slots = [(seed, j) for seed in seeds for j in range(k)]
            initial = [stream(seed, "initial", j) for seed, j in slots]
            steps = [stream(seed, "steps", j) for seed, j in slots]
            return cls(
                initial, steps, resampling or [stream(seed, "resampling") for seed in seeds], True
            )
        if isinstance(generator, (list, tuple)):
            keys = [state_key(one) for one in generator]
            steps = [stream(key, "steps") for key in keys]
            own: Generators = [stream(key, "resampling") for key in keys[::k]]
        else:
            key = state_key(generator)
            steps = [stream(key, "steps", row) for row in range(groups * k)]
            own = resampling_stream(generator)
        return cls(generator, steps, resampling or own, False)
