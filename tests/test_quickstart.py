"""The quickstart in small, by the installed command; what it leaves; a second run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from commands import SMALL, run
from PIL import Image

import diffalign.cli.entry


def test_it_leaves_what_it_says(home: Path) -> None:
    folder = home / "diffalign-quickstart"
    results = json.loads((folder / "results.json").read_text())
    for side in ("base", "tuned"):
        assert 0 <= results[side]["accuracy"] <= 1 and results[side]["accuracy_standard_error"] >= 0
        assert set(results[side]["attributes"]) == {
            "size",
            "color",
            "shape",
            "position",
            "background",
        }
    wins = results["win_rate"]
    assert 0 <= wins["low"] <= wins["rate"] <= wins["high"] <= 1
    assert Image.open(folder / "comparison.png").size[0] > 400
    assert (folder / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert (folder / "lora" / "logs" / "metrics.jsonl").read_text().count("\n") >= 1


def test_its_dataset_is_plain_parquet_of_training_prompts(home: Path) -> None:
    from datasets import load_dataset

    from diffalign.shapes import held_out_prompts

    rows = load_dataset(
        "parquet", data_dir=str(home / "diffalign-quickstart" / "dataset"), split="train"
    )
    assert len(rows) == 16 and len(rows[0]["images"]) == len(rows[0]["scores"]) == 3
    assert not set(rows["prompt"]) & set(held_out_prompts())


@pytest.mark.nightly
def test_a_second_run_says_what_is_there(home: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (home / "diffalign-quickstart").rglob("*")}
    again = run(sys.executable, "-m", "diffalign", "quickstart", *SMALL, cwd=home)
    assert (
        again.returncode == 0
        and "finished quickstart" in again.stdout
        and "win-rate" in again.stdout
    )
    other = run(sys.executable, "-m", "diffalign", "quickstart", *SMALL, "--seed", 1, cwd=home)
    assert other.returncode == 2 and "--seed 0" in other.stderr and "Traceback" not in other.stderr
    assert {p: p.stat().st_mtime_ns for p in (home / "diffalign-quickstart").rglob("*")} == before


@pytest.mark.nightly
def test_an_interrupted_run_continues_from_what_is_there(home: Path) -> None:
    import shutil

    folder = home / "again"
    shutil.copytree(home / "diffalign-quickstart", folder)
    (folder / "results.json").unlink()
    (folder / "lora" / "pytorch_lora_weights.safetensors").unlink()
    before = json.loads((home / "diffalign-quickstart" / "results.json").read_text())
    done = run(
        sys.executable, "-m", "diffalign", "quickstart", *SMALL, "--output_dir", folder, cwd=home
    )
    assert done.returncode == 0 and "continuing the quickstart" in done.stdout, done.stderr
    after = json.loads((folder / "results.json").read_text())
    for name in (
        "tuned",
        "base",
    ):  # drawn by another process, whose rounding may flip one verdict of eight
        assert after[name]["accuracy"] == pytest.approx(before[name]["accuracy"], abs=0.13)
        assert after[name]["score"] == pytest.approx(before[name]["score"], abs=0.1)


@pytest.mark.parametrize(
    "flag", ["--seed -1", "--num_prompts 601", "--images_per_prompt 1", "--beta 0", "--max_steps x"]
)
def test_settings_out_of_range(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    never = tmp_path / "never"
    assert diffalign.cli.entry.run(["quickstart", *flag.split(), "--output_dir", str(never)]) == 2
    said = capsys.readouterr().err
    assert flag.split()[0] in said and "Traceback" not in said
    assert not never.exists()
