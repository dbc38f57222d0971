"""Inspect a dataset before money is spent on it, draw its first group, and convert it.

These are `diffalign data inspect` and `diffalign data convert`. `convert` writes the
canonical form of a dataset: parquet with embedded images.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from diffalign.data import images as image_cells
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.groups import Group
from diffalign.data.transforms import ASPECT_TOLERANCE, _same_aspect
from diffalign.errors import UserError
from diffalign.runtime.files import make_folder, replacing_folder, save_image

from ..runtime.progress import track

_LISTED = 20  # row ids per finding
_SHOW_PROGRESS_FROM = 2000  # rows
_ASPECTS = {"1:2": 0.5, "9:16": 9 / 16, "2:3": 2 / 3, "3:4": 0.75, "4:5": 0.8, "1:1": 1.0}
_ASPECTS |= {
    ":".join(reversed(name.split(":"))): 1 / value for name, value in _ASPECTS.items() if value < 1
}


class _Finding:
    """Count the rows of one kind of finding, and remember the first row ids."""

    def __init__(self) -> None:
        self.count, self.rows = 0, list[int]()

    def add(self, row_id: int) -> None:
        self.count += 1
        if len(self.rows) < _LISTED:
            self.rows.append(row_id)

    def as_dict(self) -> dict[str, Any]:
        return {"count": self.count, "rows": self.rows}


def inspect(dataset: PreferenceDataset, *, decode: bool = True) -> dict[str, Any]:
    """Read every group once and describe the dataset.

    Args:
        dataset (`PreferenceDataset`): From `load_preferences`.
        decode (`bool`, *optional*, defaults to `True`): Decode every image, which finds
            files that are cut off. False reads headers only.

    Returns:
        `dict` of plain types, ready for JSON, with the load report (`rows`, `kept`,
        `ties`, ...) and:

        * `fingerprint`, `images`, `distinct_images`, `distinct_prompts`, `decoded`;
        * `sizes` ("HxW" -> number), `aspects` (nearest usual width:height -> number),
          `formats`;
        * `prompt_words` and `prompt_characters`, each `{min, median, max}`;
        * `first_image_preferred`, a share, where labels say it;
        * `liked`, a share, of likes and dislikes;
        * the findings `duplicate_groups`, `duplicate_images`, `identical_images`
          (chosen = rejected), `size_mismatches`, `aspect_mismatches` and `unreadable`,
          each `{count, rows}`;
        * `reasons`, the first reasons for `unreadable`.

    Example:
        >>> from PIL import Image
        >>> from diffalign.data import load_preferences
        >>> images = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
        >>> rows = [{"prompt": "red", "images": images, "scores": [2, 1]}]
        >>> dataset = load_preferences(rows, verbose=False)
        >>> result = inspect(dataset)
        >>> result["sizes"], result["unreadable"]["count"]
        ({'8x8': 2}, 0)
    """
    sizes, aspects, formats = Counter[str](), Counter[str](), Counter[str]()
    prompts = Counter[str]()
    seen_groups, seen_images = set[tuple[object, ...]](), set[bytes]()
    names = (
        "duplicate_groups",
        "duplicate_images",
        "identical_images",
        "size_mismatches",
        "aspect_mismatches",
        "unreadable",
    )
    findings = {name: _Finding() for name in names}
    images = liked = 0
    reasons: list[str] = []
    for group in _readable(dataset, findings["unreadable"], reasons):
        prompts.update(set(group.prompts))
        liked += dataset.kind == "labelled" and (group.scores or (0.0,))[0] > 0
        try:
            headers = [image_cells.header(image) for image in group.images]
            if decode:
                for image in group.images:
                    image_cells.decode(image)
        except image_cells.BrokenImage as error:
            findings["unreadable"].add(group.row_id)
            _note(reasons, f"row {group.row_id}: {error}")
            continue
        group_sizes = [size for size, _ in headers]
        hashes = [bytes.fromhex(digest)[:16] for digest in group.image_hashes()]
        images += len(group_sizes)
        sizes.update(f"{height}x{width}" for height, width in group_sizes)
        aspects.update(_nearest_aspect(size) for size in group_sizes)
        formats.update(kind for _, kind in headers)
        key = (group.prompts, *hashes)
        checks = {
            "duplicate_groups": key in seen_groups,
            "duplicate_images": any(digest in seen_images for digest in hashes),
            "identical_images": len(set(hashes)) < len(hashes),
            "size_mismatches": len(set(group_sizes)) > 1,
            "aspect_mismatches": any(
                not _same_aspect(size, group_sizes[0]) for size in group_sizes
            ),
        }
        for name, true in checks.items():
            if true:
                findings[name].add(group.row_id)
        seen_groups.add(key)
        seen_images.update(hashes)
    report = dataset.report
    labelled = report.first_wins + report.second_wins
    return report.as_dict() | {
        "kind": dataset.kind,
        "fingerprint": None if findings["unreadable"].count else dataset.fingerprint,
        "images": images,
        "distinct_images": len(seen_images),
        "sizes": dict(sizes.most_common()),
        "aspects": dict(aspects.most_common()),
        "formats": dict(formats.most_common()),
        "distinct_prompts": len(prompts),
        "prompt_words": _spread(len(prompt.split()) for prompt in prompts.elements()),
        "prompt_characters": _spread(len(prompt) for prompt in prompts.elements()),
        "first_image_preferred": report.first_wins / labelled if labelled else None,
        "liked": liked / sum(prompts.values()) if dataset.kind == "labelled" and prompts else None,
        **{name: finding.as_dict() for name, finding in findings.items()},
        "reasons": reasons,
        "decoded": decode,
    }


def _readable(
    dataset: PreferenceDataset, unreadable: _Finding, reasons: list[str]
) -> Iterator[Group]:
    """Yield the dataset's groups, and note those whose image files are gone."""
    if dataset.row_ids is None:
        yield from dataset
        return
    row_ids = dataset.row_ids.tolist()
    for index, row_id in enumerate(
        track(row_ids, desc="reading", unit="row", disable=len(row_ids) < _SHOW_PROGRESS_FROM)
    ):
        try:
            group = dataset[index]
        except UserError as error:
            unreadable.add(row_id)
            _note(reasons, str(error))
            continue
        yield group


