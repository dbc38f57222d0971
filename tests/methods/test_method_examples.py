"""The docstring examples of the trainers and of `TrainerCallback` run as they stand."""

from __future__ import annotations

import inspect
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest

import diffalign
from diffalign.cli import run
from diffalign.training.callbacks import TrainerCallback, TrainerControl

TRAINERS = [name for name in diffalign.__all__ if name.endswith("Trainer")]
RECAPTION = [
    "data", "recaption", "diffalign-quickstart/dataset", "--strategy", "h", "--captioner", "shapes",
    "--perturber", "shapes", "--output_dir", "runs/recaptioned",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(quickstart: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks as after a small quickstart, for this file alone."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(quickstart / "diffalign-quickstart", folder / "diffalign-quickstart")
    return folder


def examples(thing: Any) -> list[str]:
    """The Python blocks of a docstring."""
    text = inspect.getdoc(thing) or ""
    blocks = re.findall(r"^ *```python\n(.*?)^ *```$", text, flags=re.M | re.S)
    return [textwrap.dedent(block) for block in blocks]


@pytest.mark.parametrize("name", TRAINERS)
def test_the_example_of_a_trainer_trains(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    if name == "DCPOTrainer":
        assert run(RECAPTION) == 0
    [block] = examples(getattr(diffalign, name))
    names: dict[str, Any] = {}
    exec(block, names)
    trainer = names["trainer"]
    assert trainer.state.global_step == trainer.args.max_steps
    assert (trainer.output_dir / "pytorch_lora_weights.safetensors").is_file()


def test_the_example_of_a_callback_stops_a_run() -> None:
    [block] = examples(TrainerCallback)
    names: dict[str, Any] = {}
    exec(block, names)
    control = TrainerControl()
    callback = names["StopWhenLearned"]()
    callback.on_log(None, None, control, logs={"train/loss": 0.7})
    assert not control.should_training_stop
    callback.on_log(None, None, control, logs={"rewards/accuracies": 0.95})
    assert control.should_training_stop
