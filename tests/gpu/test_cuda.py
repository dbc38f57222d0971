"""What a CUDA GPU changes: precision, kernels, memory, states of generators.

Without a GPU these are skipped. `DIFFALIGN_GPU_TESTS=cpu` runs those that need no
kernel of a GPU on the CPU, which shows whether the tests themselves work.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    METHOD_NAMES,
    assert_close_tensors,
    build_pipeline,
    first_batch,
    lora_config,
    make_trainer,
    method_rows,
    next_batch,
    pair_rows,
)
from tiny_families import size_of

CUDA = torch.cuda.is_available()
ON_CPU = os.environ.get("DIFFALIGN_GPU_TESTS") == "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (CUDA or ON_CPU), reason="needs a CUDA GPU"),
]
real_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")

LORA = "pytorch_lora_weights.safetensors"
FAMILIES = ("sd", "sdxl", "sd3", "flux", "flux2-klein", "z-image", "qwen-image", "sana", "chroma")


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """float32 is float32, and a library that has to choose takes the same kernel."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    forget_device()


def forget_device() -> None:
    """The next trainer looks for its device again."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def trainer_of(folder: Path, family: str = "sd", **options: Any) -> Any:
    size = size_of(family)
    return make_trainer(
        folder, family, rows=pair_rows(4, size), per_device_train_batch_size=2,
        data={"resolution": size}, **{"peft_config": lora_config(), **options},
    )  # fmt: skip


def awake(trainer: Any) -> None:
    """Gives the LoRA an effect."""
    for name, weight in trainer.network.named_parameters():
        if "lora_B" in name:
            weight.data.fill_(0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_and_gradients_are_those_of_the_cpu(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for cpu in (True, False):
        forget_device()
        monkeypatch.setenv("ACCELERATE_USE_CPU", str(cpu).lower())
        trainer = trainer_of(tmp_path / str(cpu), family, seed=3)
        trainer.setup()
        assert trainer.accelerator.device.type == ("cpu" if cpu or not CUDA else "cuda")
        awake(trainer)
        policy, reference = trainer.errors(first_batch(trainer))
        policy.sum().backward()
        gradients = {
            name: weight.grad.cpu()
            for name, weight in trainer.network.named_parameters()
            if weight.grad is not None
        }
        results.append((policy.detach().cpu(), reference.cpu(), gradients))
    one, other = results
    torch.testing.assert_close(other[0], one[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(other[1], one[1], rtol=1e-3, atol=1e-5)
    assert_close_tensors(other[2], one[2], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method_trains_in_bf16(method: str, lora: bool, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, "sd", method, mixed_precision="bf16", gradient_checkpointing=True, max_steps=2,
        rows=method_rows(method, 4), peft_config=lora_config() if lora else None,
    )  # fmt: skip
    trainer.train()
    losses = [entry["train/loss"] for entry in trainer.state.log_history]
    assert losses and all(loss == loss for loss in losses)
    if CUDA:
        assert next(trainer.network.parameters()).device.type == "cuda"


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_run_goes_on_as_if_it_had_not_stopped(precision: str, tmp_path: Path) -> None:
    """With draws of the GPU's own generator: dropout."""
    if precision == "fp16" and not CUDA:
        pytest.skip("fp16 needs a CUDA GPU")

    def run(name: str, **options: Any) -> Any:
        return trainer_of(
            tmp_path / name, max_steps=4, save_steps=2, save_total_limit=None, adam_epsilon=1e-3,
            mixed_precision=precision, peft_config=lora_config(dropout=0.5), **options,
        )  # fmt: skip

    run("whole").train()
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoint-4")
    run("part", resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2")).train()
    whole, part = (load_file(tmp_path / name / LORA) for name in ("whole", "part"))
    assert_close_tensors(part, whole, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux", "z-image"])
def test_a_quantised_base(family: str, kind: str, tmp_path: Path) -> None:
    """Near bf16, the reference starts as the policy, and the run can be resumed."""
    pytest.importorskip("bitsandbytes" if kind == "nf4" else "torchao")
    if kind == "nf4" and not CUDA:
        pytest.skip("nf4 needs a CUDA GPU")
    build_pipeline(family).save_pretrained(tmp_path / "model")

    def run(name: str, **options: Any) -> Any:
        return trainer_of(
            tmp_path / name, family, model=str(tmp_path / "model"), max_steps=2, save_steps=1,
            mixed_precision="bf16", gradient_checkpointing=True, save_total_limit=None, **options,
        )  # fmt: skip

    errors = []
    for quantization in (None, kind):
        trainer = run(str(quantization), quantization=quantization)
        policy, reference = trainer.errors(first_batch(trainer))
        torch.testing.assert_close(policy, reference, rtol=1e-4, atol=0)
        errors.append(reference)
        trainer.train()
    torch.testing.assert_close(errors[1], errors[0], rtol=0.2 if kind == "nf4" else 0.05, atol=0)
    shutil.copytree(tmp_path / kind, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-2")
    checkpoint = str(tmp_path / "again" / "checkpoint-1")
    run("again", quantization=kind, resume_from_checkpoint=checkpoint).train()
    assert_close_tensors(
        load_file(tmp_path / "again" / LORA), load_file(tmp_path / kind / LORA), 1e-2, 1e-4
    )
    build_pipeline(family).load_lora_weights(str(tmp_path / kind))


@pytest.mark.parametrize(
    "option",
    [
        {"offload": "group"},
        {"compile": True},
        {"optim": "adamw_fused"},
        {"offload_reference": True},
    ],
    ids=lambda option: next(iter(option)),
)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_options_for_memory_and_speed_change_no_weight(
    option: dict[str, Any], lora: bool, tmp_path: Path
) -> None:
    if lora and "offload_reference" in option:
        pytest.skip("a LoRA has no second network")
    torch.compiler.reset()
    weights = []
    for name, given in (("plain", {}), ("option", option)):
        trainer_of(
            tmp_path / name, "sd3", peft_config=lora_config() if lora else None, max_steps=3,
            adam_epsilon=1e-3, seed=2, **given,
        ).train()  # fmt: skip
        files = (tmp_path / name).rglob("*.safetensors")
        weights.append(load_file(next(file for file in files if "checkpoint" not in str(file))))
    assert_close_tensors(weights[1], weights[0], rtol=1e-3, atol=1e-5)


@real_gpu
def test_the_8_bit_optimizer_learns(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    for optim in ("adamw", "adamw_8bit"):
        trainer_of(tmp_path / optim, "sd", optim=optim, max_steps=3).train()
    one, other = (load_file(tmp_path / optim / LORA) for optim in ("adamw", "adamw_8bit"))
    assert_close_tensors(other, one, rtol=0.2, atol=1e-3)


@pytest.mark.parametrize("method", ["d3po", "spo"])
def test_recorded_log_probabilities_are_those_of_the_policy(method: str, tmp_path: Path) -> None:
    """The first update starts at the policy that sampled."""
    trainer = make_trainer(
        tmp_path, "sd", method, rows=method_rows(method, 4), peft_config=lora_config(),
        images_per_prompt=3, rollout_batch_size=2, per_device_train_batch_size=2,
    )  # fmt: skip
    for micro in trainer.micro_batches(next_batch(trainer)):
        policy = trainer.step_log_probs(micro, trainer.policy).detach()
        recorded = micro.extra["recorded"].to(policy.device)
        torch.testing.assert_close(policy, recorded, rtol=1e-3, atol=1e-4)
        with torch.no_grad():
            reference = trainer.step_log_probs(micro, trainer.reference)
        torch.testing.assert_close(policy, reference, rtol=1e-4, atol=1e-5)


def test_steering_repeats() -> None:
    from diffalign import FKSteering

    def brightness(images: Any, prompts: Any) -> torch.Tensor:
        return torch.tensor([sum(image.convert("L").getdata()) / 1e5 for image in images])

    pipe = build_pipeline("sd").to("cuda" if CUDA else "cpu")
    pipe.set_progress_bar_config(disable=True)
    steering = FKSteering(pipe, brightness, num_particles=3, lmbda=2.0)
    one, other = (
        steering(["a cat", "a dog"], seed=4, num_inference_steps=4, eta=1.0) for _ in range(2)
    )
    for first, second in zip(one.images, other.images, strict=True):
        assert [image.tobytes() for image in first] == [image.tobytes() for image in second]


def test_a_scorer_gives_the_scores_of_the_cpu() -> None:
    from diffalign import load_scorer
    from diffalign.shapes import all_scenes, render

    scenes = all_scenes()[:8]
    images = [render(scene, random.Random(0)) for scene in scenes]
    prompts = [scene.prompt for scene in scenes]
    one = load_scorer("shapes-clip", device="cpu")(images, prompts)
    other = load_scorer("shapes-clip", device="cuda" if CUDA else "cpu")(images, prompts)
    torch.testing.assert_close(other.cpu().float(), one.float(), rtol=1e-3, atol=1e-3)


@real_gpu
def test_a_full_gpu_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from datasets import Dataset

    from diffalign.cli import entry

    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + 40 * 2**20
    total = torch.cuda.mem_get_info()[1]
    Dataset.from_list(pair_rows(64, 64)).to_parquet(tmp_path / "pairs.parquet")
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        code = entry.run(
            ["train", "--method", "diffusion_dpo", "--model", "shapes", "--data.dataset_name",
             str(tmp_path / "pairs.parquet"), "--train.output_dir", str(tmp_path / "run"),
             "--train.max_steps", "2", "--train.per_device_train_batch_size", "64"]
        )  # fmt: skip
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert code == 1
    assert "out of memory" in capsys.readouterr().err


@real_gpu
def test_the_estimate_is_near_the_peak(tmp_path: Path) -> None:
    """Of a network of 50 million parameters: within a quarter and 200 MiB."""
    from benchmarks.random_unet import large_pipeline
    from diffalign.backbones import load_backbone
    from diffalign.training.estimate import estimate

    trainer = make_trainer(
        tmp_path, model=large_pipeline(), mixed_precision="bf16", max_steps=3,
        rows=pair_rows(8, 64), data={"resolution": 64}, per_device_train_batch_size=2,
        peft_config=lora_config(),
    )  # fmt: skip
    trainer.setup()
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    peak = torch.cuda.max_memory_allocated()
    result = estimate(
        load_backbone(large_pipeline()), trainer.args, lora_config(), images_per_group=2,
        has_reference=True, size=(64, 64), caches_latents=False, caches_prompts=False,
    )  # fmt: skip
    assert abs(result.peak - peak) < 0.25 * peak + 200 * 2**20
