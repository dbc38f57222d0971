"""Random damage to bytes, for the nightly tests."""

from __future__ import annotations

import random


def damaged(data: bytes, generator: random.Random, longest: int) -> bytes:
    """The bytes with one to four faults: one changed, or up to `longest` gone."""
    changed = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        place = generator.randrange(len(changed))
        if generator.random() < 0.5:
            changed[place] = generator.randrange(256)
        else:
            del changed[place : place + generator.randint(1, longest)]
    return bytes(changed)
