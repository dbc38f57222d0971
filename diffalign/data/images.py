"""Images of a dataset's cells: resolved, opened, measured, hashed. Nothing here decodes before it is asked to."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

_EXIF_ORIENTATION = 0x0112
_SAMPLE = 4096  # bytes read from either end of an image for the dataset's fingerprint


class BrokenImage(Exception):
    """This image cannot be used; the message says why. Becomes a broken row, or a `UserError` naming the row."""


def resolve(cell: Any, folders: Sequence[Path]) -> Any:
    """An undecoded image from a dataset's cell: `{"bytes": bytes | None, "path": str | None}`, or a PIL image as it is.

    Args:
        cell: `{"bytes", "path"}` (datasets' undecoded form), raw bytes or a view of them, a path, or a PIL image.
        folders: where relative paths are looked up, in order, before the working directory.

    Raises:
        BrokenImage: nothing there, or no such file.
    """
    if isinstance(cell, (bytes, memoryview)):
        return {"bytes": cell, "path": None}
    if isinstance(cell, dict) and cell.get("bytes") is not None:
        return {"bytes": cell["bytes"], "path": cell.get("path")}
    path = cell.get("path") if isinstance(cell, dict) else cell
    if path is None:
        raise BrokenImage("has no image")
    if not isinstance(path, (str, Path)):
        return cell
    candidates = [Path(path)] if Path(path).is_absolute() else [*(folder / path for folder in folders), Path(path)]
    for candidate in candidates:
        if _is_file(candidate):
            return {"bytes": None, "path": str(candidate)}
    if "://" in str(path):
        return {"bytes": None, "path": str(path)}  # a member of a remote or packed file, of a streamed dataset
    raise BrokenImage(f"image file {str(path)[:200]!r} does not exist")


def raw_bytes(image: Any) -> bytes:
    """The encoded file's content; a PIL image is written as PNG."""
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


def _open(image: Any) -> Image.Image:
    from PIL import Image

    if isinstance(image, Image.Image):
        return image
    if image["bytes"] is None and "://" not in image["path"]:
        return Image.open(image["path"])
    if isinstance(image["bytes"], memoryview):
        import pyarrow

        return Image.open(pyarrow.BufferReader(image["bytes"]))  # reads no more of the memory-mapped file than PIL asks for
    return Image.open(io.BytesIO(raw_bytes(image)))


def header(image: Any) -> tuple[tuple[int, int], str]:
    """((height, width) as displayed, format such as `JPEG`), from the header alone.

    Raises:
        BrokenImage: not an image.
    """
    from PIL import Image

    try:
        opened = _open(image)
        width, height = opened.size
        # not PngImageFile's own getexif, which decodes the whole image in search of an EXIF chunk behind its pixels
        turned = Image.Image.getexif(opened).get(_EXIF_ORIENTATION, 1) >= 5
        kind = opened.format or "in memory"
        if opened is not image:
            opened.close()
    except Exception as error:  # PIL's plugins raise whatever the bad bytes lead them to
        raise BrokenImage(f"image cannot be opened: {error}") from error
    return ((width, height) if turned else (height, width)), kind


def decode(image: Any) -> Image.Image:
    """The image as RGB, turned as its EXIF says, transparency on white.

    Raises:
        BrokenImage: cannot be decoded.
    """
    from PIL import Image, ImageOps

    try:
        opened = _open(image)
        opened.load()
        upright = ImageOps.exif_transpose(opened)
        if upright.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in upright.info:
            upright = upright.convert("RGBA")
            white = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(white, upright)
        return upright.convert("RGB")
    except Exception as error:  # PIL's plugins raise whatever the bad bytes lead them to
        raise BrokenImage(f"image cannot be decoded: {error}") from error


def content_hash(image: Any) -> str:
    """sha256 of the encoded file, as hexadecimal digits."""
    return hashlib.sha256(raw_bytes(image)).hexdigest()


def sampled_digest(image: Any) -> bytes:
    """A cheap digest of the content: its size and its first and last 4 KiB. Where the file lies does not enter."""
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
    return hashlib.sha256(b"%d:" % size + head + tail).digest()


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a prompt or other long text in an image column
        return False
