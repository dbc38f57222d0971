"""A comparison as tables, files and a page that opens from disk."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..generation.grids import models_grid
from ..runtime.files import write_atomically
from .comparison import all_tables, notes, tables
from .formatting import rate

if TYPE_CHECKING:
    from .comparison import Comparison

GRID_ROWS, GRID_IMAGES = 8, 4


def write(c: Comparison) -> None:
    """``scores.parquet``, ``grid.png``, ``table.md``, ``report.html``, and ``results.json`` last."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from .comparison import save_results

    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(_records(c)), buffer)
    write_atomically(c.folder / "scores.parquet", buffer.getvalue())
    picture = io.BytesIO()
    _grid(c).save(picture, "png")
    write_atomically(c.folder / "grid.png", picture.getvalue())
    write_atomically(c.folder / "table.md", (tables(c) + "\n").encode())
    write_atomically(c.folder / "report.html", page(c).encode())
    save_results(c)


def _records(c: Comparison) -> list[dict[str, Any]]:
    """One row per image."""
    from ..runtime.seeds import image_seed
    from .comparison import image_name

    seed = c.facts["settings"]["seed"]
    rows = []
    for model in c.scores:
        for p, prompt in enumerate(c.prompts.prompts):
            for n in range(c.num_images):
                row = {
                    "model": model,
                    "prompt": prompt,
                    "category": c.prompts.categories[p],
                    "number": n,
                }
                row |= {
                    "seed": image_seed(seed, prompt, n),
                    "image": image_name(model, p, n) if c.file(model, p, n).is_file() else None,
                }
                rows.append(
                    {**row, **{f"score_{s}": float(c.scores[model][s][p, n]) for s in c.scorers}}
                )
    return rows


