"""Ctrl-U, ControlNet++ and ControlNet: what trains, limits, files of diffusers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image
from tiny import (
    SoftBrightness,
    all_tensors,
    assert_close_tensors,
    assert_same_tensors,
    build_pipeline,
    conditioned_rows,
    first_batch,
    lora_config,
    make_trainer,
    pair_rows,
    trained_tensors,
)

from diffalign import CtrlUConfig, CtrlUTrainer, load_preferences
from diffalign.data import convert
from diffalign.errors import ConfigError, UserError
from diffalign.rewards.consistency import PaletteSegmentation
from diffalign.shapes import Scene, render


def ctrl(folder: Path, family: str = "sd", **options: Any) -> Any:
    values: dict[str, Any] = {"per_device_train_batch_size": 4, "seed": 3} | options
    return make_trainer(folder, family, "ctrl_u", **values)


def loss_of(trainer: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    batch = trainer.prepare(first_batch(trainer))
    return trainer.compute_loss(batch)


def test_condition_images_are_cropped_like_their_images(tmp_path: Path) -> None:
    rows = conditioned_rows(4)
    for row in rows:
        row["conditioning_image"] = row["image"]
    trainer = ctrl(tmp_path, rows=rows, data={"center_crop": False, "random_flip": True})
    batch = first_batch(trainer)
    assert batch.condition["control"].shape == (4, 3, 32, 32) and batch.k == 1
    x0 = trainer.backbone.encode_images(2 * batch.condition["control"] - 1)[0]
    posterior = trainer.backbone.encode_images(2 * batch.condition["control"] - 1)[1]
    assert ((x0 - batch.x0[:, 0]).abs() <= 6 * posterior + 1e-4).all()


def test_data_with_conditions(tmp_path: Path) -> None:
    data = load_preferences(conditioned_rows(3), verbose=False)
    assert data.kind == "conditioned" and len(data[0].images) == 2
    assert [len(group.images) for group in data.as_kind("single")] == [1, 1, 1]
    folder = convert(data, tmp_path / "data")
    again = load_preferences(str(folder), verbose=False)
    assert again.kind == "conditioned"
    named = [
        {"text": row["prompt"], "image": row["image"], "condition": row["conditioning_image"]}
        for row in conditioned_rows(2)
    ]
    assert load_preferences(named, verbose=False).kind == "single"
    data = load_preferences(named, wanted="conditioned", verbose=False)
    assert data.kind == "conditioned"


@pytest.mark.parametrize("family", ["sd", "sd_v", "sdxl"])
def test_only_the_controlnet_trains(family: str, tmp_path: Path) -> None:
    model = build_pipeline(family)
    frozen = {n: all_tensors(getattr(model, n)) for n in ("unet", "vae", "text_encoder")}
    trainer = ctrl(tmp_path / "run", family, model=model, max_steps=2)
    trainer.setup()
    before = trained_tensors(trainer)
    trainer.train()
    for name, tensors in frozen.items():
        assert_same_tensors(all_tensors(getattr(model, name)), tensors)
    after = trained_tensors(trainer)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert any("controlnet_down_blocks" in name for name in moved)
    loaded = ControlNetModel.from_pretrained(tmp_path / "run", use_safetensors=True)
    assert_same_tensors(all_tensors(loaded), all_tensors(trainer.network))
    card = (tmp_path / "run" / "README.md").read_text()
    assert "A ControlNet fine-tuned from" in card and "ControlNet:" in card


def test_it_draws_in_the_plain_pipeline(tmp_path: Path) -> None:
    trainer = ctrl(tmp_path / "run", max_steps=6, learning_rate=1e-2)
    trainer.train()
    plain = build_pipeline("sd")
    controlnet = ControlNetModel.from_pretrained(tmp_path / "run")
    pipe = StableDiffusionControlNetPipeline(**plain.components, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)

    def draw(scale: float) -> np.ndarray:
        return pipe(
            conditioned_rows(1)[0]["prompt"], image=Image.new("RGB", (32, 32), "white"),
            num_inference_steps=2, output_type="np", controlnet_conditioning_scale=scale,
            generator=torch.Generator().manual_seed(0),
        ).images[0]  # fmt: skip

    assert np.abs(draw(1.0) - draw(0.0)).max() > 1e-3


def test_it_starts_as_the_unet_and_its_limits(tmp_path: Path) -> None:
    plain = ctrl(tmp_path / "plain", uncertainty=False, reward_weight=0.0)
    batch = first_batch(plain)
    with torch.no_grad():
        loss, metrics = plain.compute_loss(batch)
        times = plain.schedule.model_times(batch.times)
        noisy = plain.schedule.add_noise(batch.x0[:, 0], batch.noise[:, 0], batch.times)
        output = plain.backbone.predict(plain.unet, noisy, times, dict(batch.condition))
        target = plain.schedule.target(batch.x0[:, 0], batch.noise[:, 0], batch.times)
    expected = (output - target).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)  # new outputs are zero
    assert set(metrics) == {"errors/data"} and plain.consistency is None
    # ControlNet++ adds the reward alone.
    plus = ctrl(tmp_path / "plus", uncertainty=False, reward_weight=0.5)
    with torch.no_grad():
        total, facts = plus.compute_loss(first_batch(plus))
    torch.testing.assert_close(total, loss + 0.5 * facts["reward"], rtol=1e-4, atol=1e-6)
    # Without weights Ctrl-U is ControlNet training at two noise levels.
    two = ctrl(tmp_path / "two", reward_weight=0.0, uncertainty_weight=0.0)
    with torch.no_grad():
        total, facts = two.compute_loss(first_batch(two))
    torch.testing.assert_close(total, facts["errors/data"])
    assert facts["uncertainty"].isfinite().all() and (facts["uncertainty"] >= 0).all()


def test_the_window_of_the_reward(tmp_path: Path) -> None:
    rows = conditioned_rows(16)
    options: dict[str, Any] = {"rows": rows, "per_device_train_batch_size": 16}
    options |= {"reward_max_timestep": 400, "reward_weight": 2.0}
    results = {}
    for name in ("all", "window"):
        trainer = ctrl(tmp_path / name, normalise=name, **options)
        batch = first_batch(trainer)
        with torch.no_grad():
            results[name] = trainer.compute_loss(batch)
        inside = trainer.schedule.fraction(batch.times) <= 0.4
        assert 0 < inside.sum() < 16
        metrics = results[name][1]
        assert torch.equal(metrics["reward"].isnan(), ~inside)
        term = results[name][0] - metrics["errors/data"]
        assert not term[~inside].any() and (term[inside] > 0).all()
    terms = [loss - metrics["errors/data"] for loss, metrics in results.values()]
    torch.testing.assert_close(terms[1], terms[0] * 16 / inside.sum(), rtol=1e-4, atol=1e-6)
    none = ctrl(tmp_path / "none", rows=rows, reward_max_timestep=0)
    loss, metrics = loss_of(none)
    torch.testing.assert_close(loss.detach(), metrics["errors/data"])
    assert metrics["reward"].isnan().all() and loss.isfinite().all()


def test_warm_up_and_split_of_a_step(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 2, "reward_warmup_steps": 4, "adam_epsilon": 1e-3}
    whole = ctrl(tmp_path / "whole", per_device_train_batch_size=4, **options)
    parts = ctrl(
        tmp_path / "parts", per_device_train_batch_size=1, gradient_accumulation_steps=4, **options
    )
    whole.train(), parts.train()
    assert_close_tensors(trained_tensors(whole), trained_tensors(parts), rtol=1e-2, atol=1e-4)


def test_it_resumes_bit_equal_and_goes_on_from_a_controlnet(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "save_total_limit": None}
    ctrl(tmp_path / "whole", **options).train()
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoint-4")
    checkpoint = tmp_path / "part" / "checkpoint-2"
    again = ctrl(tmp_path / "part", resume_from_checkpoint=str(checkpoint), **options)
    again.train()
    whole = ControlNetModel.from_pretrained(tmp_path / "whole")
    assert_same_tensors(all_tensors(again.network), all_tensors(whole))
    other = ctrl(tmp_path / "other", controlnet=str(tmp_path / "whole"))
    other.setup()
    assert_same_tensors(all_tensors(other.network), all_tensors(whole))
    wrong = ctrl(tmp_path / "wrong", "sdxl", controlnet=str(tmp_path / "whole"))
    with pytest.raises(ConfigError, match="controlnet: .* reads prompts of width 16"):
        wrong.setup()


def test_consistencies_of_ones_own(tmp_path: Path) -> None:
    for own in (SoftBrightness(), PaletteSegmentation(torch.eye(3))):
        trainer = ctrl(tmp_path / own.name, consistency=None, options={"scorers": own})
        loss, _ = loss_of(trainer)
        loss.mean().backward()
        assert any(p.grad is not None for p in trainer.network.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"consistency": "edges"}, "consistency: expected shapes or depth:MODEL, got 'edges'"),
        ({"data": {"cache_latents": "cache"}}, "cache_latents: cached latents have no condition"),
        ({"options": {"scorers": 3}}, "scorers: expected a Consistency or a differentiable"),
        ({"reward_min_timestep": 500}, "reward_min_timestep: expected at most"),
    ],
)
def test_what_is_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    values = {"reward_max_timestep": 400} | options
    with pytest.raises(ConfigError, match=words):
        ctrl(tmp_path, **values)


def test_data_models_and_loras_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs conditioned data.*add a column condition"):
        ctrl(tmp_path, rows=pair_rows(2))
    with pytest.raises(ConfigError, match="a ControlNet is trained for StableDiffusionPipeline"):
        ctrl(tmp_path, "sd3").setup()
    with pytest.raises(ConfigError, match="lora: Ctrl-U trains a ControlNet"):
        CtrlUTrainer(
            model=build_pipeline("sd"), train_dataset=conditioned_rows(2),
            args=CtrlUConfig(output_dir=str(tmp_path), consistency="shapes"),
            peft_config=lora_config(),
        )  # fmt: skip


def test_the_palette_reads_the_embedded_world_exactly() -> None:
    from diffalign.methods.ctrl_u import shapes_consistency
    from diffalign.shapes.renderer import BACKGROUND_PALETTE, PALETTE

    consistency = shapes_consistency()
    names = [*PALETTE, *BACKGROUND_PALETTE]
    image = render(Scene("large", "blue", "square", "center", "white"))
    pixels = torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)[None]
    classes = consistency.label(pixels)[0]
    assert names[int(classes[32, 32])] == "blue" and names[int(classes[1, 1])] == "white"
