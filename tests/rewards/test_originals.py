"""Our scorers against the published code: numbers that `originals/` wrote by running it
on the same tiny random weights."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models import MODELS, load_tiny
from PIL import Image
from tiers import by_default

from diffalign import load_scorer
from diffalign.rewards.checkpoints import read_state
from diffalign.rewards.registry import find_class
from diffalign.rewards.scorers import imagereward
from diffalign.rewards.testing import reference_models as checkpoints

FIXTURES = Path(__file__).parent / "fixtures"
STRIDE = 16


def fixture(name: str) -> dict:
    return json.loads((FIXTURES / f"{name}.json").read_text())


def arrays(name: str):
    return np.load(FIXTURES / f"{name}.npz")


def all_pairs(scorer, images, prompts) -> torch.Tensor:
    """(images, prompts) scores in one call. The published code drops transparency,
    while this package lays it on white."""
    flat = [opaque(image) for image in images for _ in prompts]
    return scorer(flat, list(prompts) * len(images)).reshape(len(images), len(prompts))


def opaque(image):
    return image.convert("RGB") if image.mode in ("RGBA", "LA") else image


def spelled(prompts) -> list[int]:
    """Places of the prompts that spell CLIP's control tokens."""
    return [
        i
        for i, prompt in enumerate(prompts)
        if "<|endoftext|>" in prompt or "<|startoftext|>" in prompt
    ]


def pixel_digests(scorer, images) -> list[str]:
    return [
        hashlib.sha256(
            np.ascontiguousarray(scorer.preprocess.exact(image).numpy()).tobytes()
        ).hexdigest()
        for image in images
    ]


def gradient_of(scorer, inputs: torch.Tensor, prompts) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and their gradient in normalised inputs of the tower's own size."""
    leaf = inputs.clone().requires_grad_(True)
    scores = scorer.similarity(
        scorer.image_features(leaf), scorer.prompt_features(prompts, len(prompts))
    )
    scores.sum().backward()
    return scores.detach(), leaf.grad


@pytest.fixture(scope="module")
def images():
    return checkpoints.sample_images()


# ImageReward


def test_imagereward_tokens_and_pixels_are_exact(tmp_path, images):
    expected = fixture("imagereward")
    scorer = load_tiny("imagereward", tmp_path)
    ids, mask = scorer.text_features(expected["prompts"])
    assert ids.tolist() == expected["input_ids"]
    assert mask.sum(1).tolist() == expected["attended"]
    assert pixel_digests(scorer, images.values()) == expected["pixels_sha256"]


def test_imagereward_rewards(tmp_path, images):
    expected = fixture("imagereward")
    single = all_pairs(load_tiny("imagereward", tmp_path), images.values(), expected["prompts"])
    # The published code resizes in the image's own mode, palette and transparency too;
    # this package resizes the RGB they show.
    same = [i for i, image in enumerate(images.values()) if image.mode in ("RGB", "L")]
    assert len(same) == len(images) - 3
    assert float((single - torch.tensor(expected["rewards_fp32"]))[same].abs().max()) <= 5e-5
    scorer = load_tiny("imagereward", tmp_path / "wide", dtype="float64")
    wide = []
    with torch.no_grad():
        for image in images.values():
            # The published pixels are normalised in float32; only then does everything
            # go on in float64.
            features = scorer.image_features(
                scorer.preprocess.normalise(scorer.preprocess.exact(image)[None]).double()
            )
            many = features.expand(len(expected["prompts"]), -1, -1)
            wide.append(scorer.similarity(many, scorer.prompt_features(expected["prompts"], 64)))
    assert (
        float(
            (torch.stack(wide) - torch.tensor(expected["rewards_fp64"], dtype=torch.float64))
            .abs()
            .max()
        )
        <= 1e-10
    )


def test_imagereward_gradient(tmp_path):
    expected, sampled = fixture("imagereward")["score_gard"], arrays("imagereward")
    prompts = [checkpoints.PROMPTS[i] for i in expected["prompts"]]
    inputs = torch.from_numpy(checkpoints.random_model_input(0))
    rewards, gradient = gradient_of(load_tiny("imagereward", tmp_path), inputs, prompts)
    np.testing.assert_allclose(rewards, expected["rewards"], atol=5e-5)
    np.testing.assert_allclose(gradient[..., ::STRIDE, ::STRIDE], sampled["gradient"], atol=2e-5)
    rewards, gradient = gradient_of(
        load_tiny("imagereward", tmp_path / "wide", dtype="float64"), inputs.double(), prompts
    )
    np.testing.assert_allclose(rewards, expected["rewards_fp64"], atol=1e-10)
    np.testing.assert_allclose(
        gradient[..., ::STRIDE, ::STRIDE], sampled["gradient_fp64"], atol=1e-10
    )


