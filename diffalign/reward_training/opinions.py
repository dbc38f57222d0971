"""Opinions on single images: thumbs, ratings, places in a list."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def _no_ints() -> Ints:
    return np.empty(0, np.int64)


@dataclass
class Opinions:
    """n opinions.

    Attributes:
        image (`np.ndarray`): Index of the image, (n,).
        prompt (`np.ndarray`): Index of the prompt, (n,).
        user (`np.ndarray`): Index of the judge, -1 for nobody in particular, (n,).
        value (`np.ndarray`): 1 or 0 for a thumb, a rating, or a score in a list, (n,).
        source (`np.ndarray`): Row of the data, (n,). A list is one row.
        weight (`np.ndarray`): How much each opinion counts, (n,).
        are_thumbs (`bool`): Whether the values are likes and dislikes.
    """

    image: Ints = field(default_factory=_no_ints)
    prompt: Ints = field(default_factory=_no_ints)
    user: Ints = field(default_factory=_no_ints)
    value: Floats = field(default_factory=lambda: np.empty(0))
    source: Ints = field(default_factory=_no_ints)
    weight: Floats = field(default_factory=lambda: np.empty(0))
    are_thumbs: bool = False

    def __post_init__(self) -> None:
        if len(self.weight) != len(self.value):
            self.weight = np.ones(len(self.value))

    def __len__(self) -> int:
        return len(self.value)

    def rows(self, rows: npt.NDArray[np.bool_]) -> Opinions:
        """Return some of the opinions."""
        names = ("image", "prompt", "user", "value", "source", "weight")
        taken = {name: getattr(self, name)[rows] for name in names}
        return Opinions(**taken, are_thumbs=self.are_thumbs)

    def standardised(self) -> Floats:
        """Ratings less their judge's mean, by their judge's deviation, (n,).

        People use a scale differently. A judge with one value has 0 throughout.
        """
        result = np.zeros(len(self))
        for judge in np.unique(self.user):
            mine = self.user == judge
            deviation = self.value[mine].std()
            if deviation > 0:
                result[mine] = (self.value[mine] - self.value[mine].mean()) / deviation
        return result
