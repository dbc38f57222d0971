"""Find, open, measure and hash the images that a dataset's cells hold or name.

Nothing here decodes an image before it is asked to.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from diffalign.runtime import decoding
from diffalign.runtime.decoding import UnreadableImage as BrokenImage
from diffalign.runtime.hashing import bytes_digest, bytes_hash

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "NO_FOLDERS",
    "BrokenImage",
    "ImagePlaces",
    "Undecoded",
    "content_hash",
    "decode",
    "header",
    "raw_bytes",
    "resolve",
    "sampled_digest",
]

_SAMPLE = 4096  # bytes read from either end of an image for the dataset's fingerprint


Undecoded: TypeAlias = "dict[str, Any] | Image.Image"
"""`{"bytes": bytes | None, "path": str | None}`, or a PIL image, see `resolve`."""


@dataclass(frozen=True)
class ImagePlaces:
    """Say where the image cells of a dataset may point to.

    Attributes:
        folders (`tuple[Path, ...]`, defaults to `()`): Where relative paths are looked
            up, in order, before the working directory.
        anywhere (`bool`, defaults to `False`): Paths may leave these folders, as in
            rows that were made in code.
        remote (`bool`, defaults to `False`): Web addresses are fetched, see
            `diffalign.data.remote_images`.
        hub (`bool`, defaults to `False`): Members of the Hub dataset that is being
            streamed may be opened.
    """

    folders: tuple[Path, ...] = ()
    anywhere: bool = False
    remote: bool = False
    hub: bool = False


NO_FOLDERS = ImagePlaces()
"""For embedded images, and paths from the working directory."""


def resolve(cell: object, places: ImagePlaces) -> Undecoded:
    """Turn a dataset's cell into an undecoded image.

    Args:
        cell: `{"bytes", "path"}` (the undecoded form of `datasets`), raw bytes or a
            view of them, a path, an array or a PIL image.
        places (`ImagePlaces`): Where its path may point to.

    Returns:
        `{"bytes": bytes | None, "path": str | None}`, or a PIL image.

    Raises:
        BrokenImage: There is no image, no such file, or something else than an image,
            or the place is not allowed.
    """
    from PIL import Image

    if isinstance(cell, (bytes, memoryview)):
        return {"bytes": cell, "path": None}
    if isinstance(cell, dict) and cell.get("bytes") is not None:
        return {"bytes": cell["bytes"], "path": cell.get("path")}
    path = cell.get("path") if isinstance(cell, dict) else cell
    if path is None:
        raise BrokenImage("has no image")
    if isinstance(path, Image.Image):
        return path
    if decoding.is_array(path):
        return decoding.from_array(path)
    if not isinstance(path, (str, Path)):
        raise BrokenImage(
            f"its image is {_described(path)}; expected a path, encoded bytes, a PIL image or "
            "an array"
        )
    return _resolved_path(str(path), places)


def _described(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}; for one image per cell give the image itself"
    return f"{str(value)[:50]!r}, a value of type {type(value).__name__}"


def _resolved_path(path: str, places: ImagePlaces) -> dict[str, Any]:
    if "://" in path:
        return {"bytes": None, "path": _resolved_address(path, places)}
    outside = False
    for candidate in _candidates(path, places):
        if not _is_file(candidate):
            continue
        if places.anywhere or _is_inside(candidate, places):
            return {"bytes": None, "path": str(candidate)}
        outside = True
    if outside:
        raise BrokenImage(
            f"image file {path[:200]!r} lies outside the dataset's folder; if you trust this "
            "dataset, set data.allow_outside_paths: true, or name the folder of its images as "
            "data.train_data_dir"
        )
    raise BrokenImage(f"image file {path[:200]!r} does not exist")


def _candidates(path: str, places: ImagePlaces) -> list[Path]:
    """List the places to try for a path: in each folder, then as written.

    A table made on Windows has backslashes, so these are tried as slashes too.
    """
    spellings = [path] + ([path.replace("\\", "/")] if "\\" in path and os.sep == "/" else [])
    candidates = []
    for spelling in spellings:
        written = Path(spelling)
        candidates += (
            [written]
            if written.is_absolute()
            else [*(folder / written for folder in places.folders), written]
        )
    return candidates


def _is_inside(file: Path, places: ImagePlaces) -> bool:
    """Whether a file lies where this dataset may read.

    These places are the dataset's folders, the working directory, and the caches in
    which `datasets` keeps its downloads. Symbolic links are not followed, because the
    Hub's cache consists of them.
    """
    place = os.path.abspath(file)
    roots = [*places.folders, Path.cwd(), *_download_folders()]
    return any(Path(place).is_relative_to(os.path.abspath(root)) for root in roots)


def _download_folders() -> list[Path]:
    import datasets
    from huggingface_hub import constants

    config = datasets.config
    return [
        Path(config.HF_DATASETS_CACHE),
        Path(config.DOWNLOADED_DATASETS_PATH),
        Path(constants.HF_HUB_CACHE),
    ]


def _resolved_address(path: str, places: ImagePlaces) -> str:
    """Fetch a web address to a file. Keep the address of a streamed member."""
    place = path.rsplit("::", 1)[-1]
    if places.hub and place.startswith("hf://"):
        return path
    if path.lower().startswith(("http://", "https://")):
        if places.remote:
            from diffalign.data.remote_images import fetch

            return str(fetch(path))
        raise BrokenImage(
            f"its image is the web address {path[:100]!r}, which is not fetched; download the "
            "images first, or set data.allow_remote_images: true"
        )
    raise BrokenImage(
        f"its image is the address {path[:100]!r}, which is not opened; download the images and "
        "give their paths"
    )


def raw_bytes(image: Undecoded) -> bytes:
    """Return the encoded content of an image. A PIL image is encoded as PNG.

    Args:
        image: As `resolve` returns it.

    Raises:
        BrokenImage: The file cannot be read.
    """
    from PIL import Image

    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return buffer.getvalue()
    if image["bytes"] is not None:
        return image["bytes"]
    if "://" in image["path"]:
        from datasets.utils.file_utils import xopen

        with xopen(image["path"], "rb") as file:
            return file.read()
    try:
        return Path(image["path"]).read_bytes()
    except OSError as error:
        raise BrokenImage(f"cannot be read: {error}") from error


def _source(image: Undecoded) -> decoding.ImageSource:
    """Return what `diffalign.runtime.decoding` opens.

    A view of a memory-mapped file stays a view, so that only the part that Pillow asks
    for is read.
    """
    if not isinstance(image, dict):
        return image
    if image["bytes"] is not None:
        return image["bytes"]
    return raw_bytes(image) if "://" in image["path"] else image["path"]


def header(image: Undecoded) -> tuple[tuple[int, int], str]:
    """Read an image's size and format from its header alone.

    Args:
        image: As `resolve` returns it.

    Returns:
        `((height, width), format)`: The size as displayed, and a format such as `JPEG`.

    Raises:
        BrokenImage: It is not an image.
    """
    return decoding.header(_source(image))


def decode(image: Undecoded) -> Image.Image:
    """Decode an image to 8-bit RGB, see `diffalign.runtime.decoding`.

    Args:
        image: As `resolve` returns it.

    Raises:
        BrokenImage: It cannot be decoded.
    """
    return decoding.decode(_source(image))


def content_hash(image: Undecoded) -> str:
    """Return the sha256 of the encoded file, as hexadecimal digits.

    Args:
        image: As `resolve` returns it.

    Raises:
        BrokenImage: The file cannot be read.
    """
    return bytes_hash(raw_bytes(image))


def sampled_digest(image: Undecoded) -> bytes:
    """Return a cheap digest of an image: of its size and its first and last 4 KiB.

    The place of the file does not matter.

    Args:
        image: As `resolve` returns it.
    """
    if isinstance(image, dict) and image["bytes"] is None and "://" not in image["path"]:
        with open(image["path"], "rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            head = file.read(_SAMPLE)
            file.seek(max(0, size - _SAMPLE))
            tail = file.read(_SAMPLE)
    else:
        content = raw_bytes(image)
        size, head, tail = len(content), content[:_SAMPLE], content[-_SAMPLE:]
    return bytes_digest(b"%d:" % size, head, tail)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a prompt or other long text in an image column
        return False
