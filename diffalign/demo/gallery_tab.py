"""The *Gallery* tab: every comparison that was drawn, with a link that restores it."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .compare_tab import ComparePage, caption
from .comparisons import ComparisonStore
from .engine import Engine, Request, enlarged
from .ui import score_table

SHOWN = 48
"""Comparisons on the page. Links restore the older ones as well."""


def build(
    app: gr.Blocks, engine: Engine, store: ComparisonStore, page: ComparePage, tabs: gr.Tabs
) -> None:
    """Add the tab, its components and its events to the page.

    Args:
        app (`gr.Blocks`): The page. Opened by a link, it restores that comparison.
        engine (`Engine`): Its models can be chosen again.
        store (`ComparisonStore`): The comparisons.
        page (`ComparePage`): Where a comparison is restored.
        tabs (`gr.Tabs`): The tabs of the page, to switch to *Compare*.
    """
    with gr.Tab("Gallery", id="gallery") as tab:
        status = gr.Markdown("", elem_id="gallery-status")
        gallery = gr.Gallery(
            label="Comparisons, the newest first",
            show_label=True,
            columns=3,
            object_fit="contain",
            height="auto",
            allow_preview=False,
            interactive=False,
            buttons=[],
            format="png",
            elem_id="gallery-images",
        )
        ids = gr.State([])

    def show() -> tuple[list[Any], list[str], str]:
        newest = store.newest(SHOWN)
        items, shown = [], []
        for id, record in newest:
            thumbnail = store.thumbnail(id)
            if thumbnail is not None:
                drawn = record.settings
                items.append((thumbnail, f"seed {drawn.seed}, guidance {drawn.guidance:g}"))
                shown.append(id)
        text = (
            "Choose one to see it again, with everything set as it was."
            if items
            else "Nothing was compared yet. Every comparison of the first tab appears here."
        )
        return items, shown, text

    def choose(shown: list[str], event: gr.SelectData) -> list[Any]:
        index = int(event.index)  # type: ignore[arg-type]
        id = shown[index] if 0 <= index < len(shown) else ""
        return [gr.Tabs(selected="compare"), *restore(engine, store, page, id)]

    def follow(request: gr.Request) -> list[Any]:
        return restore(engine, store, page, str(request.query_params.get("comparison", "")))

    tab.select(show, None, [gallery, ids, status], queue=False, api_visibility="private")
    gallery.select(
        choose,
        ids,
        [tabs, *page.inputs, *page.outputs],
        queue=False,
        api_visibility="private",
    )
    app.load(follow, None, [*page.inputs, *page.outputs], queue=False, api_visibility="private")


def restore(engine: Engine, store: ComparisonStore, page: ComparePage, id: str) -> list[Any]:
    """Return what the *Compare* tab shows for a comparison of the past.

    Args:
        engine (`Engine`): Tells which models are there.
        store (`ComparisonStore`): The comparisons.
        page (`ComparePage`): The components to fill.
        id (`str`): Id from a link. Empty leaves the tab as it is.

    Returns:
        `list`: Values of `page.inputs` and `page.outputs`.
    """
    skipped = [gr.skip()] * (len(page.inputs) + len(page.outputs))
    if not id:
        return skipped
    record, images = store.get(id), store.images(id)
    if record is None or images is None:
        return [*skipped[:-1], "This link's comparison is no longer in the gallery."]
    settings = record.settings
    missing = sorted({settings.left, settings.right} - set(engine.names))
    sides = [gr.skip() if name in missing else name for name in (settings.left, settings.right)]
    size = {"height": settings.side, "width": settings.side}
    request = Request(
        settings.prompt,
        settings.seed,
        {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance, **size},
    )
    text = caption(request, id)
    if missing:
        text += f" This page has no {' and no '.join(missing)} to draw it again."
    return [
        settings.prompt,
        settings.seed,
        settings.steps,
        settings.guidance,
        settings.side,
        *sides,
        settings.lora_scale,
        tuple(enlarged(image) for image in images),
        score_table(record.scores, [f"left: {settings.left}", f"right: {settings.right}"]),
        text,
    ]
