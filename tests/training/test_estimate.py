"""Estimates without weights agree with the same step on real tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiers import by_default
from tiny import build_pipeline, first_batch, lora_config, make_trainer, pair_rows
from tiny_families import TRANSFORMERS, size_of
from torch.utils.flop_counter import FlopCounterMode

from diffalign import DiffusionDPOConfig, cli
from diffalign.backbones import load_backbone
from diffalign.errors import ConfigError
from diffalign.training import estimate as estimate_module
from diffalign.training.estimate import Estimate, estimate, gpu_memory
from diffalign.training.memory import cast_layers, store_in_8_bits

FAMILIES = ["sd", "sdxl", "sd3", *(name for name in TRANSFORMERS if name != "qwen-image-21")]


def estimated(model: Any, side: int, lora: bool = True, **options: Any) -> Estimate:
    args = DiffusionDPOConfig(output_dir="never", per_device_train_batch_size=2, **options)
    return estimate(
        load_backbone(model), args, lora_config() if lora else None, images_per_group=2,
        has_reference=True, size=(side, side), caches_latents=False, caches_prompts=False,
    )  # fmt: skip


@by_default(lambda family, lora: (family, lora) in (("sd", True), ("flux", True), ("sd3", False)))
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_and_work_are_those_of_real_tensors(
    family: str, lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is read for its configs alone: its weights are gone."""
    if family == "pixart" and lora:
        pytest.skip("the family has no LoRA")
    side = size_of(family)
    build_pipeline(family).save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    result = estimated(str(tmp_path), side, lora)

    def real(network: Any) -> Any:
        return torch.enable_grad()

    monkeypatch.setattr(estimate_module, "_without_content", real)
    monkeypatch.setattr(
        "diffalign.backbones.loading.ModelSource.empty",
        lambda self, name, dtype=torch.float32: self.load(name, dtype),
    )
    expected = estimated(build_pipeline(family), side, lora)
    assert result.parameters == expected.parameters and result.trainable == expected.trainable
    assert result.flops == expected.flops > 0 and result.rows == expected.rows == 4
    assert result.bytes.keys() == expected.bytes.keys()
    for name, size in expected.bytes.items():
        assert result.bytes[name] == pytest.approx(size, rel=0.01), name


def test_the_work_is_that_of_a_training_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(
        tmp_path, "sd", rows=pair_rows(4), peft_config=lora_config(),
        per_device_train_batch_size=2,
    )  # fmt: skip
    batch = first_batch(trainer)
    counter = FlopCounterMode(display=False, custom_mapping=estimate_module._flop_formulas())
    with counter:
        trainer.compute_loss(batch)[0].sum().backward()
    tokens = {"prompt_embeds": tuple(batch.condition["prompt_embeds"].shape[1:])}
    monkeypatch.setattr(type(trainer.backbone), "condition_shapes", lambda self: tokens)
    assert estimated(build_pipeline("sd"), 32).flops == counter.get_total_flops()


def test_options_save_what_they_say() -> None:
    def peak(lora: bool = True, **options: Any) -> Estimate:
        return estimated(build_pipeline("flux"), 32, lora, **options)

    base = peak(mixed_precision="bf16")
    weights, live = base.bytes["weights"], base.bytes["activations and gradients"]
    small = peak(mixed_precision="bf16", layerwise_casting=True)
    assert 0.5 * weights < small.bytes["weights"] < weights
    assert peak(mixed_precision="bf16", quantization="nf4").peak < small.peak
    checkpointed = peak(mixed_precision="bf16", gradient_checkpointing=True)
    assert checkpointed.bytes["activations and gradients"] < live
    assert checkpointed.flops > base.flops
    assert peak().bytes["activations and gradients"] > live
    whole = peak(lora=False)
    assert whole.bytes["reference"] == whole.bytes["weights"]
    assert whole.bytes["optimizer"] == 8 * whole.trainable == 8 * whole.parameters
    assert "text encoders" not in peak(offload="group").bytes


def run(capsys: pytest.CaptureFixture[str], *options: object) -> tuple[int, str]:
    code = cli.run(["estimate", *map(str, options)])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_pipeline("sdxl").save_pretrained(tmp_path / "model")
    fields = ["--method", "diffusion_dpo", "--model", tmp_path / "model", "--lora.r", 4]
    fields += ["--data.dataset_name", "unread", "--train.per_device_train_batch_size", 2]
    fields += ["--data.resolution", 32, "--train.output_dir", tmp_path / "out"]
    code, said = run(capsys, *fields, "--gpu", "24GB", "--num_gpus", 8)
    assert code == 0 and "4 images in a pass x 1 passes x 8 GPUs = 32 images" in said
    assert "of 24 GiB: fits" in said and "text encoders" in said
    code, said = run(capsys, *fields, "--gpu", "0.80001GB")
    assert code == 1 and "does not fit" in said
    changes = said.partition("what to change, one at a time:")[2].splitlines()[1:]
    saved = [float(line.partition("saves ")[2].split()[0]) for line in changes]
    assert len(changes) >= 2 and saved == sorted(saved, reverse=True)
    assert any("gradient_checkpointing" in line for line in changes)
    assert not (tmp_path / "out").exists()
    code, said = run(capsys, *fields, "--gpu", "RTX9999")
    assert (
        code == 2 and "'RTX9999' is neither a size such as 24GB (up to 300) nor one of a10" in said
    )
    code, said = run(capsys)
    assert code == 2 and "--config: name a run file" in said


