"""The OCR reward: targets, distances, the engine in its package, engines of one's
own."""

from __future__ import annotations

import math
from typing import Any

import pytest
from PIL import Image, ImageDraw, ImageFont

from diffalign import UserError, load_scorer
from diffalign.rewards.scorers.ocr import target_text, text_score

pytest.importorskip("rapidfuzz")


def sign(text: str) -> Image.Image:
    image = Image.new("RGB", (384, 128), "white")
    font = ImageFont.load_default(48)
    ImageDraw.Draw(image).text((30, 30), text, fill="black", font=font)
    return image


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ('a sign "OPEN" and a sign "CLOSED"', "OPEN"),
        ("a sign that says “Zum Hirsch”", "Zum Hirsch"),
        ("une affiche «Bonjour»", "Bonjour"),
        ("看板「営業中」", "営業中"),
        ("a cat's house", None),
        ('an empty sign ""', None),
        ('a sign " "', None),
        ('an unfinished "sign', None),
    ],
)
def test_targets(prompt: str, target: str | None) -> None:
    assert target_text(prompt) == target


@pytest.mark.parametrize(
    ("recognised", "target", "score"),
    [
        ("OPEN", "open", 1.0),
        ("WE ARE O PEN NOW", "Open", 1.0),  # part of it, without spaces
        ("0PEN", "open", 0.75),
        ("", "open", 0.0),
        ("something else entirely", "open", 0.0),  # never below 0
        ("ope", "open", 0.75),
    ],
)
def test_distances_are_those_of_flow_grpo(recognised: str, target: str, score: float) -> None:
    assert text_score(recognised, target) == score


def test_an_empty_target_is_refused() -> None:
    with pytest.raises(ValueError, match="target: expected a text"):
        text_score("a", " ")


def test_the_engine_reads_without_a_network() -> None:
    pytest.importorskip("rapidocr")
    scorer = load_scorer("ocr")
    images = [sign("HELLO 2049"), sign("HELLO 2049"), Image.new("RGB", (384, 128), "white")]
    prompts = ['a sign "hello 2049"', 'a sign "XYQWK"', 'a sign "hello"']
    right, wrong, empty = scorer(images, prompts).tolist()
    assert right == 1.0 and wrong < 0.3 and empty == 0.0
    assert scorer(images, prompts).tolist() == [right, wrong, empty]
    assert scorer(list(reversed(images)), list(reversed(prompts))).tolist() == [
        empty, wrong, right,
    ]  # fmt: skip


def read_size(image: Image.Image) -> str:
    """A reader for tests: the width of the image."""
    return f"{image.width} pixels"


def test_a_reader_of_ones_own() -> None:
    for reader in (read_size, f"{__name__}:read_size"):
        scorer = load_scorer("ocr", reader=reader)
        image = Image.new("RGB", (64, 32))
        assert scorer([image], ['a "64 pixels" wide one']).item() == 1.0
    assert load_scorer("ocr", reader=read_size).fingerprint() == scorer.fingerprint()


def test_a_prompt_without_text_has_no_score() -> None:
    scorer = load_scorer("ocr", reader=read_size)
    image = Image.new("RGB", (64, 32))
    result = scorer.score([image] * 2, ["a", 'a "99"'])
    assert math.isnan(result.values[0]) and result.values[1] == 0.0
    assert "names no text; put it into quotes" in result.errors[0]


def test_bad_input() -> None:
    def nothing(image: Any) -> Any:
        return None

    for reader, message in (
        ("tesseract", "reader: 'tesseract' cannot be imported"),
        ("no_such_package:read", "reader: 'no_such_package:read' cannot be imported"),
        ("math:pi", "reader: 'math:pi' is no function"),
    ):
        with pytest.raises(UserError, match=message):
            load_scorer("ocr", reader=reader)
    with pytest.raises(UserError, match="returned NoneType, not a text"):
        load_scorer("ocr", reader=nothing)([Image.new("RGB", (8, 8))], ['a "b"'])
