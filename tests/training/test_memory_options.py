"""Options for small memory and for speed are numerically what they say."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiers import by_default
from tiny import (
    assert_close_tensors,
    assert_same_tensors,
    build_pipeline,
    first_batch,
    lora_config,
    make_trainer,
    pair_rows,
    trained_tensors,
)
from tiny_families import size_of

from diffalign import ValidationConfig
from diffalign.errors import ConfigError
from diffalign.training import build

LORA = "pytorch_lora_weights.safetensors"
FAMILIES = ("flux", "sd", "sdxl", "sd3", "z-image", "qwen-image", "sana")


def trainer_of(folder: Path, family: str, **options: Any) -> Any:
    size = size_of(family)
    return make_trainer(
        folder, family, rows=pair_rows(4, size), per_device_train_batch_size=2,
        data={"resolution": size}, **{"peft_config": lora_config(), **options},
    )  # fmt: skip


@by_default(values=2)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_8_bits_are_the_rounded_weights(family: str, tmp_path: Path) -> None:
    """Errors and gradients of a network whose weights were rounded beforehand, with and
    without checkpointed activations; and near those of bf16."""
    results = []
    for way in ("cast", "rounded", "checkpointed", "plain"):
        trainer = trainer_of(
            tmp_path / way, family, mixed_precision="bf16", seed=3,
            layerwise_casting=way in ("cast", "checkpointed"),
            gradient_checkpointing=way == "checkpointed",
        )  # fmt: skip
        trainer.setup()
        weights = dict(trainer.network.named_parameters())
        if way == "cast":
            stored = {n: w for n, w in weights.items() if w.dtype == torch.float8_e4m3fn}
            assert len(stored) > 8 and not any("lora_" in name for name in stored)
        if way == "rounded":
            for name in stored:
                weights[name].data = stored[name].to(torch.bfloat16)
        for name, weight in weights.items():
            if "lora_B" in name:
                weight.data = 0.1 * torch.ones_like(weight)
        policy, reference = trainer.errors(first_batch(trainer))
        policy.sum().backward()
        gradients = {name: w.grad for name, w in weights.items() if w.requires_grad}
        results.append((policy.detach(), reference, gradients))
    cast, rounded, checkpointed, plain = results
    for other in (rounded, checkpointed):
        assert torch.equal(cast[0], other[0]) and torch.equal(cast[1], other[1])
        assert_same_tensors(other[2], cast[2])
    torch.testing.assert_close(cast[1], plain[1], rtol=0.05, atol=0)
    assert not torch.equal(cast[1], plain[1])


@by_default(lambda family, kind: (family, kind) in (("sd", "int8"), ("flux", "fp8")))
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantised_network_is_near_its_weights(family: str, kind: str, tmp_path: Path) -> None:
    """Policy and reference start equal, and the LoRA belongs to the plain pipeline."""
    pytest.importorskip("torchao")
    build_pipeline(family).save_pretrained(tmp_path / "model")
    errors = []
    for quantization in (None, kind):
        trainer = trainer_of(
            tmp_path / str(quantization), family, model=str(tmp_path / "model"), max_steps=2,
            mixed_precision="bf16", quantization=quantization, gradient_checkpointing=True,
        )  # fmt: skip
        policy, reference = trainer.errors(first_batch(trainer))
        assert torch.equal(policy, reference)
        errors.append(reference)
        trainer.train()
    torch.testing.assert_close(errors[1], errors[0], rtol=0.05, atol=0)
    assert not torch.equal(errors[1], errors[0])
    build_pipeline(family).load_lora_weights(str(tmp_path / kind))


@pytest.mark.parametrize("option", [{"layerwise_casting": True}, {"quantization": "int8"}], ids=str)
def test_a_run_in_8_bits_resumes_bit_equal(option: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    build_pipeline("sd").save_pretrained(tmp_path / "model")

    def run(name: str, **options: Any) -> Any:
        return trainer_of(
            tmp_path / name, "sd", model=str(tmp_path / "model"), mixed_precision="bf16",
            max_steps=4, save_steps=2, save_total_limit=None, **option, **options,
        )  # fmt: skip

    run("whole").train()
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoint-4")
    run("part", resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2")).train()
    assert_same_tensors(load_file(tmp_path / "part" / LORA), load_file(tmp_path / "whole" / LORA))
    build_pipeline("sd").load_lora_weights(str(tmp_path / "whole"))


@by_default(values=1)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_keeps_no_float32_copy_of_its_inputs(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors and gradients are those of peft's own casts, to the bit."""
    results, dtypes = [], []

    def note(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        dtypes[-1].add(inputs[0].dtype)

    for own in (True, False):
        if not own:
            monkeypatch.setattr(build, "_leave_casts_to_autocast", lambda network: None)
        trainer = trainer_of(tmp_path / str(own), family, mixed_precision="bf16", seed=3)
        trainer.setup()
        dtypes.append(set())
        for name, module in trainer.network.named_modules():
            if name.endswith("to_out.0.lora_A.default"):
                module.register_forward_pre_hook(note)
        for name, weight in trainer.network.named_parameters():
            if "lora_B" in name:
                weight.data.fill_(0.05)
        policy, reference = trainer.errors(first_batch(trainer))
        policy.sum().backward()
        gradients = {
            name: weight.grad
            for name, weight in trainer.network.named_parameters()
            if weight.grad is not None
        }
        results.append({"policy": policy.detach(), "reference": reference, **gradients})
    assert_same_tensors(*results)
    assert dtypes == [{torch.bfloat16}, {torch.float32}]


@by_default(values=1)
@pytest.mark.parametrize("family", ["flux", "sd", "sd3"])
def test_compiled_blocks_train_the_same_weights(family: str, tmp_path: Path) -> None:
    """With a reference that switches adapters off, and checkpointed activations."""
    steady = {"adam_epsilon": 1e-3, "learning_rate": 1e-2, "max_steps": 3}
    weights = []
    for compiled in (False, True):
        torch.compiler.reset()
        trainer = trainer_of(
            tmp_path / str(compiled),
            family,
            compile=compiled,
            gradient_checkpointing=True,
            **steady,
        )
        trainer.train()
        weights.append(load_file(tmp_path / str(compiled) / LORA))
    assert_close_tensors(weights[1], weights[0], rtol=1e-3, atol=1e-5)
    assert not any("_orig_mod" in name for name in weights[1])


@by_default(values=1)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux", "z-image"])
def test_offloaded_parts_change_nothing(family: str, lora: bool, tmp_path: Path) -> None:
    """With encoders in every step, a frozen copy as the reference, and validation."""
    validation = ValidationConfig(
        validation_prompts=["a cat"], num_validation_images=1, validation_steps=2,
        num_inference_steps=2,
    )  # fmt: skip
    weights = []
    for offload in ("none", "group"):
        trainer = trainer_of(
            tmp_path / offload, family, offload=offload, max_steps=2,
            peft_config=lora_config() if lora else None, options={"validation": validation},
        )  # fmt: skip
        trainer.train()
        weights.append(trained_tensors(trainer))
        assert list((tmp_path / offload / "samples").rglob("*.png"))
    assert_same_tensors(*weights)


def test_the_fused_optimizer_takes_the_same_steps(tmp_path: Path) -> None:
    weights = []
    for optim in ("adamw", "adamw_fused"):
        trainer_of(tmp_path / optim, "sd", optim=optim, max_steps=3).train()
        weights.append(load_file(tmp_path / optim / LORA))
    assert_close_tensors(weights[1], weights[0], rtol=1e-4, atol=1e-6)


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"layerwise_casting: only the frozen weights"):
        make_trainer(tmp_path, layerwise_casting=True)
    with pytest.raises(ConfigError, match=r"quantization: only the frozen weights .* add lora"):
        make_trainer(tmp_path, quantization="int8")
    with pytest.raises(ConfigError, match=r"layerwise_casting: a DoRA reads the frozen weights"):
        make_trainer(tmp_path, layerwise_casting=True, peft_config=lora_config(use_dora=True))
    with pytest.raises(ConfigError, match=r"quantised weights are small already"):
        make_trainer(
            tmp_path, layerwise_casting=True, quantization="fp8", peft_config=lora_config()
        )
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"nf4 needs (a CUDA GPU|bitsandbytes)"):
            make_trainer(tmp_path, quantization="nf4", peft_config=lora_config())
    trainer = make_trainer(tmp_path, quantization="int8", peft_config=lora_config())
    with pytest.raises(ConfigError, match=r"is in memory already; name the model instead"):
        trainer.setup()
