"""The random streams of one steering call.

Initial noise, step noise and resampling each have a stream of their own, so that none
of them advances another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..runtime.seeds import state_key, stream
from .resampling import Generators


def side_stream(generator: Generators, purpose: str) -> Generators:
    """Make a stream for another purpose from a generator, without advancing it.

    Args:
        generator (`torch.Generator` or one per group, *optional*): whose state decides.
            With None, torch's global generator draws a seed.
        purpose (`str`): what the stream is for, such as ``resampling``.

    Returns:
        `torch.Generator` or one per group: as many as were given.
    """
    if generator is None:
        return stream(int(torch.randint(2**62, ()).item()), purpose)
    if isinstance(generator, torch.Generator):
        return stream(state_key(generator), purpose)
    return [stream(state_key(one), purpose) for one in generator]


def resampling_stream(generator: Generators) -> Generators:
    """Make the `side_stream` from which resampling draws."""
    return side_stream(generator, "resampling")


@dataclass
class Streams:
    """The random streams of one call.

    Attributes:
        initial: what the pipeline gets as `generator`.
        steps: one generator per slot, for step noise that the pipeline does not draw.
        resampling: one, or one per prompt.
        replace: whether `steps` also replaces a generator that the pipeline hands to
            its scheduler.
    """

    initial: Generators
    steps: list[torch.Generator]
    resampling: Generators
    replace: bool

    @classmethod
    def make(
        cls,
        generator: Any,
        seeds: list[int] | None,
        resampling: Generators,
        k: int,
        groups: int,
    ) -> Streams:
        """Make the streams from the user's generator, or from one seed per prompt.

        Args:
            generator (`torch.Generator` or one per row): the user's.
            seeds (`list[int]`, *optional*): one per prompt, in place of `generator`.
            resampling (`torch.Generator` or one per prompt, *optional*): the user's.
                None derives it.
            k (`int`): particles per prompt.
            groups (`int`): prompts.
        """
        if seeds is not None:
            slots = [(seed, j) for seed in seeds for j in range(k)]
            initial = [stream(seed, "initial", j) for seed, j in slots]
            steps = [stream(seed, "steps", j) for seed, j in slots]
            return cls(
                initial, steps, resampling or [stream(seed, "resampling") for seed in seeds], True
            )
        if isinstance(generator, (list, tuple)):
            steps = [stream(state_key(one), "steps") for one in generator]
            derived = side_stream(generator[::k], "resampling")
        else:
            key = state_key(generator)
            steps = [stream(key, "steps", row) for row in range(groups * k)]
            derived = side_stream(generator, "resampling")
        return cls(generator, steps, resampling or derived, False)
