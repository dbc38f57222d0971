"""Read images in any accepted form, and preprocess them for a network.

There are two ways into a network. The exact way resizes 8-bit PIL images as the
published code of each scorer does. The differentiable way resizes float tensors with
antialiasing, which differs from it by up to 2/255. The two are never mixed in one
ranking.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.yaml_text import shown
from ..errors import ConfigError, UserError
from ..runtime import decoding
from ..runtime.missing import Missing
from .content_key import file_digest, pixel_digest, stamp_digest

if TYPE_CHECKING:
    from PIL import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_LARGEST_SIDE = 8192


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class UnreadableImage(UserError):
    """An image that cannot be used. The sentence names its place in the list."""


@dataclass
class ImageInput:
    """One image as given, decoded when first needed.

    So the cache can answer for a known file without decoding it.

    Attributes:
        place (`str`): how messages name it, e.g. ``images[3]``.
        source: a PIL image, or the path or bytes of an encoded file.
    """

    place: str
    source: decoding.ImageSource | Missing
    _image: Image.Image | None = field(default=None, repr=False)
    _encoded: bytes | None = field(default=None, repr=False)

    @property
    def image(self) -> Image.Image:
        """The decoded image as 8-bit RGB, with the pixels that training sees.

        See `diffalign.runtime.decoding`.

        Raises:
            UnreadableImage: missing, damaged or of zero size.
        """
        if isinstance(self.source, Missing):
            raise UnreadableImage(f"{self.place}: there is no image: {self.source.reason}")
        # Locals, since another thread may release the input meanwhile.
        image, encoded = self._image, self._encoded
        if image is None:
            source = encoded if encoded is not None else self._open()
            try:
                image = self._image = decoding.decode(source)
            except decoding.UnreadableImage as error:
                raise UnreadableImage(
                    f"{self.place}: {self._name()} cannot be used: {error}; remove or repair it"
                ) from error
        return image

    def _name(self) -> str:
        return repr(str(self.source)[:200]) if isinstance(self.source, (str, Path)) else "the image"

    def _open(self) -> Any:
        if isinstance(self.source, (str, Path)) and not Path(self.source).is_file():
            raise UnreadableImage(
                f"{self.place}: there is no image file {str(self.source)[:200]!r}"
            )
        return self.source

    def encoded(self) -> bytes:
        """Return the encoded file's bytes, read once."""
        if self._encoded is None:
            self._encoded = (
                bytes(self.source)
                if isinstance(self.source, (bytes, memoryview))
                else Path(self._open()).read_bytes()
            )
        return self._encoded

    def file_key(self) -> bytes | None:
        """Hash the encoded file. None for images that came decoded."""
        return file_digest(self.encoded()) if self._is_file else None

    def stamp_key(self, now: float) -> bytes | None:
        """Hash an image file's place and change times.

        None where there is no such file or it has just been written.
        """
        return stamp_digest(self.source, now) if isinstance(self.source, (str, Path)) else None

    def pixel_key(self) -> bytes:
        """Hash the decoded pixels."""
        return pixel_digest(self.image)

    def release(self) -> None:
        """Forget what was decoded from a file."""
        self._encoded = None
        if self._is_file:
            self._image = None

    @property
    def _is_file(self) -> bool:
        return isinstance(self.source, (str, Path, bytes, memoryview))


ImageLike: TypeAlias = (
    "decoding.ImageSource | np.ndarray | Tensor | dict[str, Any] | ImageInput | Missing"
)
"""One image in any form that `read_images` takes."""

Images: TypeAlias = "Iterable[ImageLike] | np.ndarray | Tensor"
"""A list of images, or one batch of them."""


