"""The programmatic verifier of the shapes world as a scorer."""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError
from ...shapes.prompts import parse_prompt
from ...shapes.verifier import attribute_table, score
from ..base import Item, Scorer
from ..spec import ScorerSpec


class ShapesScorer(Scorer):
    """How well an image follows its prompt and how good it looks, in [0, 1].

    The score is 0.8 times the share of the five attributes that are right, plus 0.15
    for the preferred style, plus up to 0.05 for a sharp shape, see
    `diffalign.shapes.score`.

    Args:
        graded (`bool`, *optional*, defaults to True): False gives 1 when every
            attribute is right and 0 otherwise, whatever the style.
        style (`bool`, *optional*, defaults to False): True gives 1 when the style is
            the preferred one and 0 otherwise, whatever the attributes.
        **options: as for `Scorer`.

    Raises:
        ConfigError: an option is no truth value, or `style` is set beside
            ``graded: false``.
    """

    spec = ScorerSpec(
        key="shapes",
        summary="verifier of the shapes world: right attributes and preferred style",
        licence="Apache-2.0",
        range=(0.0, 1.0),
        affine=(0.0, 1.0),
        preprocess="64x64",
        text="grammar",
        citation="this package, diffalign.shapes.verifier",
    )

    def __init__(self, *, graded: bool = True, style: bool = False, **options: Any) -> None:
        super().__init__(**options)
        for name, value in (("graded", graded), ("style", style)):
            if not isinstance(value, bool):
                raise ConfigError(name, f"expected true or false, got {value!r}")
        if style and not graded:
            raise ConfigError("style", "expected one of graded: false and style: true, got both")
        self.graded, self.style = graded, style

    def identity(self) -> dict[str, Any]:
        return {"graded": self.graded, "style": self.style}

    def score_batch(self, items: list[Item]) -> tuple[list[float], dict[int, str]]:
        values, notes = [float("nan")] * len(items), {}
        for i, item in enumerate(items):
            try:
                parse_prompt(item.prompt)
            except ValueError as error:
                notes[i] = str(error)
                continue
            if self.style:
                values[i] = float(attribute_table([item.image], [item.prompt])[0]["style"])
            elif self.graded:
                values[i] = float(score([item.image], [item.prompt])[0])
            else:
                values[i] = float(attribute_table([item.image], [item.prompt])[0]["all"])
        return values, notes
