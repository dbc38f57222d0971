"""The canonical preference schema and the layouts of the field that are read into it.

Everything here is a pure function of column names and of a row's light cells (prompts, labels, scores, weights): images are never
touched, so ties, swaps and unlabelled rows are decided without reading one.

Canonical columns, named as TRL names them:

* `pair`: `prompt`, `chosen`, `rejected` [+ `chosen_prompt`, `rejected_prompt`] [+ `weight`]
* `ranked`: `prompt`, `images` (list), `scores` (list, higher is better) or `rank` (list, 1 is the best) [+ `weight`]
* `single`: `prompt`, `image` [+ `weight`]
* `prompt`: `prompt`
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from diffalign.exceptions import ConfigError, UserError

KINDS = ("pair", "ranked", "single", "prompt")

_PROMPT: tuple[str, ...] = ("prompt", "caption", "text", "txt")
_LABELS: dict[str, tuple[str, ...]] = {"label_0": ("label_0",), "label_1": ("label_1",), "has_label": ("has_label",)}
_WEIGHT: dict[str, tuple[str, ...]] = {"weight": ("weight",)}


@dataclass(frozen=True)
class _Spec:
    """A layout: role -> column names that may fill it, of which the first present one is taken.

    Attributes:
        markers: columns that must be there too, where the roles' names alone would fit other data.
        lists: roles whose column must hold a list in every row; the other roles of images and judgements must not.
        ignored: columns of the published data that repeat what the roles say; all others that look like judgements are reported.
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
    required: dict[str, tuple[str, ...]] = {"jpg_0": (images[0],), "jpg_1": (images[1],), "label_0": ("label_0",)}
    optional = {k: v for k, v in _LABELS.items() if k != "label_0"} | _WEIGHT
    return _Spec(name, "pair", prompts | required, optional, ignored=ignored)


_PATHS: tuple[str, ...] = ("image_path", "file_path", "images")
_PAIR: dict[str, tuple[str, ...]] = {"chosen": ("chosen",), "rejected": ("rejected",)}
_TWO_PROMPTS: dict[str, tuple[str, ...]] = {"chosen_prompt": ("chosen_prompt",), "rejected_prompt": ("rejected_prompt",)}
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
_LISTED_IMAGES = ("images",)
_VOTED: dict[str, tuple[str, ...]] = {"prompt": _PROMPT, "jpg_0": ("image1",), "jpg_1": ("image2",)}

# The order decides when the columns fit several layouts: the first that fits wins, from the most to the least specific.
_SPECS = (
    _two_images("dcpo", {"caption_0": ("caption_0",), "caption_1": ("caption_1",)}, ignored=_PICKAPIC),
    _two_images("pickapic", _PICKAPIC_PROMPT, ignored=_PICKAPIC),
    _two_images("pickapic", _PICKAPIC_PROMPT, ("image_0_url", "image_1_url"), _PICKAPIC),
    _Spec("canonical_two_prompts", "pair", _PAIR | _TWO_PROMPTS, _WEIGHT),
    _Spec("trl", "pair", {"prompt": _PROMPT} | _PAIR, _WEIGHT),
    _Spec("imagerewarddb_pair", "pair", {"prompt": _PROMPT, "chosen": ("img_better",), "rejected": ("img_worse",)}),
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
        {"prompt": _PROMPT, "jpg_0": ("left_image",), "jpg_1": ("right_image",), "vote_type": ("vote_type",)},
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
        "imagereward", "ranked", {"prompt": _PROMPT, "images": ("generations",), "rank": ("ranking",)}, lists=("images", "rank")
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
        "hpdv2", "ranked", {"prompt": _PROMPT, "images": _PATHS, "rank": ("rank",)}, lists=("rank",), ignored=("raw_annotations",)
    ),
    _Spec("ranked", "ranked", {"prompt": _PROMPT, "images": ("images",), "scores": ("scores",)}, _WEIGHT, lists=("scores",)),
    _Spec("image_rows", "ranked", {"prompt": _PROMPT, "image": _ROW_IMAGE, "rank": ("rank",)}, {"prompt_id": ("prompt_id",)}),
    _Spec("image_rows", "ranked", {"prompt": _PROMPT, "image": _ROW_IMAGE, "scores": ("scores",)}, {"prompt_id": ("prompt_id",)}),
    _Spec("single", "single", {"prompt": _PROMPT, "image": _IMAGE}, _WEIGHT),
    _Spec("prompt", "prompt", {"prompt": _PROMPT}),
)
LAYOUTS = tuple(dict.fromkeys(spec.name for spec in _SPECS))
"""Recognised layouts in the order in which they are tried."""

