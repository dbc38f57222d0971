"""GenEval: does the image hold what the prompt names?

After Ghosh et al. 2023, arXiv 2310.11513. A prompt comes with clauses over detected
objects. The detector is yours: any callable from an image to detections, or detections
that came with the metadata. The published one, a Mask2Former of mmdetection, lives in
an environment of its own and can serve through the `remote` scorer.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from ...errors import ConfigError, UserError
from ...runtime.hashing import text_hash
from ..base import Item, Scorer
from ..spec import ScorerSpec

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from ..model_scorer import ModelScorer

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
THRESHOLD, COUNTING_THRESHOLD, MAX_OBJECTS, DEAD_ZONE = 0.3, 0.9, 16, 0.1
MODES = ("geneval", "strict", "partial", "partial_published")


@dataclass(frozen=True)
class Detection:
    """One detected object.

    Attributes:
        label (`str`): class name, as the metadata spells it.
        score (`float`): confidence in [0, 1].
        box (4 floats): (left, top, right, bottom) in pixels.
        mask: (h, w) array that is true on the object. None where there is none.
        color (`str` or None): one of `COLORS` where the detector already knows it.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None
    color: str | None = None


@dataclass
class ClauseResult:
    """What the clauses of one prompt say.

    Attributes:
        correct: all of them hold.
        reason: one line for each that does not.
        credits: what each demand of the clauses earns towards a partial score.
    """

    correct: bool = True
    reason: str = ""
    credits: list[float] = field(default_factory=list)


ColorClassifier: TypeAlias = "Callable[[Image.Image, Sequence[Detection], str], Sequence[str]]"
"""(image, detections, class name) -> one of `COLORS` per detection."""


def keep_detections(detections: Sequence[Detection], tag: str) -> dict[str, list[Detection]]:
    """Sort confident detections by class, best first, at most 16 of a class.

    Confident means above 0.3, or above 0.9 when objects are counted.

    Args:
        detections (list of `Detection`): all of an image.
        tag (`str`): the prompt's, one of `TAGS`.
    """
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    by_class: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda one: -one.score):
        same = by_class.setdefault(detection.label, [])
        if detection.score > threshold and len(same) < MAX_OBJECTS:
            same.append(detection)
    return {label: objects for label, objects in by_class.items() if objects}


def relative_position(box: Sequence[float], target: Sequence[float]) -> set[str]:
    """Say where `box` lies relative to `target`.

    Centres are compared. A tenth of the summed widths (heights) is taken off the
    distance. A direction counts when it makes up more than half of the distance between
    the centres.

    Args:
        box, target (4 floats): (left, top, right, bottom).

    Returns:
        a subset of `RELATIONS`, empty inside the dead zone.
    """
    reduced, offsets = [], []
    for axis in (0, 1):
        offset = (box[axis] + box[axis + 2] - target[axis] - target[axis + 2]) / 2
        sizes = abs(box[axis + 2] - box[axis]) + abs(target[axis + 2] - target[axis])
        offsets.append(offset)
        reduced.append(math.copysign(max(abs(offset) - DEAD_ZONE * sizes, 0.0), offset))
    if all(abs(value) < 1e-3 for value in reduced):
        return set()
    dx, dy = (value / math.hypot(*offsets) for value in reduced)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, true in holds.items() if true}


