"""Read the attributes of a shapes image from its pixels: the ground truth of the world.

Nothing is learned. The background is the median colour of the border, and the object is
what differs from it. The colour is the nearest one of the palette. The shape is the
template with the best intersection over union inside the object's bounding box. The
style is ``lit`` where the top of the image is lighter than its bottom. Rendered images
are read without error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from .prompts import ATTRIBUTES, PREFERRED_STYLE, Scene, parse_prompt
from .renderer import BACKGROUND_PALETTE, PALETTE, RESOLUTION, shape_polygon

_OBJECT_DISTANCE = 60.0
_MIN_PIXELS = 40
_SIZE_THRESHOLD = 27.0
_POSITION_THRESHOLDS = (26.5, 37.5)
_MIN_SHAPE_IOU = 0.6
_MAX_COLOR_DISTANCE = 110.0
# No object reaches these rows. Rendered images differ there by 0 or by at least 35.
_STYLE_ROWS = 6
_STYLE_THRESHOLD = 18.0

ATTRIBUTE_WEIGHT, STYLE_WEIGHT, SHARPNESS_WEIGHT = 0.8, 0.15, 0.05
"""What attributes, style and sharpness count in the graded score of `score`."""


@dataclass(frozen=True)
class Verdict:
    """The attributes that the verifier read from an image.

    An attribute is None where nothing could be read, as there is no object or no clear
    colour or shape.

    Args:
        size, color, shape, position, background (`str`, *optional*): the attributes.
        style (`str`): ``flat`` or ``lit``. Prompts do not name it.
        shape_iou (`float`, *optional*, defaults to `0.0`): intersection over union of
            the object with the template of `shape`.
    """

    size: str | None
    color: str | None
    shape: str | None
    position: str | None
    background: str | None
    style: str
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
    lightening = pixels[:_STYLE_ROWS].mean() - pixels[-_STYLE_ROWS:].mean()
    style = "lit" if lightening > _STYLE_THRESHOLD else "flat"
    mask = np.linalg.norm(pixels - back, axis=-1) > _OBJECT_DISTANCE
    if mask.sum() < _MIN_PIXELS:
        return Verdict(None, None, None, None, background, style)
    mask = _largest_component(mask)
    if mask.sum() < _MIN_PIXELS:
        return Verdict(None, None, None, None, background, style)
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
        style,
        ious[shape],
    )


def attribute_table(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[dict[str, bool]]:
    """Judge which attributes of its prompt each image has, and whether it looks good.

    Args:
        images (sequence of `Image.Image`): n of them.
        prompts (sequence of `str`): one per image, of the grammar.

    Returns:
        `list[dict[str, bool]]`: per image, attribute -> whether it is right. The key
        ``all`` says whether all of these are. The key ``style`` says whether the style
        is the preferred one, which ``all`` does not ask for.

    Raises:
        ValueError: the lengths differ, or a prompt is not of the grammar.
    """
    if len(images) != len(prompts):
        raise ValueError(
            f"prompts: expected one per image, got {len(prompts)} prompts for {len(images)} images"
        )
    table = []
    for image, prompt in zip(images, prompts, strict=True):
        verdict = verify(image)
        row = verdict.matches(parse_prompt(prompt))
        style = verdict.style == PREFERRED_STYLE
        table.append({**row, "all": all(row.values()), "style": style})
    return table


def score(images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
    """Grade images between 0 and 1.

    The grade has three parts: 0.8 times the share of the five attributes that are
    right, 0.15 where the style is the preferred one, and 0.05 times the sharpness of
    the shape (its intersection over union with the template) where the shape is right.
    An image is above 0.95 if and only if all of its attributes are right and its style
    is the preferred one.

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
        scores.append(
            ATTRIBUTE_WEIGHT * share
            + STYLE_WEIGHT * (verdict.style == PREFERRED_STYLE)
            + SHARPNESS_WEIGHT * (verdict.shape_iou if right["shape"] else 0.0)
        )
    return np.array(scores, dtype=np.float64)
