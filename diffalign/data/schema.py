"""The canonical preference schema, and the published layouts that are read into it.

Everything here is a pure function of column names. `diffalign.data.judgements` reads
the rows.

Canonical columns, named as TRL names them:

* `pair`: `prompt`, `chosen`, `rejected` [+ `chosen_prompt`, `rejected_prompt`] [+
  `chosen_score`, `rejected_score`] [+ `weight`] [+ `user_id`]
* `ranked`: `prompt`, `images` (list), `scores` (list, higher is better) or `rank`
  (list, 1 is the best) [+ `weight`]
* `labelled`: `prompt`, `image`, `label` (liked or not) [+ `weight`]
* `conditioned`: `prompt`, `image`, `condition` (an image) [+ `weight`]
* `single`: `prompt`, `image` [+ `weight`]
* `prompt`: `prompt`
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from diffalign.errors import ConfigError, UserError

KINDS = ("pair", "ranked", "labelled", "conditioned", "single", "prompt")

_PROMPT: tuple[str, ...] = ("prompt", "caption", "text", "txt")
_LABELS: dict[str, tuple[str, ...]] = {
    "label_0": ("label_0",),
    "label_1": ("label_1",),
    "has_label": ("has_label",),
}
_WEIGHT: dict[str, tuple[str, ...]] = {"weight": ("weight",)}
_USER: dict[str, tuple[str, ...]] = {"user_id": ("user_id", "user", "annotator")}
CATEGORY_KEYS = ("category", "tag", "challenge", "style", "type")
"""Columns that may hold the category of a prompt."""
EXTRAS = ("chosen_score", "rejected_score", "user_id")
"""Roles that some methods read. A dataset's fingerprint holds them only for these."""


@dataclass(frozen=True)
class _Spec:
    """Describe a layout by its roles and the column names that may fill them.

    Of several names for a role the first present one is taken.

    Attributes:
        markers: Columns that must be there too, where the roles' names alone would fit
            other data.
        lists: Roles whose column must hold a list in every row. The other roles of
            images and judgements must not.
        ignored: Columns of the published data that repeat what the roles say. All
            others that look like judgements are reported.
    """

    name: str
    kind: str
    required: Mapping[str, tuple[str, ...]]
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    markers: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def _two_images(
    name: str,
    prompts: dict[str, tuple[str, ...]],
    images: tuple[str, str] = ("jpg_0", "jpg_1"),
    ignored: tuple[str, ...] = (),
) -> _Spec:
    required: dict[str, tuple[str, ...]] = {
        "jpg_0": (images[0],),
        "jpg_1": (images[1],),
        "label_0": ("label_0",),
    }
    optional = {k: v for k, v in _LABELS.items() if k != "label_0"} | _WEIGHT | _USER
    return _Spec(name, "pair", prompts | required, optional, ignored=ignored)


_PATHS: tuple[str, ...] = ("image_path", "file_path", "images")
_PAIR: dict[str, tuple[str, ...]] = {"chosen": ("chosen",), "rejected": ("rejected",)}
_TWO_PROMPTS: dict[str, tuple[str, ...]] = {
    "chosen_prompt": ("chosen_prompt",),
    "rejected_prompt": ("rejected_prompt",),
}
_PAIR_SCORES: dict[str, tuple[str, ...]] = {
    "chosen_score": ("chosen_score", "score_chosen"),
    "rejected_score": ("rejected_score", "score_rejected"),
}
_IMAGE: tuple[str, ...] = ("image", "jpg", "jpeg", "png", "webp", "file_name")
_ROW_IMAGE = (*_IMAGE, "image_path", "file_path")
_PICKAPIC = (
    "best_image_uid",
    "image_0_uid",
    "image_1_uid",
    "image_0_url",
    "image_1_url",
    "are_different",
    "has_label",
    "label_1",
)
_PICKAPIC_PROMPT: dict[str, tuple[str, ...]] = {"prompt": ("caption", "prompt", "text")}
_RAPIDATA = tuple(
    f"{name}_{axis}"
    for axis in ("preference", "coherence", "alignment")
    for name in ("weighted_results_image1", "weighted_results_image2", "detailed_results")
)
_VOTED: dict[str, tuple[str, ...]] = {"prompt": _PROMPT, "jpg_0": ("image1",), "jpg_1": ("image2",)}

