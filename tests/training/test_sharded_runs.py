"""Runs sharded by FSDP2 over two processes equal those of one process, and resume."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import torchrun
from diffusers import ControlNetModel
from safetensors.torch import load_file
from tiny import (
    assert_close_tensors,
    build_pipeline,
    lora_config,
    make_trainer,
    pair_rows,
    user_rows,
)

from diffalign import ValidationConfig
from diffalign.errors import UserError

SCRIPT = Path(__file__).parent / "sharded_script.py"
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}
FIRST = ("diffusion_dpo:sd:full", "diffusion_dpo:flux:lora")
OTHERS = (
    *("diffusion_dpo:sd:lora", "diffusion_dpo:flux:full", "diffusion_dpo:qwen-image:lora"),
    *("diffusion_dpo:qwen-image:full", "mapo:sd:lora", "mapo:flux:full"),
    *("rankdpo:sd:full", "rankdpo:flux:lora", "d3po:sd:lora", "d3po:sd:full", "d3po:flux:lora"),
    *("seppo:sd:lora", "seppo:sd:full", "seppo:flux:full"),
    *("diffusion_nft:sd:lora", "diffusion_nft:sd:full", "diffusion_nft:flux:full"),
    *("ppd:sd:part", "ctrl_u:sd:part"),
)


def sharded_options(kind: str, size: int) -> dict[str, Any]:
    """Arguments of `make_trainer` for `method:family:lora|full|part`."""
    method, family, how = kind.split(":")
    options: dict[str, Any] = {
        "family": family,
        "method": method,
        "peft_config": lora_config() if how == "lora" else None,
        "per_device_train_batch_size": size,
        "max_steps": 4,
        "adam_epsilon": 1e-3,
        "learning_rate": 1e-2 if how == "lora" else 1e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "use_ema": how == "full",
        "ema_decay": 0.5,
    }
    if method == "ppd":
        options |= {"rows": user_rows(16), "weight_decay": 0.01}
    if kind == FIRST[0]:  # drawing and evaluating by all processes, of odd numbers
        validation = ValidationConfig(
            validation_prompts=["a red circle", "a blue star", "a cat"],
            scorers=["jpeg_compressibility"],
            num_validation_images=3,
            validation_steps=4,
            num_inference_steps=2,
        )
        options["options"] = {"validation": validation, "eval_dataset": pair_rows(3)}
        options |= {"eval_steps": 4, "precompute_ref_errors": True, "ref_error_draws": 1}
    return options


def run_sharded(
    folder: Path,
    processes: int,
    size: int,
    kinds: tuple[str, ...],
    mesh: dict[str, str] | None = None,
) -> None:
    done = torchrun(
        SCRIPT,
        folder,
        size,
        *kinds,
        timeout=1500,
        processes=processes,
        environment=FSDP | (mesh or {}),
    )
    assert done.returncode == 0, done.stderr[-4000:]


def rows(folder: Path) -> list[dict[str, float]]:
    text = (folder / "logs" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def check(folder: Path, one: Path, kind: str) -> None:
    """The curve of one process, a bit-equal resumed run, and a usable result."""
    name = kind.replace(":", "-")
    make_trainer(one / name, **sharded_options(kind, 4)).train()
    ours, single = rows(folder / name), rows(one / name)
    assert len(ours) == len(single)
    for mine, theirs in zip(ours, single, strict=True):
        compared = [k for k in mine if k.endswith("loss") or k.startswith(("validation", "eval"))]
        for key in compared:
            assert mine[key] == pytest.approx(theirs[key], abs=1e-5, rel=1e-5), (key, kind)
        if "train/grad_norm" in mine:
            # Where a pixel of a drawn image was rounded to the next of 256 values, its
            # reward is another one, too.
            same_images = mine.get("judge/score_0") == theirs.get("judge/score_0")
            assert mine["train/grad_norm"] == pytest.approx(
                theirs["train/grad_norm"], rel=1e-4 if same_images else 2e-3
            )
    assert any("train/loss" in row for row in ours)
    files = sorted(
        path.relative_to(folder / name)
        for path in (folder / name).rglob("*.safetensors")
        if "checkpoint-4" in path.parts or path.parent == folder / name
    )
    assert files
    for file in files:
        mine = load_file(folder / name / file)
        resumed = load_file(folder / f"{name}-resumed" / file)
        assert mine.keys() == resumed.keys()
        assert all(torch.equal(mine[key], resumed[key]) for key in mine), file
    # No shard of the frozen base, and no pickled index.
    written = [path.name for path in (folder / name / "checkpoint-4").rglob("*")]
    assert ".metadata" not in written and not any("model_fsdp" in file for file in written)
    usable(folder / name, one / name, kind)


def usable(folder: Path, one: Path, kind: str) -> None:
    """Plain diffusers loads the result."""
    _, family, how = kind.split(":")
    if how == "lora":
        pipe = build_pipeline(family)
        pipe.load_lora_weights(str(folder))
        assert_close_tensors(
            load_file(folder / "pytorch_lora_weights.safetensors"),
            load_file(one / "pytorch_lora_weights.safetensors"),
            rtol=1e-3,
            atol=1e-4,
        )
    elif how == "part":
        if (folder / "config.json").is_file():
            network = ControlNetModel.from_pretrained(folder, use_safetensors=True)
            facts = json.loads((folder / "config.json").read_text())
            assert facts["_class_name"] == type(network).__name__ == "ControlNetModel"
    else:
        loaded = type(build_pipeline(family)).from_pretrained(folder)
        network = next(
            part for name in ("unet", "transformer") if (part := getattr(loaded, name, None))
        )
        assert not type(network).__name__.startswith("FSDP")


@pytest.mark.skipif(sys.platform != "linux", reason="gloo with FSDP2 on CPUs")
def test_sharded_runs_equal_one_process(tmp_path: Path) -> None:
    run_sharded(tmp_path / "two", 2, 2, FIRST)
    for kind in FIRST:
        check(tmp_path / "two", tmp_path / "one", kind)


@pytest.mark.nightly
def test_every_sharded_method_equals_one_process(tmp_path: Path) -> None:
    run_sharded(tmp_path / "two", 2, 2, OTHERS)
    for kind in OTHERS:
        check(tmp_path / "two", tmp_path / "one", kind)


@pytest.mark.nightly
def test_copies_of_shards_and_another_number_of_processes(tmp_path: Path) -> None:
    """HSDP, 2 x 2, equals one process. It resumes what two processes of FSDP2 wrote."""
    mesh = {
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
        "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
    }
    kind = "diffusion_dpo:flux:full"
    name = kind.replace(":", "-")
    run_sharded(tmp_path / "four", 4, 1, (kind,), mesh)
    check(tmp_path / "four", tmp_path / "one", kind)
    state = tmp_path / "four" / name / "checkpoint-4"
    sizes = [len(load_file(path)) for path in sorted(state.glob("optimizer-0-*"))]
    assert sizes[0] and sizes[1] and sizes[2:] == [0, 0]  # each part once

    run_sharded(tmp_path / "two", 2, 2, (kind,))
    shutil.copytree(tmp_path / "two" / name, tmp_path / "other" / name)
    shutil.rmtree(tmp_path / "other" / name / "checkpoint-4")
    done = torchrun(
        SCRIPT, "--resume", tmp_path / "other", 1, kind, timeout=300, processes=4,
        environment=FSDP | mesh,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for file in ("ema.safetensors", "transformer/diffusion_pytorch_model.safetensors"):
        mine = load_file(tmp_path / "other" / name / "checkpoint-4" / file)
        theirs = load_file(tmp_path / "one" / name / "checkpoint-4" / file)
        assert_close_tensors(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.nightly
def test_a_checkpoint_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    kind = "diffusion_dpo:sd:lora"
    name = kind.replace(":", "-")
    run_sharded(tmp_path, 2, 2, (kind,))
    with pytest.raises(UserError, match="is of a run sharded by FSDP2"):
        make_trainer(tmp_path / name, **sharded_options(kind, 4)).train(
            resume_from_checkpoint=str(tmp_path / name / "checkpoint-2")
        )