def read_images(images: Images) -> list[ImageInput]:
    """Read every accepted form of images into a list.

    Floats are rounded to 8 bits, so that an image in memory and its saved PNG get the
    same number.

    Args:
        images: a list of PIL images, paths, encoded bytes, `{"bytes", "path"}` cells of
            a dataset, or arrays and tensors (h, w), (h, w, c) or (c, h, w), uint8 or
            float in [0, 1]. Or one tensor or array of them, (n, 3, h, w).

    Returns:
        list of `ImageInput`.

    Raises:
        UserError: an empty list, one image where a list is meant, values that are not
            finite or out of range, another type or shape.
    """
    from PIL import Image

    if isinstance(images, (Image.Image, str, Path, bytes)):
        raise UserError(f"images: expected a list, got one {type(images).__name__}; write [image]")
    if isinstance(images, Tensor) or (isinstance(images, np.ndarray) and images.dtype != object):
        rows: Sequence[ImageLike] = _from_batch(images)
    else:
        rows = images if isinstance(images, Sequence) else list(images)
    if len(rows) == 0:
        raise UserError("images: the list is empty; give at least one image")
    return [_read_one(image, f"images[{i}]") for i, image in enumerate(rows)]


def _read_one(image: object, place: str) -> ImageInput:
    from PIL import Image

    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if isinstance(image, ImageInput):
        return image
    if isinstance(image, (Image.Image, str, Path, bytes, memoryview, Missing)):
        return ImageInput(place, image)
    if decoding.is_array(image):
        try:
            return ImageInput(place, decoding.from_array(image))
        except decoding.UnreadableImage as error:
            raise UnreadableImage(f"{place}: {error}") from error
    raise UserError(
        f"{place}: expected a PIL image, a path, bytes or an array, got {type(image).__name__}"
    )


def _from_batch(batch: np.ndarray | Tensor, place: str = "images") -> list[ImageLike]:
    """Split an (n, 3, h, w) batch into PIL images."""
    from PIL import Image

    if isinstance(batch, np.ndarray):
        # (n, h, w, c), as pipelines return arrays.
        if batch.ndim == 4 and batch.dtype == np.uint8 and batch.shape[-1] in (3, 4):
            return list(batch)
        batch = torch.from_numpy(batch)
    check_pixels(batch, place)
    if batch.dtype != torch.uint8:
        batch = quantise(batch)
    return [
        Image.fromarray(array) for array in batch.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    ]


def quantise(pixels: Tensor) -> Tensor:
    """Round float pixels in [0, 1] to uint8: round(255 x).

    Under this rounding a saved PNG is the nearest image.
    """
    return (pixels.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)


def check_pixels(pixels: Tensor, place: str = "pixels") -> None:
    """Check an (n, 3, h, w) batch.

    Args:
        pixels (`Tensor`): uint8, or floats in [0, 1].
        place (`str`, *optional*, defaults to "pixels"): how messages name it.

    Raises:
        UserError: wrong shape or type, nothing in it, values not finite or outside [0,
            1].
    """
    if not isinstance(pixels, Tensor):
        raise UserError(
            f"{place}: expected a float tensor (N, 3, H, W) in [0, 1], got {type(pixels).__name__}"
        )
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise UserError(f"{place}: expected shape (N, 3, H, W), got {tuple(pixels.shape)}")
    if 0 in pixels.shape:
        raise UserError(
            f"{place}: the tensor is empty, shape {tuple(pixels.shape)}; give at least one image"
        )
    if pixels.dtype == torch.uint8:
        return
    if not pixels.is_floating_point():
        raise UserError(f"{place}: expected uint8 or float values, got {pixels.dtype}")
    low, high = (float(value) for value in pixels.detach().aminmax())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise UserError(
            f"{place}: some values are not finite; fix the model or decoder that produced them"
        )
    if low < -1e-3 or high > 1 + 1e-3:
        raise UserError(
            f"{place}: values run from {low:.3g} to {high:.3g}, expected [0, 1]; "
            + (
                "images in [-1, 1] become (x / 2 + 0.5)"
                if high <= 1.5
                else "images in [0, 255] go in as uint8"
            )
            + ", overshoot is removed by clamp(0, 1)"
        )


