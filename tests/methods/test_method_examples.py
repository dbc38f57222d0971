"""The docstring examples of the trainers and of `TrainerCallback` run as they stand."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from docstrings import run_examples
from tiers import by_default
from tiny import WEIGHTS

import diffalign
from diffalign.cli import run
from diffalign.rewards import Scorer
from diffalign.training.callbacks import TrainerCallback, TrainerControl

TRAINERS = [n for n in diffalign.__all__ if n.endswith("Trainer") and n != "RewardTrainer"]
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


# By default those that test_configs.py does not train, and one of the others.
@by_default(lambda name: name.removesuffix("Trainer") in ("DiffusionDPO", "D3PO", "SePPO", "SPO"))
@pytest.mark.parametrize("name", TRAINERS)
def test_the_example_of_a_trainer_trains(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    if name == "DCPOTrainer":
        assert run(RECAPTION) == 0
    trainer = run_examples(getattr(diffalign, name))["trainer"]
    assert trainer.state.global_step == trainer.args.max_steps
    weights = WEIGHTS.get(trainer.method, "pytorch_lora_weights")
    assert (trainer.output_dir / f"{weights}.safetensors").is_file()


@pytest.mark.nightly
def test_the_example_of_the_reward_trainer_gives_a_scorer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    made = run_examples(diffalign.RewardTrainer)
    assert (made["folder"] / "reward.json").is_file()
    assert isinstance(made["scorer"], Scorer)


def test_the_example_of_a_callback_stops_a_run() -> None:
    control = TrainerControl()
    callback = run_examples(TrainerCallback)["StopWhenLearned"]()
    callback.on_log(None, None, control, logs={"train/loss": 0.7})
    assert not control.should_training_stop
    callback.on_log(None, None, control, logs={"rewards/accuracies": 0.95})
    assert control.should_training_stop
