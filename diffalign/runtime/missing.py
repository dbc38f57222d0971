"""Images that a pipeline drew, and placeholders for those that cannot be used.

An image is missing when its pixels are not finite, when a safety checker painted it
black, or when the pipeline failed for its prompt. A missing image has no score, never
wins, and is counted. Images are never judged by their colour, as a model may honestly
draw black.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

NOT_FINITE = "not finite"
BLOCKED = "blocked by the safety checker"
ABSENT = "the pipeline returned no image"
FAILED = "failed"


@dataclass(frozen=True)
class Missing:
    """Stands where an image would be.

    Args:
        reason (`str`): `NOT_FINITE`, `BLOCKED`, `ABSENT`, or `FAILED` and why.
    """

    reason: str

    @property
    def kind(self) -> str:
        """The reason without details, by which missing images are counted."""
        return FAILED if self.reason.startswith(FAILED) else self.reason


MaybeImage: TypeAlias = "Image.Image | Missing"
"""A drawn image, or what stands in its place."""

PipelineImage: TypeAlias = "Image.Image | np.ndarray | Tensor | Missing"
"""An image in any form in which pipelines return one, or what stands in its place."""


class NoImages(UserError):
    """All images of a model are missing."""


@contextmanager
def watched(pipe: object) -> Iterator[list[bool]]:
    """Record which images of a pipeline's call are finite, in a block.

    Pipelines clamp pixels before they return them, so that infinite ones cannot be seen
    afterwards. The last call of the image processor counts, because a safety checker
    calls it before.

    Args:
        pipe: of diffusers.

    Yields:
        `list[bool]`: filled by the call, one per image.
    """
    import torch

    finite: list[bool] = []
    processor = getattr(pipe, "image_processor", None)
    if processor is None or not hasattr(processor, "postprocess"):
        yield finite
        return
    # The user's function, or that of a call around this one.
    previous = vars(processor).get("postprocess")
    plain = processor.postprocess

    def postprocess(image: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(image, torch.Tensor):
            finite[:] = torch.isfinite(image.detach().flatten(1)).all(1).tolist()
            if not all(finite):
                image = image.nan_to_num(0.0, 0.0, 0.0)  # the others' pixels are untouched
        return plain(image, *args, **kwargs)

    processor.postprocess = postprocess
    try:
        yield finite
    finally:
        if previous is None:
            del processor.postprocess
        else:
            processor.postprocess = previous


def read_output(output: object, expected: int, finite: Sequence[bool]) -> list[Any]:
    """Read the images of a pipeline's output.

    Args:
        output: what the pipeline returned.
        expected (`int`): how many images were asked for.
        finite (sequence of `bool`): from `watched`.

    Returns:
        `list`: the images, `Missing` where one cannot be used.

    Raises:
        UserError: another number of images, or no output of a text-to-image pipeline.
    """
    images = getattr(output, "images", None)
    if images is None or len(images) != expected:
        count = "none" if images is None else len(images)
        raise UserError(
            f"pipe: expected {expected} images for {expected} prompts, got {count}; it must be a "
            "text-to-image pipeline"
        )
    blocked = [False] * expected
    for field in ("nsfw_content_detected", "nsfw_detected", "watermark_detected"):
        flags = getattr(output, field, None)
        if isinstance(flags, (list, tuple)) and len(flags) == expected:
            blocked = [was or bool(flag) for was, flag in zip(blocked, flags, strict=True)]
    finite = finite if len(finite) == expected else [True] * expected
    return [
        Missing(BLOCKED) if blocked[i] else _checked(image) if finite[i] else Missing(NOT_FINITE)
        for i, image in enumerate(images)
    ]


def _checked(image: Any) -> Any:
    import numpy as np
    import torch

    if image is None:
        return Missing(ABSENT)
    if isinstance(image, torch.Tensor):
        good = not image.is_floating_point() or bool(torch.isfinite(image).all())
    elif isinstance(image, np.ndarray):
        good = image.dtype.kind != "f" or bool(np.isfinite(image).all())
    else:
        return image
    return image if good else Missing(NOT_FINITE)


def to_images(pixels: Tensor, processor: Any = None) -> list[MaybeImage]:
    """Convert decoded pixels to images.

    Args:
        pixels (`Tensor`): (n, 3, H, W) in [-1, 1].
        processor (*optional*): image processor of a pipeline.

    Returns:
        `list`: PIL images, `Missing` where pixels are not finite.
    """
    import torch

    if processor is None:
        from diffusers.image_processor import VaeImageProcessor

        processor = VaeImageProcessor()
    finite = torch.isfinite(pixels.flatten(1)).all(1)
    rows = finite.view(-1, *[1] * (pixels.ndim - 1))
    images = processor.postprocess(
        torch.where(rows, pixels, torch.zeros_like(pixels)), output_type="pil"
    )
    return [
        image if good else Missing(NOT_FINITE)
        for image, good in zip(images, finite.tolist(), strict=True)
    ]


def present(images: Sequence[object]) -> list[int]:
    """List the places of the images that are there."""
    return [i for i, image in enumerate(images) if not isinstance(image, Missing)]


def left_out(images: Iterable[object], total: int, whose: str = "") -> str:
    """Say how many images are missing, and why.

    Args:
        images (iterable): images and `Missing`.
        total (`int`): of which they are a part.
        whose (`str`, *optional*, defaults to `""`): name of the model.

    Returns:
        `str`: empty when none is missing.
    """
    kinds = Counter(image.kind for image in images if isinstance(image, Missing))
    if not kinds:
        return ""
    reasons = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common())
    of_whom = f" of {whose}" if whose else ""
    return f"{sum(kinds.values())} of {total} images{of_whom} left out: {reasons}"


def check_any(images: Sequence[object], whose: str) -> None:
    """Refuse a model of which all images are missing.

    Args:
        images (sequence): images and `Missing`.
        whose (`str`): name of the model.

    Raises:
        NoImages: says what to do.
    """
    if not images or present(images):
        return
    gone = [image for image in images if isinstance(image, Missing)]
    kinds = {image.kind for image in gone}
    remedy = (
        "draw in another precision, such as float32 or bfloat16 "
        "(an SDXL autoencoder overflows in float16)"
    )
    if kinds == {BLOCKED}:
        remedy = "give the pipeline without a safety checker, or other prompts"
    elif FAILED in kinds:
        remedy = next(image.reason for image in gone if image.kind == FAILED)
    raise NoImages(
        f"model {whose}: none of its {len(images)} images can be used: "
        f"{left_out(images, len(images)).split(': ')[-1]}; {remedy}"
    )


def placeholder(image: MaybeImage, side: int = 96) -> Image.Image:
    """Return the image, or a pale tile with the reason where it is missing."""
    if not isinstance(image, Missing):
        return image
    from PIL import Image, ImageDraw

    tile = Image.new("RGB", (side, side), (238, 236, 232))
    ImageDraw.Draw(tile).text((6, side // 2 - 6), image.kind[:18], fill=(120, 110, 100))
    return tile
