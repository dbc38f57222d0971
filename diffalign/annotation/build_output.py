"""What ``diffalign data build`` leaves: pairs and ranked lists as datasets, all scores, a card and a picture to look at."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.files import replacing, replacing_folder, save_image, write_atomically
from ..runtime.templates import render

if TYPE_CHECKING:
    from ..rewards.panel import Panel
    from .drawn import BuildOptions, Drawn, Generator

_SHARD_ROWS = 200
_SHEET_PROMPTS, _SHEET_IMAGES, _SHEET_SIDE = 8, 8, 128


@dataclass
class Labels:
    """What the scores say.

    Attributes:
        combined: one number per image, NaN = missing.
        pairs: (better, worse) image indices.
        lists: image indices of each prompt, best first; at least two, not all equal.
        dropped: reason -> number of prompts.
        agreement: see `diffalign.rewards.panel.Combined`.
    """

    combined: list[float]
    pairs: list[tuple[int, int]] = field(default_factory=list)
    lists: list[list[int]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    agreement: dict[str, Any] = field(default_factory=dict)


def label(
    panel: Panel,
    images: Sequence[Drawn],
    columns: dict[str, list[float]],
    selection: str,
    min_margin: float,
) -> Labels:
    """Combines the scores and picks pairs and lists. An image without a score is in neither; ties are dropped and counted."""
    groups = [image.group for image in images]
    combined = panel.combine(columns, groups)
    labels = Labels(combined.values.tolist(), agreement=combined.agreement)
    agreed: dict[int, list[tuple[int, int]]] = {}
    if selection == "unanimous":
        for better, worse in panel.agreed_pairs(columns, groups):
            agreed.setdefault(groups[better], []).append((better, worse))
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        if math.isfinite(labels.combined[i]):
            members.setdefault(group, []).append(i)
    for group in dict.fromkeys(groups):
        # Equal images stay in the order in which they were drawn.
        ranked = sorted(members.get(group, []), key=lambda i: -labels.combined[i])
        if len(ranked) < 2:
            labels.dropped["fewer than two images with a score"] += 1
            continue
        if labels.combined[ranked[0]] == labels.combined[ranked[-1]]:
            labels.dropped["all images equal"] += 1
            continue
        labels.lists.append(ranked)
        chosen = _pick(ranked, labels.combined, selection, min_margin, agreed.get(group, []))
        if not chosen:
            why = (
                "no pair that all scorers agree on"
                if selection == "unanimous"
                else f"margin below {min_margin:g}"
            )
            labels.dropped[f"{why} (kept as a list)"] += 1
        labels.pairs += chosen
    return labels


def _pick(
    ranked: list[int],
    combined: list[float],
    selection: str,
    min_margin: float,
    agreed: Sequence[tuple[int, int]],
) -> list[tuple[int, int]]:
    def wide(pair: tuple[int, int]) -> bool:
        margin = combined[pair[0]] - combined[pair[1]]
        return margin > 0 and margin >= min_margin

    if selection == "unanimous":
        good = [pair for pair in agreed if wide(pair)]
        return [max(good, key=lambda pair: combined[pair[0]] - combined[pair[1]])] if good else []
    if selection == "best_worst":
        pairs = [(ranked[0], ranked[-1])]
    elif selection == "best_vs_rest":
        pairs = [(ranked[0], other) for other in ranked[1:]]
    else:
        pairs = [(better, worse) for i, better in enumerate(ranked) for worse in ranked[i + 1 :]]
    return [pair for pair in pairs if wide(pair)]


def write(
    options: BuildOptions,
    prompts: Sequence[str],
    notes: Sequence[str],
    generators: Sequence[Generator],
    images: Sequence[Drawn],
    columns: dict[str, list[float]],
    panel: Panel,
) -> str:
    """Writes ``scores.parquet``, ``pairs/``, ``ranked/``, ``README.md`` and ``sheet.png``; returns the summary."""
    labels = label(panel, images, columns, options.pair_selection, options.min_margin)
    folder: Path = options.output_dir
    _write_scores(folder, images, columns, labels)
    if options.format != "ranked":
        _write_dataset(
            folder / "pairs",
            lambda: _pair_rows(images, labels),
            len(labels.pairs),
            _pair_features(),
        )
    if options.format != "pairs":
        _write_dataset(
            folder / "ranked",
            lambda: _list_rows(images, columns, labels),
            len(labels.lists),
            _list_features(list(columns)),
        )
    summary = summarise(options, prompts, notes, generators, images, columns, labels, panel)
    write_atomically(folder / "README.md", card(options, generators, summary).encode())
    if labels.lists:
        save_image(sheet(images, labels), folder / "sheet.png")
    return summary


def _write_scores(
    folder: Path, images: Sequence[Drawn], columns: dict[str, list[float]], labels: Labels
) -> None:
    import pyarrow
    import pyarrow.parquet

    def numbers(values: Sequence[float]) -> list[float | None]:
        return [value if math.isfinite(value) else None for value in values]

    table = {
        "prompt": [image.prompt for image in images],
        "model": [image.model for image in images],
        "number": [image.number for image in images],
        "seed": [image.seed for image in images],
        "image": [image.path.relative_to(folder).as_posix() for image in images],
        **{f"score_{name}": numbers(values) for name, values in columns.items()},
        "combined": numbers(labels.combined),
    }
    with replacing(folder / "scores.parquet") as temporary:
        pyarrow.parquet.write_table(pyarrow.table(table), temporary)


def _pair_features() -> dict[str, Any]:
    from datasets import Image, Value

    text, number = Value("string"), Value("float64")
    return {
        "prompt": text,
        "chosen": Image(),
        "rejected": Image(),
        "margin": number,
        "chosen_score": number,
        "rejected_score": number,
        "chosen_model": text,
        "rejected_model": text,
    }


def _pair_rows(images: Sequence[Drawn], labels: Labels) -> Iterator[dict[str, Any]]:
    for better, worse in labels.pairs:
        scores = labels.combined[better], labels.combined[worse]
        yield {
            "prompt": images[better].prompt,
            "chosen": _embedded(images[better]),
            "rejected": _embedded(images[worse]),
            "margin": scores[0] - scores[1],
            "chosen_score": scores[0],
            "rejected_score": scores[1],
            "chosen_model": images[better].model,
            "rejected_model": images[worse].model,
        }


def _list_features(names: Sequence[str]) -> dict[str, Any]:
    from datasets import Image, List, Value

    each = {f"scores_{name}": List(Value("float64")) for name in names}
    return {
        "prompt": Value("string"),
        "images": List(Image()),
        "scores": List(Value("float64")),
        **each,
        "models": List(Value("string")),
    }


def _list_rows(
    images: Sequence[Drawn], columns: dict[str, list[float]], labels: Labels
) -> Iterator[dict[str, Any]]:
    for ranked in labels.lists:
        each = {
            f"scores_{name}": [values[i] if math.isfinite(values[i]) else None for i in ranked]
            for name, values in columns.items()
        }
        yield {
            "prompt": images[ranked[0]].prompt,
            "images": [_embedded(images[i]) for i in ranked],
            "scores": [labels.combined[i] for i in ranked],
            **each,
            "models": [images[i].model for i in ranked],
        }


def _embedded(image: Drawn) -> dict[str, Any]:
    return {"bytes": image.path.read_bytes(), "path": None}


def _write_dataset(
    target: Path, rows: Callable[[], Iterator[dict[str, Any]]], count: int, features: dict[str, Any]
) -> None:
    """Parquet shards, whole or not at all; what stood there before is replaced. Without a row there is no folder."""
    from datasets import Dataset, Features

    shards = -(-count // _SHARD_ROWS)
    if not shards:
        shutil.rmtree(target, ignore_errors=True)
        return
    with replacing_folder(target) as temporary:
        source = rows()
        for number in range(shards):
            part = [
                row
                for _, row in zip(
                    range(min(_SHARD_ROWS, count - number * _SHARD_ROWS)), source, strict=False
                )
            ]
            name = f"train-{number:05d}-of-{shards:05d}.parquet"
            Dataset.from_list(part, features=Features(features)).to_parquet(temporary / name)


def summarise(
    options: BuildOptions,
    prompts: Sequence[str],
    notes: Sequence[str],
    generators: Sequence[Generator],
    images: Sequence[Drawn],
    columns: dict[str, list[float]],
    labels: Labels,
    panel: Panel,
) -> str:
    """The numbers of a build, a line each."""
    lines = [
        f"{len(prompts)} prompts{''.join(f', {note}' for note in notes)}; {len(images)} images of {len(generators)} models"
    ]
    for name, values in columns.items():
        good = [value for value in values if math.isfinite(value)]
        role = "" if name in panel.train_names else ", eval only"
        spread = (
            f"mean {sum(good) / len(good):.4g}, from {min(good):.4g} to {max(good):.4g}"
            if good
            else "no score at all"
        )
        lines.append(f"{name}: {spread}, {len(values) - len(good)} missing{role}")
    margins = [labels.combined[better] - labels.combined[worse] for better, worse in labels.pairs]
    mean = f", mean margin {sum(margins) / len(margins):.3f}" if margins else ""
    lines.append(
        f"{len(labels.pairs)} pairs ({options.pair_selection}){mean}; {len(labels.lists)} ranked lists"
    )
    lines += [
        f"{count} prompts without a pair: {reason}" for reason, count in labels.dropped.items()
    ]
    agreement = labels.agreement.get("kendalls_w")
    if agreement is not None:
        lines.append(
            f"agreement of the scorers, Kendall's W: {agreement:.2f} (1 is perfect, {1 / len(panel.train_names):.2f} is chance for many)"
        )
    if len(generators) > 1 and labels.pairs:
        wins, losses = (
            Counter(images[pair[side]].model for pair in labels.pairs) for side in (0, 1)
        )
        lines.append(
            "chosen, rejected: "
            + "; ".join(f"{g.name} {wins[g.name]}, {losses[g.name]}" for g in generators)
        )
    for name, kind in (("pairs", "pairs"), ("ranked", "ranked")):
        if (options.output_dir / kind).is_dir() and options.format in ("both", name):
            lines.append(f"wrote {options.output_dir / kind}")
    return "\n".join(lines)


def card(options: BuildOptions, generators: Sequence[Generator], summary: str) -> str:
    """README.md of the folder, as a dataset card."""
    names = ("seed", "num_inference_steps", "guidance_scale", "resolution", "num_images")
    settings = {name: getattr(options, name) for name in names}
    return render(
        "annotation/templates/dataset_card.md",
        datasets=[name for name in ("pairs", "ranked") if (options.output_dir / name).is_dir()],
        models=generators,
        settings=", ".join(f"{k} {v}" for k, v in settings.items() if v is not None),
        summary=[line for line in summary.split("\n") if not line.startswith("wrote ")],
    )


def sheet(images: Sequence[Drawn], labels: Labels) -> Any:
    """Some prompts, one per row: their images from best to worst with the combined score beneath."""
    from PIL import Image, ImageDraw, ImageFont

    step = max(1, len(labels.lists) // _SHEET_PROMPTS)
    rows = labels.lists[::step][:_SHEET_PROMPTS]
    font = ImageFont.load_default(13)
    width = min(_SHEET_IMAGES, max(map(len, rows)))
    line, gap = 20, 6
    height = _SHEET_SIDE + 2 * line + gap
    canvas = Image.new(
        "RGB", (width * (_SHEET_SIDE + gap) + gap, len(rows) * height + gap), "white"
    )
    pen = ImageDraw.Draw(canvas)
    for row, ranked in enumerate(rows):
        top = gap + row * height
        prompt = " ".join(images[ranked[0]].prompt[:400].split())
        while prompt and font.getlength(prompt) > canvas.width - 2 * gap:
            prompt = prompt[:-4].rstrip(".") + "..." if len(prompt) > 4 else ""
        pen.text((gap, top), prompt, fill="black", font=font)
        # Of a long list the two ends are shown: they are what a pair is made of.
        shown = (
            ranked
            if len(ranked) <= width
            else [*ranked[: width - width // 2], *ranked[-(width // 2) :]]
        )
        for column, i in enumerate(shown):
            left = gap + column * (_SHEET_SIDE + gap)
            with Image.open(images[i].path) as picture:
                small = picture.convert("RGB")
            small.thumbnail((_SHEET_SIDE, _SHEET_SIDE)) if max(small.size) > _SHEET_SIDE else None
            if max(small.size) < _SHEET_SIDE:
                factor = _SHEET_SIDE / max(small.size)
                small = small.resize(
                    (round(small.width * factor), round(small.height * factor)),
                    Image.Resampling.NEAREST,
                )
            canvas.paste(small, (left, top + line))
            pen.text(
                (left, top + line + _SHEET_SIDE + 2),
                f"{labels.combined[i]:.2f}  {images[i].model}"[:20],
                fill="black",
                font=font,
            )
    return canvas
