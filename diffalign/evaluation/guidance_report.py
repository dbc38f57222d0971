"""Write guidance curves as tables, files, a picture and a page that opens from disk."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..runtime.files import write_atomically
from ..runtime.templates import render
from .formatting import number, rate
from .guidance_curves import GuidanceCurves, all_notes, all_tables, model_name
from .report import grid, origin, records, write_files

_COLOURS = ("#6e7781", "#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#9a6700")
_WIDTH, _HEIGHT = 380, 260


def write(curves: GuidanceCurves) -> None:
    """Write all files of guidance curves into their folder.

    These are ``scores.parquet``, ``grid.png``, ``guidance.svg``, ``table.md``,
    ``report.html`` and, last, ``results.json``.
    """
    places = {
        model_name(arm.name, scale): {"arm": arm.name, "guidance_scale": scale}
        for arm in curves.arms
        for scale in curves.scales
    }
    rows = [{**places[row["model"]], **row} for row in records(curves.comparison)]
    best = [(arm.name, curves.best(arm.name)) for arm in curves.arms]
    picture = grid(
        curves.comparison,
        [model_name(*place) for place in best],
        [f"{name}, guidance {scale:g}" for name, scale in best],
    )
    write_atomically(curves.folder / "guidance.svg", picture_of(curves).encode())
    write_files(curves, rows, picture, curves.table(), page(curves))


def page(curves: GuidanceCurves) -> str:
    """Fill in the page of the report. Texts are escaped."""
    return render(
        "evaluation/templates/guidance_report.html",
        title=f"{', '.join(curves.tuned)} against {curves.base}, each at its best guidance",
        headline=headline(curves),
        chart=_chart(curves),
        tables=all_tables(curves),
        notes=all_notes(curves),
        grid_title="Some prompts, each model at its best guidance",
        models=curves.arms,
        **origin(curves.comparison),
    )


def headline(curves: GuidanceCurves) -> str:
    """Say in one sentence per model how it does at its best guidance."""
    base, scorer = curves.base, curves.scorers[0]
    against = f"{base} at {curves.best(base):g}"
    count = len(curves.comparison.prompts.prompts) // 2
    sentences = []
    for name in curves.tuned:
        won = curves.win_rate(name)
        words = {1: "wins against", -1: "loses against", 0: "shows no significant difference to"}
        verdict = words[won.verdict if curves.sign_test(name) < 0.05 else 0]
        sentences.append(
            f"{name} at guidance {curves.best(name):g} {verdict} {against}: {rate(won)} % by "
            f"{scorer} ({count} prompts)."
        )
    return " ".join(sentences)


def picture_of(curves: GuidanceCurves) -> str:
    """Draw quality against guidance, and against diversity, as SVG."""
    return render("evaluation/templates/guidance_curves.svg", chart=_chart(curves))


class _Point(NamedTuple):
    """One scale of one model, in pixels of its panel."""

    x: float
    y: float
    low: float | None
    high: float | None
    text: str
    is_best: bool


class _Curve(NamedTuple):
    """One model."""

    colour: str
    line: str
    points: list[_Point]


class _Panel(NamedTuple):
    """A picture of all models."""

    left: int
    top: int
    width: int
    height: int
    title: str
    x_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    curves: list[_Curve]


class _Name(NamedTuple):
    """An entry of the legend."""

    x: int
    colour: str
    text: str


class _Chart(NamedTuple):
    """Both panels and their legend."""

    width: int
    height: int
    label: str
    panels: list[_Panel]
    legend: list[_Name]


class _Axis:
    """Places numbers on a line of pixels, with room at both ends."""

    def __init__(self, values: list[float], start: float, end: float) -> None:
        finite = [value for value in values if math.isfinite(value)] or [0.0]
        low, high = min(finite), max(finite)
        room = 0.08 * (high - low) or 0.5 * abs(high) or 0.5
        self.low, self.high, self.start, self.end = low - room, high + room, start, end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """About five round numbers within the axis, with their places."""
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step *= min(
            (1, 2, 5, 10), key=lambda factor: abs((self.high - self.low) / 4 - factor * step)
        )
        first = math.ceil(self.low / step)
        last = math.floor(self.high / step)
        return [(self(i * step), f"{i * step:.4g}") for i in range(first, last + 1)]


def _chart(curves: GuidanceCurves) -> _Chart:
    """Place both panels. Without diversity there is only the first."""
    scorer = curves.scorers[0]
    data = {arm.name: curves.curve(arm.name) for arm in curves.arms}
    quality = [value for curve in data.values() for _, mean, _ in curve for value in mean]
    spread = [value for curve in data.values() for _, _, value in curve]
    up = _Axis(quality, _HEIGHT, 0)
    by_scale = _Axis(curves.scales, 0, _WIDTH)
    title = f"mean of {scorer}"
    panels = [
        _Panel(
            60,
            34,
            _WIDTH,
            _HEIGHT,
            title,
            "guidance scale",
            [(by_scale(scale), f"{scale:g}") for scale in curves.scales],
            up.ticks(),
            [
                _curve(curves, i, [by_scale(s) for s, *_ in curve], curve, up, intervals=True)
                for i, curve in enumerate(data.values())
            ],
        )
    ]
    if any(map(math.isfinite, spread)):
        across = _Axis(spread, 0, _WIDTH)
        kind = curves.comparison.diversity_kind
        panels.append(
            _Panel(
                60 + _WIDTH + 90,
                34,
                _WIDTH,
                _HEIGHT,
                f"{title} against diversity",
                f"diversity ({kind}); the numbers are guidance scales",
                across.ticks(),
                up.ticks(),
                [
                    _curve(curves, i, [across(d) for *_, d in curve], curve, up, intervals=False)
                    for i, curve in enumerate(data.values())
                ],
            )
        )
    legend, x = [], 60
    for i, arm in enumerate(curves.arms):
        text = f"{arm.name}, best at {curves.best(arm.name):g}"
        legend.append(_Name(x, _colour(i), text))
        x += 30 + 7 * len(text)
    last = panels[-1]
    width = max(last.left + last.width + 40, x)
    ends = ", ".join(
        f"{arm.name} {number(max(mean[0] for _, mean, _ in data[arm.name]))}" for arm in curves.arms
    )
    label = f"{title} by guidance scale; highest: {ends}"
    return _Chart(width, 34 + _HEIGHT + 44 + 30, label, panels, legend)


def _curve(
    curves: GuidanceCurves,
    index: int,
    places: list[float],
    curve: list[tuple[float, tuple[float, float, float], float]],
    up: _Axis,
    *,
    intervals: bool,
) -> _Curve:
    """Place one model's points. Scales without a score or a place are left out."""
    best = curves.best(curves.arms[index].name)
    points = [
        _Point(
            x,
            up(mean),
            up(low) if intervals and math.isfinite(low) else None,
            up(high) if intervals and math.isfinite(high) else None,
            "" if intervals else f"{scale:g}",
            scale == best,
        )
        for x, (scale, (mean, low, high), _) in zip(places, curve, strict=True)
        if math.isfinite(x) and math.isfinite(mean)
    ]
    line = " ".join(f"{point.x},{point.y}" for point in points)
    return _Curve(_colour(index), line, points)


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]
