"""Checkpoints survive kills, full disks and wrong hands; interrupted runs go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny import (
    assert_close_tensors,
    assert_same_tensors,
    build_pipeline,
    lora_config,
    make_trainer,
    pair_rows,
    trained_tensors,
)

from diffalign.errors import UserError
from diffalign.training.callbacks import TrainerCallback
from diffalign.training.checkpoint import CheckpointError, find_checkpoint, list_checkpoints

SCRIPT = Path(__file__).with_name("script.py")


def run_script(*arguments: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
    )


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run of two steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    make_trainer(
        folder, peft_config=lora_config(), max_steps=2, save_steps=1, save_total_limit=None
    ).train()
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def resume(folder: Path, **options: Any) -> Any:
    values: dict[str, Any] = {
        "peft_config": lora_config(),
        "max_steps": 3,
        "resume_from_checkpoint": "latest",
    } | options
    trainer = make_trainer(folder, **values)
    trainer.train()
    return trainer


def test_a_checkpoint_is_complete_and_readable_by_diffusers(run: Path) -> None:
    assert names(run) == ["checkpoint-1", "checkpoint-2"]
    record = json.loads((run / "checkpoint-2" / "trainer_state.json").read_text())
    assert record["state"]["global_step"] == 2 and record["identity"]["method"] == "Diffusion-DPO"
    on_disk = {p.name for p in (run / "checkpoint-2").iterdir()} - {
        "trainer_state.json",
        "done.json",
    }
    assert set(record["files"]) == on_disk
    assert_same_tensors(
        load_file(run / "checkpoint-2" / "pytorch_lora_weights.safetensors"),
        load_file(run / "pytorch_lora_weights.safetensors"),
    )
    build_pipeline("sd").load_lora_weights(run / "checkpoint-2")


@pytest.mark.parametrize(
    "file", ["pytorch_lora_weights.safetensors", "optimizer.bin", "random_states_0.pkl"]
)
def test_damaged_checkpoints_are_refused(run: Path, file: str) -> None:
    path = run / "checkpoint-2" / file
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(
        UserError,
        match=f"checkpoint-2 is damaged: {file} has .* bytes instead of .*earlier checkpoint",
    ):
        resume(run)
    path.unlink()
    with pytest.raises(UserError, match=f"checkpoint-2 is damaged: {file} is missing"):
        resume(run, force_resume=True)
    assert resume(run, resume_from_checkpoint="checkpoint-1").state.global_step == 3


def test_a_damaged_state_file_is_refused(run: Path) -> None:
    (run / "checkpoint-2" / "trainer_state.json").write_text('{"state": ')
    with pytest.raises(UserError, match=r"trainer_state.json is damaged"):
        resume(run)
    (run / "checkpoint-2" / "trainer_state.json").unlink()
    assert find_checkpoint(run, "latest").name == "checkpoint-1"


def test_a_file_rewritten_at_equal_size_is_refused(run: Path) -> None:
    path = run / "checkpoint-2" / "pytorch_lora_weights.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(UserError, match="checkpoint-2 cannot be read .*earlier checkpoint"):
        resume(run)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"rows": pair_rows(5)}, "dataset"),
        ({"seed": 3}, "seed"),
        ({"peft_config": lora_config(alpha=4)}, "lora"),
        ({"model": "other"}, "model"),
        ({"method": "sft"}, "method"),
    ],
    ids=["dataset", "seed", "alpha", "model", "method"],
)
def test_checkpoints_of_other_runs_are_refused_unless_forced(
    run: Path, change: dict[str, Any], word: str
) -> None:
    def options() -> dict[str, Any]:
        return change | ({"model": build_pipeline("sd", seed=9)} if "model" in change else {})

    with pytest.raises(UserError, match=rf"belongs to another run \(.*{word} is .*force_resume"):
        resume(run, **options())
    trainer = resume(run, force_resume=True, **options())
    assert trainer.state.global_step == 3


def test_what_latest_and_paths_mean(run: Path, tmp_path: Path) -> None:
    assert find_checkpoint(run, "latest") == run / "checkpoint-2"
    assert find_checkpoint(run, str(run / "checkpoint-1")) == run / "checkpoint-1"
    assert find_checkpoint(run, "checkpoint-1") == run / "checkpoint-1"
    with pytest.raises(UserError, match="holds no checkpoint to resume"):
        find_checkpoint(tmp_path / "empty", "latest")
    with pytest.raises(UserError, match="is no checkpoint of diffalign"):
        find_checkpoint(run, str(tmp_path))


def test_another_run_in_the_folder_is_refused_or_moved_aside(run: Path) -> None:
    with pytest.raises(
        UserError, match="holds another run .*checkpoint-2.*resume_from_checkpoint latest"
    ):
        make_trainer(run, peft_config=lora_config(), max_steps=1).train()
    assert names(run) == ["checkpoint-1", "checkpoint-2"]
    for number in (1, 2):
        make_trainer(run, peft_config=lora_config(), max_steps=1, overwrite_output_dir=True).train()
        assert names(run) == ["checkpoint-1"]
        assert (run.with_name(f"run.old-{number}") / "config.yaml").is_file()
    assert names(run.with_name("run.old-1")) == ["checkpoint-1", "checkpoint-2"]


def test_a_file_is_no_output_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="train.output_dir.*is a file"):
        make_trainer(tmp_path / "run", max_steps=1).train()


@pytest.mark.parametrize(("limit", "kept"), [(1, [5]), (2, [4, 5]), (None, [1, 2, 3, 4, 5])])
def test_old_checkpoints_go(tmp_path: Path, limit: int | None, kept: list[int]) -> None:
    make_trainer(
        tmp_path, max_steps=5, save_steps=1, save_total_limit=limit, peft_config=lora_config()
    ).train()
    assert names(tmp_path) == [f"checkpoint-{step}" for step in kept]


def test_without_save_steps_only_the_end_is_saved(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=3, peft_config=lora_config()).train()
    assert names(tmp_path) == ["checkpoint-3"]


def test_a_kill_while_saving_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run_script("kill", folder)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert names(folder) == ["checkpoint-1"]
    assert (folder / ".tmp-checkpoint-2").is_dir()
    options: dict[str, Any] = {
        "peft_config": lora_config(dropout=0.1),
        "per_device_train_batch_size": 2,
        "max_steps": 3,
    }
    options["adam_epsilon"] = 1e-3
    trainer = resume(folder, **options)
    assert trainer.state.global_step == 3
    assert not list(folder.glob(".tmp*"))
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    # The first step was taken by another process, which may have had another number of
    # threads.
    assert_close_tensors(trained_tensors(trainer), trained_tensors(whole), rtol=1e-4, atol=1e-6)


@pytest.mark.nightly
def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run_script("disk_full", folder)
    assert done.returncode == 1
    said = next(line for line in done.stderr.splitlines() if "CheckpointError: " in line)
    assert "CheckpointError: checkpoint-2 could not be written" in said
    assert said.endswith(f"the last complete checkpoint is {folder / 'checkpoint-1'}")
    assert sorted(p.name for p in folder.iterdir() if "checkpoint" in p.name) == ["checkpoint-1"]


def test_failed_save_without_an_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, peft_config=lora_config())
    trainer.setup()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.checkpoints, "_seal", full)
    with pytest.raises(
        CheckpointError,
        match=(
            r"checkpoint-1 could not be written \(.*No space left.*"
            "there is no earlier checkpoint"
        ),
    ):
        trainer.train()
    assert not list(tmp_path.glob("*checkpoint*"))


class SignalAt(TrainerCallback):
    """Sends this process a signal at the end of a step."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if kwargs["trainer"].state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_run_with_a_checkpoint_and_it_can_go_on(tmp_path: Path, number: int) -> None:
    options: dict[str, Any] = {
        "peft_config": lora_config(dropout=0.2),
        "per_device_train_batch_size": 2,
        "max_steps": 5,
    }
    before = signal.getsignal(number)
    stopped = make_trainer(tmp_path / "a", options={"callbacks": [SignalAt(number, 2)]}, **options)
    output = stopped.train()
    assert (output.global_step, output.interrupted_by) == (2, number)
    assert signal.getsignal(number) is before
    assert names(tmp_path / "a") == ["checkpoint-2"]
    assert not (
        tmp_path / "a" / "pytorch_lora_weights.safetensors"
    ).exists()  # not finished: no final model
    resumed = make_trainer(tmp_path / "a", resume_from_checkpoint="latest", **options)
    output = resumed.train()
    assert (output.global_step, output.interrupted_by) == (5, None)
    whole = make_trainer(tmp_path / "b", **options)
    whole.train()
    assert_same_tensors(trained_tensors(resumed), trained_tensors(whole))
    assert (tmp_path / "a/logs/metrics.jsonl").read_text() == (
        tmp_path / "b/logs/metrics.jsonl"
    ).read_text()