def test_all_625_keys_of_the_full_size_are_mapped():
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    from diffalign.rewards.checkpoints import build_empty

    shapes = json.loads(gzip.decompress((FIXTURES / "imagereward_full_keys.json.gz").read_bytes()))[
        "shapes"
    ]
    assert len(shapes) == 625
    parts = imagereward.split_keys(
        {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    )
    assert len(parts["dropped"]) == 5
    vision, text = imagereward.architecture(None)
    modules = {
        "vision": build_empty(lambda: BlipVisionModel(BlipVisionConfig(**vision))),
        "text": build_empty(lambda: BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)),
    }
    for name, module in modules.items():
        found = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        assert found == {key: tuple(value.shape) for key, value in parts[name].items()}
    assert {key: tuple(value.shape) for key,
     value in parts["head"].items() if key.endswith("weight")} == {
        "0.weight": (1024, 768), "2.weight": (128, 1024), "4.weight": (64, 128),
        "6.weight": (16, 64), "7.weight": (1, 16),
    }  # fmt: skip
    counts = [
        sum(value.numel() for value in parts[name].values())
        for name in ("vision", "text", "head", "dropped")
    ]
    assert counts[:3] == [303_301_632, 141_977_088, 927_969]
    assert sum(counts[:3]) == imagereward.ImageReward.spec.parameters


@pytest.mark.parametrize(
    "config",
    [
        {"vision": {"layer_norm_eps": 1e-5}},
        {"text": {"num_attention_heads": 8}},
        {"text": {"hidden_act": "gelu_new"}},
    ],
)
def test_the_silent_mistakes_would_show(config, tmp_path, images):
    """transformers' defaults load silently and are wrong; the fixture must tell."""
    expected = fixture("imagereward")
    arguments = MODELS["imagereward"](tmp_path)
    merged = {
        part: {**arguments["config"][part], **config.get(part, {})} for part in ("vision", "text")
    }
    found = all_pairs(
        load_scorer("imagereward", **{**arguments, "config": merged}),
        images.values(),
        expected["prompts"],
    )
    assert float((found - torch.tensor(expected["rewards_fp32"])).abs().max()) > 2e-4


# PickScore