def evaluate_clauses(
    objects: Mapping[str, Sequence[Detection]],
    metadata: Mapping[str, Any],
    colors: Callable[[Sequence[Detection], str], Sequence[str]],
    *,
    exact_count: bool = False,
    as_published: bool = False,
) -> ClauseResult:
    """Check the `include` and `exclude` clauses of a prompt.

    Args:
        objects (`dict`): class -> confident detections, best first (`keep_detections`).
        metadata (mapping): ``{"include": [...], "exclude": [...]}`` with clauses
            ``{"class", "count", "color"?, "position"?}``. A position is a relation and
            the index of an earlier clause.
        colors (function): (detections, class) -> colour of each. Only called when a
            clause names one.
        exact_count (`bool`, *optional*, defaults to False): more objects than asked for
            fail too (flow_grpo trains on this), instead of only fewer.
        as_published (`bool`, *optional*, defaults to False): credits exactly as
            flow_grpo's
            reward counts them: below 0 for many surplus objects, a failed position
                followed
            by a full credit all the same, nothing for `exclude`. Otherwise a credit is
            in [0, 1] and stands for one demand: a count, a colour, a position, an
            exclusion.
    """
    credits, reasons = list[float](), list[str]()
    matched: list[list[Detection] | None] = []
    for clause in _clauses(metadata, "include"):
        label, count = clause["class"], int(clause["count"])
        everything = list(objects.get(label, ()))
        counted = everything if exact_count else everything[:count]
        credit = 1 - abs(count - len(counted)) / count
        credits.append(credit if as_published else max(credit, 0.0))
        failed = len(counted) != count
        if failed:
            reasons.append(
                f"expected {label}{'==' if exact_count else '>='}{count}, found {len(counted)}"
            )
            demands = ("color" in clause) + ("position" in clause)
            credits += [0.0] * (min(demands, 1) if as_published else demands)
        elif "color" in clause:
            names = list(colors(counted, label))
            right = names.count(clause["color"])
            credits.append(right / count)
            if right < count:
                failed = True
                credits += [0.0] * ("position" in clause and not as_published)
                others = ", ".join(
                    f"{names.count(color)} {color}" for color in COLORS if color in names
                )
                reasons.append(
                    f"expected {clause['color']} {label}>={count}, found {right} "
                    f"{clause['color']}; and {others}"
                )
        if "position" in clause and not failed:
            problem = _misplaced(counted, clause, matched)
            failed = problem is not None
            no_target = matched[int(clause["position"][1])] is None
            credits += [0.0] * failed + [1.0] * (not failed or (as_published and not no_target))
            reasons += [problem] if problem is not None else []
        matched.append(None if failed else counted)
    for clause in _clauses(metadata, "exclude"):
        number = len(objects.get(clause["class"], ()))
        if not as_published:
            credits.append(0.0 if number >= int(clause["count"]) else 1.0)
        if number >= int(clause["count"]):
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {number}")
    return ClauseResult(not reasons, "\n".join(reasons), credits)


