"""The canonical preference schema and the layouts of the field that are read into it.

Everything here is a pure function of column names and of a row's light cells (prompts, labels, scores, weights): images are never
touched, so ties, swaps and unlabelled rows are decided without reading one.

Canonical columns, named as TRL names them:

* `pair`: `prompt`, `chosen`, `rejected` [+ `chosen_prompt`, `rejected_prompt`] [+ `weight`]
* `ranked`: `prompt`, `images` (list), `scores` (list, higher is better) [+ `weight`]
* `single`: `prompt`, `image` [+ `weight`]
* `prompt`: `prompt`
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from diffalign.exceptions import ConfigError, UserError

KINDS = ("pair", "ranked", "single", "prompt")

_PROMPT: tuple[str, ...] = ("prompt", "caption", "text", "txt")
_LABELS: dict[str, tuple[str, ...]] = {"label_0": ("label_0",), "label_1": ("label_1",), "has_label": ("has_label",)}
_WEIGHT: dict[str, tuple[str, ...]] = {"weight": ("weight",)}


@dataclass(frozen=True)
class _Spec:
    name: str
    kind: str
    required: Mapping[str, tuple[str, ...]]  # role -> column names that may fill it, the first present wins
    optional: Mapping[str, tuple[str, ...]]


def _two_images(name: str, prompts: dict[str, tuple[str, ...]]) -> _Spec:
    images: dict[str, tuple[str, ...]] = {"jpg_0": ("jpg_0",), "jpg_1": ("jpg_1",), "label_0": ("label_0",)}
    return _Spec(name, "pair", prompts | images, {k: v for k, v in _LABELS.items() if k != "label_0"} | _WEIGHT)


_PATHS: tuple[str, ...] = ("image_path", "file_path", "images")
_PAIR: dict[str, tuple[str, ...]] = {"chosen": ("chosen",), "rejected": ("rejected",)}
_TWO_PROMPTS: dict[str, tuple[str, ...]] = {"chosen_prompt": ("chosen_prompt",), "rejected_prompt": ("rejected_prompt",)}

# The order decides when the columns fit several layouts: the first that fits wins, from the most to the least specific.
_SPECS = (
    _two_images("dcpo", {"caption_0": ("caption_0",), "caption_1": ("caption_1",)}),
    _two_images("pickapic", {"prompt": ("caption", "prompt", "text")}),
    _Spec("canonical_two_prompts", "pair", _PAIR | _TWO_PROMPTS, _WEIGHT),
    _Spec("trl", "pair", {"prompt": _PROMPT} | _PAIR, _WEIGHT),
    _Spec("hpdv2", "ranked", {"prompt": _PROMPT, "images": _PATHS, "human_preference": ("human_preference",)}, {}),
    _Spec("hpdv2", "ranked", {"prompt": _PROMPT, "images": _PATHS, "rank": ("rank",)}, {}),
    _Spec("ranked", "ranked", {"prompt": _PROMPT, "images": ("images",), "scores": ("scores",)}, _WEIGHT),
    _Spec(
        "single",
        "single",
        {"prompt": _PROMPT, "image": ("image", "jpg", "jpeg", "png", "webp", "file_name")},
        _WEIGHT,
    ),
    _Spec("prompt", "prompt", {"prompt": _PROMPT}, {}),
)
LAYOUTS = tuple(dict.fromkeys(spec.name for spec in _SPECS))
"""Recognised layouts in the order in which they are tried."""

_NAMES = sorted({name for spec in _SPECS for names in (*spec.required.values(), *spec.optional.values()) for name in names})
_IMAGE_ROLES = {"jpg_0", "jpg_1", "chosen", "rejected", "images", "image"}
# A column so named beside a lone prompt holds data that prompt-only reading would throw away silently.
_NOT_PROMPT_ONLY = ("image", "jpg", "jpeg", "png", "webp", "chosen", "rejected", "completion", "file_name", "winner", "loser")


@dataclass(frozen=True)
class Layout:
    """A recognised set of columns.

    Attributes:
        name (`str`): one of `LAYOUTS`.
        kind (`str`): what its rows are: `pair`, `ranked`, `single` or `prompt`.
        mapping (`dict[str, str]`): role -> column of the dataset.
    """

    name: str
    kind: str
    mapping: dict[str, str]

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


def recognise(columns: Sequence[str], mapping: Mapping[str, str]) -> Layout:
    """The layout of a dataset with these columns; the first of `LAYOUTS` that fits.

    Args:
        columns: the dataset's column names.
        mapping: canonical (or any layout's) column name -> the dataset's column; overrides what the columns are called.

    Raises:
        ConfigError: the mapping names an unknown canonical name or a column that does not exist.
        UserError: no layout fits; lists the columns and the mapping to write.
    """
    names = _renamed(columns, mapping)
    for spec in _SPECS:
        found = {role: next((n for n in aliases if n in names), None) for role, aliases in spec.required.items()}
        if None in found.values():
            continue
        if spec.kind == "prompt" and "prompt" not in mapping and any(_hints_at_images(name) for name in names):
            continue
        for role, aliases in spec.optional.items():
            found[role] = next((name for name in aliases if name in names), None)
        return Layout(spec.name, spec.kind, {role: names[name] for role, name in found.items() if name is not None})
    raise UserError(
        f"data.columns: the columns {', '.join(map(str, columns)) or '(none)'} fit no known layout; say which is which, for "
        "pairs data.columns: {prompt: ..., chosen: ..., rejected: ...}, for ranked lists {prompt: ..., images: ..., scores: ...}, "
        "for single images {prompt: ..., image: ...}, for prompts only {prompt: ...}"
    )


def judge(layout: Layout, cells: Mapping[str, Any]) -> Verdict:
    """Decides prompts, order, tie and weight of one row from its light cells.

    Args:
        layout: from `recognise`.
        cells: role -> value for `layout.light_columns`.
    """
    weight = cells.get("weight")
    weight = 1.0 if weight is None else _number(weight)
    if weight is None or weight < 0:
        return Verdict("broken", f"weight is {cells['weight']!r}, expected a number of at least 0")
    if layout.name in ("dcpo", "pickapic"):
        return _judge_labels(cells, weight, ("caption_0", "caption_1") if layout.name == "dcpo" else ("prompt", "prompt"))
    if layout.kind == "pair":
        roles = ("chosen_prompt", "rejected_prompt") if layout.name == "canonical_two_prompts" else ("prompt", "prompt")
        return _with_prompts(cells, roles, Verdict("keep", image_roles=("chosen", "rejected"), weight=weight))
    if layout.kind == "ranked":
        return _judge_scores(cells, weight)
    image_roles = ("image",) if layout.kind == "single" else ()
    return _with_prompts(cells, ("prompt",), Verdict("keep", image_roles=image_roles, weight=weight))


def _judge_labels(cells: Mapping[str, Any], weight: float, prompt_roles: tuple[str, str]) -> Verdict:
    """Pick-a-Pic: `label_0` is 1 when the first image won, 0 when the second did, 0.5 for a tie."""
    if cells.get("has_label") is False or cells["label_0"] is None:
        return Verdict("unlabelled")
    first = _number(cells["label_0"])
    if first is None or not 0 <= first <= 1:
        return Verdict("broken", f"label_0 is {cells['label_0']!r}, expected a number from 0 to 1")
    second = _number(cells.get("label_1"))
    if second is None:
        second = 1 - first
    if first == second:
        tie = Verdict("tie", image_roles=("jpg_0", "jpg_1"), weight=0.0)
        return _with_prompts(cells, prompt_roles, tie)
    swap = first < second
    roles = ("jpg_1", "jpg_0") if swap else ("jpg_0", "jpg_1")
    verdict = Verdict("keep", image_roles=roles, weight=weight, second_wins=swap)
    return _with_prompts(cells, prompt_roles[::-1] if swap else prompt_roles, verdict)


def _judge_scores(cells: Mapping[str, Any], weight: float) -> Verdict:
    """Ranked lists; HPDv2's `rank` counts from the best, `scores` and `human_preference` are higher for better."""
    role = next(role for role in ("scores", "human_preference", "rank") if role in cells)
    given, sign = cells[role], -1.0 if role == "rank" else 1.0
    if given is None:
        return Verdict("unlabelled")
    values = [_number(value) for value in given] if isinstance(given, (list, tuple)) else []
    if len(values) < 2:
        return Verdict("broken", f"has {len(values)} scores, expected at least 2")
    if any(value is None for value in values):
        return Verdict("broken", f"has a score that is not a finite number: {given!r}")
    scores = tuple(sign * value for value in values if value is not None)
    tie = len(set(scores)) == 1
    verdict = Verdict("tie" if tie else "keep", image_roles=("images",), scores=scores, weight=0.0 if tie else weight)
    return _with_prompts(cells, ("prompt",) * len(scores), verdict)


def _with_prompts(cells: Mapping[str, Any], roles: tuple[str, ...], verdict: Verdict) -> Verdict:
    prompts = tuple(cells[role] for role in roles)
    for role, prompt in zip(roles, prompts, strict=True):
        if not isinstance(prompt, str):
            return Verdict("broken", f"{role} is {prompt!r}, expected text")
    return Verdict(**{**vars(verdict), "prompts": prompts})


def _number(value: Any) -> float | None:
    """`value` as a finite float, or None."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return None


def _hints_at_images(name: str) -> bool:
    return any(hint in name.lower() for hint in _NOT_PROMPT_ONLY)


def _renamed(columns: Sequence[str], mapping: Mapping[str, str]) -> dict[str, str]:
    """Layout column name -> dataset column, after the user's mapping."""
    for name, column in mapping.items():
        if name not in _NAMES:
            close = difflib.get_close_matches(name, _NAMES, n=1)
            hint = f", did you mean {close[0]!r}" if close else ""
            raise ConfigError("data.columns", f"{name!r} is not a canonical column{hint}; known are {', '.join(_NAMES)}")
        if column not in columns:
            raise ConfigError("data.columns", f"the dataset has no column {column!r}; it has {', '.join(map(str, columns))}")
    used = set(mapping.values())
    return {column: column for column in columns if column not in used} | dict(mapping)