def test_pickscore_tokens_and_pixels_are_exact(tmp_path, images):
    expected = fixture("pickscore")
    scorer = load_tiny("pickscore", tmp_path)
    inputs = scorer.clip.text_inputs(expected["prompts"])
    found = [
        row[: int(mask.sum())].tolist()
        for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    rows = {
        i: row
        for i, row in enumerate(expected["input_ids"])
        if i not in spelled(expected["prompts"])
    }
    assert {i: found[i] for i in rows} == rows
    # A prompt that spells a control token is text, as under CLIP's own tokenizer;
    # transformers' would end the prompt there.
    own = fixture("hpsv2_antialias")["input_ids"]
    assert all(
        found[i] == [token for token in own[i] if token] for i in spelled(expected["prompts"])
    )
    assert pixel_digests(scorer, images.values()) == expected["pixels_sha256"]
    prepared = torch.stack(
        [scorer.preprocess.normalise(scorer.preprocess.exact(image)) for image in images.values()]
    )
    np.testing.assert_allclose(
        prepared[..., ::STRIDE, ::STRIDE], arrays("pickscore")["model_input"], atol=1e-6
    )


def test_pickscore_scores_and_gradient(tmp_path, images):
    expected = fixture("pickscore")
    scorer = load_tiny("pickscore", tmp_path)
    found = all_pairs(scorer, images.values(), expected["prompts"])
    kept = [i for i in range(len(expected["prompts"])) if i not in spelled(expected["prompts"])]
    assert len(kept) >= 17
    assert float((found - torch.tensor(expected["scores"]))[:, kept].abs().max()) <= 2e-4
    assert float(scorer.clip.module.logit_scale) == pytest.approx(expected["logit_scale"], abs=1e-6)
    prompts = [checkpoints.PROMPTS[i] for i in expected["gradient"]["prompts"]]
    scores, gradient = gradient_of(
        scorer, torch.from_numpy(checkpoints.random_model_input(1)), prompts
    )
    np.testing.assert_allclose(scores, expected["gradient"]["scores"], atol=2e-4)
    scale = np.abs(arrays("pickscore")["gradient"]).max()
    np.testing.assert_allclose(
        gradient[..., ::STRIDE, ::STRIDE],
        arrays("pickscore")["gradient"],
        atol=2e-5 * max(1.0, scale),
    )


# HPSv2


@by_default(values=1)
@pytest.mark.parametrize(
    ("name", "antialias"), [("hpsv2_legacy", False), ("hpsv2_antialias", True)]
)
@pytest.mark.parametrize("version", ["hpsv2.0", "hpsv2.1"])
def test_hpsv2_letterbox_tokens_and_scores(name, antialias, version, tmp_path, images):
    expected = fixture(name)
    scorer = load_tiny(version, tmp_path, antialias=antialias)
    ids = scorer.clip.tokenizer(expected["prompts"])
    assert [[token for token in row.tolist() if token] for row in ids] == [
        [t for t in row if t] for row in expected["input_ids"]
    ]
    kept = [images[key] for key in expected["model_input_images"]]
    prepared = torch.stack(
        [scorer.preprocess.normalise(scorer.preprocess.exact(image)) for image in kept]
    )
    np.testing.assert_allclose(
        prepared[..., ::STRIDE, ::STRIDE], arrays(name)["model_input"], atol=3e-5
    )
    rows = [
        row
        for key, row in zip(expected["images"], expected["scores"], strict=True)
        if key in expected["model_input_images"]
    ]
    found = all_pairs(scorer, kept, expected["prompts"])
    assert float((found - torch.tensor(rows)).abs().max()) <= 5e-6


def test_hpsv2_gradient(tmp_path):
    expected = fixture("hpsv2_antialias")["gradient"]
    prompts = [checkpoints.PROMPTS[i] for i in expected["prompts"]]
    scores, gradient = gradient_of(
        load_tiny("hpsv2.1", tmp_path), torch.from_numpy(checkpoints.random_model_input(2)), prompts
    )
    np.testing.assert_allclose(scores, expected["scores"], atol=5e-6)
    np.testing.assert_allclose(
        gradient[..., ::STRIDE, ::STRIDE], arrays("hpsv2_antialias")["gradient"], atol=2e-6
    )


def test_hpsv2_converts_what_breaks_the_published_code(tmp_path, images):
    """RGBA goes into its first convolution with four channels; ours is the picture on
    white."""
    assert set(fixture("hpsv2_antialias")["errors"]) == {"RGBA_180x260"}
    scorer = load_tiny("hpsv2.1", tmp_path)
    picture = images["RGBA_180x260"]
    on_white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert(
        "RGB"
    )
    both = scorer([picture, on_white], ["a photo of a red cat"] * 2)
    assert float(both[0]) == pytest.approx(float(both[1]), abs=5e-6) and both.isfinite().all()


# MPS


@by_default(values=1)
@pytest.mark.parametrize("threshold", [0.3, 0.01])
def test_mps_scores_and_selected_tokens(threshold, tmp_path, images):
    expected = fixture("mps")
    scorer = load_tiny("mps", tmp_path, threshold=threshold)
    kept = [i for i in range(len(expected["prompts"])) if i not in spelled(expected["prompts"])]
    tokens, _, selected = scorer.text_features(expected["prompts"])
    np.testing.assert_array_equal(
        selected.sum(1)[kept], np.array(expected["kept_tokens"][str(threshold)])[kept]
    )
    near = (tokens @ scorer._condition.T).amax(-1)
    similarity = near / near.amax(-1, keepdim=True)
    np.testing.assert_allclose(similarity[kept], arrays("mps")["similarity"][kept], atol=2e-5)
    # In one batch of all images and prompts; the published code gives single ones.
    found = all_pairs(scorer, images.values(), expected["prompts"])
    assert (
        float(
            (found - torch.tensor(expected[f"scores_threshold_{threshold}"]))[:, kept].abs().max()
        )
        <= 2e-4
    )


def test_mps_gradient(tmp_path):
    expected = fixture("mps")["gradient_fp64"]
    scorer = load_tiny("mps", tmp_path, threshold=0.01, dtype="float64")
    inputs = torch.from_numpy(checkpoints.random_model_input(3)).double()
    scores, gradient = gradient_of(scorer, inputs, [checkpoints.PROMPTS[0]] * 2)
    np.testing.assert_allclose(scores, expected["scores"], atol=1e-6)
    np.testing.assert_allclose(
        gradient[..., ::STRIDE, ::STRIDE], arrays("mps")["gradient_fp64"], atol=1e-6
    )


def test_mps_does_not_depend_on_the_batch(tmp_path, images):
    scorer = load_tiny("mps", tmp_path, batch_size=64)
    prompts = [checkpoints.PROMPTS[i % 9] for i in range(len(images))]
    together = scorer(list(images.values()), prompts)
    alone = torch.cat(
        [scorer([image], [prompt]) for image, prompt in zip(images.values(), prompts, strict=True)]
    )
    torch.testing.assert_close(together, alone, atol=2e-4, rtol=0)


# Aesthetic heads


@pytest.mark.parametrize("version", [1, 2])
def test_aesthetic_heads(version, tmp_path):
    expected = fixture("aesthetic")[f"v{version}"]
    features = torch.from_numpy(checkpoints.random_features())
    features = features / features.norm(dim=-1, keepdim=True)
    state = read_state(checkpoints.write_aesthetic(tmp_path, version))
    scorer_class = find_class(f"aesthetic-v{version}")[0]
    scorer = scorer_class.__new__(scorer_class)
    for dtype, values, tolerance in (
        (torch.float32, expected["outputs"], 5e-6),
        (torch.float64, expected["outputs_fp64"], 1e-7),
    ):
        found = scorer.build_head(dict(state), 768, dtype)(features.to(dtype)).squeeze(-1)
        np.testing.assert_allclose(found, values, rtol=tolerance, atol=tolerance)
    assert scorer_class.spec.sha256 == expected["published_sha256"]
