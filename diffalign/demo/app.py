"""Build and serve the demo page, whose tabs share one engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from . import (
    compare_tab,
    gallery_tab,
    like_tab,
    scores_tab,
    steer_tab,
    train_tab,
    vote_tab,
)
from .comparisons import ComparisonStore
from .doubt import Doubt
from .engine import Engine
from .like_tab import Liking
from .likes import LikeStore
from .train_tab import Watch
from .ui import Session
from .vote_tab import KEYS, Voting
from .votes import VoteStore

CSS = """
#compare-slider img, #steer-slider img, #vote-image-left img, #vote-image-right img,
#like-image img, #gallery-images img, #train-samples img, #vote-personal-plain img,
#vote-personal-own img {
  image-rendering: pixelated
}
.gradio-container { max-width: 1100px !important }
footer { display: none !important }
"""
EXAMPLE = "a large yellow star on the right of a black background"
KEEP_SECONDS = 1800  # how long drawn images stay in the server's cache


def build_app(
    engine: Engine,
    *,
    prompts: Sequence[str] = (),
    votes: VoteStore | None = None,
    likes: LikeStore | None = None,
    vote_pair: tuple[str, str] | None = None,
    example: str = EXAMPLE,
    export: bool = True,
    doubt: Doubt | None = None,
    comparisons: ComparisonStore | None = None,
    uploads: bool = False,
    runs: Watch | None = None,
) -> gr.Blocks:
    """Build the demo as `gr.Blocks`.

    Args:
        engine (`Engine`): Models and scorers.
        prompts (`Sequence[str]`, *optional*, defaults to `()`): Prompts for blind
            votes.
        votes (`VoteStore`, *optional*): Where votes are stored. None stores them in
            `diffalign-votes`.
        likes (`LikeStore`, *optional*): Where thumbs are stored. None stores them
            beside the votes. Without prompts there is no tab for them.
        vote_pair (`tuple[str, str]`, *optional*): Names of base and tuned model. None
            takes the first and the last model.
        example (`str`, *optional*): The prompt that the page starts with.
        export (`bool`, *optional*, defaults to `True`): Let visitors download all votes
            as a preference dataset.
        doubt (`Doubt`, *optional*): Chooses the pairs to vote on. None shows any.
        comparisons (`ComparisonStore`, *optional*): Where comparisons are kept for the
            gallery. None has no gallery.
        uploads (`bool`, *optional*, defaults to `False`): Let visitors score their own
            images. `launch` must be told as well.
        runs (`Watch`, *optional*): Training runs to show. None has no tab for them.

    Returns:
        `gr.Blocks`.

    Raises:
        UserError: There is nothing to vote on.
    """
    session = Session()
    models = vote_pair or (engine.names[0], engine.names[-1])
    votes = votes or VoteStore(Path("diffalign-votes"))
    voting = Voting(engine, votes, prompts, models, doubt)
    with gr.Blocks(
        title="diffalign demo", analytics_enabled=False, delete_cache=(600, KEEP_SECONDS)
    ) as app:
        gr.Markdown("# diffalign\nModels side by side from the same noise.")
        with gr.Tabs() as tabs:
            with gr.Tab("Compare", id="compare"):
                page = compare_tab.build(engine, session, example, comparisons)
            with gr.Tab("Blind vote", id="vote"):
                vote_tab.build(voting, session, export)
            if prompts:
                liking = Liking(engine, likes or LikeStore(votes.folder), prompts, models)
                with gr.Tab("Thumbs", id="like"):
                    like_tab.build(liking, session, export)
            if engine.scorers:
                with gr.Tab("Steer", id="steer"):
                    steer_tab.build(engine, session, example)
            if engine.scorers and uploads:
                with gr.Tab("Scores", id="scores"):
                    scores_tab.build(engine, example)
            if comparisons is not None:
                gallery_tab.build(app, engine, comparisons, page, tabs)
            if runs is not None:
                with gr.Tab("Train", id="train") as tab:
                    train_tab.build(app, tab, runs)
    app.queue(max_size=engine.limits.queue, default_concurrency_limit=8)
    return app


MAX_BODY = 4 << 20
"""Largest request in bytes. A request holds texts and numbers, or one vote."""

MAX_UPLOAD = 64 << 20
"""Largest request with images to score, in bytes."""


class BodyLimit:
    """ASGI middleware that refuses large requests before anything parses them.

    Args:
        app: The application behind it.
        most (`int`, *optional*, defaults to `MAX_BODY`): Largest body, in bytes.
        upload (`int`, *optional*, defaults to `MAX_BODY`): Largest body of an upload.
    """

    def __init__(self, app: Any, most: int = MAX_BODY, upload: int = MAX_BODY) -> None:
        self.app, self.most, self.upload = app, most, upload

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        most = self.upload if scope.get("path", "").endswith("/upload") else self.most
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > most:
            await self._refuse(send)
            return
        received = 0

        async def counted() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > most:  # a body in chunks, without a length
                return {"type": "http.disconnect"}
            return message

        await self.app(scope, counted, send)

    async def _refuse(self, send: Any) -> None:
        body = b'{"detail": "the request is too large"}'
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def launch(app: gr.Blocks, *, uploads: bool = False, **options: Any) -> Any:
    """Serve the page without large requests, server files or web fonts.

    Args:
        app (`gr.Blocks`): From `build_app`.
        uploads (`bool`, *optional*, defaults to `False`): Take images. Otherwise every
            upload is refused.
        **options: Options of `gr.Blocks.launch`, which replace these defaults.
    """
    from starlette.middleware import Middleware

    theme = gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    limit = MAX_UPLOAD if uploads else MAX_BODY
    defaults: dict[str, Any] = {
        "theme": theme,
        "css": CSS,
        "head": KEYS,
        "max_file_size": MAX_UPLOAD // 4 if uploads else "1kb",
        "show_error": True,
        "footer_links": [],
        "app_kwargs": {"middleware": [Middleware(BodyLimit, upload=limit)]},
        "ssr_mode": False,
        "mcp_server": False,
        "enable_monitoring": False,
    }
    return app.launch(**{**defaults, **options})
