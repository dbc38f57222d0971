"""The *Scores* tab: drop images and a prompt, and see what every scorer says."""

from __future__ import annotations

import html
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..errors import UserError
from ..runtime.decoding import UnreadableImage, decode
from .engine import Engine
from .ui import explained

MOST_IMAGES = 16
"""Images of one request."""


def refuse_links(component: gr.Gallery) -> None:
    """Keep a component from fetching files from links that visitors send.

    It is a change of the object and not a subclass, because gradio writes a file beside
    every module that has subclasses of its components.

    Args:
        component (`gr.Gallery`): A component that takes files.
    """
    keep = component.async_move_resource_to_block_cache

    async def keep_files_only(source: str | Path | None) -> str | None:
        if "://" in str(source or ""):
            raise gr.Error("images: upload files, not links", print_exception=False, title="")
        return await keep(source)

    component.async_move_resource_to_block_cache = keep_files_only  # type: ignore[method-assign,assignment]


def build(engine: Engine, example: str) -> None:
    """Add the tab's components and events to the page.

    Args:
        engine (`Engine`): Has the scorers.
        example (`str`): The first prompt.
    """
    images = gr.Gallery(
        label=f"Images (at most {MOST_IMAGES})",
        file_types=["image"],
        type="filepath",
        sources=["upload", "clipboard"],
        columns=4,
        object_fit="contain",
        height=260,
        buttons=[],
        interactive=True,
        elem_id="scores-images",
    )
    refuse_links(images)
    prompt = gr.Textbox(
        example,
        label="Prompt",
        max_length=engine.limits.prompt_chars,
        max_lines=4,
        elem_id="scores-prompt",
    )
    go = gr.Button("Score", variant="primary", elem_id="scores-go")
    table = gr.Markdown(
        "Every image gets a row, every scorer a column. Scores of one scorer can be compared, "
        "those of two cannot.",
        elem_id="scores-table",
    )

    def score(files: Sequence[tuple[str, str | None]] | None, prompt: object) -> str:
        with explained():
            text = engine.read(prompt, 0, 1, 1).prompt
            names, pictures = _read(files or ())
            return scores_table(engine.score(pictures, text), names, engine.lower_is_better)

    options: dict[str, Any] = {"concurrency_id": "draw", "concurrency_limit": 1}
    go.click(score, [images, prompt], table, api_name="scores", **options)
    prompt.submit(score, [images, prompt], table, api_visibility="private", **options)


def _read(files: Sequence[tuple[str, str | None]]) -> tuple[list[str], list[Image.Image]]:
    """Decode uploaded files, and return them with their names."""
    if not files:
        raise UserError("images: drop at least one")
    if len(files) > MOST_IMAGES:
        raise UserError(f"images: {len(files)} are too many; at most {MOST_IMAGES} at a time")
    names, pictures = [], []
    for place, (path, _) in enumerate(files, 1):
        name = Path(path).name[:40]
        try:
            pictures.append(decode(path))
        except UnreadableImage as error:
            raise UserError(f"images: {place} ({name}) cannot be used: {error}") from None
        names.append(name)
    return names, pictures


def scores_table(
    scores: Mapping[str, Sequence[float | None]],
    names: Sequence[str],
    lower_is_better: Collection[str] = (),
) -> str:
    """Format scores as a Markdown table, a row per image and a column per scorer.

    The best score of a scorer is bold.

    Args:
        scores (`Mapping[str, Sequence[float | None]]`): Scorer -> B scores, None where
            one is missing.
        names (`Sequence[str]`): Names of the B images.
        lower_is_better (`Collection[str]`, *optional*): Scorers whose lowest score is
            the best.
    """
    columns = list(scores)
    best = {
        scorer: (min if scorer in lower_is_better else max)(
            (v for v in values if v is not None), default=None
        )
        for scorer, values in scores.items()
    }
    lines = [
        f"| | image | {' | '.join(html.escape(c) for c in columns)} |",
        f"|{'---|' * (len(columns) + 2)}",
    ]
    for row, name in enumerate(names):
        cells = []
        for scorer in columns:
            value = scores[scorer][row]
            text = "no score" if value is None else f"{value:.4g}"
            is_best = value is not None and value == best[scorer] and len(names) > 1
            cells.append(f"**{text}**" if is_best else text)
        safe = html.escape(name).replace("|", " ").replace("`", " ")
        lines.append(f"| {row + 1} | {safe} | {' | '.join(cells)} |")
    return "\n".join(lines)
