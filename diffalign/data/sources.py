"""Open whatever the user points at as a `datasets` dataset, its columns unchanged."""

from __future__ import annotations

import dataclasses
import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeAlias

from diffalign.data.images import NO_FOLDERS, BrokenImage, ImagePlaces
from diffalign.data.tables import read_tables
from diffalign.errors import UserError
from diffalign.runtime import decoding, text_files

if TYPE_CHECKING:
    import datasets

BUILDERS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".tar": "webdataset",
}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CAPTION_SUFFIXES = (".txt", ".caption")  # kohya's scripts write .caption
PAIR_FOLDERS = (("chosen", "rejected"), ("w", "l"))


Rows: TypeAlias = "datasets.Dataset | datasets.IterableDataset"
"""Rows to look up, or a stream of them."""

SourceLike: TypeAlias = (
    "str | Path | Rows | datasets.DatasetDict | datasets.IterableDatasetDict "
    "| Sequence[Mapping[str, Any]] | None"
)
"""A Hub id, a path, a `datasets` object or a list of rows, see `load_preferences`."""


@dataclass
class Source:
    """An opened source.

    Attributes:
        dataset: A `datasets.Dataset` or `IterableDataset`.
        name (`str`): What messages call it.
        places (`ImagePlaces`, defaults to `NO_FOLDERS`): Where the image cells of its
            rows may point to.
    """

    dataset: Rows
    name: str
    places: ImagePlaces = NO_FOLDERS


def open_source(
    source: SourceLike,
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    data_dir: str | Path | None = None,
) -> Source:
    """Open a Hub id, folder, file, `datasets` object or list of rows.

    Args:
        source: See `load_preferences`. None opens `data_dir`.
        split (`str`, *optional*, defaults to `"train"`): Split of a dataset that has
            several.
        config (`str`, *optional*): Configuration of a Hub dataset.
        revision (`str`, *optional*): Revision of a Hub dataset.
        streaming (`bool`, *optional*, defaults to `False`): Open a stream of rows.
        data_dir (`str` or `Path`, *optional*): A folder in which relative image paths
            are looked up first.

    Returns:
        `Source`.

    Raises:
        UserError: The source is not there, unreadable, of an unknown form, or without
            this split.
    """
    if source is None and data_dir is not None:
        source, data_dir = data_dir, None
    extra = () if data_dir is None else (_existing(Path(data_dir).expanduser(), "train_data_dir"),)
    if (
        extra
        and isinstance(source, (str, Path))
        and Path(source).expanduser().is_dir()  # a table may well name images of two folders
        and any(all((extra[0] / side).is_dir() for side in sides) for sides in PAIR_FOLDERS)
    ):
        raise UserError(
            f"data.train_data_dir: {str(data_dir)!r} is a dataset of its own, and "
            f"data.dataset_name ({str(source)[:80]!r}) would be read in its place; name the folder "
            "as data.dataset_name"
        )
    if source is None:
        raise UserError(
            "data.dataset_name: give a Hub id, a folder or a file (or data.train_data_dir)"
        )
    if not isinstance(source, (str, Path)):
        read = _in_memory if isinstance(source, Mapping) else _one_split
        return Source(
            read(source, split, streaming),
            f"a {type(source).__name__}",
            ImagePlaces(extra, anywhere=True),
        )
    path = Path(source).expanduser()
    if path.is_dir():
        opened = _folder(path, split, config, streaming)
    elif path.is_file():
        opened = _file(path, split, streaming)
    elif _looks_local(str(source)):
        raise UserError(
            f"dataset {str(source)!r}: there is no such file or folder (working directory "
            f"{Path.cwd()})"
        )
    else:
        opened = Source(
            _hub(str(source), split, config, revision, streaming),
            str(source),
            ImagePlaces(hub=True),
        )
    return Source(
        opened.dataset,
        opened.name,
        dataclasses.replace(opened.places, folders=extra + opened.places.folders),
    )


