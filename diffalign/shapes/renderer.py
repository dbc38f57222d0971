"""Draw a scene as an image: one filled shape on a background, flat or lit from above.

Edges are smooth by supersampling.
"""

from __future__ import annotations

import math
import random

import numpy as np
from PIL import Image, ImageDraw

from .prompts import STYLES, Scene

RESOLUTION = 64
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 165, 70),
    "blue": (45, 75, 220),
    "yellow": (245, 215, 45),
    "purple": (140, 50, 180),
    "cyan": (50, 205, 225),
}
BACKGROUND_PALETTE: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "black": (18, 18, 18),
    "pink": (250, 165, 195),
}
# Half the side of the shape's bounding box and its centre, in pixels of the 64-pixel
# canvas. The ranges of two values of an attribute never touch, so that the verifier's
# thresholds in the gaps are exact.
HALF_SIDE = {"small": (9.5, 11.0), "large": (16.0, 18.0)}
CENTER_X = {"left": (20.0, 22.0), "center": (31.0, 33.0), "right": (42.0, 44.0)}
CENTER_Y = (29.0, 35.0)
LIGHT = 28.0
"""Grey levels that the style ``lit`` adds at the top and subtracts at the bottom."""
_SUPERSAMPLING = 4


def shape_polygon(shape: str, half_side: float) -> list[tuple[float, float]]:
    """Compute the outline of a shape around the origin.

    Args:
        shape (`str`): one of ``ATTRIBUTES["shape"]``.
        half_side (`float`): the outline fills the box [-half_side, half_side] squared.

    Returns:
        `list[tuple[float, float]]`: points (x, y), with y downwards.

    Raises:
        ValueError: unknown shape.
    """
    r = half_side
    if shape == "circle":
        return [
            (r * math.cos(a), r * math.sin(a)) for a in (2 * math.pi * i / 96 for i in range(96))
        ]
    if shape == "square":
        return [(-r, -r), (r, -r), (r, r), (-r, r)]
    if shape == "triangle":
        return [(0.0, -r), (r, r), (-r, r)]
    if shape == "cross":
        arm = 0.34 * r
        quarter = [(arm, -r), (arm, -arm), (r, -arm), (r, arm)]
        points = []
        for _ in range(4):
            points += quarter[:3]
            quarter = [(-y, x) for x, y in quarter]
        return points
    if shape == "star":
        points = []
        for i in range(10):
            radius, angle = (1.0 if i % 2 == 0 else 0.45), -math.pi / 2 + math.pi * i / 5
            points.append((radius * math.cos(angle), radius * math.sin(angle)))
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        mid_x, mid_y = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
        half_w, half_h = (max(xs) - min(xs)) / 2, (max(ys) - min(ys)) / 2
        return [((x - mid_x) / half_w * r, (y - mid_y) / half_h * r) for x, y in points]
    raise ValueError(f"shape: {shape!r} cannot be drawn")


def _background(name: str, style: str) -> Image.Image:
    light = np.linspace(LIGHT, -LIGHT, RESOLUTION) if style == "lit" else np.zeros(RESOLUTION)
    rows = np.array(BACKGROUND_PALETTE[name], dtype=np.float64) + light[:, None]
    pixels = np.broadcast_to(rows.round().clip(0, 255)[:, None], (RESOLUTION, RESOLUTION, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def render(scene: Scene, rng: random.Random | None = None, style: str = "flat") -> Image.Image:
    """Draw an image of a scene.

    Args:
        scene (`Scene`): what to draw.
        rng (`random.Random`, *optional*): varies size and place within the ranges of
            the attributes. None takes the midpoints.
        style (`str`, *optional*, defaults to `"flat"`): one of `STYLES`. ``flat`` fills
            the background with one colour. ``lit`` makes it lighter towards the top
            and darker towards the bottom.

    Returns:
        `Image.Image`: RGB, 64x64.

    Raises:
        ValueError: unknown style.

    Example:
        ```python
        image = render(Scene("large", "blue", "star", "center", "white"))
        assert image.size == (64, 64)
        ```
    """

    def draw(low: float, high: float) -> float:
        return (low + high) / 2 if rng is None else rng.uniform(low, high)

    if style not in STYLES:
        raise ValueError(f"style: {style!r} is not one of {', '.join(STYLES)}")
    half_side, x, y = draw(*HALF_SIDE[scene.size]), draw(*CENTER_X[scene.position]), draw(*CENTER_Y)
    s = _SUPERSAMPLING
    canvas = _background(scene.background, style).resize(
        (RESOLUTION * s, RESOLUTION * s), Image.Resampling.NEAREST
    )
    outline = [((px + x) * s, (py + y) * s) for px, py in shape_polygon(scene.shape, half_side)]
    ImageDraw.Draw(canvas).polygon(outline, fill=PALETTE[scene.color])
    return canvas.resize((RESOLUTION, RESOLUTION), Image.Resampling.BOX)
