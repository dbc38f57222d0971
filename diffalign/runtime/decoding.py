"""Decode an image file, bytes, array or PIL image into pixels.

Training, scoring, labelling and display all see the same pixels. They are 8-bit RGB,
turned as EXIF says. Transparency is on white, 16-bit values count by their high byte,
and float values are read from [0, 1]. Of an animation, the first frame is taken.
"""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias, TypeGuard

from ..errors import one_line

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

FORMATS = (
    "PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000",
    "TGA", "ICO", "ICNS", "PCX", "PSD", "SGI", "QOI", "DDS", "HEIF", "JXL",
)  # fmt: skip
"""Formats that are read, where Pillow has them.

Formats that start other programs (EPS) or read no pixels (HDF5, GRIB) are left out.
"""

MAX_PIXELS = 100_000_000
"""Pixels of the largest image that is read."""

RULE = "upright as EXIF says, transparency on white, 16 bit by the high byte, first frame"
"""What `to_rgb` does, in the words of a scorer's card."""

ImageSource: TypeAlias = "Image.Image | str | Path | bytes | memoryview"
"""A PIL image, a path, or the bytes of an encoded file or a view of them."""

_ORIENTATION = 0x0112
_OVERSHOOT = 1e-3  # of floats beyond [0, 1], which rounding would not show
_BITS_PER_SAMPLE = 0x0102
_ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")


class UnreadableImage(Exception):
    """An image that cannot be used.

    The message says why, without naming the image.
    """


@functools.cache
def _formats() -> tuple[str, ...]:
    """List the formats of `FORMATS` that this Pillow and its plugins can open."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


class _View(io.RawIOBase):
    """A file over a buffer that reads no more of it than is asked for.

    Of a memory-mapped image, for example, only the header is read.
    """

    def __init__(self, buffer: memoryview) -> None:
        self._buffer, self._place = buffer.cast("B"), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: len(self._buffer)}[whence]
        self._place = max(0, start + offset)
        return self._place

    def readinto(self, target: Any) -> int:
        part = self._buffer[self._place : self._place + len(target)]
        target[: len(part)] = part
        self._place += len(part)
        return len(part)


def open_image(source: ImageSource) -> Image.Image:
    """Open an image without decoding its pixels yet.

    Args:
        source: a PIL image (returned as it is), a path, or the bytes of an encoded file
            or a view of them.

    Returns:
        `Image.Image`: with its size and mode known.

    Raises:
        UnreadableImage: no image of a known format, or too large.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, Image.Image):
        opened = source
    else:
        try:
            opened = Image.open(_readable(source), formats=_formats())
        except UnidentifiedImageError:
            raise UnreadableImage(_not_an_image(source)) from None
        except FileNotFoundError:
            raise UnreadableImage("the image file does not exist") from None
        except Exception as error:  # PIL's plugins raise whatever the bad bytes lead them to
            raise UnreadableImage(f"image cannot be opened: {one_line(error)}") from error
    width, height = opened.size
    if width * height > MAX_PIXELS:
        raise UnreadableImage(
            f"the image has {width}x{height} pixels, more than {MAX_PIXELS // 1_000_000} million; "
            "scale it down"
        )
    if not width or not height:
        raise UnreadableImage(f"the image is empty, {width}x{height} pixels")
    return opened


def _readable(source: str | Path | bytes | memoryview) -> str | Path | IO[bytes]:
    if isinstance(source, (str, Path)):
        return source
    return (
        io.BytesIO(source)
        if isinstance(source, bytes)
        else io.BufferedReader(_View(memoryview(source)))
    )


def _not_an_image(source: str | Path | bytes | memoryview) -> str:
    """Describe what the first bytes look like.

    The usual reasons are a failed download and a repository without its large files.
    """
    try:
        if isinstance(source, (str, Path)):
            with open(source, "rb") as file:
                head = file.read(200)
        else:
            head = bytes(memoryview(source)[:200])
    except OSError as error:
        return f"image cannot be read: {error.strerror}"
    if not head:
        return "the image file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "image cannot be opened: it is a Git LFS pointer; run git lfs pull"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "image cannot be opened: it is a web page"
    return "image cannot be opened: no image format that is read here"


def header(source: ImageSource) -> tuple[tuple[int, int], str]:
    """Read the size and format of an image from its header alone.

    Args:
        source: see `open_image`.

    Returns:
        `tuple[tuple[int, int], str]`: (height, width) as displayed, and the format,
        such as ``JPEG``.

    Raises:
        UnreadableImage: not an image.
    """
    from PIL import Image

    opened = open_image(source)
    try:
        width, height = opened.size
        # TIFF reports its size upright already. PngImageFile's own getexif decodes the
        # whole image in search of EXIF behind its pixels.
        orientation = (
            1 if opened.format == "TIFF" else Image.Image.getexif(opened).get(_ORIENTATION, 1)
        )
        turned = orientation in (5, 6, 7, 8)
        kind = opened.format or "in memory"
    except Exception as error:
        raise UnreadableImage(f"image cannot be opened: {one_line(error)}") from error
    finally:
        if opened is not source:
            opened.close()
    return ((width, height) if turned else (height, width)), kind


