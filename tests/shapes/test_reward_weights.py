"""The committed learned reward: plain transformers loads it, it is good but not
perfect, and its maker repeats itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.errors import ConfigError, UserError
from diffalign.shapes import ATTRIBUTES, held_out_prompts, reward_weights_dir, train_prompts

SETTINGS = {
    "num_prompts": 12,
    "images_per_prompt": 2,
    "steps": 3,
    "warmup_steps": 3,
    "renderings": 2,
    "eval_prompts": 2,
    "eval_images_per_prompt": 2,
}
TINY = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import CLIPModel

    loaded, info = CLIPModel.from_pretrained(reward_weights_dir(), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return loaded.eval()


def plain_scores(model: Any, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
    """PickScore's few lines, with transformers alone."""
    from transformers import AutoImageProcessor, AutoTokenizer

    processor = AutoImageProcessor.from_pretrained(reward_weights_dir())
    tokenizer = AutoTokenizer.from_pretrained(reward_weights_dir())
    with torch.no_grad():
        text = tokenizer(prompts, padding=True, truncation=True, max_length=16, return_tensors="pt")
        texts = model.get_text_features(**text).pooler_output
        pictures = model.get_image_features(
            **processor(images=images, return_tensors="pt")
        ).pooler_output
        return model.logit_scale.exp() * torch.nn.functional.cosine_similarity(texts, pictures)


def test_the_weights_are_small_float32_safetensors_and_nothing_else_is_large() -> None:
    from safetensors import safe_open

    folder = reward_weights_dir()
    assert (folder / "model.safetensors").stat().st_size <= 2_000_000
    assert (
        sum(
            p.stat().st_size
            for p in folder.rglob("*")
            if p.is_file() and p.name != "model.safetensors"
        )
        < 100_000
    )
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(k).dtype for k in file.keys() if "position_ids" not in k} == {  # noqa: SIM118
            torch.float32
        }


def test_the_folder_is_a_clip_with_exact_gelu_and_its_own_end_token(model: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reward_weights_dir())
    assert model.config.text_config.hidden_act == model.config.vision_config.hidden_act == "gelu"
    assert model.config.text_config.eos_token_id == tokenizer.eos_token_id
    prompts = held_out_prompts()[:3]
    short, padded = (
        tokenizer(prompts, padding=p, truncation=True, max_length=16, return_tensors="pt")
        for p in (True, "max_length")
    )
    with torch.no_grad():
        a, b = (model.get_text_features(**ids).pooler_output for ids in (short, padded))
    torch.testing.assert_close(
        a, b, atol=1e-5, rtol=0
    )  # the end token is pooled, not the padding after it
    assert (a[0] - a[1]).abs().max() > 1e-2


def test_right_images_mostly_beat_images_with_one_wrong_attribute(model: Any) -> None:
    from tools.shapes.reward_card import one_wrong

    prompts, hits = held_out_prompts()[:40], []
    for name in (*ATTRIBUTES, "style"):
        images = one_wrong(prompts, name, seed=7)
        right, wrong = (
            [Image.fromarray(image) for image in images[:, column]] for column in (0, 1)
        )
        hits.append(
            (plain_scores(model, right, prompts) > plain_scores(model, wrong, prompts)).numpy()
        )
    assert np.mean(hits) > 0.7
    assert np.mean(hits) < 1.0  # imperfect on purpose


def test_training_and_scoring_see_the_same_pixels(model: Any) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer

    from tools.shapes import reward_data as maker

    images = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    prompts = held_out_prompts()[:6]
    pictures = [Image.fromarray(image) for image in images]
    processed = AutoImageProcessor.from_pretrained(reward_weights_dir())(
        images=pictures, return_tensors="pt"
    ).pixel_values
    torch.testing.assert_close(maker.preprocess(images), processed, atol=1e-5, rtol=0)
    ours = maker.score_pixels(
        model, AutoTokenizer.from_pretrained(reward_weights_dir()), images[:, None], prompts
    )[:, 0]
    torch.testing.assert_close(ours, plain_scores(model, pictures, prompts), atol=1e-4, rtol=0)


