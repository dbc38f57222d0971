"""Measure how different the images of one prompt are.

Alignment often raises the reward by making images more alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..rewards.base import Scorer
    from ..runtime.protocols import DeviceLike

Array = npt.NDArray[np.float64]
PIXEL = "pixel"
_SIDE = 64


def pixel_features(images: Sequence[Image.Image]) -> Array:
    """Scale images to 64x64 and return their pixels.

    Returns:
        (n, 3 * 64 * 64), values from 0 to 1.
    """
    small = [image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(image, dtype=np.float64).ravel() / 255 for image in small])


def pixel_distances(features: Array) -> Array:
    """Compute the root mean squared difference of each two images, (n, n)."""
    return np.stack([np.sqrt(((features - row) ** 2).mean(1)) for row in features])


def cosine_distances(features: Array) -> Array:
    """Compute one minus the cosine of each two embeddings, (n, n)."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    return np.clip(1 - unit @ unit.T, 0.0, 2.0)


def mean_distance(distances: Array) -> float:
    """Average the distances (n, n) over all pairs of different images."""
    n = len(distances)
    return float(distances.sum() - np.trace(distances)) / (n * (n - 1))


class Diversity:
    """Compute the mean distance between two images of a prompt.

    Args:
        kind (`str` or scorer, defaults to ``pixel``): The distance. ``pixel`` is the
            root mean squared difference at 64x64. With a scorer that has an image
            embedding, by name (such as ``clip-l14``) or loaded, it is one minus the
            cosine of two embeddings.
        device (*optional*): Where a scorer given by name runs. Defaults to the GPU if
            there is one.

    Raises:
        ConfigError: There is no such scorer, or it has no image embedding.

    Example:
        >>> from PIL import Image
        >>> from diffalign.evaluation import Diversity
        >>> black = Image.new("RGB", (8, 8), "black")
        >>> white = Image.new("RGB", (8, 8), "white")
        >>> Diversity()([black, white])
        1.0
        >>> Diversity()([white, white])
        0.0
    """

    def __init__(self, kind: str | Scorer = PIXEL, *, device: DeviceLike = None) -> None:
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
        """Average the distance over all pairs of images; NaN with fewer than two."""
        if len(images) < 2:
            return float("nan")
        return mean_distance(self._distances(self._features(images)))
