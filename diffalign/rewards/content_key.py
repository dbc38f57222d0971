"""Digests of images, prompts and metadata: what a cached score belongs to."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Mapping
from datetime import date
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..runtime.hashing import bytes_digest

if TYPE_CHECKING:
    from PIL import Image


# Changes when the same file would be decoded to other pixels, so that no cache answers
# from the former ones.
_DECODING = b"2:"
_SETTLED = 2.0  # seconds after which a file's change time is trusted


def pixel_digest(image: Image.Image) -> bytes:
    """Hash a decoded image: mode, size and pixels.

    Palette and transparency count where it has them.

    Args:
        image (`PIL.Image.Image`): any mode.

    Returns:
        `bytes`: SHA-256.
    """
    image.load()  # loading brings palette and transparency into their final form
    parts = [f"{image.mode}:{image.width}x{image.height}:".encode()]
    if image.mode in ("P", "PA"):
        palette = image.palette
        parts.append(palette.tobytes() if palette is not None else b"")
    transparency = image.info.get("transparency")
    if transparency is not None:
        parts.append(repr(transparency).encode())
    return bytes_digest(*parts, image.tobytes())


def file_digest(source: bytes | str | Path) -> bytes:
    """Hash an encoded file or its bytes.

    Args:
        source (`bytes` or path): the file.

    Returns:
        `bytes`: SHA-256.

    Raises:
        UserError: a file that cannot be read.
    """
    if isinstance(source, bytes):
        return bytes_digest(_DECODING, source)
    try:
        return bytes_digest(_DECODING, Path(source).read_bytes())
    except OSError as error:
        raise UserError(
            f"images: {str(source)!r} cannot be read ({error.strerror}); name an image file"
        ) from error


def stamp_digest(path: str | Path, now: float) -> bytes | None:
    """Hash a file's place, size and change times, to know an untouched file unread.

    Args:
        path (path): the file.
        now (`float`): the time in seconds.

    Returns:
        `bytes` or None: None where there is no file, or it was touched within two
        seconds
            of `now`, since a second change within the clock's tick would not show.
    """
    try:
        status = os.stat(path)
    except OSError:
        return None
    if now - max(status.st_mtime, status.st_ctime) < _SETTLED:
        return None
    place = os.fspath(path)
    place = place if place.startswith("/") else os.path.abspath(place)
    stamp = (
        f"{place}\0{status.st_dev}:{status.st_ino}:{status.st_size}"
        f":{status.st_mtime_ns}:{status.st_ctime_ns}"
    )
    return bytes_digest(_DECODING, stamp.encode("utf-8", "surrogateescape"))


def content_key(
    image: bytes, prompt: str | None, metadata: Mapping[str, Any] | None = None
) -> bytes:
    """Compute 32 bytes that identify what is scored.

    Args:
        image (`bytes`): the image's digest.
        prompt (`str` or None): taken in Unicode normal form C. None and ``""`` differ.
        metadata (mapping, *optional*): in any order of keys. None and ``{}`` are the
            same. Beside JSON values it may hold bytes, paths, dates, images, arrays and
            tensors, all of which count in full.

    Raises:
        UserError: metadata whose content cannot be told, such as an object of another
            class.
    """
    text = (
        b""
        if prompt is None
        else (prompt if prompt.isascii() else unicodedata.normalize("NFC", prompt)).encode(
            "utf-8", "surrogatepass"
        )
    )
    parts = [b"%d:" % len(image), image, b"%d:%d:" % (prompt is not None, len(text)), text]
    if metadata:
        try:
            parts.append(
                json.dumps(metadata, sort_keys=True, ensure_ascii=True, default=_as_json).encode()
            )
        except (TypeError, ValueError) as error:
            raise UserError(
                f"metadata: cannot be hashed ({error}); use text, numbers, lists and mappings"
            ) from error
    return bytes_digest(*parts)


def _as_json(value: Any) -> Any:
    """Return a JSON value for an object that JSON cannot hold.

    It is never the printed form: large arrays print alike, and addresses change.
    """
    from PIL import Image

    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, (date, PurePath)):
        return str(value)
    if isinstance(value, Image.Image):
        return {"image": pixel_digest(value).hex()}
    if callable(getattr(value, "tolist", None)):  # numpy and torch
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return {
            "set": sorted(json.dumps(member, sort_keys=True, default=_as_json) for member in value)
        }
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} has no plain value")
