"""JPEG file size as a reward that needs no model.

Use it for smoke tests of reward optimisation (DDPO, arXiv 2305.13301).
"""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError
from ..base import Item, Scorer
from ..spec import ScorerSpec

if TYPE_CHECKING:
    from PIL import Image

QUALITY = 95


def jpeg_bytes(image: Image.Image) -> int:
    """Return an image's size as JPEG of quality 95, Pillow's default subsampling."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=QUALITY)
    return buffer.getbuffer().nbytes


class JpegIncompressibility(Scorer):
    """Bytes as JPEG over `scale`.

    The numbers depend on the libjpeg that Pillow was built with.

    Args:
        scale (`float`, *optional*, defaults to 1000.0): bytes per unit. 1000 gives
            kilobytes (DDPO, d3po). 500000 gives flow_grpo's compressibility, kilobytes
            over 500.
        **options: as for `Scorer`.

    Raises:
        ConfigError: `scale` is not above 0.
    """

    spec = ScorerSpec(
        key="jpeg_incompressibility",
        summary="kilobytes as JPEG of quality 95; for smoke tests",
        licence="none needed",
        requires=("image",),
        preprocess="jpeg-95",
        citation="Black et al. 2023, arXiv 2305.13301",
    )
    sign = 1.0

    def __init__(self, *, scale: float = 1000.0, **options: Any) -> None:
        super().__init__(**options)
        if (
            isinstance(scale, bool)
            or not isinstance(scale, (int, float))
            or not 0 < scale < math.inf
        ):
            raise ConfigError("scale", f"expected a number above 0, got {scale!r}")
        self.scale = float(scale)

    def identity(self) -> dict[str, Any]:
        from PIL import Image, features

        return {
            "scale": self.scale,
            "pillow": Image.__version__,
            "libjpeg": features.version_codec("jpg"),
        }  # type: ignore[attr-defined]

    def score_batch(self, items: list[Item]) -> list[float]:
        return [self.sign * jpeg_bytes(item.image) / self.scale for item in items]


class JpegCompressibility(JpegIncompressibility):
    """Minus the bytes as JPEG over `scale`. Arguments as `JpegIncompressibility`."""

    spec = replace(
        JpegIncompressibility.spec,
        key="jpeg_compressibility",
        summary="minus the kilobytes as JPEG of quality 95; for smoke tests",
    )
    sign = -1.0
