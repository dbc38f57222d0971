"""Every method trains on every transformer family, with caches and ragged prompts."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiers import by_default
from tiny import (
    METHOD_NAMES,
    Snapshots,
    assert_same_tensors,
    build_pipeline,
    first_batch,
    lora_config,
    make_trainer,
    method_rows,
    pair_rows,
    trained_tensors,
)
from tiny_families import TRANSFORMERS, size_of

from diffalign import ValidationConfig
from diffalign.backbones import load_backbone
from diffalign.backbones.lora import load_lora
from diffalign.errors import ConfigError, UserError
from diffalign.generation.guidance import NegativeGuidance

RAGGED = ("z-image", "qwen-image", "qwen-image-21")


def rows_of(method: str, size: int) -> list[dict[str, Any]]:
    """The method's rows, with prompts of different lengths in one batch."""
    rows = method_rows(method, 4, size)
    return [{**row, "prompt": row["prompt"] + " and more" * (i % 2)} for i, row in enumerate(rows)]


@by_default()
@pytest.mark.parametrize("method", [m for m in METHOD_NAMES if m != "ctrl_u"])
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_every_method_trains_on_every_family(method: str, family: str, tmp_path: Path) -> None:
    snapshots, size = Snapshots(), size_of(family)
    trainer = make_trainer(
        tmp_path / "run", family, method, rows=rows_of(method, size), max_steps=2,
        per_device_train_batch_size=2, learning_rate=1e-2,
        peft_config=None if family == "pixart" else lora_config(),
        data={"resolution": size, "cache_text_embeddings": str(tmp_path / "cache")},
        options={"callbacks": [snapshots]},
    )  # fmt: skip
    trainer.train()
    before, after = snapshots.weights[0], trained_tensors(trainer)
    moved = [name for name in after if not torch.equal(after[name], before[name])]
    if family != "pixart":  # every adapter has a gradient
        assert {name for name in after if "lora_B" in name} <= set(moved)
    assert len(moved) > len(after) / 2
    lines = (tmp_path / "run" / "logs" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line).get("loss") for line in lines]
    assert losses and all(loss is None or math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("family", ["flux", *RAGGED])
def test_cached_prompts_are_the_encoded_ones(family: str, tmp_path: Path) -> None:
    """Also where the cache was filled in another order and with other neighbours."""
    size = size_of(family)
    rows = rows_of("diffusion_dpo", size)

    def batch(name: str, **data: Any) -> Any:
        trainer = make_trainer(
            tmp_path / name, family, rows=rows, per_device_train_batch_size=2,
            peft_config=lora_config(), data={"resolution": size, **data},
        )  # fmt: skip
        return first_batch(trainer)

    plain = batch("plain")
    cached = batch("cached", cache_text_embeddings=str(tmp_path / "cache"))
    assert plain.condition.keys() == cached.condition.keys()
    for name, value in plain.condition.items():
        torch.testing.assert_close(cached.condition[name], value, rtol=1e-4, atol=1e-5)


def test_few_step_models_warn_unless_they_train_on_their_own_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def trainer(name: str, **args: Any) -> Any:
        return make_trainer(
            tmp_path / name, "flux-schnell", rows=pair_rows(4), peft_config=lora_config(), **args
        )

    trainer("warned", max_steps=1).train()
    said = capsys.readouterr().out
    assert "FluxPipeline draws in 4 steps" in said and "timestep_sampling: grid" in said
    quiet = trainer("quiet", max_steps=1, timestep_sampling="grid")
    quiet.train()
    assert "draws in 4 steps" not in capsys.readouterr().out
    builder = quiet.data_pipeline.builder
    times = builder.times(torch.linspace(0, 0.999, 400).double(), (4, 16, 16))
    grid = quiet.make_grid(4, 0.0).times
    assert sorted(set(times.tolist())) == sorted(grid.tolist()) and len(grid) == 4
    two = trainer("two", max_steps=1, timestep_sampling="grid", grid_steps=2)
    two.setup()
    uniforms = torch.linspace(0, 0.999, 10).double()
    assert len(set(two.data_pipeline.builder.times(uniforms, (4, 16, 16)).tolist())) == 2


@pytest.mark.parametrize(
    ("shift", "factor"), [("pipeline", None), ("none", 1.0), (3.0, 3.0)], ids=str
)
def test_the_shift_of_training_times(shift: Any, factor: float | None, tmp_path: Path) -> None:
    """Flux's depends on the image's size, and a number replaces it."""
    trainer = make_trainer(
        tmp_path, "flux", rows=pair_rows(4), peft_config=lora_config(), timestep_shift=shift,
        timestep_sampling="uniform",
    )  # fmt: skip
    trainer.setup()
    uniforms = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)

    def shifted(s: float) -> torch.Tensor:
        return s * uniforms / (1 + (s - 1) * uniforms)

    def mu(tokens: int) -> float:
        return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)

    for side, tokens in ((16, 64), (32, 256)):
        found = trainer.data_pipeline.builder.times(uniforms, (4, side, side))
        torch.testing.assert_close(found, shifted(factor or math.exp(mu(tokens))))


