"""The programmatic verifier of the shapes world as a scorer."""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError
from ...shapes.prompts import parse_prompt
from ...shapes.verifier import attribute_table, score
from ..base import Item, Scorer
from ..spec import ScorerSpec


class ShapesScorer(Scorer):
    """The share of right attributes in [0, 1].

    The last twentieth of it is the sharpness of the shape.

    Args:
        graded (`bool`, *optional*, defaults to True): False gives 1 when every
            attribute is right and 0 otherwise.
        **options: as for `Scorer`.

    Raises:
        ConfigError: `graded` is no truth value.
    """

    spec = ScorerSpec(
        key="shapes",
        summary="verifier of the shapes world: share of attributes that are right",
        licence="Apache-2.0",
        range=(0.0, 1.0),
        affine=(0.0, 1.0),
        preprocess="64x64",
        text="grammar",
        citation="this package, diffalign.shapes.verifier",
    )

    def __init__(self, *, graded: bool = True, **options: Any) -> None:
        super().__init__(**options)
        if not isinstance(graded, bool):
            raise ConfigError("graded", f"expected true or false, got {graded!r}")
        self.graded = graded

    def identity(self) -> dict[str, Any]:
        return {"graded": self.graded}

    def score_batch(self, items: list[Item]) -> tuple[list[float], dict[int, str]]:
        values, notes = [float("nan")] * len(items), {}
        for i, item in enumerate(items):
            try:
                parse_prompt(item.prompt)
            except ValueError as error:
                notes[i] = str(error)
                continue
            if self.graded:
                values[i] = float(score([item.image], [item.prompt])[0])
            else:
                values[i] = float(attribute_table([item.image], [item.prompt])[0]["all"])
        return values, notes
