"""Decide from a row's light cells which image is better, or why the row is unusable.

Light cells hold prompts, labels, scores and weights. Images are never touched, so ties,
swaps and unlabelled rows are decided without reading one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from diffalign.config.ranges import as_float
from diffalign.config.yaml_text import shown
from diffalign.data.schema import Layout


@dataclass(frozen=True)
class Verdict:
    """Hold what a row's light cells say.

    Attributes:
        status (`str`): `keep`, `tie`, `unlabelled` (nobody judged the row) or `broken`.
        reason (`str`, defaults to `""`): Why it is broken.
        prompts (`tuple[str, ...]`): One per image in canonical order, chosen first. One
            for kind `prompt`.
        image_roles (`tuple[str, ...]`): The roles whose images make the group, in
            canonical order.
        scores (`tuple[float, ...]`, *optional*): One per image of a ranked row, or of a
            pair whose data have scores. NaN marks a missing score of a pair. 1 for a
            liked single image and -1 for a disliked one.
        rating (`float`, *optional*): Of a rated single image.
        weight (`float`, defaults to `1.0`): Weight of the group in the loss, 0 for a
            tie.
        tie_weight (`float`, *optional*): Of a tie, the weight that its row has.
        second_wins (`bool`, *optional*): Whether the labels preferred the second image.
            None where the columns themselves are ordered.
        user (`str`, *optional*): Who judged the row, where the data say it.
    """

    status: Literal["keep", "tie", "unlabelled", "broken"]
    reason: str = ""
    prompts: tuple[str, ...] = ()
    image_roles: tuple[str, ...] = ()
    scores: tuple[float, ...] | None = None
    weight: float = 1.0
    second_wins: bool | None = None
    user: str | None = None
    rating: float | None = None
    tie_weight: float | None = None


def classify_row(layout: Layout, cells: Mapping[str, Any]) -> Verdict:
    """Decide prompts, order, tie and weight of one row from its light cells.

    Args:
        layout (`Layout`): From `recognise`.
        cells (`Mapping[str, Any]`): Role -> value, for `layout.light_columns`.

    Returns:
        `Verdict`.
    """
    verdict = _classified(layout, cells)
    user = user_name(cells.get("user_id"))
    return verdict if user is None else replace(verdict, user=user)


def user_name(cell: object) -> str | None:
    """Read who judged a row, None where the cell holds nobody.

    Of numbers, 2.0 and 2 are one user: a column with missing cells holds floats.
    """
    if _is_missing(cell):
        return None
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)


def _classified(layout: Layout, cells: Mapping[str, Any]) -> Verdict:
    weight = 1.0 if _is_missing(cells.get("weight")) else number(cells["weight"])
    if weight is None or weight < 0:
        return Verdict("broken", f"weight is {cells['weight']!r}, expected a number of at least 0")
    if layout.name in ("dcpo", "pickapic"):
        return _judge_labels(
            cells,
            weight,
            ("caption_0", "caption_1") if layout.name == "dcpo" else ("prompt", "prompt"),
        )
    if layout.name == "genai_bench":
        return _judge_vote(cells)
    if layout.name == "rapidata":
        return _judge_two_scores(cells)
    if layout.kind == "pair":
        roles = (
            ("chosen_prompt", "rejected_prompt")
            if layout.name == "canonical_two_prompts"
            else ("prompt", "prompt")
        )
        verdict = Verdict("keep", image_roles=("chosen", "rejected"), weight=weight)
        if "chosen_score" in cells and "rejected_score" in cells:
            scores: list[float] = []
            for role in ("chosen_score", "rejected_score"):
                score = None if _is_missing(cells[role]) else number(cells[role])
                scores.append(math.nan if score is None else score)
            verdict = replace(verdict, scores=tuple(scores))
        return _with_prompts(cells, roles, verdict)
    if layout.kind == "ranked":
        return _judge_scores(cells, weight)
    if layout.kind == "labelled":
        return _judge_like(layout, cells, weight)
    images = {"single": ("image",), "conditioned": ("image", "condition")}.get(layout.kind, ())
    prompts = ("prompt",) * max(len(images), 1)
    return _with_prompts(cells, prompts, Verdict("keep", image_roles=images, weight=weight))


def _judge_labels(
    cells: Mapping[str, Any], weight: float, prompt_roles: tuple[str, str]
) -> Verdict:
    """Judge a Pick-a-Pic row.

    `label_0` is 1 when the first image won, 0 when the second did, 0.5 for a tie.
    """
    judged = cells.get("has_label")
    if not _is_missing(judged):
        flag = _flag(judged)
        if flag is None:
            return Verdict(
                "broken", f"has_label is {shown(judged)}, expected true or false (or 1 and 0)"
            )
        if not flag:
            return Verdict("unlabelled")
    if _is_missing(cells["label_0"]):
        return Verdict("unlabelled")
    labels = [
        number(cells["label_0"]),
        None if _is_missing(cells.get("label_1")) else number(cells["label_1"]),
    ]
    for role, label in zip(("label_0", "label_1"), labels, strict=True):
        absent = role == "label_1" and _is_missing(cells.get(role))
        if not absent and (label is None or not 0 <= label <= 1):
            return Verdict(
                "broken", f"{role} is {shown(cells[role])}, expected a number from 0 to 1"
            )
    first = labels[0]
    assert first is not None
    return _compared(
        cells, first, 1 - first if labels[1] is None else labels[1], weight, prompt_roles
    )


def _compared(
    cells: Mapping[str, Any],
    first: float,
    second: float,
    weight: float = 1.0,
    prompt_roles: tuple[str, str] = ("prompt", "prompt"),
) -> Verdict:
    """Judge two images by a number each, of which the larger wins."""
    if first == second:
        tie = Verdict("tie", image_roles=("jpg_0", "jpg_1"), weight=0.0, tie_weight=weight)
        return _with_prompts(cells, prompt_roles, tie)
    swap = first < second
    roles = ("jpg_1", "jpg_0") if swap else ("jpg_0", "jpg_1")
    verdict = Verdict("keep", image_roles=roles, weight=weight, second_wins=swap)
    return _with_prompts(cells, prompt_roles[::-1] if swap else prompt_roles, verdict)


_VOTES = {
    "leftvote": (1.0, 0.0),
    "rightvote": (0.0, 1.0),
    "tievote": (0.5, 0.5),
    "bothbad_vote": (0.5, 0.5),
}


def _judge_vote(cells: Mapping[str, Any]) -> Verdict:
    """Judge a GenAI-Bench row, which names the winner in words."""
    vote = cells["vote_type"]
    if _is_missing(vote):
        return Verdict("unlabelled")
    if not isinstance(vote, str) or vote not in _VOTES:
        return Verdict("broken", f"vote_type is {shown(vote)}, expected one of {', '.join(_VOTES)}")
    return _compared(cells, *_VOTES[vote])


def _judge_two_scores(cells: Mapping[str, Any]) -> Verdict:
    """Judge two images by their votes, or by the weights of these."""
    if _is_missing(cells["score_0"]) or _is_missing(cells["score_1"]):
        return Verdict("unlabelled")
    first, second = number(cells["score_0"]), number(cells["score_1"])
    if first is None or second is None:
        return Verdict(
            "broken",
            f"the votes are {shown(cells['score_0'])} and {shown(cells['score_1'])}, expected "
            "numbers",
        )
    return _compared(cells, first, second)


def _judge_scores(cells: Mapping[str, Any], weight: float) -> Verdict:
    """Judge a ranked list.

    `rank` counts from the best. In `scores` and `human_preference` higher is better.
    """
    role = next(role for role in ("scores", "human_preference", "rank") if role in cells)
    numbers, sign = cells[role], -1.0 if role == "rank" else 1.0
    if _is_missing(numbers):
        return Verdict("unlabelled")
    if not isinstance(numbers, (list, tuple)):
        return Verdict(
            "broken", f"{role} is {shown(numbers)}, expected a list with one number per image"
        )
    if len(numbers) >= 2 and all(_is_missing(value) for value in numbers):
        return Verdict("unlabelled")
    values = [number(value) for value in numbers]
    if len(values) < 2:
        return Verdict("broken", f"has {len(values)} scores, expected at least 2")
    if any(value is None for value in values):
        return Verdict("broken", f"has a score that is not a finite number: {shown(numbers)}")
    scores = tuple(sign * value for value in values if value is not None)
    tie = len(set(scores)) == 1
    verdict = Verdict(
        "tie" if tie else "keep",
        image_roles=("images",),
        scores=scores,
        weight=0.0 if tie else weight,
        tie_weight=weight if tie else None,
    )
    return _with_prompts(cells, ("prompt",) * len(scores), verdict)


def _judge_like(layout: Layout, cells: Mapping[str, Any], weight: float) -> Verdict:
    """Judge a single image by its label or rating: score 1 is liked, -1 is not."""
    role = "label" if "label" in cells else "rating"
    if _is_missing(cells[role]):
        return Verdict("unlabelled")
    value = number(cells[role])
    if role == "label" and value not in (1.0, 0.0, -1.0):
        return Verdict(
            "broken",
            f"label is {shown(cells[role])}, expected true or false, 1 or 0, or 1 or -1; for "
            "ratings map the column as rating and set data.like_threshold",
        )
    if value is None:
        return Verdict("broken", f"rating is {shown(cells[role])}, expected a number")
    threshold = 1.0 if layout.like_threshold is None else layout.like_threshold
    score = 1.0 if value >= threshold else -1.0
    verdict = Verdict("keep", image_roles=("image",), scores=(score,), weight=weight)
    verdict = verdict if role == "label" else replace(verdict, rating=value)
    return _with_prompts(cells, ("prompt",), verdict)


def _with_prompts(cells: Mapping[str, Any], roles: tuple[str, ...], verdict: Verdict) -> Verdict:
    prompts = tuple(cells[role] for role in roles)
    for role, prompt in zip(roles, prompts, strict=True):
        if not isinstance(prompt, str):
            return Verdict("broken", f"{role} is {shown(prompt)}, expected text")
    return Verdict(**{**vars(verdict), "prompts": prompts})


_NO_VALUE = ("", "none", "null", "nan", "na", "n/a")
_TRUE, _FALSE = ("true", "yes", "t", "y"), ("false", "no", "f", "n")


def _is_missing(value: object) -> bool:
    """Whether a cell holds no value, in any way in which tables write that."""
    if isinstance(value, str):
        return value.strip().lower() in _NO_VALUE
    return value is None or (isinstance(value, float) and math.isnan(value))


def number(value: object) -> float | None:
    """Read a finite number from a cell.

    Args:
        value: A number, a boolean (True is 1 and False is 0), or a text that spells one
            of them.

    Returns:
        `float`, or None for anything else.
    """
    if isinstance(value, str):
        text = value.strip().lower()
        if text in _TRUE or text in _FALSE:
            return float(text in _TRUE)
    finite = as_float(value)
    return finite if finite is not None and math.isfinite(finite) else None


def _flag(value: object) -> bool | None:
    """Read yes or no from a cell: a boolean, 1 or 0, or words, else None."""
    flag = number(value)
    return bool(flag) if flag in (0.0, 1.0) else None