def _clauses(metadata: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    """Return the clauses of a kind.

    Tables such as Parquet hold None for what a clause does not have.
    """
    return [
        {name: value for name, value in clause.items() if value is not None}
        for clause in metadata.get(kind) or ()
    ]


def _misplaced(
    objects: Sequence[Detection],
    clause: Mapping[str, Any],
    matched: Sequence[list[Detection] | None],
) -> str | None:
    """Say why a position clause fails, or return None."""
    relation, index = clause["position"]
    targets = matched[int(index)]
    if targets is None:
        return f"no target for {clause['class']} to be {relation}"
    for one in objects:
        for target in targets:
            relations = relative_position(one.box, target.box)
            if relation not in relations:
                actual = " and ".join(name for name in RELATIONS if name in relations)
                return f"expected {clause['class']} {relation} target, found {actual} target"
    return None


def check_metadata(metadata: Mapping[str, Any], place: str = "metadata") -> None:
    """Check one prompt's clauses.

    Raises:
        UserError: naming the clause and what it lacks.
    """
    for kind in ("include", "exclude"):
        value = metadata.get(kind) or []
        empty = kind == "include" and not value and not metadata.get("exclude")
        if empty or not isinstance(value, Sequence) or isinstance(value, str):
            raise UserError(
                f"{place}.{kind}: expected a list of clauses such as {{'class': "
                f"'cat', 'count': 1}}, got {value!r}"
            )
        for i, clause in enumerate(metadata.get(kind) or ()):
            where = f"{place}.{kind}[{i}]"
            if not isinstance(clause, Mapping) or not isinstance(clause.get("class"), str):
                raise UserError(f"{where}: expected a mapping with a class, got {clause!r}")
            count = clause.get("count")
            if (
                isinstance(count, bool)
                or not isinstance(count, (int, float))
                or count < 1
                or count != int(count)
            ):
                raise UserError(f"{where}.count: expected int >= 1, got {count!r}")
            if clause.get("color") is not None and clause["color"] not in COLORS:
                raise UserError(
                    f"{where}.color: expected one of {', '.join(COLORS)}, got {clause['color']!r}"
                )
            position = clause.get("position")
            if position is not None:
                good = (
                    isinstance(position, Sequence)
                    and len(position) == 2
                    and position[0] in RELATIONS
                )
                if not good or not isinstance(position[1], int) or not 0 <= position[1] < i:
                    raise UserError(
                        f"{where}.position: expected [one of {', '.join(RELATIONS)}, index of "
                        f"an earlier clause], got {position!r}"
                    )


class GenEval(Scorer):
    """1 when every clause of the prompt holds, else 0. Or partial credit.

    A detector's scores are kept in a cache only when it can be told from another: when
    it is a function of a module, or has a method ``fingerprint() -> str``. The same
    holds for a classifier.

    Args:
        detector (callable or `str`, *optional*): from a PIL image to `Detection`s (or
            mappings with its fields), or its ``package.module:name``. By default the
            metadata brings them under `detections`.
        color_classifier (`ColorClassifier` or `str`, *optional*): needed by prompts
            that name colours unless the detections have a `color`.
        mode (`str`, *optional*, defaults to "geneval"): ``geneval``: the published
            rule, which allows surplus objects. ``strict``: counts must be equal, as
            flow_grpo trains. ``partial``: the mean credit of its demands, each in [0,
            1]. ``partial_published``: flow_grpo's reward to the letter, see
            `evaluate_clauses`.
        **options: as for `Scorer`.

    Raises:
        ConfigError: an unknown mode, or something that cannot be imported or called.
    """

    spec = ScorerSpec(
        key="geneval",
        summary="object, count, colour and position clauses on detected objects",
        licence="MIT (clauses); the detector's own",
        requires=("image", "metadata"),
        range=(0.0, 1.0),
        affine=(0.0, 1.0),
        preprocess="detector",
        citation="Ghosh et al. 2023, arXiv 2310.11513",
    )

    def __init__(
        self,
        *,
        detector: Callable[[Image.Image], Iterable[Detection | Mapping[str, Any]]]
        | str
        | None = None,
        color_classifier: ColorClassifier | str | None = None,
        mode: str = "geneval",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if mode not in MODES:
            raise ConfigError("mode", f"expected {', '.join(MODES)}, got {mode!r}")
        self.mode = mode
        self.detector = _callable(detector, "detector")
        self.color_classifier = _callable(color_classifier, "color_classifier")
        if None in (_identity(self.detector), _identity(self.color_classifier)):
            self.deterministic = False  # type: ignore[misc]  # two of them would share their cached scores

    def identity(self) -> dict[str, Any]:
        named = {name: _identity(getattr(self, name)) for name in ("detector", "color_classifier")}
        return {"mode": self.mode, **named}

    def score_batch(self, items: list[Item]) -> tuple[list[float], dict[int, str]]:
        values, notes = [math.nan] * len(items), {}
        for i, item in enumerate(items):
            check_metadata(item.metadata)
            try:
                result = self.evaluate(item)
            except _Unknown as error:
                notes[i] = str(error)
                continue
            credits = result.credits or [0.0]
            values[i] = (
                sum(credits) / len(credits)
                if self.mode.startswith("partial")
                else float(result.correct)
            )
        return values, notes

    def evaluate(self, item: Item) -> ClauseResult:
        """Check the clauses of one image, with reasons."""
        detections = item.metadata.get("detections")
        if detections is None and self.detector is None:
            raise _Unknown("no detections: give metadata['detections'] or a detector")
        image = item.image
        if detections is None:
            detections = self.detector(image)  # type: ignore[misc]
        if not isinstance(detections, Iterable) or isinstance(detections, (str, Mapping)):
            raise UserError(
                "detections: expected a list of {label, score, box}, "
                f"got {type(detections).__name__}"
            )
        tag = str(item.metadata.get("tag", ""))
        objects = keep_detections([_detection(one) for one in detections], tag)

        def colors(detections: Sequence[Detection], label: str) -> Sequence[str]:
            if all(one.color is not None for one in detections):
                return [str(one.color) for one in detections]
            if self.color_classifier is None:
                raise _Unknown(
                    "the prompt names a colour, and there is neither a colour in the "
                    "detections nor a color_classifier"
                )
            return self.color_classifier(image, detections, label)

        return evaluate_clauses(
            objects,
            item.metadata,
            colors,
            exact_count=self.mode != "geneval",
            as_published=self.mode == "partial_published",
        )


class ClipColorClassifier:
    """Zero-shot colours by any CLIP-type scorer.

    It looks at the box, with everything but the object painted gray, and compares it
    with three templates per colour.

    Args:
        scorer (`ModelScorer`): loaded, such as ``load_scorer("clip-l14")``.
    """

    templates = (
        "a photo of a {color} {label}",
        "a photo of a {color}-colored {label}",
        "a photo of a {color} object",
    )

    def __init__(self, scorer: ModelScorer) -> None:
        self.scorer = scorer

    def fingerprint(self) -> str | None:
        """Return that of its scorer, None for an object that has none."""
        return self.scorer.fingerprint() if isinstance(self.scorer, Scorer) else None

    def __call__(
        self, image: Image.Image, detections: Sequence[Detection], label: str
    ) -> list[str]:
        import torch

        from ..towers import unit

        scorer, crops = self.scorer, [_crop(image, one) for one in detections]
        with torch.no_grad():
            pixels = torch.stack(
                [scorer.preprocess.normalise(scorer.preprocess.exact(crop)) for crop in crops]
            )
            features = scorer.image_features(pixels.to(scorer.device, scorer.dtype))
            classes = []
            for color in COLORS:
                (texts,) = scorer.text_features(
                    [text.format(color=color, label=label) for text in self.templates]
                )
                classes.append(unit(texts.mean(0)))
            best = (features @ torch.stack(classes).T).argmax(-1)
        return [COLORS[i] for i in best.tolist()]


def _crop(image: Image.Image, one: Detection) -> Image.Image:
    """Crop the box of an object, paint everything else in it gray. Never empty."""
    import numpy as np
    from PIL import Image

    if one.mask is not None:
        mask = np.asarray(one.mask, dtype=bool)
        if mask.shape != (image.height, image.width):
            raise UserError(
                f"detections: the mask of {one.label} is {mask.shape}, the image "
                f"({image.height}, {image.width})"
            )
        image = Image.composite(
            image, Image.new("RGB", image.size, "#999"), Image.fromarray(mask.astype("uint8") * 255)
        )
    left, top, right, bottom = (round(value) for value in one.box)
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


class _Unknown(Exception):
    """This image cannot be judged. The sentence says why."""


def _detection(value: Any) -> Detection:
    if isinstance(value, Detection):
        return value
    try:
        label = value.get("label", value.get("class"))
        box = tuple(float(side) for side in value["box"])
        score = float(value["score"])
        if (
            not isinstance(label, str)
            or len(box) != 4
            or not all(map(math.isfinite, (*box, score)))
        ):
            raise ValueError("a detection has a label, a score and a box of four numbers")
        return Detection(label, score, box, value.get("mask"), value.get("color"))  # type: ignore[arg-type]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"detections: expected {{label, score, box}}, got {value!r} ({error})"
        ) from error


def _callable(value: object, field_name: str) -> Callable[..., Any] | None:
    if isinstance(value, str):
        module, _, name = value.partition(":")
        try:
            value = getattr(importlib.import_module(module), name)
        except Exception as error:  # whatever the module does
            raise ConfigError(
                field_name, f"{value!r} cannot be imported as package.module:name ({error})"
            ) from error
    if value is not None and not callable(value):
        raise ConfigError(field_name, f"expected a callable or package.module:name, got {value!r}")
    return value


def _identity(value: object) -> str | None:
    """Return an identity of a detector or classifier.

    It is an empty text if there is none. None means that it cannot be known, as for
    closures and objects with settings of their own.
    """
    if value is None:
        return ""
    qualified = getattr(value, "__qualname__", type(value).__qualname__)
    name = f"{getattr(value, '__module__', '')}.{qualified}"
    fingerprint = getattr(value, "fingerprint", None)
    if callable(fingerprint):
        text = fingerprint()
        return f"{name} {text}" if isinstance(text, str) else None
    if not inspect.isfunction(value) or "<" in name or value.__closure__:
        return None
    try:
        return f"{name} {text_hash(inspect.getsource(value))[:16]}"
    except OSError:  # written in an interactive session
        return None
