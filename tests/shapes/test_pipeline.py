"""The committed weights: plain diffusers loads them; they draw well, if imperfectly."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from diffalign.generation.sampling import generate
from diffalign.shapes import (
    EMBEDDED_MODELS,
    PREFERRED_STYLE,
    attribute_table,
    held_out_prompts,
    verify,
    weights_dir,
)
from diffalign.shapes.sampling_defaults import sampling_settings

LARGEST = {"shapes": 12 * 2**20, "shapes-flow": 8 * 2**20}
CLASSES = {"shapes": "StableDiffusionPipeline", "shapes-flow": "StableDiffusion3Pipeline"}


@pytest.fixture(scope="module", params=EMBEDDED_MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipe(name: str) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(weights_dir(name))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def networks(pipe: Any) -> list[torch.nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


def test_the_weights_are_small_half_precision_safetensors(name: str) -> None:
    from safetensors import safe_open

    files = [p for p in weights_dir(name).rglob("*") if p.is_file()]
    weights = [p for p in files if p.stat().st_size > 100_000]
    assert all(p.suffix == ".safetensors" for p in weights)
    assert sum(p.stat().st_size for p in files) < LARGEST[name]
    for path in weights:
        with safe_open(path, "pt") as file:
            assert {file.get_tensor(k).dtype for k in file.keys() if "position_ids" not in k} == {  # noqa: SIM118
                torch.float16
            }


def test_plain_from_pretrained_runs_in_float32(name: str, pipe: Any) -> None:
    assert type(pipe).__name__ == CLASSES[name]
    assert {network.dtype for network in networks(pipe)} == {torch.float32}
    image = pipe(
        held_out_prompts()[0], num_inference_steps=2, generator=torch.Generator().manual_seed(0)
    ).images[0]
    assert image.size == (64, 64)


def test_guidance_cannot_mend_the_base(name: str) -> None:
    results = json.loads((weights_dir(name) / "accuracy.json").read_text())
    assert set(results) == {"1", "1.5", "2", "3", "4", "5", "7", "10"}
    assert 0.3 <= max(row["all"] for row in results.values()) <= 0.65
    assert max(row["style"] for row in results.values()) <= 0.6
    card = (weights_dir(name) / "README.md").read_text()
    for scale, row in results.items():
        assert f"| {scale} | {row['all']:.1%} ± " in card


def test_the_base_draws_recognisable_shapes(name: str, pipe: Any) -> None:
    prompts = held_out_prompts()[::3]
    options = {**sampling_settings(name), "progress": False}
    images = generate(pipe, prompts, range(len(prompts)), batch_size=20, **options)
    verdicts = [verify(image) for image in images]
    assert np.mean([verdict.shape is not None for verdict in verdicts]) > 0.8
    assert 0.15 < np.mean([row["all"] for row in attribute_table(images, prompts)]) < 0.95
    assert 0.1 < np.mean([verdict.style == PREFERRED_STYLE for verdict in verdicts]) < 0.9


def test_a_seed_gives_one_image_whatever_the_batch(name: str, pipe: Any) -> None:
    prompts = held_out_prompts()[:3]
    options = {
        **sampling_settings(name),
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "progress": False,
        "output_type": "np",
    }
    together = generate(pipe, prompts, [5, 6, 7], batch_size=3, **options)
    apart = generate(pipe, prompts, [5, 6, 7], batch_size=1, **options)
    np.testing.assert_allclose(np.stack(together), np.stack(apart), atol=1e-4)


def test_the_number_of_t5_tokens_hardly_matters() -> None:
    from diffalign.generation.pipelines import base_pipeline

    pipe = base_pipeline("shapes-flow")
    pipe.set_progress_bar_config(disable=True)
    images = [
        pipe(
            held_out_prompts()[0],
            num_inference_steps=8,
            guidance_scale=1.0,
            max_sequence_length=length,
            generator=torch.Generator().manual_seed(3),
            output_type="np",
        ).images[0]
        for length in (16, 256)
    ]
    assert np.abs(images[0] - images[1]).mean() < 0.05
