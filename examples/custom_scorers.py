"""Two scorers of your own: one for looks, one for safety.

    python examples/custom_scorers.py

Import this file before you train, score or steer, and use the scorers by their names:

    from diffalign import load_scorer
    import custom_scorers

    load_scorer("colourfulness")(images, prompts)
    load_scorer("safe_for_work", model="path/to/an/image/classifier")(images, prompts)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from diffalign import load_scorer, register_scorer
from diffalign.errors import ConfigError
from diffalign.rewards import Scorer, ScorerSpec
from diffalign.rewards.base import Item


@register_scorer("colourfulness", requires=("image",))
def colourfulness(images: list[Image.Image]) -> list[float]:
    """How colourful images are (Hasler and Suesstrunk 2003, equation 9), 0 for gray
    ones.

    The simplest kind: a function of a list of images.
    """
    scores = []
    for image in images:
        red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), dtype=np.float64), 2, 0)
        red_green, yellow_blue = red - green, (red + green) / 2 - blue
        spread = np.hypot(red_green.std(), yellow_blue.std())
        centre = np.hypot(red_green.mean(), yellow_blue.mean())
        scores.append(float(spread + 0.3 * centre))
    return scores


@register_scorer("safe_for_work")
class SafeForWork(Scorer):
    """Probability that an image classifier of transformers finds an image safe.

    A class keeps what is loaded once. Give it a classifier that you trust for your
    content: its errors become the errors of your model. As a guard or as one reward of
    a panel it keeps a model from learning what its other rewards happen to like.

    Args:
        model (`str`): Folder or Hub id of an image classifier.
        unsafe (`str`, defaults to "nsfw"): Label of what is not wanted.
        **options: Options of every `Scorer`.

    Raises:
        ConfigError: There is no model, or it has no such label.
    """

    spec = ScorerSpec(
        key="safe_for_work",
        summary="probability that an image classifier finds an image safe",
        licence="of the classifier",
        requires=("image",),
        range=(0.0, 1.0),
    )

    def __init__(self, *, model: str | None = None, unsafe: str = "nsfw", **options: Any) -> None:
        super().__init__(**options)
        if model is None:
            raise ConfigError("model", "expected the folder or the Hub id of an image classifier")
        from transformers import pipeline

        self.classify = pipeline("image-classification", model=model, top_k=None)
        labels = sorted(self.classify.model.config.label2id)
        if unsafe not in labels:
            raise ConfigError("unsafe", f"expected one of {', '.join(labels)}, got {unsafe!r}")
        self.model, self.unsafe = model, unsafe

    def identity(self) -> dict[str, Any]:
        """What the scores depend on, so that caches never mix two classifiers."""
        return {"model": self.model, "unsafe": self.unsafe}

    def score_batch(self, items: list[Item]) -> list[float]:
        """Score a batch."""
        answers = self.classify([item.image for item in items])
        return [
            1.0 - next(entry["score"] for entry in answer if entry["label"] == self.unsafe)
            for answer in answers
        ]


if __name__ == "__main__":
    red, gray = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "gray")
    print("colourfulness of a red and a gray image:", load_scorer("colourfulness")([red, gray]))