_NAMES = sorted({name for spec in _SPECS for names in (*spec.required.values(), *spec.optional.values()) for name in names})
_IMAGE_ROLES = {"jpg_0", "jpg_1", "chosen", "rejected", "images", "image"}
# A column so named beside a lone prompt holds data that prompt-only reading would throw away silently.
_NOT_PROMPT_ONLY = (
    *("image", "img", "jpg", "jpeg", "png", "webp", "chosen", "rejected", "completion", "file_name", "winner", "loser"),
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
    ["image", "images", "img", "imgs", "jpg", "jpeg", "png", "webp", "picture", "pictures", "photo", "generations"]
)
# Columns that hold numbers or names about an image or its judges.
_ABOUT_IMAGES = frozenset(["width", "height", "size", "count", "amount", "number", "total", "index", "seed"])
_ABOUT_ANY = frozenset(["id", "uid", "model", "models", "prompt", "hash", "name"])


@dataclass(frozen=True)
class Layout:
    """A recognised set of columns.

    Attributes:
        name (`str`): one of `LAYOUTS`.
        kind (`str`): what its rows are: `pair`, `ranked`, `single` or `prompt`.
        mapping (`dict[str, str]`): role -> column of the dataset.
        unused (`tuple[str, ...]`): columns that look like judgements or images and are not read.
    """

    name: str
    kind: str
    mapping: dict[str, str]
    unused: tuple[str, ...] = ()

    @property
    def direction(self) -> str:
        """Which way the judgements are read, for people; empty where there are none."""
        column = {role: f"{column!r}" for role, column in self.mapping.items()}
        if "rank" in column:
            return f"{column['rank']}: lower is better (1 is the best)"
        for role in ("scores", "human_preference"):
            if role in column:
                return f"{column[role]}: higher is better"
        if "label_0" in column:
            return f"{column['label_0']}: 1 when {column['jpg_0']} won, 0 when {column['jpg_1']} won"
        if "score_0" in column:
            return f"the larger of {column['score_0']} ({column['jpg_0']}) and {column['score_1']} ({column['jpg_1']}) wins"
        if "vote_type" in column:
            return f"{column['vote_type']}: leftvote when {column['jpg_0']} won"
        if self.kind == "pair":
            return f"{column['chosen']} is better than {column['rejected']}"
        return ""

    @property
    def image_columns(self) -> dict[str, str]:
        """The roles that hold images -> their columns; `images` holds a list."""
        return {role: column for role, column in self.mapping.items() if role in _IMAGE_ROLES}

    @property
    def light_columns(self) -> dict[str, str]:
        """The roles that hold prompts, labels, scores and weights -> their columns."""
        return {role: column for role, column in self.mapping.items() if role not in _IMAGE_ROLES}


@dataclass(frozen=True)
class Verdict:
    """What a row's light cells say.

    Attributes:
        status: `keep`, `tie`, `unlabelled` (no judgement was given) or `broken`.
        reason: why it is broken.
        prompts: one per image, in canonical order (chosen first); one for kind `prompt`.
        image_roles: the roles whose images make the group, in canonical order.
        scores: one per image of a ranked row.
        weight: of the group in the loss; 0 for a tie.
        second_wins: the labels preferred the second image; None where the columns themselves are ordered.
    """

    status: Literal["keep", "tie", "unlabelled", "broken"]
    reason: str = ""
    prompts: tuple[str, ...] = ()
    image_roles: tuple[str, ...] = ()
    scores: tuple[float, ...] | None = None
    weight: float = 1.0
    second_wins: bool | None = None


