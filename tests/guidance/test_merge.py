"""``diffalign merge``: exact sums of LoRAs and of full weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiers import by_default
from tiny import all_tensors, assert_close_tensors, build_pipeline, lora_config, make_trainer

from diffalign import cli
from diffalign.errors import UserError
from diffalign.generation.merge import merge_states


def fused(model: Path, *parts: tuple[Path, float]) -> dict[str, torch.Tensor]:
    """The network's weights with LoRAs fused in by diffusers, one at a time."""
    base = all_tensors(type(build_pipeline("sd")).from_pretrained(model).unet)
    total = {name: value.clone() for name, value in base.items()}
    for path, weight in parts:
        pipe = type(build_pipeline("sd")).from_pretrained(model)
        pipe.load_lora_weights(str(path))
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        for name, value in all_tensors(pipe.unet).items():
            total[name] += weight * (value - base[name])
    return total


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build_pipeline("sd").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    targets = ["to_q", "to_k", "conv_in"]
    for name, rank, alpha, modules in (("a", 4, 8, None), ("b", 2, 6, targets)):
        config = lora_config(
            r=rank, alpha=alpha, **({"target_modules": modules} if modules else {})
        )
        make_trainer(
            folder / name, peft_config=config, max_steps=3, learning_rate=5e-2, seed=rank
        ).train()
    return [folder / "a", folder / "b"]


def merge(model: Path, out: Path, inputs: list[Path], *weights: float) -> int:
    chosen = ["--weights", *map(str, weights)] if weights else []
    return cli.run(
        [
            "merge",
            "--model",
            str(model),
            "--inputs",
            *map(str, inputs),
            *chosen,
            "--output_dir",
            str(out),
        ]
    )


@by_default(values=1)
@pytest.mark.parametrize("weights", [(), (0.3, 0.7), (1.0, -0.5)])
def test_loras_are_summed_exactly(
    model: Path, loras: list[Path], tmp_path: Path, weights: tuple[float, ...]
) -> None:
    """Different ranks, alphas and targets; plain diffusers reads the result."""
    assert merge(model, tmp_path / "out", loras, *weights) == 0
    shares = weights or (0.5, 0.5)
    expected = fused(model, *zip(loras, shares, strict=True))
    assert_close_tensors(fused(model, (tmp_path / "out", 1.0)), expected, rtol=1e-4, atol=1e-5)
    saved = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert max(t.shape[0] for n, t in saved.items() if "lora_A" in n) == 6


def test_full_weights_are_interpolated(model: Path, tmp_path: Path) -> None:
    runs = []
    for i in range(2):
        pipe = build_pipeline("sd", seed=10 + i)
        pipe.save_pretrained(tmp_path / f"run{i}")
        runs.append(tmp_path / f"run{i}")
    assert merge(model, tmp_path / "out", runs, 0.25, 0.5) == 0
    states = [all_tensors(build_pipeline("sd", seed=s).unet) for s in (0, 10, 11)]
    expected = {
        n: 0.25 * states[0][n] + 0.25 * states[1][n] + 0.5 * states[2][n] for n in states[0]
    }
    merged = type(build_pipeline("sd")).from_pretrained(tmp_path / "out")
    assert_close_tensors(all_tensors(merged.unet), expected, rtol=1e-4, atol=1e-6)


def test_parts_that_are_not_merged_are_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pipe = type(build_pipeline("sd")).from_pretrained(model)
    with torch.no_grad():
        for value in pipe.text_encoder.parameters():
            value.mul_(1.5)
    pipe.save_pretrained(tmp_path / "tuned")
    assert merge(model, tmp_path / "out", [tmp_path / "tuned"], 1.0) == 0
    said = capsys.readouterr().out
    assert "WARNING: the text_encoder of" in said and "vae" not in said


def test_mistakes(
    model: Path, loras: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def fails(
        words: str, inputs: list[Path], *weights: float, out: str = "new", base: Path = model
    ) -> None:
        assert merge(base, tmp_path / out, inputs, *weights) == 2
        said = capsys.readouterr().err
        assert words in said and "Traceback" not in said

    fails("--weights: expected one per input (2), got 1", loras, 1.0)
    fails("merge one kind at a time", [loras[0], model])
    fails("there is no file or folder", [tmp_path / "missing", loras[0]])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    fails("exists and is not empty", loras, out="full")
    build_pipeline("sdxl").save_pretrained(tmp_path / "xl")
    fails("number 1", [tmp_path / "xl"])
    build_pipeline("sd_v").save_pretrained(tmp_path / "v")
    fails("predicts v_prediction, the base epsilon", [tmp_path / "v"])
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match=r"number 1: w has shape \(3,\), the base's \(2,\)"):
        merge_states({"w": torch.zeros(2)}, [{"w": torch.zeros(3)}], [1.0])