def _note(reasons: list[str], reason: str) -> None:
    if len(reasons) < _LISTED:
        reasons.append(reason)


def _nearest_aspect(size: tuple[int, int]) -> str:
    return min(_ASPECTS, key=lambda name: abs(_ASPECTS[name] - size[1] / size[0]) / _ASPECTS[name])


def _spread(values: Iterable[int]) -> dict[str, int]:
    ordered = sorted(values) or [0]
    return {"min": ordered[0], "median": ordered[len(ordered) // 2], "max": ordered[-1]}


def format_inspection(result: dict[str, Any]) -> str:
    """Format the result of `inspect` as lines for the terminal.

    Args:
        result (`dict`): What `inspect` returned.

    Example:
        >>> from PIL import Image
        >>> from diffalign.data import load_preferences
        >>> from diffalign.data import format_inspection
        >>> images = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
        >>> rows = [{"prompt": "red", "images": images, "scores": [2, 1]}]
        >>> dataset = load_preferences(rows, verbose=False)
        >>> print(format_inspection(inspect(dataset)).splitlines()[2])
        kind                     ranked
    """

    def histogram(counts: dict[str, int]) -> str:
        shown = ", ".join(f"{name}: {count}" for name, count in list(counts.items())[:8])
        return shown + (f", {len(counts) - 8} more" if len(counts) > 8 else "") or "none"

    def finding(name: str) -> str:
        count, row_ids = result[name]["count"], result[name]["rows"]
        rows = ", ".join(map(str, row_ids)) + (", ..." if count > len(row_ids) else "")
        return f"{count} (rows {rows})" if count else "0"

    def spread(name: str) -> str:
        return "{min} to {max}, median {median}".format(**result[name])

    balance = result["first_image_preferred"]
    likes = {} if result["liked"] is None else {"liked": f"{result['liked']:.1%}"}
    mapping = ", ".join(f"{role} = {column}" for role, column in result["mapping"].items())
    lines = {
        "source": result["source"],
        "layout": f"{result['layout']} ({mapping})",
        "kind": result["kind"],
        "rows": f"{result['rows']}, of which used {result['kept']}",
        "ties": f"{result['ties']} ({'kept with weight 0' if result['ties_kept'] else 'dropped'})",
        "without a label": str(result["unlabelled"]),
        "broken": str(result["broken_count"]),
        "direction": result["direction"] or "no judgements",
        "first image preferred": "the columns are ordered" if balance is None else f"{balance:.1%}",
        **likes,
        "prompts": f"{result['distinct_prompts']} distinct",
        "words per prompt": spread("prompt_words"),
        "characters per prompt": spread("prompt_characters"),
        "images": f"{result['images']}, distinct {result['distinct_images']}",
        "formats": histogram(result["formats"]),
        "height x width": histogram(result["sizes"]),
        "aspect (w:h)": histogram(result["aspects"]),
        "repeated groups": finding("duplicate_groups"),
        "repeated images": finding("duplicate_images"),
        "equal images in a group": finding("identical_images"),
        "unequal sizes in a group": finding("size_mismatches"),
        f"aspects over {ASPECT_TOLERANCE:.0%} apart": finding("aspect_mismatches"),
        "unreadable": finding("unreadable")
        + ("" if result["decoded"] else " (headers only; --verify_images full decodes)"),
        "fingerprint": result["fingerprint"] or "none while images are unreadable",
    }
    text = [f"{name:<24} {value}" for name, value in lines.items()]
    text += [f"  row {row_id}: {reason}" for row_id, reason in result["broken"]]
    text += [f"  {reason}" for reason in result["reasons"]]
    text += [f"note: {note}" for note in result["notes"]]
    if result["unused"]:
        text.append(
            "not read, although they look like judgements or images: "
            f"{', '.join(result['unused'])} (map them with --columns)"
        )
    return "\n".join(text)


def first_group_picture(dataset: PreferenceDataset, file: str | Path, *, side: int = 256) -> Path:
    """Draw the first group of a dataset, to show which way its judgements are read.

    The preferred image is on the left.

    Args:
        dataset (`PreferenceDataset`): Pairs, ranked lists or single images.
        file (`str` or `Path`): Where the PNG goes.
        side (`int`, *optional*, defaults to `256`): Side of each image, in pixels.

    Returns:
        `Path`: The file.

    Raises:
        UserError: There are no images, or the first group cannot be read.
    """
    from PIL import Image, ImageDraw, ImageOps

    group = next(iter(dataset), None)
    if group is None or not group.images:
        raise UserError(f"--picture: dataset {dataset.report.source} has no images to show")
    images = group.open_images()
    scores = group.scores or ()
    order = list(range(len(images)))
    names = ["image"] * len(images)
    if dataset.kind == "pair":
        names = ["chosen", "rejected"]
    elif dataset.kind == "conditioned":
        names = ["image", "condition"]
    elif dataset.kind == "labelled":
        names = ["liked" if scores[0] > 0 else "disliked"]
    elif scores:
        order.sort(key=lambda i: -scores[i])
    if group.tie_weight is not None:
        names = ["tie"] * len(images)
    # Ranks are kept negated, so that higher is better.
    sign = -1.0 if dataset.score_name == "rank" else 1.0
    picture = Image.new("RGB", (len(images) * (side + 8) + 8, side + 56), "white")
    draw = ImageDraw.Draw(picture)
    draw.text(
        (8, 6), f"row {group.row_id}: {group.prompts[order[0]][: 40 * len(images)]}", fill="black"
    )
    for place, i in enumerate(order):
        left = 8 + place * (side + 8)
        picture.paste(ImageOps.pad(images[i], (side, side), color="lightgray"), (left, 24))
        label = (
            f"{place + 1}: {dataset.score_name} {sign * scores[i]:g}"
            if dataset.kind == "ranked"
            else names[i]
        )
        draw.text((left, side + 32), label, fill="black")
    target = Path(file).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    save_image(picture, target)
    return target


def convert(
    dataset: PreferenceDataset,
    output_dir: str | Path,
    *,
    kind: str | None = None,
    shard_rows: int = 1000,
) -> Path:
    """Write a dataset as canonical parquet, with its images embedded unchanged.

    The files are `train-00000-of-0000N.parquet`. `datasets.load_dataset(output_dir)`
    and `load_preferences(output_dir)` read them. The folder appears only when it is
    complete.

    Args:
        dataset (`PreferenceDataset`): From `load_preferences`.
        output_dir (`str` or `Path`): A folder that does not exist yet, or is empty.
        kind (`str`, *optional*): Kind to write, see `PreferenceDataset.as_kind`. None
            writes the dataset's own.
        shard_rows (`int`, *optional*, defaults to `1000`): Rows per file.

    Returns:
        `Path`: The folder.

    Raises:
        UserError: The folder is not empty, an image cannot be read, or the data are not
            of the kind.

    Example:
        >>> from PIL import Image
        >>> from diffalign.data import convert, load_preferences
        >>> images = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
        >>> rows = [{"prompt": "red", "images": images, "scores": [2, 1]}]
        >>> dataset = load_preferences(rows, verbose=False)
        >>> folder = convert(dataset, "pairs", kind="pair")
        >>> load_preferences("pairs", verbose=False).kind
        'pair'
    """
    output = Path(output_dir).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(
            f"output_dir: {str(output)!r} exists and is not an empty folder; choose another one"
        )
    if kind is not None:
        dataset = dataset.as_kind(kind)
    return write_canonical(
        (canonical_row(group, dataset) for group in dataset), output, shard_rows=shard_rows
    )


def write_canonical(
    rows: Iterable[dict[str, Any]], output: Path, *, shard_rows: int = 1000, replace: bool = False
) -> Path:
    """Write rows of canonical columns as parquet shards.

    The folder appears only when it is complete.

    Args:
        rows (`Iterable[dict[str, Any]]`): Rows with equal columns.
        output (`Path`): The folder.
        shard_rows (`int`, *optional*, defaults to `1000`): Rows per file.
        replace (`bool`, *optional*, defaults to `False`): Replace a folder that is
            there.

    Returns:
        `Path`: The folder.

    Raises:
        UserError: The folder is not empty and `replace` is False.
    """
    make_folder(output.parent)
    if output.exists() and not replace and any(output.iterdir()):
        raise UserError(
            f"output_dir: {str(output)!r} exists and is not an empty folder; choose another one"
        )
    with replacing_folder(output) as partial:
        shards: list[Path] = []
        for number, chunk in enumerate(_chunks(rows, shard_rows)):
            shards.append(partial / f"shard-{number:05d}")
            _write_shard(chunk, shards[-1])
        for number, shard in enumerate(shards):
            shard.rename(partial / f"train-{number:05d}-of-{len(shards):05d}.parquet")
    return output


def _chunks(source: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    for row in source:
        rows.append(row)
        if len(rows) == size:
            yield rows
            rows = []
    if rows:
        yield rows


def canonical_row(group: Group, dataset: PreferenceDataset) -> dict[str, Any]:
    """Return a group's canonical columns, with images as encoded bytes.

    Args:
        group (`Group`): The group.
        dataset (`PreferenceDataset`): The dataset that it belongs to.

    Raises:
        UserError: An image cannot be read.
    """
    try:
        images = [{"bytes": image_cells.raw_bytes(image), "path": None} for image in group.images]
    except image_cells.BrokenImage as error:
        raise UserError(f"dataset row {group.row_id}: {error}") from error
    row: dict[str, Any] = {"prompt": group.prompts[0]}
    if dataset.kind == "pair":
        row |= {"chosen": images[0], "rejected": images[1]}
        if _two_prompts(dataset):
            row |= {"chosen_prompt": group.prompts[0], "rejected_prompt": group.prompts[1]}
        if dataset.has_scores and group.scores is not None:
            scores = [None if math.isnan(score) else score for score in group.scores]
            row |= {"chosen_score": scores[0], "rejected_score": scores[1]}
        if dataset.has_users:
            row |= {"user_id": group.user}
    elif dataset.kind == "ranked":
        row |= {"images": images, "scores": list(group.scores or ())}
    elif dataset.kind == "single":
        row |= {"image": images[0]}
    elif dataset.kind == "conditioned":
        row |= {"image": images[0], "conditioning_image": images[1]}
    elif dataset.kind == "labelled":
        row |= {"image": images[0], "label": (group.scores or (0.0,))[0] > 0}
        if dataset.has_users:
            row |= {"user_id": group.user}
    return row if dataset.kind == "prompt" else row | {"weight": group.weight}


def _two_prompts(dataset: PreferenceDataset) -> bool:
    return dataset.layout.name in ("dcpo", "canonical_two_prompts")


def _write_shard(rows: list[dict[str, Any]], path: Path) -> None:
    import datasets
    import pyarrow.parquet

    types: dict[str, object] = {
        name: datasets.Value("string")
        for name in ("prompt", "chosen_prompt", "rejected_prompt", "user_id")
    }
    types |= {
        name: datasets.Image() for name in ("chosen", "rejected", "image", "conditioning_image")
    } | {"images": datasets.List(datasets.Image())}
    types |= {
        "scores": datasets.List(datasets.Value("float64")),
        "label": datasets.Value("bool"),
    }
    types |= {
        name: datasets.Value("float64") for name in ("weight", "chosen_score", "rejected_score")
    }
    features = datasets.Features({name: types[name] for name in rows[0]})
    table = datasets.Dataset.from_list(rows, features=features)
    # With small row groups one row is read from a large file without the images of
    # many others.
    pyarrow.parquet.write_table(table.data.table, path, row_group_size=100)