def _in_memory(source: object, split: str, streaming: bool) -> Rows:
    import datasets

    if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        source = _select(functools.partial(_named_split, source), split)
    elif isinstance(source, Sequence) and not isinstance(source, str):
        if not source:
            raise UserError("dataset: the list has no rows")
        for number, row in enumerate(source):
            if not isinstance(row, Mapping):
                raise UserError(
                    f"dataset a list: row {number} is {type(row).__name__}, expected a mapping "
                    "of column names to cells"
                )
        names = list(dict.fromkeys(name for row in source for name in row))
        try:
            source = datasets.Dataset.from_dict(
                {name: [_cell(row.get(name)) for row in source] for name in names}
            )
        # pyarrow's errors are of these types.
        except (ValueError, TypeError, OverflowError) as error:
            raise UserError(f"dataset a list: a column mixes types: {error}") from error
    if isinstance(source, datasets.Dataset) and source.format["type"] == "custom":
        raise UserError(
            "dataset: it has a transform (set_transform or with_transform), which is not run here; "
            "apply it with map() first"
        )
    if not isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        raise UserError(
            "dataset: expected a name, a path, a datasets object or a list of rows, got "
            f"{type(source).__name__}"
        )
    return (
        source.to_iterable_dataset()
        if streaming and isinstance(source, datasets.Dataset)
        else source
    )


class NoSuchSplit(UserError):
    """A dataset has no split of a name.

    Args:
        message (`str`): One sentence.
        splits (`Sequence[str]`): The splits that it has.
    """

    def __init__(self, message: str, splits: Sequence[str]) -> None:
        super().__init__(message)
        self.splits = list(splits)


def _named_split(source: Mapping[str, Rows], name: str) -> Rows:
    if name not in source:
        splits = [str(each) for each in source]
        raise NoSuchSplit(
            f"dataset split {name!r} does not exist; there are {', '.join(splits)}", splits
        )
    return source[name]


def _only_split(source: Any, name: str) -> Any:
    """Return rows that have one split, which is called `train`."""
    if name not in ("train", "all"):
        raise NoSuchSplit(
            f"dataset split {name!r} does not exist; a file, a list and a pair of folders have "
            "the one split train",
            ["train"],
        )
    return source


def _cell(value: object) -> object:
    """Turn an array or tensor of pixels into a PIL image, also within a list."""
    if isinstance(value, Path):
        return str(value)
    if decoding.is_array(value) and value.ndim >= 2:
        try:
            return decoding.from_array(value)
        except BrokenImage:  # numbers, but not an image
            return value
    if isinstance(value, (list, tuple)) and any(decoding.is_array(item) for item in value):
        return [_cell(item) for item in value]
    return value


def _file(path: Path, split: str, streaming: bool) -> Source:
    builder = BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise UserError(
            f"dataset {str(path)!r}: cannot read {path.suffix or 'this'} files; known are "
            f"{', '.join(BUILDERS)}"
        )
    if path.stat().st_size == 0:
        raise UserError(f"dataset {str(path)!r}: the file is empty")
    if builder in ("json", "csv", "text"):
        dataset = _one_split(read_tables([path], str(path)), split, streaming)
    else:
        dataset = _load(str(path), builder, split, data_files=str(path), streaming=streaming)
    return Source(
        _plain_tar(dataset) if builder == "webdataset" else dataset,
        str(path),
        ImagePlaces(_image_folders([path])),
    )


def _one_split(source: Any, split: str, streaming: bool) -> Rows:
    """Return the rows of a source that has one split, or a part of them."""
    rows = _in_memory(source, "train", False)
    rows = _select(functools.partial(_only_split, rows), split)
    return _in_memory(rows, "train", streaming)


