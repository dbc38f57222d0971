"""Read what `diffalign score` scores: a folder of images, or a preference dataset.

Both are read chunk by chunk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.images import BrokenImage, content_hash
from ..data.load import load_preferences
from ..data.sources import IMAGE_SUFFIXES, PAIR_FOLDERS
from ..errors import UserError
from ..rewards.images import ImageInput
from ..runtime import text_files
from ..runtime.hashing import text_hash

if TYPE_CHECKING:
    from ..data.dataset import PreferenceDataset
    from ..data.images import Undecoded
    from ..runtime.decoding import ImageSource

SIDECARS = ("captions.json", "prompts.jsonl", "metadata.jsonl")
_PROMPT_KEYS = ("prompt", "text", "caption")
_ROLES = {"pair": ("chosen", "rejected")}


@dataclass(frozen=True, slots=True)
class Record:
    """One image of the output.

    Attributes:
        image (`str`): Its path, relative to the source's folder where it lies there. An
            image that is stored in the table is called `row 7, image 0`.
        row (`int`): Row of the source.
        position (`int`): Place among the images of that row.
        role (`str`): `chosen` or `rejected` in a pair, else empty.
        prompt (`str`, *optional*): Its prompt.
        label (`float`, *optional*): People's judgement: 1 and 0 in a pair, the score of
            a ranked row.
    """

    image: str
    row: int
    position: int
    role: str
    prompt: str | None
    label: float | None = None


@dataclass
class Chunk:
    """Images to be scored together.

    Attributes:
        records (`list[Record]`): N records.
        inputs (`list[ImageInput]`): N images, undecoded.
        metadata (`list[dict]`, *optional*): N mappings, None where the source has none.
    """

    records: list[Record]
    inputs: list[ImageInput]
    metadata: list[dict[str, Any]] | None = None

    def fingerprint(self) -> str:
        """Return the sha256 of everything a score depends on.

        That is the images' bytes, prompts and metadata.
        """
        facts = []
        for i, (record, image) in enumerate(zip(self.records, self.inputs, strict=True)):
            extra = self.metadata[i] if self.metadata else None
            facts.append(
                json.dumps(
                    [record.prompt, extra, _content(image.source)], sort_keys=True, default=str
                )
            )
        return text_hash(*facts)


def as_cell(source: Any) -> Any:
    """Turn what a chunk holds of an image into a cell that `data.images` reads.

    Args:
        source: A path, encoded bytes or a PIL image.
    """
    if isinstance(source, (str, Path)):
        return {"bytes": None, "path": str(source)}
    return {"bytes": source, "path": None} if isinstance(source, (bytes, memoryview)) else source


def _content(source: Any) -> str:
    try:
        return content_hash(as_cell(source))
    except BrokenImage:
        return "missing"


class FolderSource:
    """Image files with prompts from files beside them, a file or the command line.

    Args:
        name (`str`): What messages call it.
        root (`Path`): Folder that paths are relative to.
        files (`Sequence[Path]`): N image files.
        prompts (`list[str | None]`): N prompts.
        extra (`list[dict[str, Any]]`): N mappings with metadata.

    Attributes:
        rows (`int`): Number of images.
        kind (`str`): `folder`.
        skipped: Empty. An unreadable image shows when it is scored.
    """

    kind = "folder"
    skipped: tuple[tuple[int, str], ...] = ()
    skipped_count = 0

    def __init__(
        self,
        name: str,
        root: Path,
        files: Sequence[Path],
        prompts: list[str | None],
        extra: list[dict[str, Any]],
    ) -> None:
        self.name, self._root, self._files, self._prompts, self._extra = (
            name,
            root,
            files,
            prompts,
            extra,
        )
        self.rows = len(files)

    def chunks(self, size: int) -> list[range]:
        """Return ranges of rows with about `size` images each.

        Args:
            size (`int`): Images per chunk.
        """
        return [range(start, min(start + size, self.rows)) for start in range(0, self.rows, size)]

    def read(self, rows: range) -> Chunk:
        """Return the images of these rows, undecoded.

        Args:
            rows (`range`): The rows.
        """
        names = [self._files[row].relative_to(self._root).as_posix() for row in rows]
        records = [
            Record(name, row, 0, "", self._prompts[row])
            for name, row in zip(names, rows, strict=True)
        ]
        inputs = [ImageInput(name, self._files[row]) for name, row in zip(names, rows, strict=True)]
        return Chunk(
            records, inputs, [self._extra[row] for row in rows] if any(self._extra) else None
        )

    def check(self, needs_prompt: Sequence[str], needs_metadata: Sequence[str]) -> None:
        """Refuse images without the prompts or metadata that scorers need.

        Args:
            needs_prompt (`Sequence[str]`): Scorers that need prompts.
            needs_metadata (`Sequence[str]`): Scorers that need metadata.

        Raises:
            UserError: Some are missing.
        """
        without = [
            file.name
            for file, prompt in zip(self._files, self._prompts, strict=True)
            if prompt is None
        ]
        if needs_prompt and without:
            raise UserError(
                f"--images: {len(without)} of {self.rows} images have no prompt "
                f"({', '.join(without[:3])}), and {needs_prompt[0]} needs one; write NAME.txt "
                f"beside each image, or {', '.join(SIDECARS)} in the folder, or give --prompts "
                "FILE or --prompt TEXT"
            )
        if needs_metadata and not all(self._extra):
            raise UserError(
                f"--images: {needs_metadata[0]} needs metadata of every image; write "
                "metadata.jsonl in the folder, one object per image with file_name, prompt and "
                "the scorer's keys"
            )


class DatasetSource:
    """All images of a dataset, also those of ties.

    Args:
        dataset (`PreferenceDataset`): From `load_preferences`.

    Attributes:
        rows (`int`): Number of groups.
        kind (`str`): `pair`, `ranked` or `single`.
        skipped (`tuple[tuple[int, str], ...]`): (row id, reason) of rows whose images
            cannot be opened, the first 20 of them.
        skipped_count (`int`): Number of these rows.

    Raises:
        UserError: The dataset holds prompts only.
    """

    def __init__(self, dataset: PreferenceDataset) -> None:
        self._dataset, self.name, self.kind, self.rows = (
            dataset,
            dataset.report.source,
            dataset.kind,
            len(dataset),
        )
        self.skipped = tuple(dataset.report.broken)
        self.skipped_count = dataset.report.broken_count
        if self.kind == "prompt":
            raise UserError(
                f"--images: {self.name} holds prompts and no images; draw some with diffalign "
                "sample first"
            )

    def chunks(self, size: int) -> list[range]:
        """Return ranges of rows with about `size` images each.

        Args:
            size (`int`): Images per chunk.
        """
        step = max(1, size // max(1, len(self._dataset[0].images)))
        return [range(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]

    def read(self, rows: range) -> Chunk:
        """Return the images of these rows, undecoded.

        Args:
            rows (`range`): The rows.
        """
        records, inputs = [], []
        for group in (self._dataset[row] for row in rows):
            roles = _ROLES.get(self.kind, ("",) * len(group.images))
            unlabelled: tuple[float | None, ...] = (None,) * len(group.images)
            # Whom people chose counts, also where a column has scores of a model.
            labels = (1.0, 0.0) if self.kind == "pair" else group.scores or unlabelled
            if group.weight == 0:  # a tie is no judgement
                labels = unlabelled
            # The condition of an image is no result.
            images = group.images[:1] if self.kind == "conditioned" else group.images
            for position, image in enumerate(images):
                name = self._name(image) or f"row {group.row_id}, image {position}"
                prompt = group.prompts[position]
                records.append(
                    Record(name, group.row_id, position, roles[position], prompt, labels[position])
                )
                inputs.append(ImageInput(f"row {group.row_id}, image {position}", _plain(image)))
        return Chunk(records, inputs)

    def _name(self, image: Undecoded) -> str | None:
        path = image.get("path") if isinstance(image, Mapping) else None
        for folder in self._dataset.places.folders:
            if path is not None and Path(path).is_relative_to(folder):
                return Path(path).relative_to(folder).as_posix()
        return path

    def check(self, needs_prompt: Sequence[str], needs_metadata: Sequence[str]) -> None:
        """Refuse scorers that need metadata, which a dataset does not have.

        Args:
            needs_prompt (`Sequence[str]`): Scorers that need prompts.
            needs_metadata (`Sequence[str]`): Scorers that need metadata.

        Raises:
            UserError: A scorer needs metadata.
        """
        if needs_metadata:
            raise UserError(
                f"--images: {needs_metadata[0]} needs metadata of every image, which preference "
                "datasets do not have; give a folder of images with metadata.jsonl"
            )


def _plain(image: Undecoded) -> ImageSource:
    if not isinstance(image, Mapping):
        return image
    return image["bytes"] if image["bytes"] is not None else image["path"]


def open_images(
    source: str,
    *,
    prompt: str | None = None,
    prompts: str | Path | None = None,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    skip_broken: bool = False,
) -> FolderSource | DatasetSource:
    """Open what is to be scored.

    The prompts of a folder's images stand in `NAME.txt` beside each image, else in the
    folder's `captions.json` (`{name: prompt}`), `prompts.jsonl` or `metadata.jsonl`
    (`{"file_name": ..., "prompt": ...}` per line).

    Args:
        source (`str`): An image, a folder of images, or what `load_preferences` takes.
        prompt (`str`, *optional*): One prompt for all images of a folder.
        prompts (`str` or `Path`, *optional*): A file with one line per image of a
            folder, in the order of their names. Or a `.json` or `.jsonl` file as above,
            or a `.csv` or `.tsv` with the columns `file_name` and `prompt`.
        split (`str`, *optional*, defaults to `"train"`): Split of a dataset that has
            several.
        columns (`Mapping[str, str]`, *optional*): Canonical column name -> column of a
            dataset.
        skip_broken (`bool`, *optional*, defaults to `False`): Leave out broken rows of
            a dataset, however many there are.

    Returns:
        `FolderSource` or `DatasetSource`.

    Raises:
        UserError: There is no source or no image in it, or the prompts do not fit.
    """
    path = Path(source).expanduser()
    if prompt is not None and prompts is not None:
        raise UserError("--prompt and --prompts: give one of them")
    single = path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES
    if single or (
        path.is_dir() and _is_image_folder(path, prompt is not None or prompts is not None)
    ):
        return _open_folder(source, path, single, prompt, prompts)
    if prompt is not None or prompts is not None:
        raise UserError(
            f"--prompt, --prompts: {source!r} is no folder of images; a dataset brings its own "
            "prompts"
        )
    share = 1.0 if skip_broken else 0.05
    dataset = load_preferences(
        source, split=split, columns=columns, ties="keep", max_broken_fraction=share, verbose=False
    )
    return DatasetSource(dataset)


def _is_image_folder(path: Path, prompts_given: bool) -> bool:
    """Whether a folder holds plain images, and not one of the layouts of a dataset."""
    if prompts_given:
        return True
    if any(
        (path / chosen).is_dir() and (path / rejected).is_dir() for chosen, rejected in PAIR_FOLDERS
    ):
        return False
    files = [file for file in path.rglob("*") if file.is_file()]
    tables = [
        file
        for file in files
        if file.suffix.lower() in (".parquet", ".arrow", ".tar", ".csv", ".json", ".jsonl")
    ]
    if any(file.parent != path or file.name not in SIDECARS for file in tables):
        return False
    return not (path / "metadata.jsonl").is_file() or "file_name" in next(
        (row for _, row in text_files.read_json_objects(path / "metadata.jsonl") if row), {}
    )


def _open_folder(
    source: str, path: Path, single: bool, prompt: str | None, prompts: str | Path | None
) -> FolderSource:
    root = path.parent if single else path
    files = (
        [path]
        if single
        else sorted(
            f for f in path.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file()
        )
    )
    if not files:
        raise UserError(
            f"--images: the folder {source!r} holds no images ({', '.join(IMAGE_SUFFIXES)})"
        )
    suffix = "" if prompts is None else Path(prompts).suffix.lower()
    if suffix in (".parquet", ".arrow", ".tar", ".xlsx"):
        raise UserError(
            f"--prompts: {str(prompts)!r} is no text; give a .txt, .csv, .tsv, .json or .jsonl file"
        )
    by_name = suffix in (".json", ".jsonl", ".csv", ".tsv")
    tables = [_table(root / name) for name in SIDECARS if (root / name).is_file()]
    if by_name:
        tables.insert(0, _table(Path(str(prompts))))
    rows = [_rows_of(file, root, tables) for file in files]
    texts: Sequence[str | None]
    if prompt is not None:
        texts = [prompt] * len(files)
    elif prompts is not None and not by_name:
        texts = _lines(Path(prompts), len(files))
    else:
        texts = [
            _prompt_of(file, file_rows, beside=not by_name)
            for file, file_rows in zip(files, rows, strict=True)
        ]
    extra = [_merged(file_rows) for file_rows in rows]
    return FolderSource(source, root, files, list(texts), extra)


def _rows_of(
    file: Path, root: Path, tables: Sequence[Mapping[str, dict[str, Any]]]
) -> list[dict[str, Any]]:
    rows = [_row_of(file, root, table) for table in tables]
    return [row for row in rows if row is not None]


def _merged(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge rows of one image. The first row that has a key wins."""
    merged: dict[str, Any] = {}
    for row in reversed(rows):
        merged |= row
    return merged


