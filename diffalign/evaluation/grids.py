"""Side-by-side pictures: base left, tuned right, same seeds, prompts beneath."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_MARGIN = 8
_BACKGROUND = (255, 255, 255)
_INK = (25, 25, 25)


def _lines(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    per_line = max(8, int(width / font.getlength("n")))
    return textwrap.wrap(text, per_line)[:4] or [""]


def comparison_grid(
    rows: Sequence[tuple[str, Sequence[Image.Image], Sequence[Image.Image]]],
    *,
    left: str = "base",
    right: str = "tuned",
    cell: int | None = None,
    columns: int = 1,
) -> Image.Image:
    """One block per prompt: its images under the two models, same seed in the same place, the prompt beneath.

    Args:
        rows: (prompt, base images, tuned images), equally many of each.
        left, right (`str`): headings.
        cell (`int`, *optional*): side of one image in the picture; at least 96, so that tiny images can be seen.
        columns (`int`, *optional*, defaults to `1`): blocks beside each other.
    """
    side = cell or max(96, rows[0][1][0].height)
    font = ImageFont.load_default(max(11, side // 9))
    line = int(font.size * 1.3) if isinstance(font, ImageFont.FreeTypeFont) else 14
    count = len(rows[0][1])
    half = count * side + (count - 1) * 2
    block_width = 2 * half + _MARGIN
    texts = [_lines(prompt, block_width, font) for prompt, _, _ in rows]
    block_height = side + max(len(t) for t in texts) * line + 2 * _MARGIN
    vertical = -(-len(rows) // columns)
    width = columns * block_width + (columns + 1) * 2 * _MARGIN
    canvas = Image.new("RGB", (width, line + 2 * _MARGIN + vertical * block_height), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for index, ((_, base, tuned), text) in enumerate(zip(rows, texts, strict=True)):
        x = 2 * _MARGIN + (index % columns) * (block_width + 2 * _MARGIN)
        y = line + 2 * _MARGIN + (index // columns) * block_height
        if index < columns:
            draw.text((x, _MARGIN), left, fill=_INK, font=font)
            draw.text((x + half + _MARGIN, _MARGIN), right, fill=_INK, font=font)
        for offset, images in ((0, base), (half + _MARGIN, tuned)):
            for i, image in enumerate(images):
                scaled = image.convert("RGB").resize(
                    (side, side * image.height // image.width),
                    Image.Resampling.NEAREST if side >= 2 * image.width else Image.Resampling.LANCZOS,
                )
                canvas.paste(scaled.crop((0, 0, side, side)), (x + offset + i * (side + 2), y))
        for i, content in enumerate(text):
            draw.text((x, y + side + 2 + i * line), content, fill=_INK, font=font)
    return canvas
