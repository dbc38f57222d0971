"""How the pipelines of a family combine predictions under guidance.

`guidance_scale` means here what it means in the call of the family's own pipeline.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


class GuidanceRule(Protocol):
    """Combines a conditional and an unconditional prediction."""

    def of_run(self, scale: float) -> float:
        """Return the pipelines' scale for a run's, which is without guidance at 1."""

    def active(self, scale: float) -> bool:
        """Tell whether the unconditional prediction is needed at a scale."""

    def combine(self, full: Tensor, empty: Tensor, scale: float) -> Tensor:
        """Combine the predictions, each (n, C, h, w)."""


class ClassifierFree:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598, eq. 6).

    empty + s (full - empty), which at a scale s is its guidance strength s - 1.
    """

    def of_run(self, scale: float) -> float:
        """Return the same scale."""
        return scale

    def active(self, scale: float) -> bool:
        """Above 1."""
        return scale > 1

    def combine(self, full: Tensor, empty: Tensor, scale: float) -> Tensor:
        """Combine the predictions, each (n, C, h, w)."""
        return empty + scale * (full - empty)


class OffsetByOne:
    """Classifier-free guidance of which 0 is no guidance: full + s (full - empty)."""

    def of_run(self, scale: float) -> float:
        """Return 0 for scales up to 1."""
        return scale if scale > 1 else 0.0

    def active(self, scale: float) -> bool:
        """Above 0."""
        return scale > 0

    def combine(self, full: Tensor, empty: Tensor, scale: float) -> Tensor:
        """Combine the predictions, each (n, C, h, w)."""
        return full + scale * (full - empty)


class NormRescaled(ClassifierFree):
    """Classifier-free guidance that keeps the conditional norm of every token.

    Args:
        patch (`int`): latent pixels along a side of a token.
    """

    def __init__(self, patch: int) -> None:
        self.patch = patch

    def combine(self, full: Tensor, empty: Tensor, scale: float) -> Tensor:
        """Combine the predictions, each (n, C, h, w)."""
        tokens = [
            pixel_unshuffle(x, self.patch) for x in (full, super().combine(full, empty, scale))
        ]
        conditional, guided = tokens
        ratio = conditional.norm(dim=1, keepdim=True) / guided.norm(dim=1, keepdim=True)
        return pixel_shuffle(guided * ratio, self.patch)


class Embedded:
    """No second prediction: the scale is an input of the network, or has no effect."""

    def of_run(self, scale: float) -> float:
        """Return the same scale."""
        return scale

    def active(self, scale: float) -> bool:
        """Never."""
        return False

    def combine(self, full: Tensor, empty: Tensor, scale: float) -> Tensor:
        """Return the conditional prediction."""
        return full


CLASSIFIER_FREE, OFFSET_BY_ONE, EMBEDDED = ClassifierFree(), OffsetByOne(), Embedded()