def _select(rows_of: Callable[[str], Rows], split: str) -> Rows:
    """Return the rows of a split such as `train`, `train[:50%]` or `train+test[:100]`.

    Args:
        rows_of (`Callable`): Returns the rows of a named split.
        split (`str`): The split.

    Raises:
        UserError: There is no such split, or no such part of it.
    """
    import datasets

    parts: list[Any] = []
    for piece in split.split("+"):
        name, bracket, rest = piece.strip().partition("[")
        rows = rows_of(name)
        if not bracket:
            parts.append(rows)
            continue
        if not isinstance(rows, datasets.Dataset):
            raise UserError(
                f"dataset split {split!r}: a stream has no length; name a whole split, or set "
                "data.dataset_streaming to false"
            )
        parts.append(_part(rows, f"[{rest}", split))
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _part(dataset: datasets.Dataset, bounds: str, split: str) -> datasets.Dataset:
    """Return the rows that bounds such as `[:50%]` name."""
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(f"train{bounds}").to_absolute({"train": len(dataset)})
    except (ValueError, AssertionError, KeyError) as error:
        raise UserError(f"dataset split {split!r}: {' '.join(str(error).split())[:200]}") from None
    indices = [
        i
        for part in parts
        for i in range(part.from_ or 0, part.to if part.to is not None else len(dataset))
    ]
    return dataset.select(indices)


def _folder(path: Path, split: str, config: str | None, streaming: bool) -> Source:
    """Open a folder in the first of these forms that fits.

    They are save_to_disk, a README.md with configurations, imagefolder metadata, pair
    folders, parquet, tar, and then json, jsonl, csv and tsv tables whose images lie
    beside them.
    """
    import datasets

    name, places = str(path), ImagePlaces((path,))
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        stored = datasets.load_from_disk(name)
        read = _in_memory if isinstance(stored, datasets.DatasetDict) else _one_split
        return Source(read(stored, split, streaming), name, places)
    for table in [*path.rglob("metadata.jsonl"), *path.rglob("metadata.csv")]:
        _check_metadata(table)
    if _has_configurations(path) or any(any(path.rglob(pattern)) for pattern in _METADATA):
        return Source(_load(name, name, split, config=config, streaming=streaming), name, places)
    for chosen, rejected in PAIR_FOLDERS:
        if (path / chosen).is_dir() and (path / rejected).is_dir():
            return Source(
                _one_split(_pair_folders(path / chosen, path / rejected), split, streaming),
                f"{name} (folders {chosen}/ and {rejected}/)",
                places,
            )
    if any(path.rglob("*.parquet")):
        return Source(_load(name, name, split, config=config, streaming=streaming), name, places)
    if any(path.rglob("*.tar")):
        return Source(
            _plain_tar(_load(name, name, split, config=config, streaming=streaming)), name, places
        )
    for suffix in (".jsonl", ".json", ".csv", ".tsv"):
        files = sorted(path.rglob(f"*{suffix}"))
        if files:

            def rows_of(part: str, files: list[Path] = files) -> Rows:
                return read_tables(_files_of_split(path, files, part), name)

            dataset = _in_memory(_select(rows_of, split), "train", streaming)
            return Source(dataset, name, ImagePlaces((path, *_image_folders(files))))
    raise UserError(
        f"dataset {name!r}: found no chosen/ and rejected/ (or w/ and l/) folders, no "
        "metadata.jsonl, and no parquet, jsonl, json, csv, tsv or tar files in this folder"
    )


_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def _has_configurations(folder: Path) -> bool:
    readme = folder / "README.md"
    return readme.is_file() and "\nconfigs:" in readme.read_text("utf-8", "replace")


def _check_metadata(table: Path) -> None:
    """Raise `UserError` for what would crash the imagefolder reader of `datasets`."""
    if table.suffix == ".jsonl":
        for _ in text_files.read_json_objects(table, "dataset "):
            pass
    else:
        text_files.read_table(table, "dataset ")


