"""GenEval's clauses against the published evaluation of the same detections."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from models import load_tiny
from PIL import Image

from diffalign import UserError, load_scorer
from diffalign.rewards.scorers.geneval import (
    COLORS,
    ClipColorClassifier,
    Detection,
    evaluate_clauses,
    keep_detections,
    relative_position,
)
from diffalign.rewards.scoring import make_items
from diffalign.rewards.testing.check import check_scorer

CASES = json.loads((Path(__file__).parent / "fixtures" / "geneval.json").read_text())["cases"]
IMAGE = Image.new("RGB", (100, 100), (120, 120, 120))


def picture(i: int) -> Image.Image:
    return Image.new("RGB", (100, 100), (i, 120, 120))


def lines(reason: str) -> list[str]:
    """Two relations are published in any order."""
    return [" ".join(sorted(line.replace(" and ", " ").split())) for line in reason.split("\n")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_published_cases(case):
    scorer = load_scorer("geneval")
    metadata = {**case["metadata"], "detections": case["detections"]}
    (item,) = make_items(scorer, [_input()], [""], [metadata])
    result = scorer.evaluate(item)
    assert result.correct is case["correct"]
    assert lines(result.reason) == lines(case["reason"])
    assert float(scorer([IMAGE], metadata=[metadata])[0]) == float(case["correct"])


def _input():
    from diffalign.rewards.images import read_images

    return read_images([IMAGE])[0]


def test_all_six_tags_are_covered():
    assert {case["metadata"]["tag"] for case in CASES} == {
        "single_object",
        "two_object",
        "counting",
        "colors",
        "position",
        "color_attr",
    }


def test_positions_have_a_dead_zone():
    assert relative_position((0, 0, 10, 10), (50, 0, 60, 10)) == {"left of"}
    assert relative_position((50, 0, 60, 10), (0, 0, 10, 10)) == {"right of"}
    assert relative_position((0, 0, 10, 10), (0, 50, 10, 60)) == {"above"}
    assert relative_position((0, 0, 10, 10), (50, 50, 60, 60)) == {"left of", "above"}
    assert relative_position((0, 0, 10, 10), (1, 0, 11, 10)) == set()
    assert relative_position((0, 0, 10, 10), (0, 0, 10, 10)) == set()


def cat(x, score=0.95, **more):
    return {"label": "cat", "score": score, "box": [x, 10, x + 10, 20], **more}


def dog(x, y=10):
    return {"label": "dog", "score": 0.95, "box": [x, y, x + 10, y + 10]}


def test_modes():
    counting = {
        "tag": "counting",
        "include": [{"class": "cat", "count": 2}],
        "detections": [cat(0), cat(30), cat(60)],
    }
    assert load_scorer("geneval")([IMAGE], metadata=[counting])[0] == 1
    assert load_scorer("geneval", mode="strict")([IMAGE], metadata=[counting])[0] == 0
    assert load_scorer("geneval", mode="partial")([IMAGE], metadata=[counting])[0] == 0.5
    many = {**counting, "detections": [cat(8 * i) for i in range(12)]}
    assert load_scorer("geneval", mode="partial")([IMAGE], metadata=[many])[0] == 0
    assert load_scorer("geneval", mode="partial_published")([IMAGE], metadata=[many])[0] == -4
    misplaced = {
        "tag": "position",
        "include": [
            {"class": "cat", "count": 1},
            {"class": "dog", "count": 1, "position": ["left of", 0]},
        ],
        "detections": [cat(10), dog(70)],
    }
    assert load_scorer("geneval", mode="strict")([IMAGE], metadata=[misplaced])[0] == 0
    assert float(
        load_scorer("geneval", mode="partial")([IMAGE], metadata=[misplaced])[0]
    ) == pytest.approx(2 / 3)
    assert (
        load_scorer("geneval", mode="partial_published")([IMAGE], metadata=[misplaced])[0] == 0.75
    )
    with pytest.raises(UserError, match="mode: expected geneval, strict"):
        load_scorer("geneval", mode="loose")


def test_a_detector_is_called_and_a_missing_colour_is_missing():
    calls = []

    def detector(image):
        calls.append(image.size)
        return [Detection("cat", 0.9, (10, 10, 40, 40))]

    scorer = load_scorer("geneval", detector=detector)
    metadata = [{"tag": "single_object", "include": [{"class": "cat", "count": 1}]}] * 2
    assert (
        scorer([picture(1), picture(2)], metadata=metadata).tolist() == [1, 1]
        and calls == [(100, 100)] * 2
    )
    colored = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}
    result = scorer.score([IMAGE], metadata=[colored])
    assert result.values.isnan().all() and "names a colour" in result.errors[0]
    scorer = load_scorer(
        "geneval",
        detector=detector,
        color_classifier=lambda image, found, label: ["red"] * len(found),
    )
    assert scorer([IMAGE], metadata=[colored])[0] == 1
    result = load_scorer("geneval").score([IMAGE], metadata=metadata[:1])
    assert result.values.isnan().all() and "no detections" in result.errors[0]


def test_colours_by_a_clip_see_the_masked_box_only(tmp_path):
    classifier = ClipColorClassifier(load_tiny("clip-l14", tmp_path))
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (100, 100, 3), dtype=np.uint8))
    mask = np.zeros((100, 100), dtype=bool)
    mask[20:40, 20:40] = True
    found = [Detection("cat", 0.9, (10, 10, 50, 50), mask), Detection("cat", 0.9, (10, 10, 50, 50))]
    colors = classifier(image, found, "cat")
    assert len(colors) == 2 and set(colors) <= set(COLORS)
    outside = np.asarray(image).copy()
    outside[~mask] = 7  # what the mask hides plays no part
    assert classifier(Image.fromarray(outside), found[:1], "cat") == colors[:1]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, r"include: expected a list of clauses"),
        ({"include": [{"count": 1}]}, r"include\[0\]: expected a mapping with a class"),
        (
            {"include": [{"class": "cat", "count": 0}]},
            r"include\[0\].count: expected int >= 1, got 0",
        ),
        (
            {"include": [{"class": "cat", "count": 1, "color": "teal"}]},
            r"color: expected one of red",
        ),
        (
            {"include": [{"class": "cat", "count": 1, "position": ["left of", 0]}]},
            r"position: expected .*an earlier clause",
        ),
        (
            {"include": [{"class": "cat", "count": 1}], "detections": [{"label": "cat"}]},
            r"detections: expected \{label, score, box\}",
        ),
    ],
)
def test_malformed_metadata_is_one_sentence(metadata, message):
    with pytest.raises(UserError, match=message):
        load_scorer("geneval")([IMAGE], metadata=[{"detections": [], **metadata}])
    with pytest.raises(UserError, match="detector: 'nowhere:it' cannot be imported"):
        load_scorer("geneval", detector="nowhere:it")


def test_the_common_checks():
    def detector(image):
        mean = float(np.asarray(image).mean())
        return [Detection("cat", 0.9, (10, 10, 40, 40))] * int(mean // 50)

    images = [Image.new("RGB", (60 + i, 50), (40 * i,) * 3) for i in range(6)]
    metadata = [
        {"tag": "two_object", "include": [{"class": "cat", "count": 1 + i % 3}]} for i in range(6)
    ]
    scorer = load_scorer("geneval", detector=detector, mode="partial")
    check_scorer(scorer, images, [""] * 6, metadata).raise_if_failed()


def test_none_stands_for_what_a_clause_does_not_have():
    """As tables with one column per field hold it."""
    clause = {"class": "cat", "count": 1, "color": None, "position": None}
    metadata = {
        "tag": "single_object",
        "include": [clause],
        "exclude": None,
        "detections": [cat(0)],
    }
    for mode in ("geneval", "strict", "partial", "partial_published"):
        assert load_scorer("geneval", mode=mode)([IMAGE], metadata=[metadata])[0] == 1
    only = {"include": None, "exclude": [{"class": "dog", "count": 1}]}
    assert load_scorer("geneval")([IMAGE], metadata=[{**only, "detections": [cat(0)]}])[0] == 1
    assert load_scorer("geneval")([IMAGE], metadata=[{**only, "detections": [dog(0)]}])[0] == 0


def credits_of(detections, include, **options):
    objects = keep_detections(
        [Detection(d["label"], d["score"], d["box"], color=d.get("color")) for d in detections], ""
    )
    return evaluate_clauses(
        objects,
        {"include": include},
        lambda found, _: [one.color for one in found],
        exact_count=True,
        **options,
    )


def test_every_demand_has_one_credit_whatever_fails_first():
    include = [
        {"class": "dog", "count": 1},
        {"class": "cat", "count": 1, "color": "red", "position": ["left of", 0]},
    ]
    right, wrong, away = cat(0, color="red"), cat(0, color="blue"), cat(90, color="red")
    for detections, published, mended in (
        ([dog(50), right], [1, 1, 1, 1], [1, 1, 1, 1]),
        ([dog(50), wrong], [1, 1, 0], [1, 1, 0, 0]),
        (
            [dog(50), away],
            [1, 1, 1, 0, 1],
            [1, 1, 1, 0],
        ),  # published: a failed position collects a 1 behind its 0
        ([dog(50)], [1, 0, 0], [1, 0, 0, 0]),
        ([right], [0, 1, 1, 0], [0, 1, 1, 0]),  # no target: no 1 behind it
    ):
        assert credits_of(detections, include, as_published=True).credits == published
        assert credits_of(detections, include).credits == mended


@pytest.mark.parametrize(
    ("detections", "message"),
    [
        (5, "expected a list of .*got int"),
        ("cat", "expected a list of .*got str"),
        ([cat(0, score=float("nan"))], "a score and a box of four numbers"),
        (
            [{"label": "cat", "score": 0.9, "box": [0, 0, float("nan"), 5]}],
            "a score and a box of four numbers",
        ),
        ([{"label": "cat", "score": 0.9, "box": [0, 0, 5]}], "a score and a box of four numbers"),
    ],
)
def test_malformed_detections_are_one_sentence(detections, message):
    metadata = {"include": [{"class": "cat", "count": 1}], "detections": detections}
    with pytest.raises(UserError, match=f"detections: .*{message}"):
        load_scorer("geneval")([IMAGE], metadata=[metadata])
    if detections == 5:
        with pytest.raises(UserError, match="metadata.exclude: expected a list"):
            load_scorer("geneval")([IMAGE], metadata=[{**metadata, "detections": [], "exclude": 5}])


def finds_a_cat(image):
    return [Detection("cat", 0.9, (0, 0, 5, 5))]


class Threshold:
    """A detector with a setting, which says so."""

    def __init__(self, value):
        self.value = value

    def __call__(self, image):
        return [Detection("cat", self.value, (0, 0, 5, 5))]


class Named(Threshold):
    def fingerprint(self):
        return f"threshold {self.value}"


def test_detectors_that_cannot_be_told_apart_share_no_cache(tmp_path):
    metadata = [{"tag": "single_object", "include": [{"class": "cat", "count": 1}]}]
    found = {}
    for kind in (Threshold, Named):
        for value in (0.1, 0.9):
            scorer = load_scorer("geneval", detector=kind(value), cache=tmp_path / "scores.sqlite")
            first, again = (scorer.score([picture(1)], metadata=metadata) for _ in range(2))
            assert first.values[0] == again.values[0] == (value > 0.3)
            found[kind, value] = (scorer.fingerprint(), again.cached)
    assert [cached for _, cached in found.values()] == [0, 0, 1, 1]
    assert found[Named, 0.1][0] != found[Named, 0.9][0]
    assert load_scorer("geneval", detector=finds_a_cat).deterministic
    assert not load_scorer("geneval", detector=lambda image: []).deterministic
    assert load_scorer("geneval").deterministic


def test_boxes_without_area_and_masks_as_lists_have_colours_too(tmp_path):
    classifier = ClipColorClassifier(load_tiny("clip-l14", tmp_path))
    mask = [[True] * 100 for _ in range(100)]
    found = [
        Detection("cat", 0.9, (10.2, 10.2, 10.4, 40)),
        Detection("cat", 0.9, (0, 0, 50, 50), mask),
    ]
    assert set(classifier(IMAGE, found, "cat")) <= set(COLORS)
    with pytest.raises(UserError, match=r"the mask of cat is \(1, 2\), the image \(100, 100\)"):
        classifier(IMAGE, [Detection("cat", 0.9, (0, 0, 5, 5), [[True, False]])], "cat")
