"""The *Thumbs* tab: one image at a time, liked or not.

Every thumb is on disk before the next image comes.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from typing import Any

import gradio as gr

from ..errors import UserError
from .answers import ANNOTATOR_CHARS, Pending
from .engine import Engine, enlarged
from .likes import LikeStore, Shown
from .ui import Session, explained, export_button


class Liking:
    """Give visitors images to judge, and take their thumbs.

    The images are drawn for random prompts by one of two models.

    Args:
        engine (`Engine`): Draws.
        store (`LikeStore`): Stores the thumbs.
        prompts (`Sequence[str]`): Prompts to draw.
        models (`Sequence[str]`): Names of the models.

    Raises:
        UserError: There is no prompt.
    """

    def __init__(
        self, engine: Engine, store: LikeStore, prompts: Sequence[str], models: Sequence[str]
    ) -> None:
        self.engine, self.store = engine, store
        self.prompts, self.models = list(prompts), list(models)
        self.pending = Pending()
        if not self.prompts:
            raise UserError(
                "--prompts: the list is empty; name a prompt set or a file with a prompt per line"
            )

    def new_image(self, visitor: str) -> Shown:
        """Draw a visitor's next image, and remember it until its thumb.

        Args:
            visitor (`str`): Who asks.
        """
        rng = random.SystemRandom()
        prompt, model = rng.choice(self.prompts), rng.choice(self.models)
        settings = self.engine.defaults(model)
        request = self.engine.read(
            prompt[: self.engine.limits.prompt_chars],
            rng.randrange(self.engine.limits.seed),
            settings["num_inference_steps"],
            settings["guidance_scale"],
        )
        image = self.engine.draw(model, request)
        facts = {"seed": request.seed, **request.settings}
        shown = Shown(uuid.uuid4().hex, request.prompt, image, model, facts)
        self.pending.put(visitor, shown)
        return shown

    def judge(self, visitor: str, shown: object, thumb: str, annotator: object) -> bool:
        """Take a thumb for the image that the visitor sees.

        Args:
            visitor (`str`): Who judges.
            shown: Id of the image.
            thumb (`str`): `up` or `down`.
            annotator: The name that the visitor gave.

        Returns:
            `bool`: False if the thumb was for another image (a key pressed twice).

        Raises:
            UserError: There is no such thumb.
        """
        image = self.pending.take(visitor, shown)
        return image is not None and self.store.add(image, thumb, annotator)

    def state(self) -> str:
        """Return one line about all thumbs."""
        shares = self.store.shares()
        if not shares:
            return "No thumbs yet." + self.store.remarks()
        parts = [
            f"**{name}** {up} of {total} liked" for name, (up, total) in sorted(shares.items())
        ]
        return f"{len(self.store.votes)} thumbs: {', '.join(parts)}.{self.store.remarks()}"


def build(liking: Liking, session: Session, export: bool) -> None:
    """Add the tab's components and events to the page.

    Args:
        liking (`Liking`): Gives images and takes thumbs.
        session (`Session`): Knows the visitors.
        export (`bool`): Let visitors download all thumbs as a dataset.
    """
    gr.Markdown("Do you like this image for its prompt? Keys: **+** or ↑ yes, **-** or ↓ no.")
    with gr.Row():
        annotator = gr.Textbox(
            label="Your name or a pseudonym (optional)",
            max_length=ANNOTATOR_CHARS,
            elem_id="like-annotator",
            min_width=200,
        )
        start = gr.Button("Show an image", variant="primary", elem_id="like-start")
    prompt = gr.Textbox(label="Prompt", interactive=False, elem_id="like-prompt")
    shown = gr.Textbox(visible="hidden", elem_id="like-shown")
    image = gr.Image(
        label="image", format="png", interactive=False, buttons=[], elem_id="like-image"
    )
    with gr.Row():
        buttons = [
            gr.Button(text, elem_id=f"like-{thumb}", interactive=False, min_width=90)
            for text, thumb in (("No (-)", "down"), ("Yes (+)", "up"))
        ]
    status = gr.Markdown(liking.state, elem_id="like-status")
    outputs = [prompt, shown, image, *buttons, status]
    options: dict[str, Any] = {"concurrency_id": "draw", "concurrency_limit": 1}

    def show(request: gr.Request) -> list[Any]:
        with explained():
            new = liking.new_image(session.visitor(request))
        ready = [gr.update(interactive=True)] * 2
        return [new.prompt, new.id, enlarged(new.image), *ready, liking.state()]

    def show_next(request: gr.Request) -> list[Any]:
        if session.visitor(request) in liking.pending:
            # The thumb was for another image. This one still waits for its own.
            return [*[gr.skip()] * 3, *[gr.update(interactive=True)] * 2, gr.skip()]
        return show(request)

    start.click(show, None, outputs, api_name="image", **options)
    for button, thumb in zip(buttons, ("down", "up"), strict=True):

        def take(
            shown: object, annotator: object, request: gr.Request, thumb: str = thumb
        ) -> list[Any]:
            with explained():
                liking.judge(session.visitor(request), shown, thumb, annotator)
            return [*[gr.update(interactive=False)] * 2, liking.state()]

        # The thumb itself skips the queue of drawings, in which the next image waits.
        button.click(
            take, [shown, annotator], [*buttons, status], queue=False, api_name=f"like_{thumb}"
        ).then(show_next, None, outputs, api_visibility="private", **options)
    if export:
        export_button(
            liking.store.export,
            "Make a dataset of all thumbs",
            "likes",
            elem_id="like",
            api_name="export_likes",
        )