# Columns may fit several layouts. The first that fits is taken, so the order is from
# the most to the least specific.
_SPECS = (
    _two_images(
        "dcpo", {"caption_0": ("caption_0",), "caption_1": ("caption_1",)}, ignored=_PICKAPIC
    ),
    _two_images("pickapic", _PICKAPIC_PROMPT, ignored=_PICKAPIC),
    _two_images("pickapic", _PICKAPIC_PROMPT, ("image_0_url", "image_1_url"), _PICKAPIC),
    _Spec("canonical_two_prompts", "pair", _PAIR | _TWO_PROMPTS, _PAIR_SCORES | _WEIGHT | _USER),
    _Spec("trl", "pair", {"prompt": _PROMPT} | _PAIR, _PAIR_SCORES | _WEIGHT | _USER),
    _Spec(
        "imagerewarddb_pair",
        "pair",
        {"prompt": _PROMPT, "chosen": ("img_better",), "rejected": ("img_worse",)},
    ),
    _Spec(
        "hpdv3",
        "pair",
        {"prompt": _PROMPT, "chosen": ("path1",), "rejected": ("path2",)},
        markers=("model1", "model2"),
        ignored=("choice_dist",),
    ),
    _Spec(
        "genai_bench",
        "pair",
        {
            "prompt": _PROMPT,
            "jpg_0": ("left_image",),
            "jpg_1": ("right_image",),
            "vote_type": ("vote_type",),
        },
    ),
    *(
        _Spec(
            "rapidata",
            "pair",
            _VOTED | {"score_0": (first,), "score_1": (second,)},
            ignored=(*_RAPIDATA, "image1_path", "image2_path"),
        )
        for first, second in (_RAPIDATA[:2], ("votes_image1", "votes_image2"))
    ),
    _Spec(
        "imagereward",
        "ranked",
        {"prompt": _PROMPT, "images": ("generations",), "rank": ("ranking",)},
        lists=("images", "rank"),
    ),
    _Spec(
        "imagerewarddb_group",
        "ranked",
        {"prompt": _PROMPT, "images": ("image",), "rank": ("rank",)},
        lists=("images", "rank"),
    ),
    _Spec(
        "hpdv2",
        "ranked",
        {"prompt": _PROMPT, "images": _PATHS, "human_preference": ("human_preference",)},
        ignored=("raw_annotations", "user_hash"),
    ),
    _Spec(
        "hpdv2",
        "ranked",
        {"prompt": _PROMPT, "images": _PATHS, "rank": ("rank",)},
        lists=("rank",),
        ignored=("raw_annotations",),
    ),
    _Spec(
        "ranked",
        "ranked",
        {"prompt": _PROMPT, "images": ("images",), "scores": ("scores",)},
        _WEIGHT,
        lists=("scores",),
    ),
    _Spec(
        "image_rows",
        "ranked",
        {"prompt": _PROMPT, "image": _ROW_IMAGE, "rank": ("rank",)},
        {"prompt_id": ("prompt_id",)},
    ),
    _Spec(
        "image_rows",
        "ranked",
        {"prompt": _PROMPT, "image": _ROW_IMAGE, "scores": ("scores",)},
        {"prompt_id": ("prompt_id",)},
    ),
    _Spec(
        "conditioned",
        "conditioned",
        {
            "prompt": _PROMPT,
            "image": _IMAGE,
            "condition": ("conditioning_image", "control_image", "condition", "control"),
        },
        _WEIGHT,
    ),
    _Spec(
        "labelled",
        "labelled",
        {"prompt": _PROMPT, "image": _IMAGE, "label": ("liked", "thumbs_up", "label")},
        _WEIGHT | _USER,
    ),
    _Spec(
        "rated",
        "labelled",
        {"prompt": _PROMPT, "image": _IMAGE, "rating": ("rating", "stars")},
        _WEIGHT | _USER,
    ),
    _Spec("single", "single", {"prompt": _PROMPT, "image": _IMAGE}, _WEIGHT),
    _Spec("prompt", "prompt", {"prompt": _PROMPT}),
)
LAYOUTS = tuple(dict.fromkeys(spec.name for spec in _SPECS))
"""The known layouts, in the order in which they are tried."""