def test_an_interrupted_trainer_can_be_told_to_go_on(tmp_path: Path) -> None:
    """As in a notebook: the same object, after Ctrl-C."""
    trainer = make_trainer(
        tmp_path,
        peft_config=lora_config(),
        max_steps=4,
        options={"callbacks": [SignalAt(signal.SIGINT, 2)]},
    )
    assert trainer.train().interrupted_by == signal.SIGINT
    output = trainer.train(resume_from_checkpoint="latest")
    assert (output.global_step, output.interrupted_by) == (4, None)


@pytest.mark.nightly
def test_sigterm_from_outside(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "announce", str(tmp_path / "run")], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("did step 1"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=120) == 0
    assert "interrupted by 15" in rest
    step = int(rest.split("ended at step ")[1].split(",")[0])
    assert 1 <= step < 40 and names(tmp_path / "run") == [f"checkpoint-{step}"]


def test_resuming_cuts_the_log_at_the_checkpoint(run: Path) -> None:
    log = run / "logs" / "metrics.jsonl"
    with log.open("a") as file:
        file.write('{"step": 7, "train/loss": 1.0}\n{"step": 8, "tra')
    resume(run, resume_from_checkpoint="checkpoint-1", max_steps=2)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2]


def test_ema_is_asked_for_and_missing(run: Path) -> None:
    with pytest.raises(UserError, match="train.use_ema.*no average"):
        resume(run, use_ema=True)


