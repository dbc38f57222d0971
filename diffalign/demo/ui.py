"""What the tabs share: bounded inputs, error messages and the visitors' jobs."""

from __future__ import annotations

import html
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from ..errors import UserError
from .engine import Engine
from .jobs import Cancelled, Job


class Session:
    """Hold the running job of every visitor, so that *Stop* ends only one's own."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()

    @staticmethod
    def visitor(request: gr.Request) -> str:
        """Return who asks: a browser tab, or a client of the API.

        Args:
            request (`gr.Request`): The request.
        """
        return str(request.session_hash or "api")

    def run(self, request: gr.Request, work: Callable[[Job], object]) -> Iterator[tuple[str, Any]]:
        """Run some work as this visitor's job, and yield its reports.

        Args:
            request (`gr.Request`): Tells the visitor.
            work (`Callable`): See `Job`.
        """
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
        """Stop this visitor's job.

        Args:
            request (`gr.Request`): Tells the visitor.

        Returns:
            `str`: What happened, for the page.
        """
        with self._lock:
            job = self._jobs.pop(self.visitor(request), None)
        if job is None:
            return "Nothing was running."
        job.cancel()
        return "Stopped."


@contextmanager
def explained() -> Iterator[None]:
    """Show a user's error as its one sentence.

    Any other error shows as a failure without details of the server.
    """
    try:
        yield
    except UserError as error:
        raise gr.Error(html.escape(str(error)), print_exception=False, title="") from None
    except Cancelled:
        raise gr.Error("Stopped.", print_exception=False, title="") from None


def inputs(engine: Engine, name: str, example: str, tab: str) -> tuple[Any, ...]:
    """Add inputs for prompt, seed, steps, guidance and side, within the limits.

    Args:
        engine (`Engine`): Gives limits and defaults.
        name (`str`): Model whose defaults are taken.
        example (`str`): The first prompt.
        tab (`str`): Prefix of the elements' ids.

    Returns:
        The five components.
    """
    limits, defaults = engine.limits, engine.defaults(name)
    sides = sorted(
        {
            defaults["side"],
            *(s for s in (256, 512, 768, 1024) if s <= min(limits.side, defaults["side"])),
        }
    )
    start = min(defaults["num_inference_steps"], limits.steps)
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
            defaults["guidance_scale"],
            step=0.1,
            label="Guidance",
            elem_id=f"{tab}-guidance",
            min_width=200,
        )
        side = gr.Dropdown(
            sides,
            value=defaults["side"],
            label="Size",
            elem_id=f"{tab}-size",
            visible=len(sides) > 1,
            min_width=100,
        )
    return prompt, seed, steps, guidance, side


def score_table(scores: Mapping[str, Sequence[float | None]], columns: Sequence[str]) -> str:
    """Format scores as a Markdown table with a row per scorer, a column per image.

    Args:
        scores (`Mapping[str, Sequence[float | None]]`): Scorer -> B scores.
        columns (`Sequence[str]`): B headings.
    """
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


def export_button(
    export: Callable[[Path], int], title: str, name: str, *, elem_id: str, api_name: str
) -> None:
    """Add a button that makes a dataset of all answers, and one that downloads it.

    Args:
        export (`Callable`): Writes the dataset to a path.
        title (`str`): Text of the button.
        name (`str`): Name of the file, without `.parquet`.
        elem_id (`str`): Beginning of the ids of both buttons.
        api_name (`str`): Name of the event.
    """
    with gr.Row():
        make = gr.Button(title, elem_id=f"{elem_id}-export")
        file = gr.DownloadButton(
            f"Download {name}.parquet", visible=False, elem_id=f"{elem_id}-download"
        )

    def write() -> Any:
        with explained():
            path = Path(tempfile.mkdtemp(prefix=f"diffalign-{name}-")) / f"{name}.parquet"
            export(path)
        return gr.update(value=str(path), visible=True)

    make.click(write, None, file, api_name=api_name)