_NAMES = sorted(
    {
        name
        for spec in _SPECS
        for names in (*spec.required.values(), *spec.optional.values())
        for name in names
    }
)
_IMAGE_ROLES = {"jpg_0", "jpg_1", "chosen", "rejected", "images", "image", "condition"}
# Beside a lone prompt such a column holds data that would be ignored silently if the
# rows were read as prompts only.
_NOT_PROMPT_ONLY = (
    *(
        "image",
        "img",
        "jpg",
        "jpeg",
        "png",
        "webp",
        "chosen",
        "rejected",
        "completion",
        "file_name",
        "winner",
        "loser",
    ),
    *("generations", "ranking", "preference"),
)
_JUDGEMENT_WORDS = frozenset(
    [
        "rank",
        "ranks",
        "ranking",
        "rankings",
        "score",
        "scores",
        "rating",
        "ratings",
        "label",
        "labels",
        "vote",
        "votes",
        "preference",
        "preferences",
        "preferred",
        "winner",
        "loser",
        "better",
        "worse",
        "best",
        "worst",
        "choice",
        "like",
        "likes",
        "dislike",
        "dislikes",
        "mos",
        "stars",
        "thumbs",
        "chosen",
        "rejected",
        "judgement",
        "judgment",
        "annotation",
        "annotations",
        "aesthetic",
        "aesthetics",
        "quality",
        "confidence",
    ]
)
_IMAGE_WORDS = frozenset(
    [
        "image",
        "images",
        "img",
        "imgs",
        "jpg",
        "jpeg",
        "png",
        "webp",
        "picture",
        "pictures",
        "photo",
        "generations",
    ]
)
# Columns with these words hold numbers or names about an image or its judges.
_ABOUT_IMAGES = frozenset(
    ["width", "height", "size", "count", "amount", "number", "total", "index", "seed"]
)
_ABOUT_ANY = frozenset(["id", "uid", "model", "models", "prompt", "hash", "name"])


@dataclass(frozen=True)
class Layout:
    """A recognised set of columns.

    Attributes:
        name (`str`): One of `LAYOUTS`.
        kind (`str`): What its rows are: `pair`, `ranked`, `labelled`, `conditioned`,
            `single` or `prompt`.
        mapping (`dict[str, str]`): Role -> column of the dataset.
        unused (`tuple[str, ...]`, defaults to `()`): Columns that look like judgements
            or images and are not read.
        like_threshold (`float`, *optional*): Ratings from here on are liked.

    Example:
        >>> from diffalign.data import recognise
        >>> layout = recognise(["caption", "jpg_0", "jpg_1", "label_0"], {})
        >>> layout.name, layout.kind, layout.mapping["prompt"]
        ('pickapic', 'pair', 'caption')
    """

    name: str
    kind: str
    mapping: dict[str, str]
    unused: tuple[str, ...] = ()
    like_threshold: float | None = None

    @property
    def direction(self) -> str:
        """Which way the judgements are read, in words. Empty where there are none."""
        column = {role: f"{column!r}" for role, column in self.mapping.items()}
        if "rank" in column:
            return f"{column['rank']}: lower is better (1 is the best)"
        for role in ("scores", "human_preference"):
            if role in column:
                return f"{column[role]}: higher is better"
        if "label_0" in column:
            return (
                f"{column['label_0']}: 1 when {column['jpg_0']} won, 0 when {column['jpg_1']} won"
            )
        if "score_0" in column:
            return (
                f"the larger of {column['score_0']} ({column['jpg_0']}) and "
                f"{column['score_1']} ({column['jpg_1']}) wins"
            )
        if "vote_type" in column:
            return f"{column['vote_type']}: leftvote when {column['jpg_0']} won"
        if "label" in column:
            return f"{column['label']}: true or 1 is liked; false, 0 or -1 is not"
        if "rating" in column:
            return f"{column['rating']}: liked from {self.like_threshold:g} on"
        if self.kind == "pair":
            return f"{column['chosen']} is better than {column['rejected']}"
        return ""

    @property
    def image_columns(self) -> dict[str, str]:
        """Role -> column of the roles that hold images. `images` holds a list."""
        return {role: column for role, column in self.mapping.items() if role in _IMAGE_ROLES}

    @property
    def light_columns(self) -> dict[str, str]:
        """Role -> column of prompts, labels, scores and weights."""
        return {role: column for role, column in self.mapping.items() if role not in _IMAGE_ROLES}


