"""Read the attributes of a shapes image from its pixels: the ground truth of the world.

Nothing is learned. The background is the median colour of the border, and the object is
what differs from it. The colour is the nearest one of the palette. The shape is the
template with the best intersection over union inside the object's bounding box.
Rendered images are read without error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from .prompts import ATTRIBUTES, Scene, parse_prompt
from .renderer import BACKGROUND_PALETTE, PALETTE, RESOLUTION, shape_polygon

_OBJECT_DISTANCE = 60.0
_MIN_PIXELS = 40
_SIZE_THRESHOLD = 27.0
_POSITION_THRESHOLDS = (26.5, 37.5)
_MIN_SHAPE_IOU = 0.6
_MAX_COLOR_DISTANCE = 110.0


@dataclass(frozen=True)
class Verdict:
    """The attributes that the verifier read from an image.

    An attribute is None where nothing could be read, as there is no object or no clear
    colour or shape.

    Args:
        size, color, shape, position, background (`str`, *optional*): the attributes.
        shape_iou (`float`, *optional*, defaults to `0.0`): intersection over union of
            the object with the template of `shape`.
    """

    size: str | None
    color: str | None
    shape: str | None
    position: str | None
    background: str | None
    shape_iou: float = 0.0

    def matches(self, scene: Scene) -> dict[str, bool]:
        """Compare each attribute with a scene.

        Returns:
            `dict[str, bool]`: attribute -> whether it is right.
        """
        return {name: getattr(self, name) == getattr(scene, name) for name in ATTRIBUTES}


def _nearest(color: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str | None:
    distances = {
        name: float(np.linalg.norm(color - np.array(value, dtype=np.float64)))
        for name, value in palette.items()
    }
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= _MAX_COLOR_DISTANCE else None


@lru_cache(maxsize=4096)
def _template(shape: str, width: int, height: int) -> np.ndarray:
    scale = 4
    canvas = Image.new("L", (width * scale, height * scale), 0)
    points = [
        ((x + 1) / 2 * width * scale, (y + 1) / 2 * height * scale)
        for x, y in shape_polygon(shape, 1.0)
    ]
    ImageDraw.Draw(canvas).polygon(points, fill=255)
    return np.asarray(canvas.resize((width, height), Image.Resampling.BOX)) > 127


def _largest_component(mask: np.ndarray) -> np.ndarray:
    """Find the 4-connected component with the most pixels.

    Specks far from the object must not stretch its bounding box.
    """
    labels = np.arange(1, mask.size + 1).reshape(mask.shape) * mask
    while True:
        grown = labels.copy()
        grown[1:] = np.maximum(grown[1:], labels[:-1])
        grown[:-1] = np.maximum(grown[:-1], labels[1:])
        grown[:, 1:] = np.maximum(grown[:, 1:], labels[:, :-1])
        grown[:, :-1] = np.maximum(grown[:, :-1], labels[:, 1:])
        grown *= mask
        if np.array_equal(grown, labels):
            break
        labels = grown
    values, counts = np.unique(labels[labels > 0], return_counts=True)
    return labels == values[np.argmax(counts)]


def verify(image: Image.Image) -> Verdict:
    """Read the attributes of one image.

    Args:
        image (`Image.Image`): any size and mode. It is brought to 64x64 RGB first.

    Returns:
        `Verdict`: what was read.

    Example:
        ```python
        scene = Scene("large", "blue", "star", "center", "white")
        assert all(verify(render(scene)).matches(scene).values())
        ```
    """
    if image.size != (RESOLUTION, RESOLUTION):
        image = image.resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    back = np.median(border, axis=0)
    background = _nearest(back, BACKGROUND_PALETTE)
    mask = np.linalg.norm(pixels - back, axis=-1) > _OBJECT_DISTANCE
    if mask.sum() < _MIN_PIXELS:
        return Verdict(None, None, None, None, background)
    mask = _largest_component(mask)
    if mask.sum() < _MIN_PIXELS:
        return Verdict(None, None, None, None, background)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    height, width = int(bottom - top), int(right - left)
    size = "large" if (height + width) / 2 > _SIZE_THRESHOLD else "small"
    center = (left + right) / 2
    position = ("left", "center", "right")[int(np.searchsorted(_POSITION_THRESHOLDS, center))]
    crop = mask[top:bottom, left:right]
    ious = {}
    for shape in ATTRIBUTES["shape"]:
        template = _template(shape, width, height)
        ious[shape] = float((crop & template).sum() / (crop | template).sum())
    shape = max(ious, key=ious.__getitem__)
    color = _nearest(np.median(pixels[mask], axis=0), PALETTE)
    return Verdict(
        size,
        color,
        shape if ious[shape] >= _MIN_SHAPE_IOU else None,
        position,
        background,
        ious[shape],
    )


def attribute_table(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[dict[str, bool]]:
    """Judge which attributes of its prompt each image has.

    Args:
        images (sequence of `Image.Image`): n of them.
        prompts (sequence of `str`): one per image, of the grammar.

    Returns:
        `list[dict[str, bool]]`: per image, attribute -> whether it is right, and the
        key ``all``.

    Raises:
        ValueError: the lengths differ, or a prompt is not of the grammar.
    """
    if len(images) != len(prompts):
        raise ValueError(
            f"prompts: expected one per image, got {len(prompts)} prompts for {len(images)} images"
        )
    table = []
    for image, prompt in zip(images, prompts, strict=True):
        row = verify(image).matches(parse_prompt(prompt))
        table.append({**row, "all": all(row.values())})
    return table


def score(images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
    """Grade images between 0 and 1.

    The grade is 0.95 times the share of right attributes, plus 0.05 times the sharpness
    of the shape (its intersection over union with the template) where the shape is
    right. An image is above 0.95 if and only if all of its attributes are right.

    Args:
        images (sequence of `Image.Image`): n of them.
        prompts (sequence of `str`): one per image, of the grammar.

    Returns:
        `np.ndarray`: float64 (n,).

    Raises:
        ValueError: the lengths differ, or a prompt is not of the grammar.
    """
    scores = []
    for image, prompt in zip(images, prompts, strict=True):
        scene, verdict = parse_prompt(prompt), verify(image)
        right = verdict.matches(scene)
        share = sum(right.values()) / len(right)
        scores.append(0.95 * share + 0.05 * (verdict.shape_iou if right["shape"] else 0.0))
    return np.array(scores, dtype=np.float64)
