"""`--json` and `--quiet`: one JSON value on stdout, and nothing else."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import write_world

from diffalign.cli import entry
from diffalign.runtime.json_values import plain
from diffalign.runtime.progress import QUIET

PROMPT = "a small red circle on the left of a gray background"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


def answer(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> Any:
    """Run a command with `--json`, and return what stdout holds."""
    assert entry.run([*map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_every_command_that_ends_has_both_options(capsys: pytest.CaptureFixture[str]) -> None:
    for command in entry.COMMANDS:
        group = command.commands if isinstance(command, entry.Group) else [command]
        for each in group:
            if each.own_help:
                continue
            words = [command.name] if each is command else [command.name, each.name]
            with pytest.raises(SystemExit):
                entry.run([*words, "--help"])
            text = capsys.readouterr().out
            assert ("--json" in text) == ("--quiet" in text) == (not each.serves), words


def test_train_compare_and_export(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    facts = answer(capsys, "train", "--config", "run.yaml")
    assert facts["status"] == "finished" and facts["global_step"] == 2
    assert facts["output_dir"] == str(world / "out") and facts["metrics"]["train/loss"] > 0
    written = answer(
        capsys, "export", "--lora", "out", "--format", "kohya", "--output", "l.safetensors"
    )
    assert Path(written["output"]).is_file() and written["layers"] > 0
    merged = answer(
        capsys, "merge", "--model", "model", "--inputs", "out", "out", "--output_dir", "merged"
    )
    assert merged["parts"] == [{"input": "out", "weight": 0.5}] * 2
    config = answer(capsys, "train", "--config", "run.yaml", "--print_config")
    assert config["train"]["max_steps"] == 2


def test_text_ends_with_the_next_command(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["train", "--config", str(world / "run.yaml"), "--train.output_dir"]
    assert entry.run([*run, str(tmp_path / "a")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == f"done: {tmp_path / 'a'}"
    assert lines[-1].startswith(f"next: diffalign compare --base {world / 'model'} --tuned ")
    assert entry.run([*run, str(tmp_path / "b"), "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"done: {tmp_path / 'b'}\n" and "training" not in printed.err
    assert QUIET not in os.environ


def test_data_score_and_estimate(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = answer(capsys, "data", "inspect", world / "pairs")
    assert facts["rows"] == 6 and facts["images"] == 12
    written = answer(capsys, "data", "convert", world / "pairs", "--output_dir", tmp_path / "c")
    assert written["rows"] == 6
    estimate = answer(capsys, "estimate", "--config", world / "run.yaml", "--gpu", "24GB")
    assert estimate["fits"] is True and estimate["trainable_parameters"] > 0
    scores = answer(
        capsys, "score", "--images", world / "pairs", "--scorers", "jpeg-compressibility",
        "--output_dir", tmp_path / "scores",
    )  # fmt: skip
    assert scores["scorers"]["jpeg-compressibility"]["n"] == 12


def test_lists_versions_and_drawings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "torch" in answer(capsys, "env")
    assert {"shapes-clip", "imagereward"} <= {card["key"] for card in answer(capsys, "scorers")}
    assert answer(capsys, "scorers", "shapes-clip")["key"] == "shapes-clip"
    drawn = answer(
        capsys, "sample", "--model", "shapes", "--prompt", PROMPT, "--output_dir", tmp_path / "s",
        "--num_inference_steps", 2,
    )  # fmt: skip
    assert drawn["images"] and all(Path(image).is_file() for image in drawn["images"])
    assert drawn["missing"] == 0
    compared = answer(
        capsys, "compare", "--tuned", "shapes", "--max_prompts", 2, "--num_images", 1,
        "--num_inference_steps", 2, "--output_dir", tmp_path / "compared",
    )  # fmt: skip
    assert compared == json.loads((tmp_path / "compared" / "results.json").read_text())


def test_a_mistake_leaves_stdout_empty(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run(["scorers", "nobody", "--json"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "nobody" in printed.err


@pytest.mark.nightly
def test_two_processes_print_one_result(world: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "diffalign", "train", "--config", str(world / "run.yaml"),
        "--num_processes", "2", "--train.per_device_train_batch_size", "1",
        "--train.output_dir", str(tmp_path / "out"), "--json",
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["global_step"] == 2


def test_what_json_knows() -> None:
    value = {1: (math.nan, math.inf, 1.5), "path": Path("a"), "array": np.array([1.0, np.nan])}
    assert plain(value) == {"1": [None, None, 1.5], "path": "a", "array": [1.0, None]}


def test_train_runs_a_scorer_of_a_file_when_it_is_told(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffalign.rewards import registry

    monkeypatch.setattr(registry, "_trusts_files", False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def bright(images):\n    return [1.5] * len(images)\n")
    run = [
        "train", "--config", str(world / "run.yaml"), "--train.output_dir", "out",
        "--validation.validation_prompts", "[a cat]", "--validation.scorers", "[./mine.py:bright]",
        "--validation.num_inference_steps", "2", "--validation.validation_steps", "2",
    ]  # fmt: skip
    assert entry.run(run) == 2
    assert "read it, then pass --trust_remote_code" in capsys.readouterr().err
    assert entry.run([*run, "--trust_remote_code"]) == 0
    text = Path("out/logs/metrics.jsonl").read_text()
    entries = [json.loads(line) for line in text.splitlines()]
    values = [entry[name] for entry in entries for name in entry if name.startswith("validation/")]
    assert 1.5 in values, entries