def _pair_folders(chosen: Path, rejected: Path) -> list[dict[str, Any]]:
    """Return one row per file stem of two folders of images.

    The caption is the chosen image's .txt, else it stands in captions.json (`{stem:
    text}`) or prompts.jsonl (`{"file_name" | "id": stem or name, "prompt" | "text" |
    "caption": text}` per line) in the folder above or in chosen/.
    """
    captions = _captions(chosen)
    images = [_images_by_stem(side) for side in (chosen, rejected)]
    stems = sorted(set(images[0]) | set(images[1]))
    counts = Counter(PurePosixPath(stem).name for stem in stems)
    rows: list[dict[str, Any]] = []
    without: list[str] = []
    for stem in stems:
        # The path that a missing image of one side should have, for the message.
        pair = [
            side.get(stem) or folder / other[stem].relative_to(other_folder)
            for side, folder, other, other_folder in (
                (images[0], chosen, images[1], rejected),
                (images[1], rejected, images[0], chosen),
            )
        ]
        beside = [pair[0].with_suffix(ending) for ending in CAPTION_SUFFIXES]
        file = next((file for file in beside if file.is_file()), None)
        name = PurePosixPath(stem).name
        caption = captions.get(stem, captions.get(name) if counts[name] == 1 else None)
        if file is not None:
            caption = text_files.read_text(file).strip()
        if not isinstance(caption, str):
            without.append(stem)
            caption = None
        paths = [str(path) for path in pair]
        rows.append({"prompt": caption, "chosen": paths[0], "rejected": paths[1], "id": stem})
    if not rows:
        raise UserError(
            f"dataset {str(chosen.parent)!r}: {chosen.name}/ and {rejected.name}/ hold no images"
        )
    if len(without) == len(rows):
        raise UserError(
            f"dataset {str(chosen.parent)!r}: no image has a caption; write "
            f"{without[0]}.txt (or {', '.join(CAPTION_SUFFIXES[1:])}) beside each "
            f"image of {chosen.name}/, or captions.json or prompts.jsonl beside the folders"
        )
    return rows


def _captions(chosen: Path) -> dict[str, Any]:
    """Read captions.json and prompts.jsonl beside or in the folder of chosen images.

    Returns:
        By the image's path in the folder, without its suffix.
    """
    captions: dict[str, Any] = {}
    for folder in (chosen.parent, chosen):
        entries: list[tuple[str, Any]] = []
        if (folder / "captions.json").is_file():
            entries += text_files.read_json(folder / "captions.json", dict).items()
        if (folder / "prompts.jsonl").is_file():
            entries += [
                (
                    str(row.get("file_name", row.get("id"))),
                    row.get("prompt", row.get("text", row.get("caption"))),
                )
                for _, row in text_files.read_json_objects(folder / "prompts.jsonl")
            ]
        for name, caption in entries:
            path = PurePosixPath(unicodedata.normalize("NFC", name))
            if path.suffix.lower() in IMAGE_SUFFIXES:
                path = path.with_suffix("")
            if len(path.parts) > 1 and path.parts[0] == chosen.name:
                path = path.relative_to(chosen.name)
            captions[str(path)] = caption
    return captions


def _images_by_stem(folder: Path) -> dict[str, Path]:
    """Return the images of a folder by their path in it, without suffix.

    Some systems store the letters of names decomposed (NFD), so names are compared
    composed. Hidden files, such as the `._*` of macOS archives, do not count.
    """
    images: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        stem = path.relative_to(folder).with_suffix("").as_posix()
        stem = unicodedata.normalize("NFC", stem)
        if stem in images:
            raise UserError(
                f"dataset {str(folder)!r}: {images[stem].name} and {path.name} are images of one "
                "pair; keep one of them"
            )
        images[stem] = path
    return images


def _files_of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """Return the files of a split.

    They begin with the split's name (`train-0001.jsonl`) or lie in its folder. `train`
    means all files when no file names any usual split.
    """
    names = {
        file: [part.lower() for part in (*file.relative_to(folder).parent.parts, file.stem)]
        for file in files
    }

    def is_named(file: Path, starts: str | tuple[str, ...]) -> bool:
        return any(part.startswith(starts) for part in names[file])

    mine = [file for file in files if is_named(file, split.lower())]
    usual = ("train", "test", "val", "dev", "eval")
    if not mine and split == "train" and not any(is_named(file, usual) for file in files):
        return files
    if not mine:
        listed = ", ".join(file.name for file in files[:5])
        raise NoSuchSplit(
            f"dataset {str(folder)!r}: no file is named after the split {split!r}; there are "
            f"{listed}",
            [name for name in usual if any(is_named(f, name) for f in files)] or ["train"],
        )
    return mine


