"""Draw the resampling genealogy of one prompt as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..generation.grids import wrap_text
from .step_trace import StepTrace

_BACKGROUND, _INK, _PALE, _STRONG, _BEST = (
    (255, 255, 255),
    (25, 25, 25),
    (205, 211, 222),
    (31, 98, 171),
    (24, 140, 60),
)
_MARGIN = 14


Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Population(Protocol):
    """The fields of a `SteeringResult` that the picture needs."""

    prompts: list[str]
    images: list[list[Any]]
    rewards: Tensor
    lmbda: Tensor
    log_z: Tensor
    roots: Tensor
    final_ess: Tensor
    steps: list[StepTrace]

    @property
    def weights(self) -> Tensor:
        """Normalised weights, (P, K)."""

    @property
    def best_index(self) -> Tensor:
        """The particle of highest reward of each prompt, (P,)."""

    @property
    def num_roots(self) -> Tensor:
        """How many initial noises still have descendants, (P,)."""


def surviving(ancestors: Sequence[Sequence[int]], num_particles: int) -> list[set[int]]:
    """Find the slots of every scored step whose lineage reaches the end.

    Args:
        ancestors (sequence): one row per scored step. Slot k goes on from slot
            ``ancestors[step][k]``.
        num_particles (`int`): K.

    Returns:
        `list[set[int]]`: one set per scored step.
    """
    alive = set(range(num_particles))
    survivors = []
    for step in reversed(ancestors):
        alive = {int(step[k]) for k in alive}
        survivors.append(alive)
    return survivors[::-1]


def lineage_picture(result: Population, prompt: int = 0, *, cell: int | None = None) -> Image.Image:
    """Draw the resampling genealogy of one prompt.

    Columns are the scored steps and the returned images, rows are the particle slots.
    Predicted images are shown before resampling, with their reward beneath. Lines run
    to the slots that went on from them. Lineages that reach the end are drawn strong,
    the others pale. The returned image of highest reward is framed.

    Args:
        result (`SteeringResult`): of a steering call.
        prompt (`int`, *optional*, defaults to `0`): index of the prompt.
        cell (`int`, *optional*): side of a thumbnail in pixels. None is 96, and 64
            beyond eight particles.

    Returns:
        `Image.Image`: RGB.

    Raises:
        IndexError: no such prompt.
    """
    if not -len(result.prompts) <= prompt < len(result.prompts):
        raise IndexError(f"prompt: expected an index below {len(result.prompts)}, got {prompt}")
    k, steps = result.rewards.shape[1], result.steps
    side = cell or (96 if k <= 8 else 64)
    caption = wrap_text(
        result.prompts[prompt], _Tree.width_of(len(steps), side) - 2 * _MARGIN, _Tree.fonts(side)[0]
    )[:3]
    tree = _Tree(steps, prompt, k, side, len(caption) + 1)
    canvas, draw, font, small, line, corner = (
        tree.canvas,
        tree.draw,
        tree.font,
        tree.small,
        tree.line,
        tree.corner,
    )
    x = corner(len(steps), 0)[0]
    draw.text((x, _MARGIN), "returned", fill=_INK, font=font)
    draw.text(
        (x, _MARGIN + line + 2), f"ESS {float(result.final_ess[prompt]):.2f}", fill=_INK, font=small
    )
    best = int(result.best_index[prompt])
    for slot in range(k):
        at = corner(len(steps), slot)
        image = result.images[prompt][slot]
        _paste(canvas, draw, image if isinstance(image, Image.Image) else None, at, side)
        if slot == best:
            draw.rectangle(
                (at[0] - 3, at[1] - 3, at[0] + side + 2, at[1] + side + 2), outline=_BEST, width=3
            )
        reward, weight = float(result.rewards[prompt, slot]), float(result.weights[prompt, slot])
        draw.text(
            (at[0], at[1] + side + 3),
            _number(reward),
            fill=_BEST if slot == best else _INK,
            font=small,
        )
        beside = [
            f"weight {weight:.2f}",
            f"root {int(result.roots[prompt, slot])}",
            *(["best"] if slot == best else []),
        ]
        for i, words in enumerate(beside):
            draw.text(
                (at[0] + side + 8, at[1] + i * (line + 1)),
                words,
                fill=_BEST if words == "best" else _INK,
                font=small,
            )
    y = tree.bottom + 2
    for words in caption:
        draw.text((_MARGIN, y), words, fill=_INK, font=font)
        y += line + 4
    numbers = (
        f"lmbda {float(result.lmbda[prompt]):.3g}, log Z {float(result.log_z[prompt]):.3f}, "
        f"{int(result.num_roots[prompt])} of {k} initial noises survive"
    )
    draw.text((_MARGIN, y), numbers, fill=_INK, font=small)
    return canvas


def trace_picture(steps: Sequence[StepTrace], prompt: int = 0, *, cell: int = 96) -> Image.Image:
    """Draw the genealogy of one prompt while its run is still going on.

    Lineages that are alive so far are drawn strong.

    Args:
        steps (sequence of `StepTrace`): the scored steps so far, at least one.
        prompt (`int`, *optional*, defaults to `0`): index of the prompt.
        cell (`int`, *optional*, defaults to `96`): side of a thumbnail in pixels.

    Returns:
        `Image.Image`: RGB.
    """
    return _Tree(steps, prompt, steps[0].rewards.shape[1], cell, 0).canvas


class _Tree:
    """The canvas, with the columns of the scored steps and the lines between them."""

    def __init__(
        self, steps: Sequence[StepTrace], prompt: int, k: int, side: int, caption_lines: int
    ) -> None:
        self.side, self.line = side, max(14, side // 6)
        self.font, self.small = self.fonts(side)
        self.pitch = side + self.line + 8
        self.top = _MARGIN + 3 * self.line
        self.bottom = self.top + k * self.pitch
        height = self.bottom + caption_lines * (self.line + 4) + _MARGIN
        self.canvas = Image.new("RGB", (self.width_of(len(steps), side), height), _BACKGROUND)
        self.draw = ImageDraw.Draw(self.canvas)
        ancestors = [step.ancestors[prompt].tolist() for step in steps]
        alive = [*surviving(ancestors, k), set(range(k))]
        for strong in (False, True):
            for j, row in enumerate(ancestors):
                for child, parent in enumerate(row):
                    if (child in alive[j + 1]) == strong:
                        (x0, y0), (x1, y1) = self.corner(j, parent), self.corner(j + 1, child)
                        ends = (x0 + side, y0 + side // 2, x1, y1 + side // 2)
                        self.draw.line(
                            ends, fill=_STRONG if strong else _PALE, width=3 if strong else 2
                        )
        for j, step in enumerate(steps):
            x = self.corner(j, 0)[0]
            self.draw.text((x, _MARGIN), f"step {step.index}", fill=_INK, font=self.font)
            state = "resampled" if bool(step.resampled[prompt]) else "kept"
            ess = f"ESS {float(step.ess[prompt]):.2f}, {state}"
            self.draw.text((x, _MARGIN + self.line + 2), ess, fill=_INK, font=self.small)
            for slot in range(k):
                picture = None if step.thumbnails is None else step.thumbnails[prompt][slot]
                at = self.corner(j, slot)
                _paste(self.canvas, self.draw, picture, at, side, dim=slot not in alive[j])
                self.draw.text(
                    (at[0], at[1] + side + 1),
                    _number(float(step.rewards[prompt, slot])),
                    fill=_INK,
                    font=self.small,
                )

    @staticmethod
    def fonts(side: int) -> tuple[Font, Font]:
        return ImageFont.load_default(max(11, side // 7)), ImageFont.load_default(max(9, side // 9))

    @staticmethod
    def width_of(steps: int, side: int) -> int:
        return 2 * _MARGIN + steps * (side + max(40, side // 2)) + side + 8 * max(14, side // 6)

    def corner(self, j: int, slot: int) -> tuple[int, int]:
        """Return the top left of a thumbnail."""
        return _MARGIN + j * (self.side + max(40, self.side // 2)), self.top + slot * self.pitch


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def _paste(
    canvas: Image.Image,
    draw: ImageDraw.ImageDraw,
    picture: Image.Image | None,
    at: tuple[int, int],
    side: int,
    dim: bool = False,
) -> None:
    if picture is None:
        draw.rectangle(
            (*at, at[0] + side - 1, at[1] + side - 1), fill=(235, 235, 235), outline=_PALE
        )
        return
    scale = side / max(picture.size)
    width, height = picture.size
    size = max(1, round(width * scale)), max(1, round(height * scale))
    nearest = side >= 1.5 * max(picture.size)
    shown = picture.convert("RGB").resize(
        size, Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS
    )
    if dim:
        shown = Image.blend(shown, Image.new("RGB", shown.size, _BACKGROUND), 0.65)
    canvas.paste(shown, (at[0] + (side - shown.width) // 2, at[1] + (side - shown.height) // 2))