def test_the_card_states_the_measured_figures() -> None:
    results = json.loads((reward_weights_dir() / "accuracy.json").read_text())
    card = (reward_weights_dir() / "README.md").read_text()
    accuracy = results["pairwise_accuracy"]["all"]
    assert 0.65 <= accuracy["rate"] <= 0.90 and accuracy["pairs"] >= 2000
    # It has learned both parts of the preferences: follow the prompt, and look good.
    assert results["pairwise_accuracy"]["attributes"]["low"] > 0.75
    assert results["pairwise_accuracy"]["style"]["low"] > 0.6
    assert accuracy["low"] < accuracy["rate"] < accuracy["high"]
    for share in (*results["pairwise_accuracy"].values(), *results["attribute_accuracy"].values()):
        assert f"{share['rate']:.1%} | {share['low']:.1%} to {share['high']:.1%}" in card
    for image in ("before", "after", "perfect"):
        assert f"{results['exploit'][image]['reward']:.2f}" in card
    assert results["exploit"]["after"]["reward"] > results["exploit"]["perfect"]["reward"]
    assert results["bytes"] == (reward_weights_dir() / "model.safetensors").stat().st_size
    assert results["command"] in card


def test_the_committed_settings_are_those_of_data_and_recipe() -> None:
    from dataclasses import asdict

    from diffalign.recipe import read_yaml
    from diffalign.reward_training.run_file import reward_run_from_dict
    from tools.shapes.reward_data import RewardDataConfig

    results = json.loads((reward_weights_dir() / "accuracy.json").read_text())
    assert results["settings"] == asdict(RewardDataConfig())
    config = Path(__file__).parents[2] / "configs" / "reward" / "shapes_clip.yaml"
    recipe = read_yaml(config)
    train = asdict(reward_run_from_dict(recipe).train)
    names = list(recipe["train"])
    assert [results["training"][name] for name in names] == [train[name] for name in names]


def test_labels_are_bradley_terry_with_flips() -> None:
    from tools.shapes.reward_data import RewardDataConfig, noisy_labels

    truth = np.tile([0.95, 0.90, 0.0], (20_000, 1))  # pairs: 0.05, 0.95 and 0.90 apart
    labels = noisy_labels(truth, RewardDataConfig(temperature=0.05, label_flips=0.1))
    sigmoid = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(
        labels.mean(0), [0.9 * sigmoid + 0.1 * (1 - sigmoid), 0.9, 0.9], atol=0.01
    )
    assert (
        labels == noisy_labels(truth, RewardDataConfig(temperature=0.05, label_flips=0.1))
    ).all()


@pytest.mark.nightly
def test_the_recipe_repeats_itself_and_goes_on_from_drawn_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The three commands of the card, twice, with few images and steps."""
    from diffalign import cli
    from diffalign.generation import sampling
    from tools.shapes import reward_card
    from tools.shapes import reward_data as maker

    prompts: list[str] = []
    generate = sampling.generate

    def recording(pipe: Any, texts: list[str], *args: Any, **kwargs: Any) -> Any:
        prompts.extend(texts)
        return generate(pipe, texts, *args, **kwargs)

    monkeypatch.setattr(sampling, "generate", recording)
    config = Path(__file__).parents[2] / "configs" / "reward" / "shapes_clip.yaml"
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        maker.main(["--output_dir", "shapes-clip", *TINY])
        few = ["--train.max_steps", "3", "--train.warmup_steps", "1", "--train.val", "0.2"]
        few += ["--train.test", "0.2", "--train.eval_steps", "2"]
        assert cli.run(["reward", "train", "--config", str(config), *few]) == 0
        options = ["--data", "shapes-clip", "--reward", "rewards/shapes-clip"]
        reward_card.main([*options, "--output_dir", "weights"])
    assert set(prompts) == set(train_prompts()[:12]) | set(held_out_prompts()[:2])
    drawn = len(prompts)
    names = {p.name for p in (tmp_path / "a" / "weights").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    for name in names:
        one, other = ((tmp_path / run / "weights" / name).read_bytes() for run in ("a", "b"))
        assert one == other, name
    monkeypatch.chdir(tmp_path / "a")
    next(Path("shapes-clip/drawn").glob("train-0-*.npy")).unlink()
    maker.main(["--output_dir", "shapes-clip", *TINY])
    assert len(prompts) == drawn + 12  # one file was drawn again, nothing else
    with pytest.raises(UserError, match="--steps 3"):
        maker.main(["--output_dir", "shapes-clip", *TINY, "--steps", "4"])


def test_settings_out_of_range_are_named() -> None:
    from tools.shapes.reward_data import RewardDataConfig

    with pytest.raises(ConfigError, match="--num_prompts"):
        RewardDataConfig(num_prompts=601)
    with pytest.raises(ConfigError, match="--label_flips"):
        RewardDataConfig(label_flips=0.5)
    with pytest.raises(ConfigError, match="--temperature"):
        RewardDataConfig(temperature=0.0)