def recognise(
    columns: Sequence[str],
    mapping: Mapping[str, str],
    lists: Mapping[str, bool] | None = None,
    *,
    rows_to_lists: bool = True,
    like_threshold: float | None = None,
    wanted: str | None = None,
    flags: Collection[str] = (),
) -> Layout:
    """Recognise the layout of a dataset by its columns.

    The first of `LAYOUTS` that fits is taken.

    Args:
        columns (`Sequence[str]`): The dataset's column names.
        mapping (`Mapping[str, str]`): Canonical (or any layout's) column name -> the
            dataset's column. It overrides what the columns are called.
        lists (`Mapping[str, bool]`, *optional*): Column -> whether its cells are lists,
            where that is known.
        rows_to_lists (`bool`, *optional*, defaults to `True`): Gather rows of one image
            with a rank into lists. False reads them as single images.
        like_threshold (`float`, *optional*): Ratings from here on are liked. None reads
            no column of ratings.
        wanted (`str`, *optional*): Kind that a method trains on. Columns whose names
            also mean other things, such as `label`, are read as likes or as conditions
            only for a method that wants these, or where they are mapped.
        flags (`Collection[str]`, *optional*): Columns of true and false. `label` is
            then read as likes for single images, too.

    Returns:
        `Layout`.

    Raises:
        ConfigError: The mapping names an unknown canonical name or a column that does
            not exist, or reads ranks as scores.
        UserError: No layout fits. The message lists the columns and the mapping to
            write.

    Example:
        >>> from diffalign.data import recognise
        >>> layout = recognise(["prompt", "images", "votes"], {"scores": "votes"})
        >>> layout.direction
        "'votes': higher is better"
    """
    names = _renamed(columns, mapping)
    # A layout that reads everything that was mapped goes before one that does not.
    fitting = [spec for spec in _SPECS if _reads(spec, mapping)]
    for spec in (*fitting, *(spec for spec in _SPECS if spec not in fitting)):
        roles = _fitting(spec, names, lists or {})
        if roles is not None and not _is_meant(spec, roles, mapping, wanted, flags):
            continue
        if roles is None or (spec.name == "image_rows" and not rows_to_lists):
            continue
        if spec.name == "rated" and like_threshold is None:
            continue
        if (
            spec.kind == "prompt"
            and "prompt" not in mapping
            and any(_hints_at_images(name) for name in names)
        ):
            continue
        for role, aliases in spec.optional.items():
            name = _first_present(aliases, names)
            if name is not None:
                roles[role] = name
        used = {role: names[name] for role, name in roles.items()}
        _check_images_differ(used)
        return Layout(
            spec.name,
            spec.kind,
            used,
            _unused(columns, {*used.values(), *mapping.values(), *spec.ignored}),
            like_threshold if spec.name == "rated" else None,
        )
    suspects = _unused(columns, set())
    looks = f" ({', '.join(suspects)} look like images or judgements)" if suspects else ""
    raise UserError(
        f"data.columns: the columns {', '.join(map(str, columns)) or '(none)'} fit no known "
        f"layout{looks}; say which is which, for pairs data.columns: {{prompt: ..., chosen: "
        f"..., rejected: ...}}, for two images with a vote {{prompt: ..., jpg_0: ..., jpg_1: "
        f"..., label_0: ...}} (1 when the first won), for ranked lists {{prompt: ..., images: "
        f"..., scores: ...}} where higher is better or {{prompt: ..., images: ..., rank: ...}} "
        f"where 1 is the best, for likes and dislikes {{prompt: ..., image: ..., label: ...}}, for "
        f"single images {{prompt: ..., image: ...}}, for prompts only "
        f"{{prompt: ...}}"
    )


def _reads(spec: _Spec, mapping: Mapping[str, str]) -> bool:
    """Whether a layout has a role for every name that was mapped."""
    roles = (*spec.required.values(), *spec.optional.values())
    return all(any(name in aliases for aliases in roles) for name in mapping)