@dataclass(frozen=True)
class Preprocess:
    """How one family of scorers turns an image into a network's input, in both modes.

    Attributes:
        size (`int`): side of the square input, in pixels.
        mode (`str`): ``crop``: shortest side to `size`, centre crop. ``letterbox``:
            HPSv2's: the longest side to `size` on the float tensor, black bars.
            ``squash``: both sides to `size`, whatever the aspect.
        rounding (`str`): where the centre crop of an odd margin begins: ``floor`` as
            transformers does, ``half_even`` as torchvision does.
        rgb_first (`bool`): convert to RGB before resizing (transformers, HPSv2) or
            after it (ImageReward).
        antialias (`bool`): of the letterbox's tensor resize. True is what torchvision
            computes since 0.17, False what it computed when HPSv2's tables were made.
        mean, std (tuple of `float`): per channel.

    Raises:
        ConfigError: sizes or numbers that make no sense.
    """

    size: int = 224
    mode: Literal["crop", "letterbox", "squash"] = "crop"
    rounding: Literal["floor", "half_even"] = "floor"
    rgb_first: bool = True
    antialias: bool = True
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    resize_to: int | None = None
    """Target of the shortest side where it differs from the crop."""

    def __post_init__(self) -> None:
        for name, side in (("size", self.size), ("resize_to", self.resize_to)):
            if side is not None and not (
                _is_number(side) and isinstance(side, int) and 1 <= side <= _LARGEST_SIDE
            ):
                raise ConfigError(
                    f"preprocessing.{name}",
                    f"expected pixels, an int from 1 to {_LARGEST_SIDE}, got {shown(side)}",
                )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if (
                len(values) != 3
                or not all(map(_is_number, values))
                or (name == "std" and min(values) <= 0)
            ):
                positive = " above 0" if name == "std" else ""
                raise ConfigError(
                    f"preprocessing.{name}",
                    f"expected 3 numbers{positive}, one per channel, got {shown(list(values))}",
                )

    def exact(self, image: Image.Image) -> Tensor:
        """Resize a PIL image as the published code does.

        Returns:
            `Tensor`: (3, size, size), uint8 after a PIL resize, float after the
            letterbox.
        """
        from PIL import Image

        if image.mode != "RGB" and (self.rgb_first or self.mode == "letterbox"):
            image = image.convert("RGB")
        if self.mode == "crop":
            image = middle_of_thin(image)
        if self.mode == "letterbox":
            return self.letterbox(_to_tensor(image).float().div(255))
        if self.mode == "squash":
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        else:
            height, width = self._shortest(image.height, image.width)
            if (width, height) != image.size:
                image = image.resize((width, height), Image.Resampling.BICUBIC)
            top, left = self._margin(height), self._margin(width)
            image = image.crop((left, top, left + self.size, top + self.size))
        return _to_tensor(image if image.mode == "RGB" else image.convert("RGB"))

    def tensor(self, pixels: Tensor) -> Tensor:
        """Resize float pixels so that gradients flow back to them.

        Args:
            pixels (`Tensor`): (n, 3, h, w) in [0, 1].

        Returns:
            `Tensor`: (n, 3, size, size).
        """
        if self.mode == "letterbox":
            return self.letterbox(pixels)
        height, width = (
            (self.size, self.size) if self.mode == "squash" else self._shortest(*pixels.shape[-2:])
        )
        if (height, width) != tuple(pixels.shape[-2:]):
            # A bicubic kernel overshoots. 8-bit images cannot, so the clamp keeps the
            # two modes close.
            pixels = _resize(pixels, (height, width), antialias=True).clamp(0, 1)
        top, left = self._margin(height), self._margin(width)
        return pixels[..., top : top + self.size, left : left + self.size]

    def normalise(self, pixels: Tensor) -> Tensor:
        """Normalise pixels per channel.

        Args:
            pixels (`Tensor`): (..., 3, size, size), uint8 or floats in [0, 1].

        Returns:
            `Tensor`: float32 or wider, of the same shape.
        """
        mean, std = (
            torch.tensor(values, device=pixels.device)[:, None, None]
            for values in (self.mean, self.std)
        )
        if pixels.dtype == torch.uint8:
            # In place, and along whole rows of interleaved colours: the plain formula
            # costs as much as a small tower.
            last = pixels.movedim(-3, -1)
            rows = last.reshape(*last.shape[:-2], last.shape[-2] * 3).float().div_(255)
            rows.sub_(mean.flatten().repeat(last.shape[-2])).div_(
                std.flatten().repeat(last.shape[-2])
            )
            return rows.view(last.shape).movedim(-1, -3)
        return (pixels - mean.to(pixels.dtype)) / std.to(pixels.dtype)

    def letterbox(self, pixels: Tensor) -> Tensor:
        """Resize the longest side to `size`, with black bars around.

        The resize is bicubic, on tensors. The odd pixel of the bars lies right and
        below.
        """
        height, width = pixels.shape[-2:]
        scale = self.size / max(height, width)
        if scale == 1.0 and height == width:
            return pixels
        new = (max(1, round(height * scale)), max(1, round(width * scale)))
        if scale != 1.0:
            pixels = _resize(pixels, new, antialias=self.antialias)
        free_h, free_w = self.size - new[0], self.size - new[1]
        if free_h == free_w == 0:
            return pixels
        return F.pad(pixels, (free_w // 2, free_w - free_w // 2, free_h // 2, free_h - free_h // 2))

    def _shortest(self, height: int, width: int) -> tuple[int, int]:
        target, short = self.resize_to or self.size, min(height, width)
        if short == target:
            return height, width
        long = int(target * max(height, width) / short)
        return (target, long) if height <= width else (long, target)

    def _margin(self, side: int) -> int:
        free = side - self.size
        return free // 2 if self.rounding == "floor" else round(free / 2)

    @staticmethod
    def stack(images: Sequence[Tensor]) -> Tensor:
        """Stack prepared images to a batch (n, 3, size, size).

        8-bit ones stay in the order of memory in which PIL wrote them.
        """
        if images[0].dtype == torch.uint8:
            return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
        return torch.stack(list(images))

    def describe(self) -> str:
        """Return a stable name of this preprocessing, part of fingerprints."""
        parts = [
            self.mode,
            str(self.size),
            self.rounding,
            "rgb-first" if self.rgb_first else "rgb-last",
        ]
        parts += [f"resize{self.resize_to}"] * (self.resize_to is not None)
        parts += [f"antialias={self.antialias}"] * (self.mode == "letterbox")
        return "-".join([*parts, ",".join(f"{v:g}" for v in (*self.mean, *self.std))])


_THIN = 32  # long side in short sides from which only the middle is resized


def middle_of_thin(image: Image.Image) -> Image.Image:
    """Crop the middle of an image whose long side is more than 32 times the short one.

    So resizing it takes bounded memory. Other images stay as they are.
    """
    short, longest = min(image.size), max(image.size)
    if longest <= _THIN * short:
        return image
    start = (longest - _THIN * short) // 2
    end = start + _THIN * short
    return image.crop(
        (start, 0, end, short) if image.width > image.height else (0, start, short, end)
    )


def _resize(pixels: Tensor, size: tuple[int, int], antialias: bool) -> Tensor:
    """Resize (3, h, w) or (n, 3, h, w) as torchvision resizes tensors.

    This is the call that torchvision makes behind its checks.
    """
    batch = pixels if pixels.ndim == 4 else pixels[None]
    resized = F.interpolate(
        batch, size=list(size), mode="bicubic", align_corners=False, antialias=antialias
    )
    return resized if pixels.ndim == 4 else resized[0]


def _to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image as uint8 (3, h, w)."""
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, 3).permute(2, 0, 1)
