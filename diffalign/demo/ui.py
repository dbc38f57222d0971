"""What the tabs share: inputs with bounds, one sentence for a mistake, the jobs of every visitor."""

from __future__ import annotations

import html
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import gradio as gr

from ..errors import UserError
from .engine import Engine
from .jobs import Cancelled, Job


class Session:
    """The running job of every visitor, so that *Stop* ends one's own and nobody else's."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()

    @staticmethod
    def visitor(request: gr.Request) -> str:
        """Who asks: a browser tab, or a client of the API."""
        return str(request.session_hash or "api")

    def run(self, request: gr.Request, work: Callable[[Job], Any]) -> Iterator[tuple[str, Any]]:
        """The reports of some work, as this visitor's job."""
        job, visitor = Job(work), self.visitor(request)
        with self._lock:
            self._jobs[visitor] = job
        try:
            yield from job
        finally:
            with self._lock:
                if self._jobs.get(visitor) is job:
                    del self._jobs[visitor]

    def cancel(self, request: gr.Request) -> str:
        """Stops this visitor's job."""
        with self._lock:
            job = self._jobs.pop(self.visitor(request), None)
        if job is None:
            return "Nothing was running."
        job.cancel()
        return "Stopped."


@contextmanager
def said() -> Iterator[None]:
    """A mistake is shown as its one sentence; anything else is a failure without details of the server."""
    try:
        yield
    except UserError as error:
        raise gr.Error(html.escape(str(error)), print_exception=False, title="") from None
    except Cancelled:
        raise gr.Error("Stopped.", print_exception=False, title="") from None


def inputs(engine: Engine, name: str, example: str, tab: str) -> tuple[Any, ...]:
    """Prompt, seed, steps, guidance, side, within the engine's limits."""
    limits, own = engine.limits, engine.defaults(name)
    sides = sorted(
        {own["side"], *(s for s in (256, 512, 768, 1024) if s <= min(limits.side, own["side"]))}
    )
    start = min(own["num_inference_steps"], limits.steps)
    with gr.Row():
        prompt = gr.Textbox(
            example,
            label="Prompt",
            max_length=limits.prompt_chars,
            max_lines=4,
            elem_id=f"{tab}-prompt",
            scale=4,
            min_width=260,
        )
        seed = gr.Number(
            0,
            label="Seed",
            precision=0,
            minimum=0,
            maximum=limits.seed,
            elem_id=f"{tab}-seed",
            min_width=110,
        )
    with gr.Row():
        steps = gr.Slider(
            1, limits.steps, start, step=1, label="Steps", elem_id=f"{tab}-steps", min_width=200
        )
        guidance = gr.Slider(
            0,
            limits.guidance,
            own["guidance_scale"],
            step=0.1,
            label="Guidance",
            elem_id=f"{tab}-guidance",
            min_width=200,
        )
        side = gr.Dropdown(
            sides,
            value=own["side"],
            label="Size",
            elem_id=f"{tab}-size",
            visible=len(sides) > 1,
            min_width=100,
        )
    return prompt, seed, steps, guidance, side


def score_table(scores: Mapping[str, Sequence[float | None]], columns: Sequence[str]) -> str:
    """Markdown: a row per scorer, a column per image."""
    if not scores:
        return ""
    lines = [
        f"| | {' | '.join(html.escape(c) for c in columns)} |",
        f"|{'---|' * (len(columns) + 1)}",
    ]
    for name, values in scores.items():
        shown = (
            "no score for this prompt" if value is None else f"{value:.4g}" for value in values
        )
        lines.append(f"| {html.escape(name)} | {' | '.join(shown)} |")
    return "\n".join(lines)
