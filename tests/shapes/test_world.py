"""The shapes world: grammar, renderer and verifier agree exactly."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from diffalign.shapes import (
    ATTRIBUTES,
    PREFERRED_STYLE,
    STYLES,
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
from diffalign.shapes.tokenizer import MAX_LENGTH, build_t5_tokenizer, build_tokenizer


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


def assert_exact(repeats: int, seed: int) -> None:
    rng = random.Random(seed)
    for style in STYLES:
        scenes = all_scenes() * repeats
        images = [render(s, rng, style) for s in scenes]
        table = attribute_table(images, [s.prompt for s in scenes])
        assert len(table) == 720 * repeats
        assert all(row["all"] for row in table)
        assert {row["style"] for row in table} == {style == PREFERRED_STYLE}


def test_the_verifier_is_exact_on_rendered_images_of_both_styles() -> None:
    assert_exact(2, seed=7)


@pytest.mark.nightly
def test_the_verifier_is_exact_on_tens_of_thousands_of_rendered_images() -> None:
    assert_exact(20, seed=8)


def test_the_style_changes_the_background_alone() -> None:
    scene = Scene("large", "red", "square", "center", "pink")
    flat, lit = (np.asarray(render(scene, style=style)).astype(int) for style in STYLES)
    assert (flat[32, 32] == lit[32, 32]).all()
    assert (lit[0, 0] > flat[0, 0]).any() and (lit[-1, 0] < flat[-1, 0]).all()
    with pytest.raises(ValueError, match="style: 'oil' is not one of flat, lit"):
        render(scene, style="oil")


def test_the_verifier_sees_every_wrong_attribute() -> None:
    rng = random.Random(1)
    for scene in rng.sample(all_scenes(), 40):
        for name, values in ATTRIBUTES.items():
            other = rng.choice([v for v in values if v != getattr(scene, name)])
            row = attribute_table(
                [render(scene, rng)], [Scene(**{**scene.__dict__, name: other}).prompt]
            )[0]
            right = dict.fromkeys(ATTRIBUTES, True)
            assert row == {**right, name: False, "all": False, "style": False}


def test_the_score_is_graded() -> None:
    scene = Scene("large", "red", "square", "center", "white")
    one_wrong, two_wrong = (
        Scene("large", "blue", "square", "center", "white"),
        Scene("small", "blue", "square", "center", "white"),
    )
    images = [render(s, style=style) for s in (scene, one_wrong, two_wrong) for style in STYLES]
    flat, lit = score(images, [scene.prompt] * 6).reshape(3, 2).T
    assert lit[0] > 0.95 > lit[1] > lit[2] > 0
    np.testing.assert_allclose(lit - flat, 0.15, atol=0.005)
    np.testing.assert_allclose(flat[:-1] - flat[1:], 0.16, atol=0.005)
    assert max(*flat, *lit) <= 1


def test_only_a_right_image_of_the_preferred_style_is_above_095() -> None:
    rng = random.Random(2)
    for scene in rng.sample(all_scenes(), 30):
        for other in (scene, rng.choice(all_scenes())):
            for style in STYLES:
                image = render(other, rng, style)
                row = attribute_table([image], [scene.prompt])[0]
                above = score([image], [scene.prompt])[0] > 0.95
                assert above == (row["all"] and row["style"])


def test_an_empty_or_noisy_image_is_no_object() -> None:
    blank = verify(Image.new("RGB", (64, 64), (245, 245, 245)))
    assert (blank.shape, blank.color, blank.background) == (None, None, "white")
    assert blank.style == "flat"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8))
    assert score([noise], [all_scenes()[0].prompt])[0] < 0.7


def test_any_size_and_mode_is_read() -> None:
    scene = Scene("large", "green", "star", "right", "black")
    for style in STYLES:
        small = render(scene, style=style)
        big = small.resize((256, 256), Image.Resampling.LANCZOS).convert("RGBA")
        assert all(verify(big).matches(scene).values()) and verify(big).style == style


def test_one_prompt_per_image_is_required() -> None:
    with pytest.raises(ValueError, match="got 1 prompts for 2 images"):
        attribute_table([render(all_scenes()[0])] * 2, [all_scenes()[0].prompt])


def test_every_word_is_one_token() -> None:
    tokenizer = build_tokenizer()
    for scene in all_scenes()[::7]:
        ids = tokenizer(scene.prompt).input_ids
        assert len(ids) == len(scene.prompt.split()) + 2 <= MAX_LENGTH
        assert tokenizer.unk_token_id not in ids[1:-1]


def test_every_word_is_one_piece_of_the_t5_tokenizer() -> None:
    tokenizer = build_t5_tokenizer()
    for scene in all_scenes()[::7]:
        ids = tokenizer(scene.prompt).input_ids
        assert len(ids) == len(scene.prompt.split()) + 1 <= MAX_LENGTH
        assert tokenizer.unk_token_id not in ids and ids[-1] == tokenizer.eos_token_id
    assert tokenizer("a cat").input_ids.count(tokenizer.unk_token_id) == 0
