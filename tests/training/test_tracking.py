"""Trackers: their names, and what happens when one fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import lora_config, make_trainer

from diffalign.errors import ConfigError


def trainer_of(folder: Path, **fields: Any) -> Any:
    return make_trainer(folder, peft_config=lora_config(), max_steps=2, **fields)


def test_a_tracker_must_be_known_and_installed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"report_to: expected one of none.*did you mean 'wandb'"):
        trainer_of(tmp_path, report_to="wandbb")
    with pytest.raises(ConfigError, match="aim is not installed; pip install aim"):
        trainer_of(tmp_path, report_to="aim")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("project", ["../../esc", "/tmp/esc"])
def test_a_project_is_no_path(project: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="project: expected a name, got the path"):
        trainer_of(tmp_path, report_to="tensorboard", project=project)


def test_tensorboard_gets_metrics_and_a_failing_tracker_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from accelerate.tracking import TensorBoardTracker

    trainer_of(tmp_path / "good", report_to="tensorboard").train()
    assert list((tmp_path / "good/logs").rglob("events.*"))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    with pytest.warns(UserWarning, match="tensorboard failed .no route to host.; the run goes on"):
        assert trainer_of(tmp_path / "bad", report_to="tensorboard").train().global_step == 2
    lines = [(tmp_path / name / "logs/metrics.jsonl").read_text() for name in ("good", "bad")]
    assert lines[0] == lines[1] and json.loads(lines[0].splitlines()[-1])["step"] == 2


def test_a_tracker_that_cannot_start_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from accelerate.tracking import TensorBoardTracker

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no login")

    monkeypatch.setattr(TensorBoardTracker, "start", fail)
    with pytest.raises(ConfigError, match=r"report_to: tensorboard could not start \(no login\)"):
        trainer_of(tmp_path, report_to="tensorboard").train()