_CLEAR = ("liked", "thumbs_up", "rating", "stars", "conditioning_image", "control_image")
"""Names that mean nothing else beside an image and its prompt."""


def _check_images_differ(columns: Mapping[str, str]) -> None:
    """Refuse one column as both images of a pair."""
    for first, second in (("chosen", "rejected"), ("jpg_0", "jpg_1")):
        if first in columns and columns[first] == columns.get(second):
            raise ConfigError(
                "data.columns",
                f"{first} and {second} are both {columns[first]!r}; name two columns",
            )


def _is_meant(
    spec: _Spec,
    roles: Mapping[str, str],
    mapping: Mapping[str, str],
    wanted: str | None,
    flags: Collection[str],
) -> bool:
    """Whether likes or conditions are meant by columns that look like them."""
    if spec.kind not in ("labelled", "conditioned") or wanted == spec.kind:
        return True
    name = next(roles[role] for role in ("label", "rating", "condition") if role in roles)
    if name in mapping:
        return True
    if spec.kind == "conditioned":
        return wanted is None and name in _CLEAR
    return wanted is None or (wanted == "single" and (name in _CLEAR or name in flags))


def _first_present(aliases: Sequence[str], names: Collection[str]) -> str | None:
    return next((name for name in aliases if name in names), None)


def _fitting(
    spec: _Spec, names: Mapping[str, str], lists: Mapping[str, bool]
) -> dict[str, str] | None:
    """Return role -> name for a layout that fits, None for one that does not."""
    roles = {role: _first_present(aliases, names) for role, aliases in spec.required.items()}
    if None in roles.values() or not all(marker in names for marker in spec.markers):
        return None
    filled = {role: name for role, name in roles.items() if name is not None}
    for role, name in filled.items():
        # Without a known type the name decides: `image` is one image, while `images`,
        # `ranking` and `scores` are lists.
        is_list = lists.get(names[name])
        if role in spec.lists:
            if is_list is False or (is_list is None and name == "image"):
                return None
        elif role in ("image", "rank", "scores") and is_list:
            return None
    return filled


def _words(column: str) -> set[str]:
    """Return the lower-case words of a column's name.

    `overall_rating`, `overallRating` and `overall rating` have two each.
    """
    return set(re.sub(r"(?<=[a-z])(?=[A-Z])|[^A-Za-z]+", " ", str(column)).lower().split())


def _unused(columns: Sequence[str], used: Collection[str]) -> tuple[str, ...]:
    """Return the columns that look like judgements or images and are not used."""
    # `data build` writes each scorer's numbers beside the combined `scores`.
    has_scores = "scores" in used
    return tuple(
        column
        for column in columns
        if column not in used
        and not (has_scores and column.startswith("scores_"))
        and _is_suspect(_words(column))
    )


def _is_suspect(words: set[str]) -> bool:
    if words & _ABOUT_ANY:
        return False
    return bool(words & _JUDGEMENT_WORDS or (words & _IMAGE_WORDS and not words & _ABOUT_IMAGES))


def _hints_at_images(name: str) -> bool:
    return any(hint in name.lower() for hint in _NOT_PROMPT_ONLY)


def _renamed(columns: Sequence[str], mapping: Mapping[str, str]) -> dict[str, str]:
    """Return layout column name -> dataset column, after the user's mapping."""
    for name, column in mapping.items():
        if name not in _NAMES:
            close = difflib.get_close_matches(str(name), _NAMES, n=1)
            hint = f", did you mean {close[0]!r}" if close else ""
            raise ConfigError(
                "data.columns",
                f"{name!r} is not a canonical column{hint}; known are {', '.join(_NAMES)}",
            )
        if name in ("scores", "human_preference") and _words(column) & {
            "rank",
            "ranks",
            "ranking",
            "rankings",
        }:
            raise ConfigError(
                "data.columns",
                f"{name}: {column} would read the largest number as the best, but ranks count "
                f"from the best; write rank: {column}, or rename the column if higher is better "
                "in it",
            )
        if column not in columns:
            raise ConfigError(
                "data.columns",
                f"the dataset has no column {column!r}; it has {', '.join(map(str, columns))}",
            )
    used = set(mapping.values())
    return {column: column for column in columns if column not in used} | dict(mapping)
