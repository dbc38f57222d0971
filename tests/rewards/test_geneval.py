"""GenEval's clauses against what the published evaluation said of the same detections."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from models import load_tiny
from PIL import Image

from diffalign import UserError, load_scorer
from diffalign.rewards.check import check_scorer
from diffalign.rewards.geneval import COLORS, ClipColorClassifier, Detection, relative_position

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
    (item,) = scorer._items([_input()], [""], [metadata])
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
    counting = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "detections": [cat(0), cat(30), cat(60)]}
    assert load_scorer("geneval")([IMAGE], metadata=[counting])[0] == 1
    assert load_scorer("geneval", mode="strict")([IMAGE], metadata=[counting])[0] == 0
    assert load_scorer("geneval", mode="partial")([IMAGE], metadata=[counting])[0] == 0.5
    many = {**counting, "detections": [cat(8 * i) for i in range(12)]}
    assert load_scorer("geneval", mode="partial")([IMAGE], metadata=[many])[0] == 0
    assert load_scorer("geneval", mode="partial_published")([IMAGE], metadata=[many])[0] == -4
    misplaced = {
        "tag": "position",
        "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
        "detections": [cat(10), dog(70)],
    }
    assert load_scorer("geneval", mode="strict")([IMAGE], metadata=[misplaced])[0] == 0
    assert float(load_scorer("geneval", mode="partial")([IMAGE], metadata=[misplaced])[0]) == pytest.approx(2 / 3)
    assert load_scorer("geneval", mode="partial_published")([IMAGE], metadata=[misplaced])[0] == 0.75
    with pytest.raises(UserError, match="mode: expected geneval, strict"):
        load_scorer("geneval", mode="loose")


def test_a_detector_is_called_and_a_missing_colour_is_missing():
    calls = []

    def detector(image):
        calls.append(image.size)
        return [Detection("cat", 0.9, (10, 10, 40, 40))]

    scorer = load_scorer("geneval", detector=detector)
    metadata = [{"tag": "single_object", "include": [{"class": "cat", "count": 1}]}] * 2
    assert scorer([picture(1), picture(2)], metadata=metadata).tolist() == [1, 1] and calls == [(100, 100)] * 2
    colored = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}
    result = scorer.score([IMAGE], metadata=[colored])
    assert result.values.isnan().all() and "names a colour" in result.errors[0]
    scorer = load_scorer("geneval", detector=detector, color_classifier=lambda image, found, label: ["red"] * len(found))
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
        ({"include": [{"class": "cat", "count": 0}]}, r"include\[0\].count: expected int >= 1, got 0"),
        ({"include": [{"class": "cat", "count": 1, "color": "teal"}]}, r"color: expected one of red"),
        ({"include": [{"class": "cat", "count": 1, "position": ["left of", 0]}]}, r"position: expected .*an earlier clause"),
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
    metadata = [{"tag": "two_object", "include": [{"class": "cat", "count": 1 + i % 3}]} for i in range(6)]
    scorer = load_scorer("geneval", detector=detector, mode="partial")
    check_scorer(scorer, images, [""] * 6, metadata).raise_if_failed()
