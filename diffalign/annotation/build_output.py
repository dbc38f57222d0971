"""Write what ``diffalign data build`` leaves.

That is pairs, ranked lists and the best images as datasets, all scores, a card, and a
picture.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.files import replacing, save_image, write_atomically
from ..runtime.templates import render
from .best import ranked_images, write_best
from .dataset_files import write_dataset

if TYPE_CHECKING:
    from PIL import Image

    from ..rewards.panel import Panel
    from .drawn import BuildOptions, Drawn, Generator

DATASETS = ("pairs", "ranked", "best")
_SHEET_PROMPTS, _SHEET_IMAGES, _SHEET_SIDE = 8, 8, 128


@dataclass
class Labels:
    """Preferences between images, made from their scores.

    Attributes:
        combined (`list[float]`): One number per image. NaN means missing.
        pairs (`list[tuple[int, int]]`): (better, worse) image indices.
        lists (`list[list[int]]`): Image indices of each prompt, best first. A list has
            at least two images, and they are not all equal.
        best (`list[int]`): Image indices of the best images of all prompts together.
        dropped (`Counter[str]`): Reason -> number of prompts.
        agreement (`dict`): See `diffalign.rewards.panel.Combined`.
    """

    combined: list[float]
    pairs: list[tuple[int, int]] = field(default_factory=list)
    lists: list[list[int]] = field(default_factory=list)
    best: list[int] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    agreement: dict[str, Any] = field(default_factory=dict)


def label(
    panel: Panel,
    images: Sequence[Drawn],
    columns: dict[str, list[float]],
    selection: str,
    min_margin: float,
) -> Labels:
    """Combine the scores and choose pairs and lists.

    An image without a score is in neither. Ties are dropped and counted.

    Args:
        panel (`Panel`): Says how scores are combined.
        images (`Sequence[Drawn]`): N images.
        columns: Scorer -> N scores.
        selection (`str`): ``best_worst``, ``best_vs_rest``, ``all`` or ``unanimous``.
        min_margin (`float`): Smallest difference of the combined scores of a pair.

    Returns:
        `Labels`, with indices into `images`.
    """
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
    """Choose the pairs of one prompt.

    Args:
        ranked (`list[int]`): Its image indices, best first.
        combined (`list[float]`): Score of every image.
        selection (`str`): See `label`.
        min_margin (`float`): Smallest difference of the scores of a pair.
        agreed: Pairs of this prompt on which all scorers agree.
    """

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
    """Write all files of a build and summarise them.

    These are ``scores.parquet``, ``pairs/``, ``ranked/``, ``best/`` where it is asked
    for, ``README.md`` and ``sheet.png``.

    Args:
        options (`BuildOptions`): Options of the build.
        prompts (`Sequence[str]`): All prompts.
        notes (`Sequence[str]`): Remarks on the prompts, for the summary.
        generators (`Sequence[Generator]`): The models that drew.
        images (`Sequence[Drawn]`): N images.
        columns: Scorer -> N scores.
        panel (`Panel`): Says how scores are combined.

    Returns:
        The summary, see `summarise`.
    """
    labels = label(panel, images, columns, options.pair_selection, options.min_margin)
    folder: Path = options.output_dir
    if options.best is not None:
        labels.best = ranked_images(panel, columns)[: options.best]
        best = [(i, images[i]) for i in labels.best]
        write_best(
            folder / "best",
            lambda: ((i, x.prompt, x.path.read_bytes(), x.model) for i, x in best),
            len(best),
            columns,
            "model",
        )
    _write_scores(folder, images, columns, labels)
    if options.format != "ranked":
        write_dataset(
            folder / "pairs",
            lambda: _pair_rows(images, labels),
            len(labels.pairs),
            _pair_features(),
        )
    if options.format != "pairs":
        write_dataset(
            folder / "ranked",
            lambda: _list_rows(images, columns, labels),
            len(labels.lists),
            _list_features(list(columns)),
        )
    summary = summarise(options, prompts, notes, generators, images, columns, labels, panel)
    write_atomically(folder / "README.md", card(options, generators, labels, summary).encode())
    if labels.lists:
        save_image(sheet(images, labels), folder / "sheet.png")
    return summary


def _write_scores(
    folder: Path, images: Sequence[Drawn], columns: dict[str, list[float]], labels: Labels
) -> None:
    """Write a row per image, with None for a missing score."""
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
    """Say what a build gave, one fact per line.

    The arguments are those of `write`, and the labels that `label` made of them.
    """
    remarks = "".join(f", {note}" for note in notes)
    lines = [f"{len(prompts)} prompts{remarks}; {len(images)} images of {len(generators)} models"]
    for name, values in columns.items():
        scores = [value for value in values if math.isfinite(value)]
        role = "" if name in panel.train_names else ", eval only"
        spread = "no score at all"
        if scores:
            mean = sum(scores) / len(scores)
            spread = f"mean {mean:.4g}, from {min(scores):.4g} to {max(scores):.4g}"
        lines.append(f"{name}: {spread}, {len(values) - len(scores)} missing{role}")
    margins = [labels.combined[better] - labels.combined[worse] for better, worse in labels.pairs]
    mean_margin = f", mean margin {sum(margins) / len(margins):.3f}" if margins else ""
    lines.append(
        f"{len(labels.pairs)} pairs ({options.pair_selection}){mean_margin}; "
        f"{len(labels.lists)} ranked lists"
    )
    for reason, count in labels.dropped.items():
        lines.append(f"{count} prompts without a pair: {reason}")
    agreement = labels.agreement.get("kendalls_w")
    if agreement is not None:
        chance = 1 / len(panel.train_names)
        lines.append(
            f"agreement of the scorers, Kendall's W: {agreement:.2f} "
            f"(1 is perfect, {chance:.2f} is chance for many)"
        )
    if len(generators) > 1 and labels.pairs:
        wins = Counter(images[better].model for better, _ in labels.pairs)
        losses = Counter(images[worse].model for _, worse in labels.pairs)
        counts = "; ".join(f"{g.name} {wins[g.name]}, {losses[g.name]}" for g in generators)
        lines.append(f"chosen, rejected: {counts}")
    if labels.best:
        prompts_of_best = len({images[i].group for i in labels.best})
        lines.append(f"{len(labels.best)} best images of {prompts_of_best} prompts")
    asked = written(options, labels)
    for kind in DATASETS:
        if not (options.output_dir / kind).is_dir():
            continue
        if kind in asked:
            lines.append(f"wrote {options.output_dir / kind}")
        else:
            lines.append(
                f"{options.output_dir / kind} is of an earlier run of this command, and may have "
                "other labels"
            )
    return "\n".join(lines)


def written(options: BuildOptions, labels: Labels) -> list[str]:
    """Name the datasets that a build writes.

    Args:
        options (`BuildOptions`): Options of the build.
        labels (`Labels`): What it labelled.
    """
    asked = {
        "pairs": options.format != "ranked",
        "ranked": options.format != "pairs",
        "best": bool(labels.best),
    }
    return [name for name in DATASETS if asked[name]]


def card(
    options: BuildOptions, generators: Sequence[Generator], labels: Labels, summary: str
) -> str:
    """Fill in the dataset card.

    Args:
        options (`BuildOptions`): Options of the build.
        generators (`Sequence[Generator]`): The models that drew.
        labels (`Labels`): What was labelled.
        summary (`str`): See `summarise`.

    Returns:
        The text of ``README.md``.
    """
    names = ("seed", "num_inference_steps", "guidance_scale", "resolution", "num_images")
    settings = {name: getattr(options, name) for name in names}
    return render(
        "annotation/templates/dataset_card.md",
        datasets=[
            name for name in written(options, labels) if (options.output_dir / name).is_dir()
        ],
        models=generators,
        settings=", ".join(f"{k} {v}" for k, v in settings.items() if v is not None),
        summary=[line for line in summary.split("\n") if not line.startswith("wrote ")],
    )


def sheet(images: Sequence[Drawn], labels: Labels) -> Image.Image:
    """Draw some prompts, one per row, with their images from best to worst.

    Every image has its combined score and its model beneath.

    Args:
        images (`Sequence[Drawn]`): The images.
        labels (`Labels`): Their order, with at least one list.

    Returns:
        A PIL image.
    """
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
        # Of a long list the two ends are shown, because pairs are made of them.
        shown = (
            ranked
            if len(ranked) <= width
            else [*ranked[: width - width // 2], *ranked[-(width // 2) :]]
        )
        for column, i in enumerate(shown):
            left = gap + column * (_SHEET_SIDE + gap)
            with Image.open(images[i].path) as picture:
                small = picture.convert("RGB")
            if max(small.size) > _SHEET_SIDE:
                small.thumbnail((_SHEET_SIDE, _SHEET_SIDE))
            elif max(small.size) < _SHEET_SIDE:
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
