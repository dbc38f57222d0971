"""The shapes world: grammar, renderer and verifier agree exactly."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from diffalign.shapes import (
    ATTRIBUTES,
    Scene,
    all_scenes,
    attribute_table,
    held_out_prompts,
    parse_prompt,
    render,
    score,
    split_scenes,
    train_prompts,
    verify,
)
from diffalign.shapes.tokenizer import MAX_LENGTH, build_tokenizer


def test_every_prompt_is_read_back() -> None:
    scenes = all_scenes()
    assert len(scenes) == len({s.prompt for s in scenes}) == 720
    assert all(parse_prompt(s.prompt) == s for s in scenes)
    assert parse_prompt("  A small RED circle on the left of a gray background ").color == "red"


def test_the_held_out_combinations_are_apart_and_balanced() -> None:
    train, held_out = split_scenes()
    assert len(train) == 600 and len(held_out) == 120
    assert not set(train) & set(held_out)
    assert set(train_prompts()) | set(held_out_prompts()) == {s.prompt for s in all_scenes()}
    for name, values in ATTRIBUTES.items():
        assert {getattr(s, name) for s in held_out} == set(values)


def test_foreign_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="not of the shapes world"):
        parse_prompt("a photo of a cat")
    with pytest.raises(ValueError, match="color: 'mauve' is not one of"):
        Scene("small", "mauve", "circle", "left", "gray")


def test_the_verifier_is_exact_on_thousands_of_rendered_images() -> None:
    rng = random.Random(7)
    scenes = all_scenes() * 4
    table = attribute_table([render(s, rng) for s in scenes], [s.prompt for s in scenes])
    assert len(table) == 2880
    assert all(row["all"] for row in table)


def test_the_verifier_sees_every_wrong_attribute() -> None:
    rng = random.Random(1)
    for scene in rng.sample(all_scenes(), 40):
        for name, values in ATTRIBUTES.items():
            other = rng.choice([v for v in values if v != getattr(scene, name)])
            row = attribute_table(
                [render(scene, rng)], [Scene(**{**scene.__dict__, name: other}).prompt]
            )[0]
            assert row == {**dict.fromkeys(ATTRIBUTES, True), name: False, "all": False}


def test_the_score_is_graded() -> None:
    scene = Scene("large", "red", "square", "center", "white")
    one_wrong, two_wrong = (
        Scene("large", "blue", "square", "center", "white"),
        Scene("small", "blue", "square", "center", "white"),
    )
    images = [render(s) for s in (scene, one_wrong, two_wrong)]
    scores = score(images, [scene.prompt] * 3)
    assert scores[0] > 0.95 > scores[1] > scores[2] > 0
    assert scores.max() <= 1


def test_an_empty_or_noisy_image_is_no_object() -> None:
    blank = verify(Image.new("RGB", (64, 64), (245, 245, 245)))
    assert (blank.shape, blank.color, blank.background) == (None, None, "white")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8))
    assert score([noise], [all_scenes()[0].prompt])[0] < 0.7


def test_any_size_and_mode_is_read() -> None:
    scene = Scene("large", "green", "star", "right", "black")
    big = render(scene).resize((256, 256), Image.Resampling.LANCZOS).convert("RGBA")
    assert all(verify(big).matches(scene).values())


def test_one_prompt_per_image_is_required() -> None:
    with pytest.raises(ValueError, match="got 1 prompts for 2 images"):
        attribute_table([render(all_scenes()[0])] * 2, [all_scenes()[0].prompt])


def test_every_word_is_one_token() -> None:
    tokenizer = build_tokenizer()
    for scene in all_scenes()[::7]:
        ids = tokenizer(scene.prompt).input_ids
        assert len(ids) == len(scene.prompt.split()) + 2 <= MAX_LENGTH
        assert tokenizer.unk_token_id not in ids[1:-1]