def test_memory_of_gpus() -> None:
    assert gpu_memory("RTX 4090") == gpu_memory("24GB") == gpu_memory("24 GiB") == 24
    assert gpu_memory("NVIDIA H100") == 80 and gpu_memory("4090") == 24
    assert gpu_memory("A100 80GB") == 80 and gpu_memory("A100-40GB") == 40
    assert gpu_memory("V100 32GB") == 32 and gpu_memory("24576MiB") == 24
    for name in ("0GB", "-3", "huge", "", "4095"):
        with pytest.raises(ConfigError, match="--gpu"):
            gpu_memory(name)


def test_a_family_without_shapes_says_so() -> None:
    with pytest.raises(ConfigError, match="has no estimate yet"):
        estimated(build_pipeline("qwen-image-21"), 64)


def test_an_estimate_of_a_sharded_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Less per process than one process, and less with more of them."""
    from diffalign.cli.entry import run

    build_pipeline("flux").save_pretrained(tmp_path / "model")
    options = ["estimate", "--method", "diffusion_dpo", "--model", str(tmp_path / "model")]
    options += ["--data.resolution", "32", "--train.per_device_train_batch_size", "1"]

    def together(*more: str) -> dict[str, float]:
        code, printed = run([*options, *more]), capsys.readouterr()
        if "cannot simulate sharding; update torch" in printed.err:
            pytest.skip("this torch has no simulated collectives")
        assert code == 0
        rows = [line.rsplit(maxsplit=2) for line in printed.out.splitlines()]
        return {row[0].strip(): float(row[1]) for row in rows if row[-1:] == ["GiB"]}

    one = together()
    assert "gradients that DDP sends" in together("--num_gpus", "8")
    for name in ("fsdp2", "hsdp"):
        spread = together("--num_gpus", "16", "--accelerate_config", name)
        assert "activations, gradients, gathered blocks" in spread
        assert spread["together"] <= one["together"]
    assert run([*options, "--num_gpus", "3", "--accelerate_config", "hsdp"]) == 2
    assert "3 GPUs cannot hold 2 copies" in capsys.readouterr().err
    assert run([*options, "--num_gpus", "8", "--accelerate_config", "zero2"]) == 2


def test_8_bits_as_they_are_stored() -> None:
    """Modulations of a Flux stay in bf16; layers are copied for the backward pass."""
    pipe = build_pipeline("flux")
    layers = list(cast_layers(pipe.transformer))
    store_in_8_bits(pipe.transformer, torch.bfloat16)
    stored = [m for m in pipe.transformer.modules() if getattr(m, "weight", None) is not None]
    cast = [m for m in stored if m.weight.dtype == torch.float8_e4m3fn]
    assert cast and {id(m) for m in cast} == {id(m) for m in layers}
    options: Any = {"mixed_precision": "bf16", "layerwise_casting": True}
    name = "copies of 8-bit weights kept for the backward pass"
    copies = estimated(build_pipeline("flux"), 32, **options).bytes[name]
    assert copies == 2 * sum(layer.weight.numel() for layer in layers)
    checkpointed = estimated(build_pipeline("flux"), 32, gradient_checkpointing=True, **options)
    assert name not in checkpointed.bytes


def test_runs_that_cannot_be_estimated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_pipeline("pixart").save_pretrained(tmp_path / "pixart")
    common = ["--data.dataset_name", "unread", "--data.resolution", size_of("pixart")]
    common += ["--train.output_dir", tmp_path / "out", "--model", tmp_path / "pixart"]
    code, said = run(capsys, "--method", "diffusion_dpo", "--lora.r", 4, *common)
    assert code == 2 and "diffusers cannot load a LoRA into a PixArtSigmaPipeline" in said
    code, said = run(capsys, "--method", "diffusion_dpo", *common, "--gpu", "0.80001GB")
    assert code == 1 and "lora" not in said.partition("what to change")[2]
    code, said = run(capsys, "--method", "ppd", *common)
    assert code == 2 and "ppd has no estimate yet: it trains an adapter" in said
    code, said = run(
        capsys, "--method", "diffusion_dpo", *common, "--train.layerwise_casting", "true"
    )
    assert code == 2 and "train.layerwise_casting: only the frozen weights" in said


def test_what_drawing_methods_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guidance is in the trained steps, and the autoencoder is always needed."""
    build_pipeline("sd3").save_pretrained(tmp_path / "model")
    common = ["--data.dataset_name", "unread", "--data.resolution", 32, "--lora.r", 4]
    common += ["--train.output_dir", tmp_path / "out", "--model", tmp_path / "model"]
    common += ["--data.cache_latents", tmp_path / "cache", "--train.per_device_train_batch_size", 1]
    for method, options, images in (
        ("grpo", ["--train.images_per_prompt", 6], 12),
        ("grpo", ["--train.images_per_prompt", 6, "--train.guidance_scale", 1], 6),
        ("spo", ["--train.images_per_prompt", 6], 2),
        ("diffusion_nft", ["--train.images_per_prompt", 6], 6),
        ("rankdpo", ["--data.online.k", 5], 5),
    ):
        code, said = run(capsys, "--method", method, *common, *options)
        assert code == 0 and f"step: {images} images in a pass" in said, method
        assert "autoencoder" in said and "not counted: drawing" in said