def recognise(columns: Sequence[str], mapping: Mapping[str, str], lists: Collection[str] | None = None) -> Layout:
    """The layout of a dataset with these columns; the first of `LAYOUTS` that fits.

    Args:
        columns: the dataset's column names.
        mapping: canonical (or any layout's) column name -> the dataset's column; overrides what the columns are called.
        lists: the columns that hold a list in every row; None where that is not known.

    Raises:
        ConfigError: the mapping names an unknown canonical name or a column that does not exist, or reads ranks as scores.
        UserError: no layout fits; lists the columns and the mapping to write.
    """
    names = _renamed(columns, mapping)
    for spec in _SPECS:
        roles = _fitting(spec, names, lists)
        if roles is None:
            continue
        if spec.kind == "prompt" and "prompt" not in mapping and any(_hints_at_images(name) for name in names):
            continue
        for role, aliases in spec.optional.items():
            name = next((name for name in aliases if name in names), None)
            if name is not None:
                roles[role] = name
        used = {role: names[name] for role, name in roles.items()}
        return Layout(spec.name, spec.kind, used, _unused(columns, {*used.values(), *mapping.values(), *spec.ignored}))
    suspects = _unused(columns, set())
    looks = f" ({', '.join(suspects)} look like images or judgements)" if suspects else ""
    raise UserError(
        f"data.columns: the columns {', '.join(map(str, columns)) or '(none)'} fit no known layout{looks}; say which is which, for "
        "pairs data.columns: {prompt: ..., chosen: ..., rejected: ...}, for two images with a vote {prompt: ..., jpg_0: ..., jpg_1: "
        "..., label_0: ...} (1 when the first won), for ranked lists {prompt: ..., images: ..., scores: ...} where higher is better "
        "or {prompt: ..., images: ..., rank: ...} where 1 is the best, for single images {prompt: ..., image: ...}, for prompts only "
        "{prompt: ...}"
    )


def _fitting(spec: _Spec, names: Mapping[str, str], lists: Collection[str] | None) -> dict[str, str] | None:
    """Role -> name for a layout that fits; None for one that does not."""
    roles = {role: next((name for name in aliases if name in names), None) for role, aliases in spec.required.items()}
    if None in roles.values() or not all(marker in names for marker in spec.markers):
        return None
    filled = {role: name for role, name in roles.items() if name is not None}
    for role, name in filled.items():
        if role in spec.lists:
            # Unknown types are taken as what the name says: `image` is one, `images`, `ranking` and `scores` are many.
            if names[name] not in lists if lists is not None else name == "image":
                return None
        elif lists is not None and role in ("image", "rank", "scores") and names[name] in lists:
            return None
    return filled


def _words(column: str) -> set[str]:
    """The lower-case words of a column's name: `overall_rating`, `overallRating` and `overall rating` are two each."""
    return set(re.sub(r"(?<=[a-z])(?=[A-Z])|[^A-Za-z]+", " ", str(column)).lower().split())


def _unused(columns: Sequence[str], used: Collection[str]) -> tuple[str, ...]:
    """The columns that look like judgements or images and are not used."""
    return tuple(column for column in columns if column not in used and _is_suspect(_words(column)))


def _is_suspect(words: set[str]) -> bool:
    if words & _ABOUT_ANY:
        return False
    return bool(words & _JUDGEMENT_WORDS or (words & _IMAGE_WORDS and not words & _ABOUT_IMAGES))


