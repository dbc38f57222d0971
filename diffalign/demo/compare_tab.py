"""The *Compare* tab: one prompt and seed under two models.

A slider lies between the images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr
from PIL import Image

from ..errors import UserError
from .comparisons import ComparisonStore, Settings
from .engine import Engine, Request, bounded, enlarged
from .ui import Session, explained, inputs, score_table


@dataclass(frozen=True)
class ComparePage:
    """The components of the tab that a past comparison fills again.

    Attributes:
        inputs (`list`): Prompt, seed, steps, guidance, size, left and right model, and
            LoRA scale.
        outputs (`list`): Slider, scores and status.
    """

    inputs: list[Any]
    outputs: list[Any]


def build(
    engine: Engine, session: Session, example: str, store: ComparisonStore | None = None
) -> ComparePage:
    """Add the tab's components and events to the page.

    Args:
        engine (`Engine`): Models and scorers.
        session (`Session`): The visitors' jobs.
        example (`str`): The first prompt.
        store (`ComparisonStore`, *optional*): Where comparisons are kept. None keeps
            none.

    Returns:
        `ComparePage`.
    """
    names = engine.names
    prompt, seed, steps, guidance, side = inputs(engine, names[0], example, "compare")
    with gr.Row():
        left = gr.Dropdown(
            names, value=names[0], label="Left", elem_id="compare-left", min_width=140
        )
        right = gr.Dropdown(
            names, value=names[-1], label="Right", elem_id="compare-right", min_width=140
        )
        high = engine.limits.lora_scale
        scale = gr.Slider(
            0,
            high,
            value=1.0,
            step=0.05,
            label="LoRA scale (times each LoRA's own)",
            elem_id="compare-scale",
            min_width=200,
        )
    with gr.Row():
        go = gr.Button("Draw both", variant="primary", elem_id="compare-go")
        another = gr.Button("Seed + 1", elem_id="compare-next")
        stop = gr.Button("Stop", variant="stop", elem_id="compare-stop")
    status = gr.Markdown("Both images start from the same noise.", elem_id="compare-status")
    slider = gr.ImageSlider(
        show_label=False,
        format="png",
        interactive=False,
        elem_id="compare-slider",
        buttons=["fullscreen"],
        max_height=420,
    )
    scores = gr.Markdown(elem_id="compare-scores")

    def draw(  # type: ignore[no-untyped-def]
        prompt,
        seed,
        steps,
        guidance,
        side,
        left,
        right,
        scale,
        request: gr.Request,
        progress=gr.Progress(),  # noqa: B008
    ):
        with explained():
            image_request = engine.read(prompt, seed, steps, guidance, side)
            bounded("LoRA scale", scale, 0, engine.limits.lora_scale)
            for name in (left, right):
                engine.pipe(name)
            images = []
            for i, name in enumerate((left, right)):
                own = engine.models[name].lora_scale
                for kind, value in session.run(
                    request, partial(engine.draw, name, image_request, lora_scale=scale * own)
                ):
                    if kind == "step":
                        progress((i * value[1] + value[0], 2 * value[1]), desc=f"drawing {name}")
                    else:
                        images.append(value)
            yield gr.skip(), gr.skip(), "scoring"
            values = engine.score(images, image_request.prompt)
            table = score_table(values, [f"left: {left}", f"right: {right}"])
            id = _keep(store, image_request, (left, right), float(scale), images, values)
            yield tuple(enlarged(image) for image in images), table, caption(image_request, id)

    arguments = [prompt, seed, steps, guidance, side, left, right, scale]
    options: dict[str, Any] = {"concurrency_id": "draw", "concurrency_limit": 1}
    events = [
        go.click(draw, arguments, [slider, scores, status], api_name="compare", **options),
        prompt.submit(
            draw, arguments, [slider, scores, status], api_visibility="private", **options
        ),
    ]
    more = another.click(
        lambda seed: min(int(seed or 0) + 1, engine.limits.seed),
        seed,
        seed,
        queue=False,
        api_visibility="private",
    )
    events.append(
        more.then(draw, arguments, [slider, scores, status], api_visibility="private", **options)
    )
    stop.click(session.cancel, None, status, cancels=events, queue=False, api_visibility="private")
    return ComparePage(arguments, [slider, scores, status])


def _keep(
    store: ComparisonStore | None,
    request: Request,
    models: tuple[str, str],
    lora_scale: float,
    images: Sequence[Image.Image],
    scores: Mapping[str, Sequence[float | None]],
) -> str | None:
    """Keep a comparison for the gallery, and return its id where that worked."""
    if store is None:
        return None
    settings = Settings(
        prompt=request.prompt,
        seed=request.seed,
        steps=request.settings["num_inference_steps"],
        guidance=float(request.settings["guidance_scale"]),
        side=request.settings["width"],
        left=models[0],
        right=models[1],
        lora_scale=lora_scale,
    )
    try:
        return store.add(settings, images, scores)
    except (OSError, UserError) as error:  # a full disk takes the link, not the images
        print(f"--gallery_dir: cannot write there ({error})", flush=True)
        return None


def caption(request: Request, id: str | None = None) -> str:
    """Describe both images in a line, with a link that shows them again.

    Args:
        request (`Request`): What was drawn.
        id (`str`, *optional*): Id of the comparison. None makes no link.
    """
    settings = ", ".join(
        f"{key.replace('_', ' ')} {value:g}" for key, value in request.settings.items()
    )
    link = "" if id is None else f" [Link to this comparison](?comparison={id})"
    return f"Seed {request.seed}, {settings}: the same initial noise on both sides.{link}"