def _lines(path: Path, count: int) -> list[str]:
    lines = text_files.read_lines(path, "--prompts: ")
    while len(lines) > count and not lines[-1].strip():
        lines.pop()
    if len(lines) != count:
        raise UserError(
            f"--prompts: {path} has {len(lines)} lines, but there are {count} images; give one "
            "line per image in the order of their names, or one prompt for all with --prompt "
            "TEXT"
        )
    return lines


def _prompt_of(file: Path, rows: list[dict[str, Any]], beside: bool) -> str | None:
    """Return the text beside the image, else the prompt of the first table with one."""
    text = file.with_suffix(".txt")
    if beside and text.is_file():
        return text_files.read_text(text).strip()
    cells = [row.get(key) for row in rows for key in _PROMPT_KEYS]
    prompt = next((cell for cell in cells if cell is not None), None)
    if prompt is not None and not isinstance(prompt, str):
        raise UserError(
            f"--images: the prompt of {file.name} is {str(prompt)[:80]!r}, expected text"
        )
    return prompt


def _table(path: Path) -> dict[str, dict[str, Any]]:
    """Read file name -> row from captions.json, a .jsonl, a .csv or a .tsv file."""
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _named_rows(path)
    if suffix == ".jsonl":
        named: dict[str, dict[str, Any]] = {}
        for number, row in text_files.read_json_objects(path):
            if not row:
                continue
            if not isinstance(row.get("file_name"), str):
                raise UserError(
                    f'{path}, line {number}: names no image; write {{"file_name": ..., '
                    f'"prompt": ...}}'
                )
            named[row["file_name"]] = row
        return named
    captions = text_files.read_json(path, dict)
    return {
        name: text if isinstance(text, dict) else {"prompt": text}
        for name, text in captions.items()
    }


_NAME_KEYS = ("file_name", "filename", "file", "image", "image_path", "path")


def _named_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Read file name -> row from a table whose first line names its columns."""
    table = text_files.read_table(path, "--prompts: ")
    lower = {column.lower(): column for column in table.columns}
    name = next((lower[key] for key in _NAME_KEYS if key in lower), None)
    prompt = next((lower[key] for key in _PROMPT_KEYS if key in lower), None)
    if name is None or prompt is None:
        raise UserError(
            f"--prompts: {path}: its first line must name the columns, file_name and prompt; it "
            f"holds {', '.join(table.columns)[:120]}"
        )
    rows: dict[str, dict[str, Any]] = {}
    for row in table.rows:
        file = (row.cells.get(name) or "").replace("\\", "/")
        if file in rows:
            raise UserError(
                f"--prompts: {path}, line {row.line}: {file!r} stands twice; keep one row per image"
            )
        rows[file] = {**row.cells, "file_name": file, "prompt": row.cells.get(prompt)}
    return rows


def _row_of(file: Path, root: Path, table: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    inside = file.relative_to(root)
    names = (inside.as_posix(), inside.with_suffix("").as_posix(), file.name, file.stem)
    return next((table[name] for name in names if name in table), None)
