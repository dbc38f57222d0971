"""The images of one prompt, and how a group of one kind is read as another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from diffalign.data import images as image_cells
from diffalign.data.images import ImagePlaces, Undecoded
from diffalign.data.judgements import Verdict
from diffalign.data.schema import Layout
from diffalign.errors import UserError

if TYPE_CHECKING:
    import pyarrow
    from PIL import Image

T = TypeVar("T")


def group_number(row_id: int, place: int) -> int:
    """Number a group by its row and the place of a labelled image in it.

    Args:
        row_id (`int`): Index of the row in the source.
        place (`int`): 0, or 1 for the rejected image of a pair.
    """
    return row_id + (place << 40)


@dataclass
class Group:
    """The images of one prompt, to be compared with each other.

    Attributes:
        row_id (`int`): Index of the row in the source.
        prompts (`tuple[str, ...]`): One per image, all equal unless each image has its
            own. A group of kind `prompt` has a single one.
        images (`list`): Undecoded images, each `{"bytes": bytes | None, "path": str |
            None}` or a PIL image. The chosen one comes first in a pair, the condition
            image last in a conditioned group.
        scores (`tuple[float, ...]`, *optional*): One per image of a ranked group, or of
            a pair whose data have scores. Higher is better, and NaN marks a missing
            score. 1 for a liked single image and -1 for a disliked one. None where the
            data have none.
        weight (`float`, defaults to `1.0`): Weight of the group in the loss, 0 for a
            kept tie.
        place (`int`, defaults to `0`): Which image of its row a labelled image is.
        user (`str`, *optional*): Who judged the row, where the data say it.
        rating (`float`, *optional*): Of a rated single image.
        tie_weight (`float`, *optional*): Weight of the row of a kept tie. None for
            other groups.

    Example:
        >>> from PIL import Image
        >>> from diffalign.data import load_preferences
        >>> row = {"prompt": "a cat", "chosen": Image.new("RGB", (64, 48))}
        >>> row["rejected"] = Image.new("RGB", (64, 64))
        >>> group = load_preferences([row], verbose=False)[0]
        >>> group.prompts, group.image_sizes()
        (('a cat', 'a cat'), [(48, 64), (64, 64)])
    """

    row_id: int
    prompts: tuple[str, ...]
    images: list[Undecoded]
    scores: tuple[float, ...] | None = None
    weight: float = 1.0
    place: int = 0
    user: str | None = None
    rating: float | None = None
    tie_weight: float | None = None

    @property
    def key(self) -> int:
        """A number that no other group of the dataset has: `row_id` for image 0."""
        return group_number(self.row_id, self.place)

    def open_images(self) -> list[Image.Image]:
        """Decode all images to RGB, rotated by their EXIF tag, transparency on white.

        Returns:
            `list[PIL.Image.Image]` in the order of `images`.

        Raises:
            UserError: An image cannot be decoded. The message names the row.
        """
        return [self.open_image(place) for place in range(len(self.images))]

    def open_image(self, place: int) -> Image.Image:
        """Decode one image as `open_images` does.

        Args:
            place (`int`): Index of the image in the group.

        Raises:
            UserError: The image cannot be decoded. The message names the row.
        """
        return self._or_name_row(image_cells.decode, self.images[place])

    def image_hashes(self) -> list[str]:
        """Return the sha256 of every image's encoded bytes, as hexadecimal digits.

        Raises:
            UserError: An image cannot be read. The message names the row.
        """
        return [self._or_name_row(image_cells.content_hash, image) for image in self.images]

    def image_sizes(self) -> list[tuple[int, int]]:
        """Return the (height, width) of every image as displayed, from the headers.

        Raises:
            UserError: An image cannot be read. The message names the row.
        """
        return [self._or_name_row(image_cells.header, image)[0] for image in self.images]

    def _or_name_row(self, function: Callable[[Undecoded], T], image: Undecoded) -> T:
        try:
            return function(image)
        except image_cells.BrokenImage as error:
            raise UserError(f"dataset row {self.row_id}: {error}") from error


def build_group(
    layout: Layout, verdict: Verdict, row_id: int, cells: dict[str, Any], places: ImagePlaces
) -> Group:
    """Make the group of a row from its verdict and image cells.

    Args:
        layout (`Layout`): How the columns are read.
        verdict (`Verdict`): What the row's light cells say.
        row_id (`int`): Index of the row in the source.
        cells (`dict[str, Any]`): Role -> image cell, a list of cells for `images`.
            Roles that are missing leave the group without images.
        places (`ImagePlaces`): Where image cells may point to.

    Raises:
        BrokenImage: An image is missing, or their number differs from that of the
            scores.
    """
    row_cells = [cells[role] for role in verdict.image_roles if role in cells]
    if "images" in cells:
        row_cells = cells["images"] or []
        if len(row_cells) != len(verdict.prompts):
            raise image_cells.BrokenImage(
                f"has {len(row_cells)} images and {len(verdict.prompts)} scores"
            )
    images = [image_cells.resolve(cell, places) for cell in row_cells]
    return Group(
        row_id,
        verdict.prompts,
        images,
        verdict.scores,
        verdict.weight,
        user=verdict.user,
        rating=verdict.rating,
        tie_weight=verdict.tie_weight,
    )


def lazy_cell(scalar: pyarrow.Scalar) -> Any:
    """Convert a pyarrow scalar to Python values without copying image bytes.

    Bytes become a view of the (memory-mapped) table.

    Args:
        scalar (`pyarrow.Scalar`): A cell.
    """
    from pyarrow import types

    if not scalar.is_valid:
        return None
    if types.is_struct(scalar.type):
        return {name: lazy_cell(value) for name, value in scalar.items()}
    if types.is_binary(scalar.type) or types.is_large_binary(scalar.type):
        return memoryview(scalar.as_buffer())
    if types.is_list(scalar.type) or types.is_large_list(scalar.type):
        return [lazy_cell(value) for value in scalar.values]
    return scalar.as_py()


def _best(group: Group) -> int:
    return (
        0 if group.scores is None else max(range(len(group.scores)), key=group.scores.__getitem__)
    )


def _pick(group: Group, picked: list[int]) -> Group:
    return dataclasses.replace(
        group,
        prompts=tuple(group.prompts[i] for i in picked),
        images=[group.images[i] for i in picked],
        scores=None if group.scores is None else tuple(group.scores[i] for i in picked),
    )


def labelled_image(group: Group, place: int) -> Group:
    """Return one image of a pair as a liked (chosen) or a disliked (rejected) image.

    Args:
        group (`Group`): A pair.
        place (`int`): 0 for the chosen image, 1 for the rejected one.
    """
    return dataclasses.replace(
        group,
        prompts=group.prompts[place : place + 1],
        images=group.images[place : place + 1],
        scores=(1.0,) if place == 0 else (-1.0,),
        place=place,
    )


def _best_and_worst(group: Group) -> Group:
    assert group.scores is not None
    # Of equally bad images take the last, so that a kept tie is a pair of two images.
    worst = min(reversed(range(len(group.scores))), key=group.scores.__getitem__)
    return _pick(group, [_best(group), worst])


VIEWS: dict[tuple[str, str], Callable[[Group], Group]] = {
    ("ranked", "pair"): _best_and_worst,
    ("ranked", "single"): lambda group: _pick(group, [_best(group)]),
    ("pair", "single"): lambda group: _pick(group, [0]),
    # Each group is one image of the pair: `PreferenceDataset._unroll`.
    ("pair", "labelled"): lambda group: group,
    ("ranked", "labelled"): _best_and_worst,
    ("labelled", "single"): lambda group: group,
    ("conditioned", "single"): lambda group: _pick(group, [0]),
}
"""(kind of the data, kind asked for) -> how a group is read as that."""


def inverted_group(group: Group, kind: str) -> Group:
    """Return a group with the opposite preference.

    Args:
        group (`Group`): The group.
        kind (`str`): `pair`, `ranked` or `labelled`.
    """
    if kind == "pair":
        scores = None if group.scores is None else tuple(-score for score in group.scores[::-1])
        return dataclasses.replace(
            group, prompts=group.prompts[::-1], images=group.images[::-1], scores=scores
        )
    scores = group.scores or ()
    if kind == "labelled":
        return dataclasses.replace(group, scores=tuple(-score for score in scores))
    top = 1.0 if scores and min(scores) >= 0 and max(scores) <= 1 else 0.0
    return dataclasses.replace(group, scores=tuple(top - score for score in scores))


def prompt_only(group: Group) -> Group:
    """Return a group without its images and scores.

    Args:
        group (`Group`): The group.
    """
    return dataclasses.replace(group, prompts=group.prompts[:1], images=[], scores=None)
