"""Joint geometry: all images of a group get the same relative crop and the same flip, and none is stretched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from diffalign.data.config import MISMATCH
from diffalign.errors import ConfigError, UserError

if TYPE_CHECKING:
    import torch
    from PIL import Image

ASPECT_TOLERANCE = 0.05
"""Images of a group whose width / height differ by more than this share do not fit one bucket."""

_MOST_RESIZED = 64  # times the pixels of the target: an image that would become larger is cut before it is resized

Size = tuple[int, int]
"""(height, width) in pixels."""


class Geometry(NamedTuple):
    """The micro-conditioning of SDXL's time ids, true of the group's first image.

    Attributes:
        original_size: (height, width) of the image before any resizing.
        crop_top_left: (top, left) of the crop in the resized (and, after a flip, mirrored) image.
        target_size: (height, width) of the result.
    """

    original_size: Size
    crop_top_left: Size
    target_size: Size


def check_resolution(size: int | Size, factor: int, field: str = "data.resolution") -> None:
    """Checks that the model can encode this size.

    Args:
        size: pixels, one side or (height, width).
        factor: what every side must be a multiple of (the VAE's downscale times the patch size).
        field: named in the message.

    Raises:
        ConfigError: a side is not positive or not divisible; names the nearest ones that are.
    """
    for side in (size,) if isinstance(size, int) else size:
        if side <= 0:
            raise ConfigError(field, f"expected a number of pixels above 0, got {side}")
        if side % factor:
            below, above = side // factor * factor, -(-side // factor) * factor
            use = f"{below} or {above}" if below else f"{above}"
            raise ConfigError(
                field,
                f"{side} is not divisible by {factor}, as this model's images must be; use {use}",
            )


class GroupTransform:
    """Brings the images of a group to one size.

    Every image is resized by a factor of its own until it just covers the target (LANCZOS; an image that already has the size
    is not resampled), then cropped at the same relative place.

    Args:
        size: (height, width), or a list of such buckets from which every group gets the nearest in aspect ratio.
        center_crop (`bool`): crop the middle, else at a random place.
        random_flip (`bool`): mirror a group with probability one half.
        mismatch: under buckets, for a group whose images differ in aspect ratio by more than `ASPECT_TOLERANCE`: `drop`
            (`bucket_of` is None), or `letterbox`: those that differ from the first image are fitted inside and padded black.
    """

    def __init__(
        self,
        size: Size | Sequence[Size],
        center_crop: bool = True,
        random_flip: bool = False,
        mismatch: str = "drop",
    ) -> None:
        if mismatch not in MISMATCH:
            raise ConfigError(
                "data.mismatch", f"expected one of {', '.join(MISMATCH)}, got {mismatch!r}"
            )
        self.bucketed = not isinstance(size[0], int)
        self.sizes: list[Size] = [(h, w) for h, w in ([size] if not self.bucketed else size)]  # type: ignore[list-item,misc]
        self.center_crop, self.random_flip, self.mismatch = center_crop, random_flip, mismatch

    @property
    def fingerprint(self) -> str:
        """All that decides the result, for the key of a cache."""
        sizes = ";".join(f"{h},{w}" for h, w in self.sizes)
        return (
            f"sizes={sizes} bucketed={self.bucketed} center_crop={self.center_crop} random_flip={self.random_flip} "
            f"mismatch={self.mismatch} tolerance={ASPECT_TOLERANCE} resample=lanczos version=1"
        )

    @property
    def deterministic(self) -> bool:
        """The same images give the same result every time: neither crop nor flip is random."""
        return self.center_crop and not self.random_flip

    def bucket_of(self, sizes: Sequence[Size]) -> int | None:
        """Index into `self.sizes` for a group whose images have these (height, width); None for a group to be dropped."""
        if not self.bucketed:
            return 0
        if self.mismatch == "drop" and not all(_same_aspect(size, sizes[0]) for size in sizes):
            return None
        from diffusers.training_utils import find_nearest_bucket

        return find_nearest_bucket(*sizes[0], self.sizes)

    def __call__(
        self, images: Sequence[Image.Image], generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, Geometry]:
        """Pixels `(k, 3, H, W)`, float32 in [-1, 1], and the geometry of the first image.

        Args:
            images: RGB.
            generator: on the CPU; the only source of randomness, needed unless `deterministic`.

        Raises:
            UserError: the images fit no common bucket (`bucket_of` is None).
        """
        import torch

        sizes = [(image.height, image.width) for image in images]
        bucket = self.bucket_of(sizes)
        if bucket is None:
            raise UserError(
                f"data.mismatch: images of (height, width) {sizes} fit no common bucket; drop the group or letterbox"
            )
        if generator is None and not self.deterministic:
            raise ValueError("generator: random crops and flips need one")
        target = self.sizes[bucket]
        down, right = (
            (0.5, 0.5) if self.center_crop else torch.rand(2, generator=generator).tolist()
        )
        flip = self.random_flip and torch.rand((), generator=generator).item() < 0.5
        pixels, corners = [], []
        for image, size in zip(images, sizes, strict=True):
            fitted = self.bucketed and not _same_aspect(size, sizes[0])
            cropped, corner = (
                _letterboxed(image, target)
                if fitted
                else _covered(image, target, down, right, flip)
            )
            pixels.append(_to_tensor(cropped, flip))
            corners.append(corner)
        return torch.stack(pixels), Geometry(sizes[0], corners[0], target)


def _same_aspect(size: Size, other: Size) -> bool:
    return abs(math.log(size[1] * other[0] / (size[0] * other[1]))) <= math.log1p(ASPECT_TOLERANCE)


def _covered(
    image: Image.Image, target: Size, down: float, right: float, flip: bool
) -> tuple[Image.Image, Size]:
    """The crop that leaves the share `down` of the overhang above it and `right` left of it, and its (top, left)."""
    height, width = target
    factor = max(height / image.height, width / image.width)
    resized_height, resized_width = (
        max(height, round(image.height * factor)),
        max(width, round(image.width * factor)),
    )
    top, left = round(down * (resized_height - height)), round(right * (resized_width - width))
    if resized_height * resized_width > _MOST_RESIZED * height * width:
        cropped = _crop_of_thin(image, target, (top / factor, left / factor), factor)
    else:
        cropped = _resized(image, resized_height, resized_width).crop(
            (left, top, left + width, top + height)
        )
    # cropping and mirroring is mirroring and cropping at the mirrored place, which is how diffusers' SDXL scripts count
    return cropped, (top, resized_width - width - left if flip else left)


def _crop_of_thin(
    image: Image.Image, target: Size, corner: tuple[float, float], factor: float
) -> Image.Image:
    """The crop of a very thin image, cut out before it is resized: the whole of it resized could fill any memory."""
    from PIL import Image as Pillow

    (top, left), (height, width) = corner, target
    box = (
        left,
        top,
        min(image.width, left + width / factor),
        min(image.height, top + height / factor),
    )
    return image.resize((width, height), Pillow.Resampling.LANCZOS, box=box)


def _letterboxed(image: Image.Image, target: Size) -> tuple[Image.Image, Size]:
    from PIL import Image as Pillow

    height, width = target
    factor = min(height / image.height, width / image.width)
    inner_height = min(height, max(1, round(image.height * factor)))
    inner_width = min(width, max(1, round(image.width * factor)))
    box = Pillow.new("RGB", (width, height))
    box.paste(
        _resized(image, inner_height, inner_width),
        ((width - inner_width) // 2, (height - inner_height) // 2),
    )
    return box, (0, 0)


def _resized(image: Image.Image, height: int, width: int) -> Image.Image:
    from PIL import Image as Pillow

    return (
        image
        if image.size == (width, height)
        else image.resize((width, height), Pillow.Resampling.LANCZOS)
    )


def _to_tensor(image: Image.Image, flip: bool) -> torch.Tensor:
    """(3, H, W) float32 in [-1, 1]."""
    import numpy as np
    import torch

    array = np.asarray(image, dtype=np.float32)
    if flip:
        array = array[:, ::-1]
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1))).div_(127.5).sub_(1.0)
