"""How different the images of one prompt are: alignment often pays for reward with sameness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import ConfigError

Array = npt.NDArray[np.float64]
PIXEL = "pixel"
_SIDE = 64


def pixel_features(images: Sequence[Image.Image]) -> Array:
    """(n, 3 * 64 * 64) in [0, 1], of the images scaled to 64x64."""
    small = [image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(image, dtype=np.float64).ravel() / 255 for image in small])


def pixel_distances(features: Array) -> Array:
    """(n, n): root mean squared difference of pixels."""
    return np.stack([np.sqrt(((features - row) ** 2).mean(1)) for row in features])


def cosine_distances(features: Array) -> Array:
    """(n, n): one minus the cosine."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    return np.clip(1 - unit @ unit.T, 0.0, 2.0)


def mean_distance(distances: Array) -> float:
    """Over the pairs of different images."""
    n = len(distances)
    return float(distances.sum() - np.trace(distances)) / (n * (n - 1))


class Diversity:
    """Mean distance between two images of a prompt.

    Args:
        kind: ``pixel`` (root mean squared difference at 64x64), or a scorer with an image embedding, by name or loaded (e.g. ``clip-b32``):
            one minus the cosine of two embeddings.

    Raises:
        ConfigError: no such scorer, or one without an embedding.
    """

    def __init__(self, kind: Any = PIXEL, *, device: Any = None) -> None:
        self.name = kind if isinstance(kind, str) else kind.name
        self._features: Callable[[Sequence[Image.Image]], Array] = pixel_features
        self._distances = pixel_distances
        if self.name == PIXEL:
            return
        from ..rewards.model_scorer import ModelScorer
        from ..rewards.registry import load_scorer

        scorer = load_scorer(kind, device=device) if isinstance(kind, str) else kind
        if not isinstance(scorer, ModelScorer):
            raise ConfigError(
                "diversity", f"{self.name} has no image embedding; take {PIXEL} or a CLIP scorer"
            )
        self._features = lambda images: scorer.embed(images).double().numpy()
        self._distances = cosine_distances

    def __call__(self, images: Sequence[Image.Image]) -> float:
        """Of the images of one prompt; NaN for fewer than two."""
        return (
            mean_distance(self._distances(self._features(images)))
            if len(images) > 1
            else float("nan")
        )
