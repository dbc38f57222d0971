"""`model: shapes-flow`, the embedded flow model, goes through every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT, torchrun
from safetensors.torch import load_file
from tiny import assert_close_tensors, assert_same_tensors

from diffalign import cli
from diffalign.backbones import load_backbone
from diffalign.recipe import build_trainer, load_run
from diffalign.shapes import FLOW_MODEL, render, train_prompts
from diffalign.shapes.prompts import parse_prompt

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ranked lists of a right and a wrong rendered image."""
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    prompts = train_prompts()[:8]
    for i, prompt in enumerate(prompts):
        names = []
        for j, shown in enumerate((prompt, prompts[i - 1])):
            names.append(f"{i}-{j}.png")
            render(parse_prompt(shown), style=("lit", "flat")[j]).save(folder / names[-1])
        lines.append(json.dumps({"prompt": prompt, "images": names, "scores": [1.0, 0.0]}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def options(rows: Path, out: Path, **more: Any) -> list[str]:
    values = {
        "model": FLOW_MODEL,
        "lora.r": 4,
        "data.dataset_name": rows,
        "train.output_dir": out,
        "train.max_steps": 4,
        "train.per_device_train_batch_size": 4,
        "train.learning_rate": 1e-3,
        "train.save_steps": 2,
        "train.save_total_limit": 9,
        **more,
    }
    return [str(x) for key, value in values.items() for x in (f"--{key}", value)]


def trained(method: str, rows: Path, out: Path, **more: Any) -> Path:
    build_trainer(load_run(None, ["--method", method, *options(rows, out, **more)])).train()
    return out


def test_prompts_are_encoded_with_few_t5_tokens() -> None:
    backbone = load_backbone(FLOW_MODEL)
    encoded = backbone.encode_prompts([train_prompts()[0], ""])
    assert encoded["prompt_embeds"].shape == (2, 32, 128)
    assert encoded["pooled_prompt_embeds"].shape == (2, 64)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("diffusion_dpo", {"train.use_ema": "true", "lora.dropout": 0.2}),
        pytest.param(
            "d3po",
            {"rewards": "[shapes]", "train.num_inference_steps": 3, "train.images_per_prompt": 2},
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_resumed_run_is_the_uninterrupted_run(
    rows: Path, tmp_path: Path, method: str, more: dict[str, Any]
) -> None:
    trained(method, rows, tmp_path / "a", **more)
    trained(method, rows, tmp_path / "b", **{**more, "train.max_steps": 2})
    again = {**more, "train.resume_from_checkpoint": "latest"}
    trained(method, rows, tmp_path / "b", **again)
    assert_same_tensors(load_file(tmp_path / "a" / LORA), load_file(tmp_path / "b" / LORA))


@pytest.mark.nightly
def test_two_processes_are_one_process(rows: Path, tmp_path: Path) -> None:
    steady = {"train.adam_epsilon": 1e-3, "train.learning_rate": 1e-2}
    trained("diffusion_dpo", rows, tmp_path / "one", **steady)
    two = {**steady, "train.per_device_train_batch_size": 2}
    done = torchrun(
        ROOT / "scripts" / "train.py",
        *("--method", "diffusion_dpo", *options(rows, tmp_path / "two", **two)),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, both = (load_file(tmp_path / name / LORA) for name in ("one", "two"))
    assert_close_tensors(both, one, rtol=1e-3, atol=1e-5)
    assert max(float(t.abs().max()) for key, t in one.items() if "lora_B" in key) > 1e-4


@pytest.mark.nightly
def test_every_command_takes_it(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["--num_inference_steps", "3"]
    model = ["--model", FLOW_MODEL]
    trained("diffusion_dpo", rows, tmp_path / "run")
    prompt = train_prompts()[0]
    tuned = ["--base", FLOW_MODEL, "--tuned", "run"]
    small = ["--max_prompts", "4", "--num_images", "1", *few]
    drawn = ["--max_prompts", "3", "--num_images", "2", *few]
    pair = ["--inputs", "run", "run", "--weights", "0.5", "0.5"]
    particles = ["--lmbda", "5", "--num_particles", "2", *few]
    build = ["data", "build", "--prompts", "shapes", "--models", FLOW_MODEL, "--scorers", "shapes"]
    for number, command in enumerate(
        (
            [*build, *drawn],
            ["sample", *model, "--lora", "run", "--prompt", prompt, *few],
            ["compare", *tuned, *small],
            ["compare", *tuned, *small, "--guidance_scales", "1,3"],
            ["steer", *model, "--scorer", "shapes", "--prompt", prompt, *particles],
            ["merge", *model, *pair],
        )
    ):
        assert cli.run([*command, "--output_dir", f"out-{number}"]) == 0, command
    one, twice = load_file(tmp_path / "run" / LORA), load_file(tmp_path / "out-5" / LORA)
    assert set(one) == set(twice)
    results = json.loads((tmp_path / "out-2" / "results.json").read_text())
    assert results["comparisons"]


@pytest.mark.nightly
def test_validation_draws_what_sampling_draws(rows: Path, tmp_path: Path) -> None:
    """Without text tokens of its own the pipeline would encode other prompts."""
    prompt = train_prompts()[0]
    trained(
        "sft",
        rows,
        tmp_path / "run",
        **{
            "validation.validation_prompts": json.dumps([prompt]),
            "validation.validation_steps": 2,
            "validation.num_inference_steps": 2,
            "validation.num_validation_images": 1,
        },
    )
    assert list((tmp_path / "run").rglob("*.png"))
    assert torch.isfinite(load_file(tmp_path / "run" / LORA).popitem()[1]).all()