def test_guidance_as_an_input_is_the_same_for_policy_and_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def guidance(name: str, method: str = "diffusion_dpo", **args: Any) -> float:
        trainer = make_trainer(
            tmp_path / name, "flux", method, rows=method_rows(method, 4),
            peft_config=lora_config(), max_steps=1, **args,
        )  # fmt: skip
        trainer.train()
        return float(trainer.backbone.guidance_input(torch.zeros(1))[0])

    assert guidance("default") == 3.5
    assert "guidance 3.5, which the network takes as an input" in capsys.readouterr().out
    assert guidance("given", embedded_guidance=1.0) == 1.0
    assert guidance("sampled", "d3po", guidance_scale=2.0) == 2.0


def test_a_model_of_no_family_says_which_there_are() -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    network = UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    with pytest.raises(ConfigError) as error:
        load_backbone(DDPMPipeline(network, DDPMScheduler()))
    said = str(error.value)
    assert said.startswith("model: 'DDPMPipeline' is a DDPMPipeline, which is not supported")
    assert "FluxPipeline" in said and "docs/guides/new-model.md" in said


def test_sizes_off_the_grid_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"resolution: .*divisible by 4"):
        make_trainer(tmp_path, "flux", peft_config=lora_config(), data={"resolution": 30})


@pytest.mark.parametrize(
    ("trained", "family", "said"),
    [
        ("flux", "qwen-image", "is a LoRA of Flux.1 or Chroma, and this model is a QwenImageP"),
        ("z-image", "flux", "is a LoRA of Z-Image, and this model is a FluxPipeline"),
        ("sd", "flux2-klein", "is a LoRA of Stable Diffusion with a UNet, and this model is a Fl"),
    ],
)
def test_a_lora_of_another_family_is_refused(
    trained: str, family: str, said: str, tmp_path: Path
) -> None:
    trainer = make_trainer(
        tmp_path, trained, peft_config=lora_config(), max_steps=1, rows=pair_rows(4)
    )
    trainer.train()
    with pytest.raises(UserError, match=f"^lora: .* {said}"):
        load_lora(build_pipeline(family), tmp_path, "other", "lora")


@pytest.mark.parametrize("family", ["flux", "flux2-klein", "z-image", "qwen-image", "sana"])
def test_full_weights_are_saved_as_a_pipeline(family: str, tmp_path: Path) -> None:
    """A folder that diffusers loads, with the trained network and all other parts."""
    from diffusers import DiffusionPipeline

    trainer = make_trainer(
        tmp_path, family, rows=pair_rows(4, size_of(family)), max_steps=1,
        data={"resolution": size_of(family)},
    )  # fmt: skip
    trainer.train()
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipe).__name__ == trainer.backbone.source.pipeline_class_name
    saved, trained = pipe.transformer.state_dict(), trainer.network.state_dict()
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], trained[name]) for name in saved)
    assert torch.equal(load_backbone(str(tmp_path)).encode_prompts(["a"])["prompt_embeds"],
                       trainer.backbone.encode_prompts(["a"])["prompt_embeds"])  # fmt: skip


