"""What mixed precision and a network that trains ask of the parts around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from tiny import build_pipeline, lora_config, make_trainer, method_rows, next_batch

from diffalign.backbones import load_backbone
from diffalign.generation.sampling import generate
from diffalign.training.optimizer import averaged, trainable_parameters


def test_autocast_leaves_the_autoencoder_alone() -> None:
    backbone = load_backbone(build_pipeline("sd"))
    vae = backbone.component("vae")
    dtypes = []
    for module in (vae.encoder.conv_in, vae.decoder.conv_in):
        module.register_forward_hook(lambda _, inputs, output: dtypes.append(output.dtype))
    latents = torch.randn(1, *backbone.latent_shape(32, 32), requires_grad=True)
    plain = backbone.decode_pixels(latents)
    with torch.autocast("cpu", torch.bfloat16):
        pixels = backbone.decode_pixels(latents)
        backbone.decode_latents(latents)
        backbone.encode_images(torch.zeros(1, 3, 32, 32))
    assert set(dtypes) == {torch.float32} and len(dtypes) == 4
    assert torch.equal(pixels, plain)


def test_drawing_leaves_no_inference_tensors() -> None:
    """A table that a network keeps of it must serve a backward pass later."""
    pipe = build_pipeline("sd")
    seen = []
    pipe.unet.register_forward_pre_hook(
        lambda *_: seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
    )
    generate(pipe, ["a cat"], seeds=[0], num_inference_steps=2)
    assert set(seen) == {(False, False)}


@pytest.mark.parametrize("is_skipped", [False, True])
def test_a_step_that_the_scaler_skips(
    is_skipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts, also for the learning rate, but the average stays."""
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda _: is_skipped))
    trainer = make_trainer(
        tmp_path, peft_config=lora_config(), max_steps=2, lr_scheduler="linear", use_ema=True
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.lr_scheduler.last_epoch == 2
    assert trainer.ema.optimization_step == (0 if is_skipped else 2)


@pytest.mark.parametrize("offload", [False, True])
def test_averaged_weights_come_and_go(offload: bool, tmp_path: Path) -> None:
    """Where both are on one device, nothing is copied."""
    trainer = make_trainer(
        tmp_path, peft_config=lora_config(), max_steps=2, use_ema=True, offload_ema=offload
    )
    trainer.train()
    parameters = trainable_parameters(trainer.network)
    before = [(p.data_ptr(), p.detach().clone()) for p in parameters]
    average = [shadow.clone() for shadow in trainer.ema.shadow_params]
    with averaged(trainer.ema, trainer.network):
        for parameter, shadow in zip(parameters, average, strict=True):
            assert torch.equal(parameter.detach(), shadow)
    for parameter, shadow, (pointer, value), mean in zip(
        parameters, trainer.ema.shadow_params, before, average, strict=True
    ):
        assert torch.equal(parameter.detach(), value) and torch.equal(shadow, mean)
        assert parameter.data_ptr() == pointer
    assert any(not torch.equal(m, v) for m, (_, v) in zip(average, before, strict=True))


def test_the_guidance_of_one_branch_without_a_gradient_trains(tmp_path: Path) -> None:
    """GRPO under autocast: before torch 2.11 the weights cast without a gradient were
    used again for the branch that has one."""

    options: dict[str, Any] = {"uncond_gradient": False, "mixed_precision": "bf16"}
    trainer = make_trainer(
        tmp_path, "sd", "grpo", rows=method_rows("grpo", 2), peft_config=lora_config(), **options
    )
    for micro in trainer.micro_batches(next_batch(trainer)):
        loss, _ = trainer.compute_loss(micro)
        loss.sum().backward()
        break
    gradients = [p.grad for p in trainable_parameters(trainer.network)]
    assert all(gradient is not None for gradient in gradients)
