"""Bring the images of a group to one size, with the same relative crop and flip.

No image is stretched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from diffalign.data.config import MISMATCH
from diffalign.errors import ConfigError, UserError

if TYPE_CHECKING:
    import torch
    from PIL import Image

ASPECT_TOLERANCE = 0.05
"""Largest relative difference of width / height between the images of one bucket."""

# An image that would get more than so many times the target's pixels is cropped before
# it is resized.
_MOST_RESIZED = 64

Size = tuple[int, int]
"""(height, width) in pixels."""


class Geometry(NamedTuple):
    """SDXL's micro-conditioning (its time ids) for the first image of a group.

    Attributes:
        original_size (`tuple[int, int]`): (height, width) of the image before any
            resizing.
        crop_top_left (`tuple[int, int]`): (top, left) of the crop in the resized (and,
            after a flip, mirrored) image.
        target_size (`tuple[int, int]`): (height, width) of the result.

    Example:
        >>> from PIL import Image
        >>> from diffalign.data import GroupTransform
        >>> _, geometry = GroupTransform((64, 64))([Image.new("RGB", (200, 100))])
        >>> geometry.original_size, geometry.crop_top_left, geometry.target_size
        ((100, 200), (0, 32), (64, 64))
    """

    original_size: Size
    crop_top_left: Size
    target_size: Size


def check_resolution(size: int | Size, factor: int, field: str = "data.resolution") -> None:
    """Check that the model can encode images of this size.

    Args:
        size (`int` or `tuple[int, int]`): Pixels, one side or (height, width).
        factor (`int`): What every side must be a multiple of (the VAE's downscale times
            the patch size).
        field (`str`, *optional*, defaults to `"data.resolution"`): The option that the
            message names.

    Raises:
        ConfigError: A side is not positive or not divisible. The message names the
            nearest ones that are.

    Example:
        >>> from diffalign.data import check_resolution
        >>> check_resolution((512, 768), 8)
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
    """Bring the images of a group to one size.

    Every image is resized by a factor of its own until it just covers the target, and
    then cropped at the same relative place. Resizing is LANCZOS. An image that has the
    size already is not resampled.

    Args:
        size (`tuple[int, int]` or a sequence of them): (height, width), or a list of
            such buckets. Every group gets the bucket that is nearest in aspect ratio.
        center_crop (`bool`, *optional*, defaults to `True`): Crop the middle, else a
            random place.
        random_flip (`bool`, *optional*, defaults to `False`): Mirror a group with
            probability one half.
        mismatch (`str`, *optional*, defaults to `"drop"`): Under buckets, what to do
            with a group whose images differ in aspect ratio by more than
            `ASPECT_TOLERANCE`. With `drop`, `bucket_of` returns None. With `letterbox`,
            images that differ from the first one are fitted inside and padded black.

    Raises:
        ConfigError: `mismatch` has an unknown value.

    Example:
        >>> from PIL import Image
        >>> from diffalign.data import GroupTransform
        >>> transform = GroupTransform((64, 64))
        >>> pixels, geometry = transform([Image.new("RGB", (200, 100))] * 2)
        >>> pixels.shape
        torch.Size([2, 3, 64, 64])
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
        sizes: Sequence[Any] = size if self.bucketed else [size]
        self.sizes: list[Size] = [(height, width) for height, width in sizes]
        self.center_crop, self.random_flip, self.mismatch = center_crop, random_flip, mismatch

    @property
    def fingerprint(self) -> str:
        """Everything that decides the result, as text for the key of a cache."""
        sizes = ";".join(f"{h},{w}" for h, w in self.sizes)
        return (
            f"sizes={sizes} bucketed={self.bucketed} center_crop={self.center_crop} "
            f"random_flip={self.random_flip} mismatch={self.mismatch} "
            f"tolerance={ASPECT_TOLERANCE} resample=lanczos version=1"
        )

    @property
    def deterministic(self) -> bool:
        """Whether the same images always give the same result.

        That is so when neither crop nor flip is random.
        """
        return self.center_crop and not self.random_flip

    def bucket_of(self, sizes: Sequence[Size]) -> int | None:
        """Return the bucket of a group.

        Args:
            sizes (`Sequence[tuple[int, int]]`): (height, width) of its images.

        Returns:
            `int`: Index into `self.sizes`. None for a group that is to be dropped.
        """
        if not self.bucketed:
            return 0
        if self.mismatch == "drop" and not all(_same_aspect(size, sizes[0]) for size in sizes):
            return None
        from diffusers.training_utils import find_nearest_bucket

        return find_nearest_bucket(*sizes[0], self.sizes)

    def __call__(
        self, images: Sequence[Image.Image], generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, Geometry]:
        """Transform the images of a group.

        Args:
            images (`Sequence[PIL.Image.Image]`): k RGB images.
            generator (`torch.Generator`, *optional*): On the CPU. It is the only source
                of randomness, and needed unless `deterministic`.

        Returns:
            `tuple[torch.Tensor, Geometry]`: Pixels `(k, 3, H, W)`, float32 in [-1, 1],
            and the geometry of the first image.

        Raises:
            UserError: The images fit no common bucket (`bucket_of` returns None).
            ValueError: A generator is needed and missing.
        """
        import torch

        sizes = [(image.height, image.width) for image in images]
        bucket = self.bucket_of(sizes)
        if bucket is None:
            raise UserError(
                f"data.mismatch: images of (height, width) {sizes} fit no common bucket; drop "
                "the group or letterbox"
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
    """Resize an image until it covers the target, and crop it.

    The share `down` of the overhang lies above the crop, the share `right` left of it.

    Returns:
        The crop and its (top, left).
    """
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
    # Our flip mirrors the crop. diffusers' SDXL scripts crop the mirrored image, where
    # the same crop begins elsewhere.
    return cropped, (top, resized_width - width - left if flip else left)


def _crop_of_thin(
    image: Image.Image, target: Size, corner: tuple[float, float], factor: float
) -> Image.Image:
    """Crop a very thin image before it is resized.

    Resizing all of it could fill any memory.
    """
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
    """Convert an image to a `(3, H, W)` float32 tensor in [-1, 1]."""
    import numpy as np
    import torch

    array = np.asarray(image, dtype=np.float32)
    if flip:
        array = array[:, ::-1]
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1))).div_(127.5).sub_(1.0)