def judge(layout: Layout, cells: Mapping[str, Any]) -> Verdict:
    """Decides prompts, order, tie and weight of one row from its light cells.

    Args:
        layout: from `recognise`.
        cells: role -> value for `layout.light_columns`.
    """
    weight = 1.0 if _is_missing(cells.get("weight")) else _number(cells["weight"])
    if weight is None or weight < 0:
        return Verdict("broken", f"weight is {cells['weight']!r}, expected a number of at least 0")
    if layout.name in ("dcpo", "pickapic"):
        return _judge_labels(cells, weight, ("caption_0", "caption_1") if layout.name == "dcpo" else ("prompt", "prompt"))
    if layout.name == "genai_bench":
        return _judge_vote(cells)
    if layout.name == "rapidata":
        return _judge_two_scores(cells)
    if layout.kind == "pair":
        roles = ("chosen_prompt", "rejected_prompt") if layout.name == "canonical_two_prompts" else ("prompt", "prompt")
        return _with_prompts(cells, roles, Verdict("keep", image_roles=("chosen", "rejected"), weight=weight))
    if layout.kind == "ranked":
        return _judge_scores(cells, weight)
    image_roles = ("image",) if layout.kind == "single" else ()
    return _with_prompts(cells, ("prompt",), Verdict("keep", image_roles=image_roles, weight=weight))


def _judge_labels(cells: Mapping[str, Any], weight: float, prompt_roles: tuple[str, str]) -> Verdict:
    """Pick-a-Pic: `label_0` is 1 when the first image won, 0 when the second did, 0.5 for a tie."""
    judged = cells.get("has_label")
    if not _is_missing(judged):
        flag = _flag(judged)
        if flag is None:
            return Verdict("broken", f"has_label is {_shown(judged)}, expected true or false (or 1 and 0)")
        if not flag:
            return Verdict("unlabelled")
    if _is_missing(cells["label_0"]):
        return Verdict("unlabelled")
    labels = [_number(cells["label_0"]), None if _is_missing(cells.get("label_1")) else _number(cells["label_1"])]
    for role, label in zip(("label_0", "label_1"), labels, strict=True):
        absent = role == "label_1" and _is_missing(cells.get(role))
        if not absent and (label is None or not 0 <= label <= 1):
            return Verdict("broken", f"{role} is {_shown(cells[role])}, expected a number from 0 to 1")
    first = labels[0]
    assert first is not None
    return _compared(cells, first, 1 - first if labels[1] is None else labels[1], weight, prompt_roles)


def _compared(
    cells: Mapping[str, Any],
    first: float,
    second: float,
    weight: float = 1.0,
    prompt_roles: tuple[str, str] = ("prompt", "prompt"),
) -> Verdict:
    """Two images of which the one with the larger number won."""
    if first == second:
        tie = Verdict("tie", image_roles=("jpg_0", "jpg_1"), weight=0.0)
        return _with_prompts(cells, prompt_roles, tie)
    swap = first < second
    roles = ("jpg_1", "jpg_0") if swap else ("jpg_0", "jpg_1")
    verdict = Verdict("keep", image_roles=roles, weight=weight, second_wins=swap)
    return _with_prompts(cells, prompt_roles[::-1] if swap else prompt_roles, verdict)


_VOTES = {"leftvote": (1.0, 0.0), "rightvote": (0.0, 1.0), "tievote": (0.5, 0.5), "bothbad_vote": (0.5, 0.5)}


def _judge_vote(cells: Mapping[str, Any]) -> Verdict:
    """GenAI-Bench: who won in words."""
    vote = cells["vote_type"]
    if _is_missing(vote):
        return Verdict("unlabelled")
    if vote not in _VOTES:
        return Verdict("broken", f"vote_type is {_shown(vote)}, expected one of {', '.join(_VOTES)}")
    return _compared(cells, *_VOTES[vote])


def _judge_two_scores(cells: Mapping[str, Any]) -> Verdict:
    """A number per image, of votes or of their weights; the larger one wins."""
    if _is_missing(cells["score_0"]) or _is_missing(cells["score_1"]):
        return Verdict("unlabelled")
    first, second = _number(cells["score_0"]), _number(cells["score_1"])
    if first is None or second is None:
        return Verdict("broken", f"the votes are {_shown(cells['score_0'])} and {_shown(cells['score_1'])}, expected numbers")
    return _compared(cells, first, second)