def test_another_optimizer_or_order_of_the_data_is_another_run(run: Path, capsys: Any) -> None:
    with pytest.raises(UserError, match=r"optimizer is 'Adafactor', there 'AdamW'"):
        resume(run, optim="adafactor")
    with pytest.raises(UserError, match=r"data_seed is 7, there 0"):
        resume(run, data_seed=7)
    trainer = resume(run, optim="adafactor", force_resume=True)
    assert trainer.state.global_step == 3
    assert "the state of AdamW is dropped; Adafactor starts anew" in capsys.readouterr().out
    # A fused kernel has the same state.
    shutil.rmtree(run / "checkpoint-3")
    assert resume(run, optim="adamw_fused").state.global_step == 3


class FirstStep(TrainerCallback):
    """Keeps the settings by which the first step after resuming was taken."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.group = {
            name: value
            for name, value in kwargs["trainer"].optimizer.param_groups[0].items()
            if name != "params"
        }


def test_new_settings_of_the_optimizer_count_from_the_next_step_on(run: Path, capsys: Any) -> None:
    seen = FirstStep()
    resume(
        run,
        learning_rate=3e-4,
        lr_scheduler="linear",
        weight_decay=0.5,
        adam_beta2=0.9,
        adam_epsilon=1e-6,
        options={"callbacks": [seen]},
    )
    assert seen.group["lr"] == pytest.approx(3e-4 * (1 - 2 / 3))
    assert (seen.group["weight_decay"], seen.group["eps"]) == (0.5, 1e-6)
    assert seen.group["betas"] == (0.9, 0.9)
    out = capsys.readouterr().out
    assert "learning_rate is 0.0003, it was 0.001; weight_decay is 0.5, it was 0.0" in out
    shutil.rmtree(run / "checkpoint-3")
    resume(run)
    assert "other settings" not in capsys.readouterr().out


def test_a_dropped_average_is_said(tmp_path: Path, capsys: Any) -> None:
    fields: dict[str, Any] = {"peft_config": lora_config(), "save_steps": 1}
    make_trainer(tmp_path / "run", max_steps=1, use_ema=True, **fields).train()
    resume(tmp_path / "run")
    assert "holds an average of the weights, which is dropped" in capsys.readouterr().out


def test_a_resumed_run_without_a_step_left_keeps_its_record(run: Path, capsys: Any) -> None:
    before = (run / "config.yaml").read_text()
    resume(run, max_steps=2, learning_rate=5e-4)
    assert "has all these steps, so none is taken" in capsys.readouterr().out
    assert (run / "config.yaml").read_text() == before


def _sequence(optimizer: Any) -> Any:
    from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LinearLR, SequentialLR

    parts = [LinearLR(optimizer, 0.1, 1.0, 2), CosineAnnealingWarmRestarts(optimizer, 2)]
    return SequentialLR(optimizer, parts, [2])


def _restarts(optimizer: Any) -> Any:
    from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

    return CosineAnnealingWarmRestarts(optimizer, 2)


def _steps(optimizer: Any) -> Any:
    from torch.optim.lr_scheduler import MultiStepLR

    return MultiStepLR(optimizer, [2, 4], 0.1)


def _cycle(optimizer: Any) -> Any:
    from torch.optim.lr_scheduler import OneCycleLR

    return OneCycleLR(optimizer, 1e-3, total_steps=8)


@pytest.mark.parametrize("schedule", [_sequence, _restarts, _steps, _cycle])
def test_a_schedule_of_the_user_goes_on(schedule: Any, tmp_path: Path) -> None:
    def run(folder: Path, steps: int, **fields: Any) -> Any:
        trainer = make_trainer(
            folder,
            peft_config=lora_config(),
            max_steps=steps,
            options={"optimizers": (None, schedule)},
            **fields,
        )
        trainer.train()
        return trainer

    whole = run(tmp_path / "whole", 5)
    run(tmp_path / "cut", 3, save_steps=3)
    cut = run(tmp_path / "cut", 5, resume_from_checkpoint="latest")
    assert_same_tensors(trained_tensors(whole), trained_tensors(cut))
    assert cut.lr_scheduler.get_last_lr() == whole.lr_scheduler.get_last_lr()
