"""Make pictures that compare images: models side by side, or one image framed.

The prompt is written below its images.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont

from ..runtime.missing import MaybeImage, Missing, placeholder

_MARGIN = 8
_BACKGROUND = (255, 255, 255)
_INK = (25, 25, 25)


def wrap_text(
    text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> list[str]:
    """Break a text into lines of at most about `width` pixels.

    Args:
        text (`str`): The text.
        width (`int`): Pixels.
        font (`ImageFont`): The font that it is drawn with.

    Returns:
        `list[str]`, at least one line.
    """
    per_line = max(8, int(width / font.getlength("n")))
    return textwrap.wrap(text, per_line) or [""]


def comparison_grid(
    rows: Sequence[tuple[str, Sequence[MaybeImage], Sequence[MaybeImage]]],
    *,
    left: str = "base",
    right: str = "tuned",
    cell: int | None = None,
    columns: int = 1,
) -> Image.Image:
    """Draw the images of two models side by side, one block per prompt.

    The same place holds the same seed. The prompt is written below.

    Args:
        rows (`Sequence[tuple[str, Sequence[Image], Sequence[Image]]]`): (prompt, base
            images, tuned images), equally many of each.
        left (`str`, *optional*, defaults to `"base"`): Heading of the first model.
        right (`str`, *optional*, defaults to `"tuned"`): Heading of the second model.
        cell (`int`, *optional*): Side of one image in the picture. None takes the
            images' own height, but at least 96, so that tiny images can be seen.
        columns (`int`, *optional*, defaults to `1`): Blocks beside each other.

    Returns:
        `PIL.Image.Image`.
    """
    return models_grid(
        [(prompt, sides) for prompt, *sides in rows], [left, right], cell=cell, columns=columns
    )


def _first_height(images: Iterable[MaybeImage]) -> int:
    return next((image.height for image in images if not isinstance(image, Missing)), 96)


def models_grid(
    rows: Sequence[tuple[str, Sequence[Sequence[MaybeImage]]]],
    headings: Sequence[str],
    *,
    cell: int | None = None,
    columns: int = 1,
) -> Image.Image:
    """Draw the images of any number of models, as `comparison_grid` does for two.

    Args:
        rows (`Sequence[tuple[str, Sequence[Sequence[Image]]]]`): (prompt, the images of
            every model), equally many of each.
        headings (`Sequence[str]`): One per model.
        cell (`int`, *optional*): Side of one image in the picture, see
            `comparison_grid`.
        columns (`int`, *optional*, defaults to `1`): Blocks beside each other.

    Returns:
        `PIL.Image.Image`.
    """
    images_of_all = (image for _, sides in rows for images in sides for image in images)
    side = cell or max(96, _first_height(images_of_all))
    font = ImageFont.load_default(max(11, side // 9))
    line = int(font.size * 1.3) if isinstance(font, ImageFont.FreeTypeFont) else 14
    count = len(rows[0][1][0])
    part = count * side + (count - 1) * 2
    block_width = len(headings) * (part + _MARGIN) - _MARGIN
    texts = [wrap_text(prompt, block_width, font)[:4] for prompt, _ in rows]
    names = [wrap_text(heading, part, font) for heading in headings]
    top = max(len(lines) for lines in names) * line + 2 * _MARGIN
    block_height = side + max(len(t) for t in texts) * line + 2 * _MARGIN
    vertical = -(-len(rows) // columns)
    width = columns * block_width + (columns + 1) * 2 * _MARGIN
    canvas = Image.new("RGB", (width, top + vertical * block_height), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for index, ((_, sides), text) in enumerate(zip(rows, texts, strict=True)):
        x = 2 * _MARGIN + (index % columns) * (block_width + 2 * _MARGIN)
        y = top + (index // columns) * block_height
        for s, images in enumerate(sides):
            offset = x + s * (part + _MARGIN)
            if index < columns:
                for i, content in enumerate(names[s]):
                    draw.text((offset, _MARGIN + i * line), content, fill=_INK, font=font)
            for i, image in enumerate(images):
                image = placeholder(image, side)
                scaled = image.convert("RGB").resize(
                    (side, side * image.height // image.width),
                    Image.Resampling.NEAREST
                    if side >= 2 * image.width
                    else Image.Resampling.LANCZOS,
                )
                canvas.paste(scaled.crop((0, 0, side, side)), (offset + i * (side + 2), y))
        for i, content in enumerate(text):
            draw.text((x, y + side + 2 + i * line), content, fill=_INK, font=font)
    return canvas


def framed_grid(
    rows: Sequence[tuple[str, Sequence[MaybeImage], int]], *, cell: int | None = None
) -> Image.Image:
    """Draw one row of images per prompt, with one of them framed.

    The prompt is written below.

    Args:
        rows (`Sequence[tuple[str, Sequence[Image], int]]`): (prompt, images, index of
            the framed one).
        cell (`int`, *optional*): Side of one image in the picture, see
            `comparison_grid`.

    Returns:
        `PIL.Image.Image`.
    """
    side = cell or max(96, _first_height(image for _, images, _ in rows for image in images))
    font = ImageFont.load_default(max(11, side // 9))
    line = max(14, side // 7)
    count = max(len(images) for _, images, _ in rows)
    width = 2 * _MARGIN + count * (side + _MARGIN)
    texts = [wrap_text(prompt, width - 2 * _MARGIN, font)[:4] for prompt, _, _ in rows]
    height = sum(side + len(text) * line + 3 * _MARGIN for text in texts)
    canvas = Image.new("RGB", (width, height + _MARGIN), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    y = _MARGIN
    for (_, images, best), text in zip(rows, texts, strict=True):
        for i, image in enumerate(images):
            image = placeholder(image, side)
            scale = side / max(image.size)
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            kind = Image.Resampling.NEAREST if scale >= 1.5 else Image.Resampling.LANCZOS
            x = _MARGIN + i * (side + _MARGIN)
            canvas.paste(image.convert("RGB").resize(size, kind), (x, y))
            if i == best:
                draw.rectangle(
                    (x - 3, y - 3, x + side + 2, y + side + 2), outline=(24, 140, 60), width=3
                )
        for j, content in enumerate(text):
            draw.text((_MARGIN, y + side + 4 + j * line), content, fill=_INK, font=font)
        y += side + len(text) * line + 3 * _MARGIN
    return canvas
