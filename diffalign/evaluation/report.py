"""Write a comparison as tables, files and a page that opens from disk."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..generation.grids import models_grid
from ..runtime.files import save_image, write_atomically
from ..runtime.templates import render
from .comparison import all_tables, notes, save_results, tables
from .formatting import rate

if TYPE_CHECKING:
    from PIL import Image

    from .comparison import Comparison, Result
    from .statistics import WinRate

GRID_ROWS, GRID_IMAGES = 8, 4


def write(c: Comparison) -> None:
    """Write all files of a comparison into its folder.

    These are ``scores.parquet``, ``grid.png``, ``table.md``, ``report.html`` and, last,
    ``results.json``.
    """
    names = [model.name for model in c.models]
    write_files(c, records(c), grid(c, names, names), tables(c), page(c))


def write_files(
    result: Result, rows: list[dict[str, Any]], picture: Image.Image, table: str, html: str
) -> None:
    """Write the files of a comparison into its folder, the results last.

    Args:
        result (`Result`): Says the folder and the results.
        rows (`list[dict[str, Any]]`): Rows of ``scores.parquet``.
        picture (`PIL.Image.Image`): ``grid.png``.
        table (`str`): ``table.md``.
        html (`str`): ``report.html``.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder, buffer = result.folder, io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    write_atomically(folder / "scores.parquet", buffer.getvalue())
    save_image(picture, folder / "grid.png")
    write_atomically(folder / "table.md", (table + "\n").encode())
    write_atomically(folder / "report.html", html.encode())
    save_results(result)


def records(c: Comparison) -> list[dict[str, Any]]:
    """Collect the rows of ``scores.parquet``, one per image."""
    from ..runtime.seeds import image_seed
    from .comparison import image_name

    seed = c.facts["settings"]["seed"]
    rows = []
    for model in c.scores:
        for p, prompt in enumerate(c.prompts.prompts):
            for n in range(c.num_images):
                row: dict[str, Any] = {
                    "model": model,
                    "prompt": prompt,
                    "category": c.prompts.categories[p],
                    "number": n,
                    "seed": image_seed(seed, prompt, n),
                    "image": image_name(model, p, n) if c.file(model, p, n).is_file() else None,
                }
                for scorer in c.scorers:
                    row[f"score_{scorer}"] = float(c.scores[model][scorer][p, n])
                rows.append(row)
    return rows


