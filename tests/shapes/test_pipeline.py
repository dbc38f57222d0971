"""The committed weights: plain diffusers loads them; they draw well, if imperfectly."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from diffalign.shapes import attribute_table, held_out_prompts, weights_dir


@pytest.fixture(scope="module")
def pipe():  # type: ignore[no-untyped-def]
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(weights_dir())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_weights_are_small_half_precision_safetensors() -> None:
    from safetensors import safe_open

    files = [p for p in weights_dir().rglob("*") if p.is_file()]
    weights = [p for p in files if p.stat().st_size > 100_000]
    assert all(p.suffix == ".safetensors" for p in weights)
    assert sum(p.stat().st_size for p in files) < 12 * 2**20
    for path in weights:
        with safe_open(path, "pt") as file:
            assert {file.get_tensor(k).dtype for k in file.keys() if "position_ids" not in k} == {  # noqa: SIM118
                torch.float16
            }


def test_plain_from_pretrained_runs_in_float32(pipe) -> None:  # type: ignore[no-untyped-def]
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    image = pipe(
        held_out_prompts()[0], num_inference_steps=2, generator=torch.Generator().manual_seed(0)
    ).images[0]
    assert image.size == (64, 64)


def test_the_card_states_an_imperfect_base() -> None:
    accuracy = json.loads((weights_dir() / "accuracy.json").read_text())["2.0"]
    assert 0.45 <= accuracy["all"] <= 0.70
    assert f"{accuracy['all']:.1%}" in (weights_dir() / "README.md").read_text()


def test_the_base_draws_recognisable_shapes(pipe) -> None:  # type: ignore[no-untyped-def]
    from diffalign.evaluation import generate
    from diffalign.shapes import verify
    from diffalign.shapes.sampling_defaults import SAMPLING

    prompts = held_out_prompts()[:16]
    images = generate(pipe, prompts, range(16), batch_size=16, progress=False, **SAMPLING)
    assert np.mean([verify(image).shape is not None for image in images]) > 0.8
    assert 0.2 < np.mean([row["all"] for row in attribute_table(images, prompts)]) < 0.95


def test_a_seed_gives_one_image_whatever_the_batch(pipe) -> None:  # type: ignore[no-untyped-def]
    from diffalign.evaluation import generate

    prompts, options = (
        held_out_prompts()[:3],
        {"num_inference_steps": 3, "guidance_scale": 3.0, "progress": False},
    )
    together = generate(pipe, prompts, [5, 6, 7], batch_size=3, output_type="np", **options)
    apart = generate(pipe, prompts, [5, 6, 7], batch_size=1, output_type="np", **options)
    np.testing.assert_allclose(np.stack(together), np.stack(apart), atol=1e-4)