@pytest.mark.parametrize("family", ["flux", "flux2-klein", "z-image", "qwen-image", "sana"])
def test_validation_draws_with_the_familys_pipeline(family: str, tmp_path: Path) -> None:
    validation = ValidationConfig(
        validation_prompts=[*"abcd"], num_validation_images=1,
        validation_steps=1, num_inference_steps=2, guidance_scales=[1.0, 2.5],
        scorers=["jpeg_compressibility"],
    )  # fmt: skip
    trainer = make_trainer(
        tmp_path, family, rows=pair_rows(4, size_of(family)), max_steps=1,
        peft_config=lora_config(), data={"resolution": size_of(family)},
        options={"validation": validation},
    )  # fmt: skip
    trainer.train()
    assert list((tmp_path / "samples").rglob("*.png"))


@pytest.mark.parametrize("family", ["flux", "chroma", "flux2-klein", "z-image", "qwen-image"])
def test_negative_guidance_says_where_it_works(family: str) -> None:
    pipe = build_pipeline(family)
    name = type(pipe).__name__
    with pytest.raises(UserError, match=f"pipe: {name} has no classifier-free guidance with two"):
        NegativeGuidance(pipe, negative=pipe.transformer)


def test_negative_guidance_with_the_own_network_changes_nothing_on_sana() -> None:
    pipe, other = build_pipeline("sana"), build_pipeline("sana")
    call: dict[str, Any] = {
        "prompt": "a cat", "height": 32, "width": 32, "num_inference_steps": 2,
        "guidance_scale": 3.0, "output_type": "np", "use_resolution_binning": False,
    }  # fmt: skip
    plain = pipe(generator=torch.Generator().manual_seed(1), **call).images
    with NegativeGuidance(pipe, negative=other.transformer):
        guided = pipe(generator=torch.Generator().manual_seed(1), **call).images
    np.testing.assert_allclose(guided, plain, atol=1e-5)


@pytest.mark.parametrize("value", ["foo", -1, None])
def test_a_wrong_shift_says_what_is_right(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"timestep_shift: expected pipeline, none or float > 0"):
        make_trainer(tmp_path, "flux", peft_config=lora_config(), timestep_shift=value)


@by_default(lambda family, lora: lora or family == "z-image")
@pytest.mark.parametrize("family", TRANSFORMERS)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_policy_is_the_reference_before_training(family: str, lora: bool, tmp_path: Path) -> None:
    if family == "pixart" and lora:
        pytest.skip("the family has no LoRA")
    trainer = make_trainer(
        tmp_path, family, rows=rows_of("diffusion_dpo", size_of(family)), beta=5000.0,
        peft_config=lora_config(dropout=0.3) if lora else None, per_device_train_batch_size=2,
        data={"resolution": size_of(family)},
    )  # fmt: skip
    batch = first_batch(trainer)
    policy, reference = trainer.errors(batch)
    assert policy.requires_grad and not reference.requires_grad
    assert torch.equal(policy, reference)
    loss, _ = trainer.compute_loss(batch)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)), rtol=0, atol=1e-7)


@by_default(lambda family: family in ("flux", "z-image"))
@pytest.mark.parametrize("family", [name for name in TRANSFORMERS if name != "pixart"])
def test_a_resumed_run_is_the_uninterrupted_run(family: str, tmp_path: Path) -> None:
    def trainer(name: str, **more: Any) -> Any:
        return make_trainer(
            tmp_path / name, family, rows=rows_of("diffusion_dpo", size_of(family)), max_steps=4,
            save_steps=2, save_total_limit=None, per_device_train_batch_size=2,
            peft_config=lora_config(dropout=0.2), proportion_empty_prompts=0.5,
            data={"resolution": size_of(family), "cache_text_embeddings": str(tmp_path / "cache")},
            **more,
        )  # fmt: skip

    trainer("whole").train()
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    place = str(tmp_path / "resumed" / "checkpoint-2")
    assert trainer("resumed", resume_from_checkpoint=place).train().global_step == 4
    name = "pytorch_lora_weights.safetensors"
    found, expected = (load_file(tmp_path / run / name) for run in ("resumed", "whole"))
    assert_same_tensors(found, expected)
