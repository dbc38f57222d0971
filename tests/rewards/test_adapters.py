"""Scorers in the shapes in which other trainers call a reward."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.errors import UserError
from diffalign.rewards import as_ddpo, as_flow_factory, as_trl, load_scorer
from diffalign.rewards.base import Item, Scorer
from diffalign.rewards.spec import ScorerSpec


class Length(Scorer):
    """Mean of the image plus the prompt's length; missing for black images."""

    spec = ScorerSpec(key="adapter-length", summary="length")

    def score_batch(self, items: list[Item]):
        means = [float(np.asarray(item.image.convert("RGB")).mean()) for item in items]
        return [
            mean + len(item.prompt) if mean else None
            for mean, item in zip(means, items, strict=True)
        ]


class Counting(Scorer):
    """The number that the metadata asks for."""

    spec = ScorerSpec(key="adapter-counting", summary="metadata", requires=("image", "metadata"))

    def score_batch(self, items: list[Item]):
        return [float(item.metadata["count"]) for item in items]


def pictures(count: int = 3) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(1, 256, (6, 8, 3), dtype=np.uint8)) for _ in range(count)]


PROMPTS = ["a", "bb", "ccc"]


def expected() -> list[float]:
    return [
        float(np.asarray(image).mean()) + len(prompt)
        for image, prompt in zip(pictures(), PROMPTS, strict=True)
    ]


def test_ddpo_takes_both_layouts_and_lists():
    reward = as_ddpo(Length())
    hwc = np.stack([np.asarray(image) for image in pictures()])
    chw = torch.from_numpy(hwc.copy()).permute(0, 3, 1, 2)
    forms = [
        hwc,
        torch.from_numpy(hwc),
        chw,
        chw.float() / 255,
        (chw.float() / 255).numpy(),
        (chw.double() / 255),
        pictures(),
    ]
    for images in forms:
        scores, info = reward(images, tuple(PROMPTS), [{}] * 3)
        assert scores.dtype == torch.float32 and scores.shape == (3,)
        assert scores.tolist() == pytest.approx(expected(), abs=1e-4)
        assert info == {"errors": {}}
    assert reward(pictures(), PROMPTS, ())[0].tolist() == pytest.approx(expected())
    assert reward.__name__ == "adapter-length"


def test_ddpo_half_precision_images_are_near_the_exact_ones():
    hwc = np.stack([np.asarray(image) for image in pictures()])
    half = (torch.from_numpy(hwc).permute(0, 3, 1, 2).float() / 255).half()
    for images in (half, half.numpy()):
        assert as_ddpo(Length())(images, PROMPTS, None)[0].tolist() == pytest.approx(
            expected(), abs=0.5
        )


def test_ddpo_missing_scores_are_nan_and_lengths_are_checked():
    images = [*pictures(2), Image.new("RGB", (4, 4))]
    scores, _ = as_ddpo(Length())(images, PROMPTS, None)
    assert torch.isnan(scores).tolist() == [False, False, True]
    with pytest.raises(UserError, match="2 prompts for 3 images"):
        as_ddpo(Length())(images, PROMPTS[:2], None)


def test_trl_reads_columns_and_ignores_the_trainers_extras():
    reward = as_trl(Length())
    extras = {
        "trainer_state": object(),
        "log_extra": print,
        "log_metric": print,
        "completion_ids": [[1]] * 3,
    }
    found = reward(
        prompts=PROMPTS, completions=["x"] * 3, image=pictures(), other=[1, 2, 3], **extras
    )
    assert isinstance(found, list) and found == pytest.approx(expected())
    assert all(type(value) is float for value in found)
    assert reward.__name__ == "adapter-length"


def test_trl_reads_conversations_generated_images_and_named_columns():
    conversations = [
        [
            {"role": "system", "content": "draw"},
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": "ok"},
        ]
        for prompt in PROMPTS
    ]
    parts = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
        for prompt in PROMPTS
    ]
    for prompts in (conversations, parts):
        assert as_trl(Length(), "completions")(
            prompts=prompts, completions=pictures()
        ) == pytest.approx(expected())
    named = as_trl(Length(), image_column="picture", prompt_column="caption")
    assert named(
        prompts=["", "", ""], completions=[], picture=pictures(), caption=PROMPTS
    ) == pytest.approx(expected())


def test_trl_gives_none_for_missing_scores_and_unreadable_files(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    images = [pictures()[0], Image.new("RGB", (4, 4)), tmp_path / "broken.png"]
    found = as_trl(Length())(prompts=PROMPTS, completions=[], image=images)
    assert found == [pytest.approx(expected()[0]), None, None]


def test_trl_passes_metadata_from_a_column_or_from_all():
    reward = as_trl(Counting())
    assert reward(prompts=PROMPTS, completions=[], image=pictures(), count=[3, 1, 2], note="x") == [
        3.0,
        1.0,
        2.0,
    ]
    rows = [{"count": 5}, {"count": 6}, {"count": 7}]
    assert reward(prompts=PROMPTS, completions=[], image=pictures(), metadata=rows) == [
        5.0,
        6.0,
        7.0,
    ]


def test_trl_names_a_column_that_is_missing():
    with pytest.raises(
        UserError, match="no column 'image'; it has prompt, prompts, completions, picture"
    ):
        as_trl(Length())(prompts=PROMPTS, completions=["x"], picture=pictures())
    with pytest.raises(UserError, match="no column 'caption'"):
        as_trl(Length(), prompt_column="caption")(prompts=PROMPTS, completions=[], image=pictures())


def test_flow_factory_is_called_with_keywords():
    reward = as_flow_factory(Length())
    assert reward.required_fields == ("prompt", "image") and reward.use_tensor_inputs is False
    tensors = [
        torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 for image in pictures()
    ]
    for images in (pictures(), tensors):
        output = reward(prompt=PROMPTS, image=images, video=None, condition_images=None)
        assert output.rewards.tolist() == pytest.approx(expected(), abs=1e-4)
        assert output.extra_info == {"errors": {}}
    with pytest.raises(UserError, match="image: adapter-length"):
        reward(prompt=PROMPTS)


def test_flow_factory_reads_encoded_metadata():
    reward = as_flow_factory(Counting())
    assert reward.required_fields == ("image", "metadata")
    rows = [json.dumps({"count": i}) for i in range(3)]
    assert reward(prompt=PROMPTS, image=pictures(), metadata=rows).rewards.tolist() == [
        0.0,
        1.0,
        2.0,
    ]


def test_a_real_scorer_gives_its_own_numbers_through_every_adapter():
    from diffalign.shapes import render, split_scenes

    scenes = split_scenes()[0][:3]
    images, prompts = (
        [render(scene) for scene in scenes],
        [scene.prompt for scene in reversed(scenes)],
    )
    scorer = load_scorer("shapes")
    direct = scorer(images, prompts).tolist()
    assert (
        as_ddpo(scorer)(np.stack([np.asarray(image) for image in images]), prompts, [])[0].tolist()
        == direct
    )
    assert as_trl(scorer)(prompts=prompts, completions=[], image=images) == direct
    assert as_flow_factory(scorer)(prompt=prompts, image=images).rewards.tolist() == direct
