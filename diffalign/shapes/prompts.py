"""The grammar of the shapes world: five attributes and 720 prompts.

A prompt reads ``a small red circle on the left of a gray background``. Every
combination of the five attributes is one prompt. A fixed sixth of the combinations is
held out: preference data never contains them.
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

STYLES = ("flat", "lit")
"""How a background can look. Captions never mention it."""
PREFERRED_STYLE = "lit"
"""The style that people prefer in this world."""

_PLACE = {"left": "on the left", "center": "in the center", "right": "on the right"}
_PATTERN = re.compile(
    r"^a (?P<size>\w+) (?P<color>\w+) (?P<shape>\w+) (?:on|in) the (?P<position>\w+) "
    r"of a (?P<background>\w+) background$"
)
_HELD_OUT_SEED = 20240601


@dataclass(frozen=True)
class Scene:
    """The five attributes of one image.

    Args:
        size, color, shape, position, background (`str`): members of the tuples in
            `ATTRIBUTES`.

    Raises:
        ValueError: another value.

    Example:
        ```python
        scene = Scene("small", "red", "circle", "left", "gray")
        assert scene.prompt == "a small red circle on the left of a gray background"
        ```
    """

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
        """The sentence of the grammar that describes the scene."""
        return (
            f"a {self.size} {self.color} {self.shape} {_PLACE[self.position]} "
            f"of a {self.background} background"
        )


def parse_prompt(prompt: str) -> Scene:
    """Read a prompt of the grammar back into a scene.

    Args:
        prompt (`str`): case and surrounding space do not matter.

    Returns:
        `Scene`: its attributes.

    Raises:
        ValueError: not a sentence of the grammar. The message shows the pattern.

    Example:
        ```python
        prompt = "A large blue star in the center of a white background"
        assert parse_prompt(prompt).color == "blue"
        ```
    """
    match = _PATTERN.match(" ".join(prompt.lower().split()))
    if match is None:
        raise ValueError(
            f"prompt: {prompt!r} is not of the shapes world; write 'a SIZE COLOR SHAPE on the "
            "POSITION of a BACKGROUND background', "
            "for example 'a small red circle on the left of a gray background'"
        )
    return Scene(**match.groupdict())


def all_scenes() -> list[Scene]:
    """List all 720 combinations, in a fixed order."""
    return [Scene(*values) for values in itertools.product(*ATTRIBUTES.values())]


def split_scenes() -> tuple[list[Scene], list[Scene]]:
    """Split the scenes into 600 for training and 120 held out.

    Returns:
        `tuple[list[Scene], list[Scene]]`: training and held-out scenes, each in a fixed
        shuffled order.
    """
    scenes = all_scenes()
    random.Random(_HELD_OUT_SEED).shuffle(scenes)
    held_out = len(scenes) // 6
    return scenes[held_out:], scenes[:held_out]


def train_prompts() -> list[str]:
    """List the 600 prompts that preference data may use."""
    return [scene.prompt for scene in split_scenes()[0]]


def held_out_prompts() -> list[str]:
    """List the 120 prompts for evaluation."""
    return [scene.prompt for scene in split_scenes()[1]]