def _image_folders(files: Sequence[Path]) -> tuple[Path, ...]:
    """Return the folders where a table's images may lie.

    They lie beside it, in images/ beside it, or in a folder named like it (HPDv2:
    train.json and train/).
    """
    return tuple(
        dict.fromkeys(
            base
            for file in files
            for base in (file.parent, file.parent / "images", file.with_suffix(""))
        )
    )


def _plain_tar(dataset: Rows) -> Rows:
    """Turn WebDataset's fields into plain columns.

    `chosen.png` becomes `chosen`, `prompt.txt` becomes `prompt`, and the keys of `json`
    become columns.
    """
    if dataset.features is not None and isinstance(dataset.features.get("json"), dict):
        if hasattr(dataset, "flatten"):
            dataset = dataset.flatten()
        else:  # a stream: undecoded, so that its images are not encoded again
            flat = dataset.features.flatten()
            dataset = dataset.decode(False).map(_lift_json, remove_columns=["json"], features=flat)
    names = dataset.column_names or []
    endings = (*(suffix[1:] for suffix in IMAGE_SUFFIXES), "txt", "cls")
    plain: dict[str, str] = {}
    for name in names:
        short = name.removeprefix("json.")
        stem, _, ending = short.rpartition(".")
        short = stem if stem and ending in endings else short
        if short != name and short not in names and short not in plain.values():
            plain[name] = short
    return dataset.rename_columns(plain) if plain else dataset


def _lift_json(row: dict[str, Any]) -> dict[str, Any]:
    return {f"json.{name}": value for name, value in row["json"].items()}


def _load(name: str, builder: str, split: str, *, config: str | None = None, **kwargs: Any) -> Rows:
    import datasets

    try:
        return datasets.load_dataset(builder, config, split=split, **kwargs)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError):
        raise  # `_hub` explains these
    except (ValueError, OSError, RecursionError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        unknown = re.search(r"Unknown split \"[^\"]*\". Should be one of \[(.*?)\]", str(cause))
        if unknown:
            splits = re.findall(r"'([^']+)'", unknown[1])
            raise NoSuchSplit(
                f"dataset {name!r}: split {split!r} does not exist; there are {', '.join(splits)}",
                splits,
            ) from error
        raise UserError(f"dataset {name!r}: {' '.join(str(cause).split())[:600]}") from error


def _hub(name: str, split: str, config: str | None, revision: str | None, streaming: bool) -> Rows:
    import datasets

    alternatives = "Check the name"
    if name.startswith("diffalign-quickstart/"):
        alternatives = "`diffalign quickstart` makes this folder; run it here first"
    elif "pick" in name.lower():
        alternatives = (
            "Pick-a-Pic was taken down from the Hub in 2025; use "
            "data-is-better-together/open-image-preferences-v1-binarized, HPDv2, or your own data "
            "through `diffalign data convert`"
        )
    try:
        return _load(name, name, split, config=config, revision=revision, streaming=streaming)
    except datasets.exceptions.DatasetNotFoundError as error:
        at = f" at revision {revision!r}" if revision else ""
        raise UserError(
            f"dataset {name!r}: there is no file or folder of this name in {Path.cwd()}, and no "
            f"dataset on the Hub{at}, or it is private. {alternatives}"
        ) from error
    except ConnectionError as error:
        raise UserError(
            f"dataset {name!r}: there is no file or folder of this name in {Path.cwd()}, and the "
            f"Hub cannot be reached ({error}). {alternatives}"
        ) from error


def _looks_local(source: str) -> bool:
    """Whether a source was meant as a path, and not as `name` or `owner/name`."""
    suffixes = (*BUILDERS, ".arrow", ".zip", ".pkl", ".pickle")
    return (
        source.startswith((".", "/", "~"))
        or source.endswith("/")
        or source.lower().endswith(suffixes)
        or source.count("/") > 1
    )


def _existing(path: Path, field: str) -> Path:
    if not path.is_dir():
        raise UserError(f"data.{field}: there is no folder {str(path)!r}")
    return path
