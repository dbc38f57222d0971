"""The *Train* tab: curves and samples of a run, while it goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..runtime.decoding import UnreadableImage, decode
from .runs import RunReader, RunState, default_metrics, find_runs
from .ui import explained

PLOTS = 4
"""Curves at a time."""

POINTS = 400
"""Points of a curve. Of a longer one, every n-th is drawn, and the last."""

SAMPLES = 4
"""Pictures of validation at a time."""

SECONDS = 3.0
"""Time between two looks at the folder."""


class Watch:
    """The runs that the page may show.

    Args:
        folders (`Sequence[Path]`): Folders of runs, or folders that hold such folders.

    Raises:
        UserError: A folder is a file.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = list(folders)
        self._readers: dict[Path, RunReader] = {}
        self._known = self.runs()

    def runs(self) -> dict[str, Path]:
        """Name -> folder of every run, the newest first."""
        self._known = find_runs(self.folders)
        return self._known

    def read(self, name: object) -> RunState | None:
        """Return a run as it is now, or None when there is no such run.

        Args:
            name: Its name in `runs`.
        """
        # A page asks every few seconds, and need not search the disk each time.
        folder = self._known.get(str(name)) or self.runs().get(str(name))
        if folder is None:
            return None
        if folder not in self._readers:
            self._readers[folder] = RunReader(folder)
        return self._readers[folder].read()


def build(app: gr.Blocks, tab: gr.Tab, watch: Watch) -> None:
    """Add the tab's components and events to the page.

    Args:
        app (`gr.Blocks`): The page.
        tab (`gr.Tab`): The tab. Opening it looks for new runs.
        watch (`Watch`): The runs.
    """
    with gr.Row():
        run = gr.Dropdown(list(watch.runs()), label="Run", elem_id="train-run", min_width=200)
        metrics = gr.Dropdown(
            [],
            value=[],
            multiselect=True,
            max_choices=PLOTS,
            label=f"Metrics (at most {PLOTS})",
            elem_id="train-metrics",
            scale=2,
            min_width=260,
        )
    status = gr.Markdown("", elem_id="train-status")
    plots = []
    for start in range(0, PLOTS, 2):
        with gr.Row():
            plots += [
                gr.LinePlot(
                    x="step",
                    y="value",
                    x_title="step",
                    height=220,
                    min_width=260,
                    buttons=[],
                    visible=False,
                    elem_id=f"train-plot-{start + i}",
                )
                for i in range(2)
            ]
    samples = gr.Gallery(
        label="Samples of validation, the newest first",
        columns=4,
        object_fit="contain",
        height="auto",
        interactive=False,
        buttons=["fullscreen"],
        format="jpeg",
        visible=False,
        elem_id="train-samples",
    )
    shown = gr.State(())
    timer = gr.Timer(SECONDS)
    outputs = [metrics, status, *plots, samples, shown]
    options: dict[str, Any] = {
        "queue": False,
        "show_progress": "hidden",
        "api_visibility": "private",
    }

    def open_run(name: str | None) -> list[Any]:
        with explained():
            state = watch.read(name)
        if state is None:
            return _nothing()
        names = sorted(state.curves)
        chosen = default_metrics(names, PLOTS)
        return [gr.Dropdown(choices=names, value=chosen), *_views(state, chosen, name)]

    def refresh(name: str | None, chosen: list[str], before: tuple[Any, ...]) -> list[Any]:
        with explained():
            state = watch.read(name)
        if state is None:
            return _nothing()
        if not before or before[0] != name or (not chosen and state.curves and not before[2]):
            return open_run(name)
        if _version(state, chosen, name) == tuple(before):
            return [gr.skip(), state.describe(), *[gr.skip()] * (PLOTS + 2)]
        return [gr.Dropdown(choices=sorted(state.curves)), *_views(state, chosen, name)]

    def list_runs(name: str | None) -> Any:
        names = list(watch.runs())
        return gr.Dropdown(choices=names, value=name if name in names else next(iter(names), None))

    # On every load, since a run may have begun after the page was made.
    app.load(list_runs, run, run, **options).then(open_run, run, outputs, **options)
    tab.select(list_runs, run, run, **options)
    run.input(open_run, run, outputs, **options)
    metrics.input(refresh, [run, metrics, shown], outputs, **options)
    timer.tick(refresh, [run, metrics, shown], outputs, **options)


def _nothing() -> list[Any]:
    hidden = [gr.LinePlot(visible=False)] * PLOTS
    return [gr.Dropdown(choices=[]), "There is no run.", *hidden, gr.Gallery(visible=False), ()]


def _version(state: RunState, chosen: Sequence[str], name: str | None) -> tuple[Any, ...]:
    """Return what changes whenever the page must be drawn again."""
    points = sum(len(curve) for curve in state.curves.values())
    newest = str(state.samples[0]) if state.samples else ""
    return name, tuple(chosen), points, state.step, newest


def _views(state: RunState, chosen: Sequence[str], name: str | None) -> list[Any]:
    """Return status, plots, samples and version of a run."""
    import pandas

    plots = []
    for place in range(PLOTS):
        metric = chosen[place] if place < len(chosen) else None
        if metric not in state.curves:
            plots.append(gr.LinePlot(visible=False))
            continue
        curve = thinned(state.curves[metric])
        frame = pandas.DataFrame(curve, columns=["step", "value"])
        plots.append(gr.LinePlot(frame, y_title=metric, label=metric, visible=True))
    pictures = []
    for path in state.samples[:SAMPLES]:
        with contextlib.suppress(UnreadableImage):  # being written, or removed meanwhile
            pictures.append((decode(path), f"step {path.stem.removeprefix('step-')}"))
    return [
        state.describe(),
        *plots,
        gr.Gallery(pictures, visible=bool(pictures)),
        _version(state, chosen, name),
    ]


def thinned(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Leave out points of a long curve, so that a browser draws it at once.

    Args:
        curve (`Sequence[tuple[int, float]]`): Its (step, value).
    """
    stride = -(-len(curve) // POINTS) or 1
    points = list(curve[::stride])
    if curve and points[-1] != curve[-1]:
        points.append(curve[-1])
    return points