def decode(source: ImageSource) -> Image.Image:
    """Decode an image into 8-bit RGB, as the top of this file says.

    Args:
        source: a PIL image, a path, or the bytes of an encoded file or a view of them.

    Returns:
        `Image.Image`: RGB.

    Raises:
        UnreadableImage: no image, damaged, cut off, too large, or with values that have
            no 8-bit form.
    """
    opened = open_image(source)
    try:
        opened.load()
        return to_rgb(opened)
    except UnreadableImage:
        raise
    except Exception as error:
        raise UnreadableImage(f"image cannot be decoded: {one_line(error)}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a decoded PIL image to 8-bit RGB.

    Args:
        image (`Image.Image`): any mode.

    Returns:
        `Image.Image`: the image itself where it is 8-bit RGB already.

    Raises:
        UnreadableImage: values that have no 8-bit form.
    """
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    transparent = upright.mode in _ALPHA_MODES or "transparency" in upright.info
    if upright.mode == "RGB" and not transparent:
        return image if Image.Image.getexif(image).get(_ORIENTATION, 1) == 1 else upright
    if upright.mode.startswith("I") or upright.mode == "F":
        grey = _to_8_bit(upright, bits=_bits(image))
        clear = upright.info.get("transparency")
        if isinstance(clear, int):  # a grey value that is transparent, in the depth of the file
            grey.putdata(
                [
                    255 if value == clear else shade
                    for value, shade in zip(upright.getdata(), grey.getdata(), strict=True)
                ]
            )
        return grey.convert("RGB")
    if transparent:
        upright = (upright.convert("LA") if upright.mode == "La" else upright).convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    return upright.convert("RGB")


def _bits(image: Image.Image) -> int:
    """Return the bits of a deep grey image.

    They are 16, but for TIFF files of 9 to 15 bits, whose values Pillow does not scale.
    """
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))
    bits = bits[0] if isinstance(bits, tuple) else bits
    return bits if 8 < bits < 16 else 16


def _to_8_bit(image: Image.Image, bits: int) -> Image.Image:
    """Convert a deep grey image to 8 bits.

    Its values are 16-bit integers, 32-bit integers up to 65535, or floats in [0, 1] or
    [0, 255].
    """
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise UnreadableImage("image has values that are not finite")
    low, high = float(values.min()), float(values.max())
    top = 255 if image.mode == "F" else 65535
    if low < (-_OVERSHOOT if image.mode == "F" else 0) or high > top:
        raise UnreadableImage(
            f"image has values from {low:g} to {high:g}, expected 0 to {top}; save it with 8 bits "
            "per channel"
        )
    if image.mode == "F":
        values = np.round(values * 255) if high <= 1 + _OVERSHOOT else values
    elif image.mode != "I" or high > 255:
        # 32-bit integers up to 255 are 8-bit values in a wide type.
        values = values.astype(np.uint32) >> (bits - 8)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def from_array(array: np.ndarray | Tensor) -> Image.Image:
    """Convert a numpy array or tensor to a PIL image.

    Args:
        array: uint8, or float in [0, 1] (rounded to 8 bits); (H, W), (H, W, C) or
            (C, H, W) with 1, 3 or 4 channels.

    Returns:
        `Image.Image`: L, RGB or RGBA.

    Raises:
        UnreadableImage: another type or shape, or floats outside [0, 1].
    """
    import numpy as np
    from PIL import Image

    if hasattr(array, "detach"):
        try:
            array = array.detach().cpu()
            array = (array.float() if array.is_floating_point() else array).numpy()
        except (NotImplementedError, RuntimeError, TypeError) as error:
            # Sparse, or on the meta device.
            raise UnreadableImage(f"a tensor that cannot be read ({one_line(error)})") from error
    values = np.asarray(array)
    if values.ndim == 3 and values.shape[-1] not in (1, 3, 4) and values.shape[0] in (1, 3, 4):
        values = values.transpose(1, 2, 0)
    described = f"an array of {values.dtype} with shape {tuple(np.shape(array))}"
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (1, 3, 4)):
        raise UnreadableImage(f"{described} is no image; expected (H, W), (H, W, 3) or (3, H, W)")
    if 0 in values.shape:
        raise UnreadableImage(f"the image is empty, shape {tuple(np.shape(array))}")
    if values.dtype.kind == "f":
        values = _from_unit(values, described)
    if values.dtype != np.uint8:
        raise UnreadableImage(f"{described} is no image; expected uint8, or float in [0, 1]")
    return Image.fromarray(
        np.ascontiguousarray(
            values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values
        )
    )


def _from_unit(values: np.ndarray, described: str) -> np.ndarray:
    import numpy as np

    if not np.isfinite(values).all():
        raise UnreadableImage(f"{described} has values that are not finite")
    low, high = float(values.min()), float(values.max())
    if low < -_OVERSHOOT or high > 1 + _OVERSHOOT:
        raise UnreadableImage(
            f"{described} runs from {low:.3g} to {high:.3g}, expected [0, 1]; give [0, 255] as "
            "uint8"
        )
    return np.round(values.astype(np.float32) * 255).clip(0, 255).astype(np.uint8)


def is_array(value: object) -> TypeGuard[np.ndarray | Tensor]:
    """Tell whether a value is a numpy array or a tensor."""
    import numpy as np

    return isinstance(value, np.ndarray) or (hasattr(value, "detach") and hasattr(value, "cpu"))
