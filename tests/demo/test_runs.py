"""A run's folder, read while the run writes it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from diffalign.demo.runs import METRICS, RunReader, default_metrics, duration, find_runs
from diffalign.errors import UserError


def log(folder: Path, text: str, mode: str = "a") -> None:
    (folder / METRICS).parent.mkdir(parents=True, exist_ok=True)
    with (folder / METRICS).open(mode) as file:
        file.write(text)


def entry(step: int, **values: float) -> str:
    return json.dumps({"step": step, **{k.replace("_", "/"): v for k, v in values.items()}}) + "\n"


def test_only_whole_lines_count_and_nothing_is_read_twice(tmp_path: Path) -> None:
    reader = RunReader(tmp_path / "run")
    assert reader.read().describe() == "**run**: nothing is logged yet."
    (tmp_path / "run").mkdir()
    log(tmp_path / "run", entry(1, train_loss=0.5) + entry(2, train_loss=0.25)[:9])
    assert reader.read().curves == {"train/loss": [(1, 0.5)]}
    log(tmp_path / "run", entry(2, train_loss=0.25)[9:] + "garbage\n[1]\n")
    log(tmp_path / "run", entry(2, validation_clip=0.125))
    state = reader.read()
    assert state.curves == {"train/loss": [(1, 0.5), (2, 0.25)], "validation/clip": [(2, 0.125)]}
    assert state.step == 2 and state.age is not None and not state.finished


def test_a_resumed_run_loses_what_it_computes_again(tmp_path: Path) -> None:
    reader = RunReader(tmp_path)
    log(tmp_path, "".join(entry(step, train_loss=step) for step in range(1, 6)))
    assert len(reader.read().curves["train/loss"]) == 5
    # The log is cut at the checkpoint of step 2, and the run goes on from there.
    log(tmp_path, "".join(entry(step, train_loss=step) for step in (1, 2)), mode="w")
    assert [step for step, _ in reader.read().curves["train/loss"]] == [1, 2]
    log(tmp_path, "".join(entry(step, train_loss=9) for step in (2, 3)))
    assert reader.read().curves["train/loss"] == [(1, 1.0), (2, 9.0), (3, 9.0)]


def test_title_length_samples_and_end(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    run.mkdir()
    (run / "config.yaml").write_text("method: mapo\nmodel: shapes\ntrain:\n  max_steps: 300\n")
    log(run, entry(120, train_loss=1))
    (run / "samples").mkdir()
    for step in (5, 100, 20):
        (run / "samples" / f"step-{step}.png").touch()
    state = RunReader(run).read()
    assert state.describe() == "**mine** (mapo on shapes): step 120 of 300, last entry 0 s ago."
    assert [path.stem for path in state.samples] == ["step-100", "step-20", "step-5"]
    weights = run / "pytorch_lora_weights.safetensors"
    weights.touch()
    os.utime(weights, (1, 1))  # of an earlier run in this folder
    assert not RunReader(run).read().finished
    os.utime(weights)
    assert RunReader(run).read().describe().endswith("finished at step 120 of 300.")
    (run / "config.yaml").write_text("train: [")
    assert RunReader(run).read().describe().startswith("**mine**: finished")


def test_runs_are_folders_or_lie_in_one(tmp_path: Path) -> None:
    for name, age in (("a", 300), ("b", 100), ("c/a", 200)):
        (tmp_path / name).mkdir(parents=True)
        config = tmp_path / name / "config.yaml"
        config.touch()
        os.utime(config, (1e9 - age, 1e9 - age))
    found = find_runs([tmp_path, tmp_path / "c", tmp_path / "later"])
    assert list(found)[:2] == ["b", str(tmp_path / "c" / "a")]
    assert set(found.values()) == {tmp_path / p for p in ("a", "b", "c/a", "later")}
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--runs: .* is a file"):
        find_runs([tmp_path / "file"])


def test_the_first_metrics() -> None:
    names = ["judge/advantage", "judge/clip", "train/loss", "train/lr", "validation/clip"]
    assert default_metrics(names, 4) == ["train/loss", "validation/clip", "judge/clip"]
    assert default_metrics(["reward/head"], 4) == ["reward/head"]
    assert default_metrics([], 4) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5, "5 s"), (119, "119 s"), (150, "2 min"), (9000, "2 h"), (2e5, "2 days")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
