"""The lineage tree of a steered population as a picture: who was predicted to become what, who was copied, who died."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from ..evaluation.grids import wrap_text

if TYPE_CHECKING:
    from .result import SteeringResult

_BACKGROUND, _INK, _PALE, _STRONG, _BEST = (255, 255, 255), (25, 25, 25), (205, 211, 222), (31, 98, 171), (24, 140, 60)
_MARGIN = 14


def surviving(ancestors: Sequence[Sequence[int]], num_particles: int) -> list[set[int]]:
    """For every scored step the slots whose lineage reaches the end.

    Args:
        ancestors: per scored step, slot k goes on from slot ``ancestors[step][k]``.
        num_particles (`int`): K.
    """
    alive = set(range(num_particles))
    found = []
    for step in reversed(ancestors):
        alive = {int(step[k]) for k in alive}
        found.append(alive)
    return found[::-1]


def lineage_picture(result: SteeringResult, prompt: int = 0, *, cell: int | None = None) -> Image.Image:
    """Draws one prompt's tree: columns are the scored steps and the returned images, rows the particle slots.

    Predicted images are shown before resampling, their reward beneath; lines run to the slots that went on from them. Lineages that reach the end are
    drawn strong, the others pale; the returned image of highest reward is framed.

    Args:
        result (`SteeringResult`): of a steering call.
        prompt (`int`): index of the prompt.
        cell (`int`, *optional*): side of a thumbnail in pixels; 96, and 64 beyond eight particles.

    Raises:
        IndexError: no such prompt.
    """
    if not -len(result.prompts) <= prompt < len(result.prompts):
        raise IndexError(f"prompt: {prompt} of {len(result.prompts)}")
    k, steps = result.rewards.shape[1], result.steps
    side = cell or (96 if k <= 8 else 64)
    font, small = ImageFont.load_default(max(11, side // 7)), ImageFont.load_default(max(9, side // 9))
    ancestors = [step.ancestors[prompt].tolist() for step in steps]
    alive = [*surviving(ancestors, k), set(range(k))]
    gap, line = max(40, side // 2), max(14, side // 6)
    pitch = side + line + 8
    column = side + gap
    width = 2 * _MARGIN + len(steps) * column + side + 8 * line
    caption = wrap_text(result.prompts[prompt], width - 2 * _MARGIN, font)[:3]
    top = _MARGIN + 3 * line
    height = top + k * pitch + (len(caption) + 1) * (line + 4) + _MARGIN
    canvas = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)

    def corner(j: int, slot: int) -> tuple[int, int]:
        return _MARGIN + j * column, top + slot * pitch

    for strong in (False, True):
        for j, row in enumerate(ancestors):
            for child, parent in enumerate(row):
                if (child in alive[j + 1]) == strong:
                    (x0, y0), (x1, y1) = corner(j, parent), corner(j + 1, child)
                    ends = (x0 + side, y0 + side // 2, x1, y1 + side // 2)
                    draw.line(ends, fill=_STRONG if strong else _PALE, width=3 if strong else 2)
    for j, step in enumerate(steps):
        x = corner(j, 0)[0]
        draw.text((x, _MARGIN), f"step {step.index}", fill=_INK, font=font)
        state = "resampled" if bool(step.resampled[prompt]) else "kept"
        draw.text((x, _MARGIN + line + 2), f"ESS {float(step.ess[prompt]):.2f}, {state}", fill=_INK, font=small)
        for slot in range(k):
            picture = None if step.thumbnails is None else step.thumbnails[prompt][slot]
            _paste(canvas, draw, picture, corner(j, slot), side, dim=slot not in alive[j])
            at = corner(j, slot)
            draw.text((at[0], at[1] + side + 1), _number(float(step.rewards[prompt, slot])), fill=_INK, font=small)
    x = corner(len(steps), 0)[0]
    draw.text((x, _MARGIN), "returned", fill=_INK, font=font)
    draw.text((x, _MARGIN + line + 2), f"ESS {float(result.final_ess[prompt]):.2f}", fill=_INK, font=small)
    best = int(result.best_index[prompt])
    for slot in range(k):
        at = corner(len(steps), slot)
        image = result.images[prompt][slot]
        _paste(canvas, draw, image if isinstance(image, Image.Image) else None, at, side)
        if slot == best:
            draw.rectangle((at[0] - 3, at[1] - 3, at[0] + side + 2, at[1] + side + 2), outline=_BEST, width=3)
        reward, weight = float(result.rewards[prompt, slot]), float(result.weights[prompt, slot])
        draw.text((at[0], at[1] + side + 3), _number(reward), fill=_BEST if slot == best else _INK, font=small)
        beside = [f"weight {weight:.2f}", f"root {int(result.roots[prompt, slot])}", *(["best"] if slot == best else [])]
        for i, words in enumerate(beside):
            draw.text((at[0] + side + 8, at[1] + i * (line + 1)), words, fill=_BEST if words == "best" else _INK, font=small)
    y = top + k * pitch + 2
    for words in caption:
        draw.text((_MARGIN, y), words, fill=_INK, font=font)
        y += line + 4
    numbers = f"lmbda {float(result.lmbda[prompt]):.3g}, log Z {float(result.log_z[prompt]):.3f}, {int(result.num_roots[prompt])} of {k} initial noises survive"
    draw.text((_MARGIN, y), numbers, fill=_INK, font=small)
    return canvas


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def _paste(
    canvas: Image.Image, draw: ImageDraw.ImageDraw, picture: Image.Image | None, at: tuple[int, int], side: int, dim: bool = False
) -> None:
    if picture is None:
        draw.rectangle((*at, at[0] + side - 1, at[1] + side - 1), fill=(235, 235, 235), outline=_PALE)
        return
    scale = side / max(picture.size)
    size = tuple(max(1, round(x * scale)) for x in picture.size)
    nearest = side >= 1.5 * max(picture.size)
    shown = picture.convert("RGB").resize(size, Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS)  # type: ignore[arg-type]
    if dim:
        shown = Image.blend(shown, Image.new("RGB", shown.size, _BACKGROUND), 0.65)
    canvas.paste(shown, (at[0] + (side - shown.width) // 2, at[1] + (side - shown.height) // 2))