def _judge_scores(cells: Mapping[str, Any], weight: float) -> Verdict:
    """Ranked lists: `rank` counts from the best, `scores` and `human_preference` are higher for better."""
    role = next(role for role in ("scores", "human_preference", "rank") if role in cells)
    given, sign = cells[role], -1.0 if role == "rank" else 1.0
    if _is_missing(given):
        return Verdict("unlabelled")
    if not isinstance(given, (list, tuple)):
        return Verdict("broken", f"{role} is {_shown(given)}, expected a list with one number per image")
    if len(given) >= 2 and all(_is_missing(value) for value in given):
        return Verdict("unlabelled")
    values = [_number(value) for value in given]
    if len(values) < 2:
        return Verdict("broken", f"has {len(values)} scores, expected at least 2")
    if any(value is None for value in values):
        return Verdict("broken", f"has a score that is not a finite number: {_shown(given)}")
    scores = tuple(sign * value for value in values if value is not None)
    tie = len(set(scores)) == 1
    verdict = Verdict("tie" if tie else "keep", image_roles=("images",), scores=scores, weight=0.0 if tie else weight)
    return _with_prompts(cells, ("prompt",) * len(scores), verdict)


def _with_prompts(cells: Mapping[str, Any], roles: tuple[str, ...], verdict: Verdict) -> Verdict:
    prompts = tuple(cells[role] for role in roles)
    for role, prompt in zip(roles, prompts, strict=True):
        if not isinstance(prompt, str):
            return Verdict("broken", f"{role} is {_shown(prompt)}, expected text")
    return Verdict(**{**vars(verdict), "prompts": prompts})


_NO_VALUE = ("", "none", "null", "nan", "na", "n/a")
_TRUE, _FALSE = ("true", "yes", "t", "y"), ("false", "no", "f", "n")


def _is_missing(value: Any) -> bool:
    """No value, in any of the ways in which tables write that."""
    if isinstance(value, str):
        return value.strip().lower() in _NO_VALUE
    return value is None or (isinstance(value, float) and math.isnan(value))


def _number(value: Any) -> float | None:
    """`value`, or the number that a text spells, as a finite float; None for anything else. True is 1 and False is 0."""
    if isinstance(value, str):
        text = value.strip().lower()
        if text in _TRUE or text in _FALSE:
            return float(text in _TRUE)
        try:
            value = float(text) if "_" not in text else None
        except ValueError:
            return None
    if not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _flag(value: Any) -> bool | None:
    """Yes or no as tables write it: booleans, 1 and 0, or their words; None for anything else."""
    number = _number(value)
    return bool(number) if number in (0.0, 1.0) else None


def _shown(value: Any) -> str:
    """A value in a message, however long it is."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a number of type {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _hints_at_images(name: str) -> bool:
    return any(hint in name.lower() for hint in _NOT_PROMPT_ONLY)


def _renamed(columns: Sequence[str], mapping: Mapping[str, str]) -> dict[str, str]:
    """Layout column name -> dataset column, after the user's mapping."""
    for name, column in mapping.items():
        if name not in _NAMES:
            close = difflib.get_close_matches(str(name), _NAMES, n=1)
            hint = f", did you mean {close[0]!r}" if close else ""
            raise ConfigError("data.columns", f"{name!r} is not a canonical column{hint}; known are {', '.join(_NAMES)}")
        if name in ("scores", "human_preference") and _words(column) & {"rank", "ranks", "ranking", "rankings"}:
            raise ConfigError(
                "data.columns",
                f"{name}: {column} would read the largest number as the best, but ranks count from the best; write rank: {column}, "
                "or rename the column if higher is better in it",
            )
        if column not in columns:
            raise ConfigError("data.columns", f"the dataset has no column {column!r}; it has {', '.join(map(str, columns))}")
    used = set(mapping.values())
    return {column: column for column in columns if column not in used} | dict(mapping)
