"""The grammar of the shapes world: five attributes, 720 prompts, and a held-out split of combinations.

A prompt reads ``a small red circle on the left of a gray background``. Every combination of the five attributes is
one prompt; a fixed sixth of the combinations is *held out*: preference data never contains them.
"""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass, fields

SIZES = ("small", "large")
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "star", "cross")
POSITIONS = ("left", "center", "right")
BACKGROUNDS = ("white", "gray", "black", "pink")

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": SIZES,
    "color": COLORS,
    "shape": SHAPES,
    "position": POSITIONS,
    "background": BACKGROUNDS,
}

_PLACE = {"left": "on the left", "center": "in the center", "right": "on the right"}
_PATTERN = re.compile(
    r"^a (?P<size>\w+) (?P<color>\w+) (?P<shape>\w+) (?:on|in) the (?P<position>\w+) of a (?P<background>\w+) background$"
)
_HELD_OUT_SEED = 20240601


@dataclass(frozen=True)
class Scene:
    """The five attributes of one image. Field values are members of the tuples in :data:`ATTRIBUTES`."""

    size: str
    color: str
    shape: str
    position: str
    background: str

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value not in ATTRIBUTES[field.name]:
                raise ValueError(
                    f"{field.name}: {value!r} is not one of {', '.join(ATTRIBUTES[field.name])}"
                )

    @property
    def prompt(self) -> str:
        return f"a {self.size} {self.color} {self.shape} {_PLACE[self.position]} of a {self.background} background"


def parse_prompt(prompt: str) -> Scene:
    """Reads a prompt of the grammar back into a `Scene`; case and surrounding space do not matter.

    Raises:
        ValueError: when the text is not a sentence of the grammar, with the pattern a sentence must have.
    """
    match = _PATTERN.match(" ".join(prompt.lower().split()))
    if match is None:
        raise ValueError(
            f"prompt: {prompt!r} is not of the shapes world; write 'a SIZE COLOR SHAPE on the POSITION of a BACKGROUND background', "
            "for example 'a small red circle on the left of a gray background'"
        )
    return Scene(**match.groupdict())


def all_scenes() -> list[Scene]:
    """All 720 combinations, in a fixed order."""
    return [Scene(*values) for values in itertools.product(*ATTRIBUTES.values())]


def split_scenes() -> tuple[list[Scene], list[Scene]]:
    """The (training, held-out) scenes: 600 and 120 combinations, disjoint, each in a fixed shuffled order."""
    scenes = all_scenes()
    random.Random(_HELD_OUT_SEED).shuffle(scenes)
    held_out = len(scenes) // 6
    return scenes[held_out:], scenes[:held_out]


def train_prompts() -> list[str]:
    """The 600 prompts that preference data may use."""
    return [scene.prompt for scene in split_scenes()[0]]


def held_out_prompts() -> list[str]:
    """The 120 prompts kept for evaluation."""
    return [scene.prompt for scene in split_scenes()[1]]