def _grid(c: Comparison) -> Any:
    step = max(1, len(c.prompts.prompts) // GRID_ROWS)
    picks = list(range(0, len(c.prompts.prompts), step))[:GRID_ROWS]
    count = min(c.num_images, GRID_IMAGES if len(c.models) < 4 else 1)
    rows = [(c.prompts.prompts[p], [c.images(m.name, p)[:count] for m in c.models]) for p in picks]
    return models_grid(
        rows, [m.name for m in c.models], columns=2 if len(c.models) * count <= 4 else 1
    )


# The page


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #1b1f24; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; display: block; overflow-x: auto } td, th { padding: .25rem .8rem .25rem 0; text-align: left; border-bottom: 1px solid #d8dee4 }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem }
figure { margin: 0 } figcaption { font-size: .85rem } .pair { display: flex; gap: 2px } .pair img { width: 50%; image-rendering: pixelated }
.note { color: #57606a; font-size: .9rem } svg { max-width: 100%; height: auto }
@media (prefers-color-scheme: dark) { body { color: #e6edf3; background: #0d1117 } td, th { border-color: #30363d } .note { color: #9198a1 } svg { color: #e6edf3 } }
"""


def page(c: Comparison) -> str:
    """The report; images are linked from beside it. Whatever a prompt holds is text."""
    e = html.escape
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>{e(', '.join(c.tuned))} against {e(c.base)}</title><style>{_STYLE}</style>",
        f"<h1>{e(', '.join(c.tuned))} against {e(c.base)}</h1><p>{e(headline(c))}</p>",
        bars(c),
    ]
    for title, header, rows in all_tables(c):
        head = "".join(f"<th>{e(cell)}</th>" for cell in header)
        body = "".join(
            "<tr>" + "".join(f"<td>{e(cell)}</td>" for cell in row) + "</tr>" for row in rows
        )
        parts.append(
            f"<h2>{e(title)}</h2><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )
    parts += [f"<p class=note>{e(note)}</p>" for note in notes(c)]
    parts.append(
        "<h2>Some prompts</h2><p><img src=grid.png alt='images of all models side by side' style='max-width:100%'></p>"
    )
    for model in c.tuned:
        for places, title in zip(
            c.extremes(model), ("largest wins", "largest losses"), strict=True
        ):
            if places:
                parts.append(
                    f"<h2>{e(model)}: {title} ({e(c.scorers[0])})</h2>{_pairs(c, model, places)}"
                )
    models = "".join(f"<li>{e(m.name)}: {e(m.described)}</li>" for m in c.models)
    settings = (
        ", ".join(f"{k} {v}" for k, v in c.facts["settings"]["arguments"].items())
        or "the pipelines' defaults"
    )
    source = f"{c.prompts.name}, sha256 {c.prompts.sha256[:16]}" + (
        f", {c.prompts.licence}" if c.prompts.licence else ""
    )
    parts.append(
        f"<h2>How it was made</h2><ul>{models}<li>prompts: {e(source)}</li><li>seed {c.facts['settings']['seed']}; {e(settings)}</li></ul>"
    )
    return "\n".join(parts) + "</html>\n"


def headline(c: Comparison) -> str:
    """One sentence on every tuned model, by the deciding scorer."""
    said = []
    for model in c.tuned:
        won = c.win_rate(model)
        verdict = (
            "wins"
            if won.low > 0.5
            else "loses"
            if won.high < 0.5
            else "is not told apart from the base by this many prompts"
        )
        said.append(f"{model} {verdict}: {rate(won)} % by {c.scorers[0]}.")
    return " ".join(said)


def bars(c: Comparison) -> str:
    """Win-rates with their intervals, as an inline picture."""
    rows = [
        (f"{m}, {s}" if len(c.scorers) > 1 else m, c.win_rate(m, s))
        for m in c.tuned
        for s in c.scorers
    ]
    rows = [(label, found) for label, found in rows if not math.isnan(found.rate)]
    left, width, step = 260, 400, 26
    height = step * len(rows) + 30
    parts = [
        f"<svg viewBox='0 0 {left + width + 20} {height}' width='{left + width + 20}' role=img aria-label='win-rates with intervals' "
        "fill=currentColor font-size=13 font-family='system-ui, sans-serif'>"
    ]
    for tick in (0, 25, 50, 75, 100):
        x = left + width * tick / 100
        dash = "" if tick == 50 else " stroke-dasharray='2 3' opacity=.4"
        parts.append(f"<line x1={x} x2={x} y1=0 y2={height - 20} stroke=currentColor{dash}></line>")
        parts.append(f"<text x={x} y={height - 5} text-anchor=middle>{tick}</text>")
    for i, (label, found) in enumerate(rows):
        y = step * i + step / 2
        colour = "#1a7f37" if found.low > 0.5 else "#cf222e" if found.high < 0.5 else "#6e7781"
        low, at, high = (
            left + width * min(1.0, max(0.0, v)) for v in (found.low, found.rate, found.high)
        )
        parts.append(
            f"<text x={left - 10} y={y + 4} text-anchor=end>{html.escape(_short(label, 36))}</text>"
        )
        parts.append(
            f"<line x1={low:.1f} x2={high:.1f} y1={y} y2={y} stroke='{colour}' stroke-width=3></line>"
        )
        parts.append(f"<circle cx={at:.1f} cy={y} r=5 fill='{colour}'></circle>")
    return "".join(parts) + "</svg>"


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else "…" + text[-length + 1 :]


def _pairs(c: Comparison, model: str, places: Sequence[tuple[int, int]]) -> str:
    from .comparison import image_name

    parts = []
    for p, n in places:
        scores = " to ".join(
            f"{c.scores[name][c.scorers[0]][p, n]:.3g}" for name in (c.base, model)
        )
        images = "".join(
            f"<img loading=lazy src='{html.escape(image_name(name, p, n))}' alt='{html.escape(name)}'>"
            for name in (c.base, model)
        )
        parts.append(
            f"<figure><div class=pair>{images}</div><figcaption>{html.escape(c.prompts.prompts[p])} ({scores})</figcaption></figure>"
        )
    return f"<div class=pairs>{''.join(parts)}</div>"