def grid(c: Comparison, names: Sequence[str], headings: Sequence[str]) -> Image.Image:
    """Draw some prompts under some models, evenly spread over the prompts.

    Args:
        c (`Comparison`): Holds the images.
        names (`Sequence[str]`): Names of the models.
        headings (`Sequence[str]`): One per model.
    """
    step = max(1, len(c.prompts.prompts) // GRID_ROWS)
    picks = list(range(0, len(c.prompts.prompts), step))[:GRID_ROWS]
    count = min(c.num_images, GRID_IMAGES if len(names) < 4 else 1)
    rows = [(c.prompts.prompts[p], [c.images(name, p)[:count] for name in names]) for p in picks]
    return models_grid(rows, headings, columns=2 if len(names) * count <= 4 else 1)


def page(c: Comparison) -> str:
    """Fill in the page of the report.

    Images are linked by their names inside the folder. Texts are escaped, so HTML in a
    prompt shows as text.
    """
    return render(
        "evaluation/templates/report.html",
        title=f"{', '.join(c.tuned)} against {c.base}",
        headline=headline(c),
        chart=_chart(c),
        tables=all_tables(c),
        notes=notes(c),
        galleries=_galleries(c),
        grid_title="Some prompts",
        models=c.models,
        **origin(c),
    )


def origin(c: Comparison) -> dict[str, Any]:
    """Collect what the page says of prompts, seed and settings."""
    settings = c.facts["settings"]
    arguments = ", ".join(f"{name} {value}" for name, value in settings["arguments"].items())
    prompts = f"{c.prompts.name}, sha256 {c.prompts.sha256[:16]}"
    if c.prompts.licence:
        prompts += f", {c.prompts.licence}"
    return {
        "prompts": prompts,
        "seed": settings["seed"],
        "settings": arguments or "the pipelines' defaults",
    }


def headline(c: Comparison) -> str:
    """Say in one sentence how every tuned model does, by the deciding scorer."""
    sentences = []
    for model in c.tuned:
        won = c.win_rate(model)
        # An interval of few prompts can leave 50 % where the exact test does not.
        verdict = won.verdict if c.sign_test(model) < 0.05 else 0
        words = {
            1: "wins",
            -1: "loses",
            0: f"shows no significant difference ({len(c.prompts.prompts)} prompts)",
        }[verdict]
        sentences.append(f"{model} {words}: {rate(won)} % by {c.scorers[0]}.")
    return " ".join(sentences)


def bars(c: Comparison) -> str:
    """Draw the win-rates with their intervals, as SVG for a page."""
    return render("evaluation/templates/win_rates.svg", chart=_chart(c))


class _Bar(NamedTuple):
    """A win-rate and its interval as drawn, in pixels from the top left corner."""

    label: str
    y: float
    low: float
    rate: float
    high: float
    colour: str


class _Chart(NamedTuple):
    """The picture of all win-rates, with a rate of zero at `left`."""

    width: int
    height: int
    left: int
    ticks: list[tuple[float, int]]
    bars: list[_Bar]


def _chart(c: Comparison) -> _Chart:
    """Place the bars and the axis."""
    left, span, step = 260, 400, 26
    bars: list[_Bar] = []
    for model in c.tuned:
        for scorer in c.scorers:
            won = c.win_rate(model, scorer)
            if math.isnan(won.rate):
                continue
            label = f"{model}, {scorer}" if len(c.scorers) > 1 else model
            low, middle, high = (
                left + span * min(1.0, max(0.0, share)) for share in (won.low, won.rate, won.high)
            )
            y = step * len(bars) + step / 2
            bars.append(_Bar(_short(label, 36), y, low, middle, high, _colour(won)))
    ticks = [(left + span * percent / 100, percent) for percent in (0, 25, 50, 75, 100)]
    return _Chart(left + span + 20, step * len(bars) + 30, left, ticks, bars)


def _colour(won: WinRate) -> str:
    """Choose green for a win, red for a loss, grey for neither."""
    return {1: "#1a7f37", -1: "#cf222e", 0: "#6e7781"}[won.verdict]


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else "…" + text[-length + 1 :]


class _Pair(NamedTuple):
    """The images of the base and of a tuned model from the same noise."""

    prompt: str
    scores: str
    files: list[tuple[str, str]]


class _Gallery(NamedTuple):
    title: str
    pairs: list[_Pair]


def _galleries(c: Comparison) -> list[_Gallery]:
    """Collect the largest wins and losses of every tuned model.

    A model without wins or without losses has no gallery of them.
    """
    galleries = []
    for model in c.tuned:
        wins, losses = c.extremes(model)
        for places, title in ((wins, "largest wins"), (losses, "largest losses")):
            pairs = [_pair(c, model, *place) for place in places]
            # Scores that look equal would make a reader search for a difference.
            pairs = [pair for pair in pairs if len(set(pair.scores.split(" to "))) > 1]
            if pairs:
                galleries.append(_Gallery(f"{model}: {title} ({c.scorers[0]})", pairs))
    return galleries


def _pair(c: Comparison, model: str, prompt: int, number: int) -> _Pair:
    from .comparison import image_name

    names = (c.base, model)
    scores = [c.scores[name][c.scorers[0]][prompt, number] for name in names]
    return _Pair(
        c.prompts.prompts[prompt],
        " to ".join(f"{score:.3g}" for score in scores),
        [(name, image_name(name, prompt, number)) for name in names],
    )
