"""Draw examples of the graded score: ``python -m tools.shapes.score_examples``.

Writes ``docs/shapes_score.png``: rendered images of one prompt, with their scores.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from diffalign.shapes import render, score
from diffalign.shapes.prompts import Scene

SCENE = Scene("large", "blue", "star", "center", "gray")
EXAMPLES: tuple[tuple[str, dict[str, str], str], ...] = (
    ("right, lit", {}, "lit"),
    ("wrong colour, lit", {"color": "purple"}, "lit"),
    ("right, flat", {}, "flat"),
    ("wrong shape, lit", {"shape": "cross"}, "lit"),
    ("wrong colour, flat", {"color": "purple"}, "flat"),
    ("wrong colour and size, lit", {"color": "purple", "size": "small"}, "lit"),
    ("wrong shape and place, flat", {"shape": "cross", "position": "left"}, "flat"),
    (
        "all wrong, flat",
        {
            "size": "small",
            "color": "red",
            "shape": "square",
            "position": "right",
            "background": "pink",
        },
        "flat",
    ),
)
CELL, CAPTION, COLUMNS = 192, 44, 4


def picture() -> Image.Image:
    """Draw the examples in a grid, best first, each with its score beneath."""
    images = [render(dataclasses.replace(SCENE, **values), None, s) for _, values, s in EXAMPLES]
    scores = score(images, [SCENE.prompt] * len(images))
    order = sorted(range(len(images)), key=lambda i: -scores[i])
    rows = -(-len(images) // COLUMNS)
    canvas = Image.new("RGB", (COLUMNS * (CELL + 8), 32 + rows * (CELL + CAPTION)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    draw.text((8, 8), SCENE.prompt, "black", font)
    for place, i in enumerate(order):
        x, y = place % COLUMNS * (CELL + 8) + 4, 32 + place // COLUMNS * (CELL + CAPTION)
        canvas.paste(images[i].resize((CELL, CELL), Image.Resampling.NEAREST), (x, y))
        draw.text((x, y + CELL + 2), f"{scores[i]:.3f}", "black", font)
        draw.text((x, y + CELL + 20), EXAMPLES[i][0], "black", font)
    return canvas


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/shapes_score.png"))
    picture().save(parser.parse_args(arguments).output)


if __name__ == "__main__":
    main()
