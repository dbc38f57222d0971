"""Resuming in the corners: inside a round, after damage, between a checkpoint and the
work that comes after it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiers import by_default
from tiny import (
    assert_same_tensors,
    brightness,
    lora_config,
    make_trainer,
    method_rows,
    pair_rows,
    trained_tensors,
)

from diffalign import TrainerCallback, ValidationConfig
from diffalign.data.cache import TensorCache
from diffalign.errors import ConfigError, UserError
from diffalign.runtime.files import LOCK, read_tensors, save_tensors
from diffalign.training.checkpoint import NonFiniteWeights, list_checkpoints
from diffalign.training.diagnostics import NonFiniteLoss

LORA = "pytorch_lora_weights.safetensors"


class StopAt(TrainerCallback):
    """Raises at the end of a step, as a kill would end the run there."""

    def __init__(self, step: int, event: str = "on_step_end") -> None:
        self.step = step
        setattr(self, event, self._stop)

    def _stop(self, *args: Any, **kwargs: Any) -> None:
        if kwargs["trainer"].state.global_step == self.step:
            raise KeyboardInterrupt


def train(
    folder: Path, method: str = "diffusion_dpo", stop: TrainerCallback | None = None, **options: Any
) -> Any:
    parts = {"callbacks": [stop] if stop else [], **options.pop("options", {})}
    trainer = make_trainer(
        folder, method=method, peft_config=lora_config(dropout=0.2), options=parts, **options
    )
    if stop:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    else:
        trainer.train()
    return trainer


def rows(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "logs/metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if "second" not in k and "per_" not in k}
        for line in lines
    ]


ROUNDS = [
    (
        "diffusion_dpo",
        {
            "data": {"online": {"every": 3, "k": 2, "num_inference_steps": 3}},
            "options": {"scorers": [brightness]},
        },
    ),
    (
        "sft",
        {
            "data": {"online": {"every": 3, "k": 2, "num_inference_steps": 3}},
            "options": {"scorers": [brightness]},
        },
    ),
    (
        "rankdpo",
        {
            "data": {"online": {"every": 3, "k": 3, "num_inference_steps": 3}},
            "options": {"scorers": [brightness]},
        },
    ),
    ("d3po", {"reference": "iterated", "steps_per_round": 3}),
    ("seppo", {"pool_save_steps": 1, "pool_size": 2}),
    ("spo", {}),
]


@pytest.mark.nightly
@pytest.mark.parametrize(("method", "options"), ROUNDS, ids=[name for name, _ in ROUNDS])
@pytest.mark.parametrize("stop", [2, 4])
def test_a_run_stopped_inside_a_round_ends_bit_equal(method, options, stop, tmp_path):
    fields = {"max_steps": 5, "save_steps": 1, "per_device_train_batch_size": 2}
    try:
        whole = train(tmp_path / "whole", method, **fields, **options)
    except ConfigError as error:
        pytest.fail(str(error))
    train(tmp_path / "cut", method, StopAt(stop + 1), **fields, **options)
    assert list_checkpoints(tmp_path / "cut")[-1].name == f"checkpoint-{stop}"
    cut = train(tmp_path / "cut", method, resume_from_checkpoint="latest", **fields, **options)
    assert_same_tensors(trained_tensors(whole), trained_tensors(cut))
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")


def test_tensors_of_files_are_copies(tmp_path):
    tensors = {
        "a": torch.arange(5.0),
        "bb": torch.arange(7, dtype=torch.float16),
        "c": torch.ones(3, 3),
    }
    save_tensors(tensors, tmp_path / "t.safetensors", {"key": "x"})
    found, facts = read_tensors(tmp_path / "t.safetensors")
    assert facts == {"key": "x"}
    assert all(
        torch.equal(found[name], value) and found[name].data_ptr() % 64 == 0
        for name, value in tensors.items()
    )
    cache = TensorCache(tmp_path / "cache")
    cache.add("k", {"one": torch.ones(1), "odd": torch.randn(33)})
    cache.flush()
    assert all(
        value.data_ptr() % 64 == 0 for value in TensorCache(tmp_path / "cache")["k"].values()
    )


@by_default(values=2)
@pytest.mark.parametrize("content", [b"", b"\0" * 200, b"PK\x03\x04 not a zip", b"<html>"])
def test_a_damaged_random_state_is_refused(content, tmp_path):
    train(tmp_path, max_steps=2, save_steps=1)
    file = tmp_path / "checkpoint-2/random_states_0.pkl"
    size = file.stat().st_size
    file.write_bytes((content * size)[:size] or b"\0" * size)
    with pytest.raises(
        UserError,
        match="checkpoint-2 is damaged: .*random_state.* (cannot be read|has a wrong checksum)",
    ):
        train(tmp_path, max_steps=3, resume_from_checkpoint="latest")


@pytest.mark.parametrize("name", ["random_states_0.pkl", "optimizer.bin"])
def test_one_flipped_bit_is_found(name, tmp_path):
    train(tmp_path, max_steps=1, save_steps=1)
    file = tmp_path / "checkpoint-1" / name
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    data[largest.header_offset + 30 + len(largest.filename) + largest.file_size // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(UserError, match="is damaged"):
        train(tmp_path, max_steps=2, resume_from_checkpoint="latest")


STATES = [
    "[]",
    "null",
    "5",
    "{}",
    '{"state": null, "files": {}, "identity": {}}',
    '{"state": {}, "files": {}, "identity": {}}',
    "{",
    "\udce4",
]
STATES += [
    '{"state": {"global_step": -1, "samples_seen": 0, "epoch": 0}, "files": {}, "identity": {}}'
]
STATES += [
    '{"state": {"global_step": "1", "samples_seen": 0, "epoch": 0}, "files": {}, "identity": {}}'
]


@by_default(values=3)
@pytest.mark.parametrize("text", STATES)
def test_a_state_that_no_trainer_wrote_is_refused(text, tmp_path):
    train(tmp_path, max_steps=1, save_steps=1)
    (tmp_path / "checkpoint-1/trainer_state.json").write_bytes(
        text.encode("utf-8", "surrogateescape")
    )
    with pytest.raises(UserError) as caught:
        train(tmp_path, max_steps=2, resume_from_checkpoint="latest")
    assert "\n" not in str(caught.value)


class Poison(TrainerCallback):
    def __init__(self, value: float) -> None:
        self.value = value

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        trainer = kwargs["trainer"]
        if trainer.state.global_step == 2:
            next(p for p in trainer.network.parameters() if p.requires_grad).data[0] = self.value


@by_default()
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("last", [2, 3])
def test_bad_weights_never_replace_a_good_checkpoint(value, last, tmp_path):
    with pytest.raises((NonFiniteWeights, NonFiniteLoss)) as caught:
        train(
            tmp_path,
            max_steps=last,
            save_steps=1,
            save_total_limit=1,
            options={"callbacks": [Poison(value)]},
        )
    assert "step 2" in str(caught.value) and "checkpoint-1" in str(caught.value)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1"] and not (
        tmp_path / LORA
    ).exists()
    train(tmp_path, max_steps=2, resume_from_checkpoint="latest")


def test_a_gradient_that_is_not_finite_is_never_applied(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, peft_config=lora_config(), max_steps=3, save_steps=1)
    compute = trainer.compute_loss

    def poisoned(batch: Any) -> Any:
        loss, metrics = compute(batch)
        if trainer.state.global_step == 1:
            loss = loss + 0 * torch.sqrt(
                sum(p.sum() for p in trainer.network.parameters() if p.requires_grad) * 0
            )  # 0 * inf
        return loss, metrics

    monkeypatch.setattr(trainer, "compute_loss", poisoned)
    with pytest.raises(NonFiniteLoss, match="step 2: the gradient is not finite .*rows"):
        trainer.train()
    assert all(p.isfinite().all() for p in trainer.network.parameters())


def test_a_poisoned_checkpoint_of_an_older_version_is_refused(tmp_path):
    train(tmp_path, max_steps=2, save_steps=1)
    file = tmp_path / "checkpoint-2" / LORA
    tensors = load_file(file)
    next(iter(tensors.values()))[:] = float("nan")
    save_file(tensors, file, metadata=_metadata(file))
    _forget_sizes(tmp_path / "checkpoint-2")
    with pytest.raises(
        UserError,
        match="checkpoint-2 holds weights that are not finite; resume from an earlier checkpoint",
    ):
        train(tmp_path, max_steps=3, resume_from_checkpoint="latest")


def _metadata(file: Path) -> Any:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return opened.metadata()


def _forget_sizes(folder: Path) -> None:
    record = json.loads((folder / "trainer_state.json").read_text())
    record["files"] = {name: (folder / name).stat().st_size for name in record["files"]}
    (folder / "trainer_state.json").write_text(json.dumps(record))


def watched() -> dict[str, Any]:
    return {
        "validation": ValidationConfig(
            validation_prompts=["a small red circle"], validation_steps=2, num_inference_steps=2,
            num_validation_images=1,
            scorers=["jpeg_incompressibility"], keep_best="jpeg_incompressibility",
        )
    }  # fmt: skip


@by_default(values=1)
@pytest.mark.parametrize("event", ["on_save"])
@pytest.mark.parametrize("stop", [2, 4])
def test_work_after_a_checkpoint_is_made_up_for(event, stop, tmp_path):
    fields: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "save_total_limit": None}
    train(tmp_path / "whole", options=watched(), **fields)
    train(tmp_path / "cut", stop=StopAt(stop, event), options=watched(), **fields)
    assert list_checkpoints(tmp_path / "cut")[-1].name == f"checkpoint-{stop}"
    train(tmp_path / "cut", options=watched(), resume_from_checkpoint="latest", **fields)
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")
    best = [
        json.loads((tmp_path / name / "best/validation.json").read_text())
        for name in ("whole", "cut")
    ]
    assert best[0]["step"] == best[1]["step"] and best[0]["value"] == best[1]["value"]
    assert_same_tensors(*(load_file(tmp_path / name / "best" / LORA) for name in ("whole", "cut")))


@by_default(values=1)
@pytest.mark.parametrize("left", [".best.old", ".best.new"])
def test_the_best_weights_survive_a_kill_between_two_renames(left, tmp_path):
    fields: dict[str, Any] = {"max_steps": 2, "save_steps": 2}
    train(tmp_path, options=watched(), **fields)
    value = json.loads((tmp_path / "best/validation.json").read_text())
    shutil.move(tmp_path / "best", tmp_path / left)
    train(tmp_path, options=watched(), resume_from_checkpoint="latest", max_steps=3, save_steps=3)
    assert json.loads((tmp_path / "best/validation.json").read_text())["value"] >= value["value"]
    assert not (tmp_path / left).exists()


@by_default(values=3)
@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{\n",
        b"5\n",
        b"null\n",
        b'{"a": 1}\n',
        b'{"step": "x"}\n',
        b"\xff\xfe\n",
        b'{"step": 1, "tra',
    ],
)
def test_a_log_with_foreign_or_torn_lines_keeps_the_others(line, tmp_path):
    train(tmp_path, max_steps=2, save_steps=2)
    expected = rows(tmp_path)
    with open(tmp_path / "logs/metrics.jsonl", "ab") as file:
        file.write(line)
    train(tmp_path, max_steps=3, resume_from_checkpoint="latest")
    assert rows(tmp_path)[: len(expected)] == expected


def test_resuming_from_an_earlier_checkpoint_keeps_its_own_line(tmp_path, capsys):
    fields: dict[str, Any] = {"save_steps": 1}
    train(tmp_path, max_steps=4, save_total_limit=None, **fields)
    train(
        tmp_path, max_steps=2, save_total_limit=1, resume_from_checkpoint="checkpoint-1", **fields
    )
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert (
        "checkpoint-4 is of a later step" in capsys.readouterr().out
        and (tmp_path / "abandoned-checkpoint-4").is_dir()
    )


STARTS = [
    "logs/metrics.jsonl",
    "samples/step-1.png",
    "samples/base/0000.png",
    ".tmp-checkpoint-1/x",
    "reference_errors.safetensors",
]


@by_default(values=3)
@pytest.mark.parametrize("again", [None, "latest"])
@pytest.mark.parametrize("left", STARTS)
def test_a_run_without_a_checkpoint_starts_again_by_the_same_command(left, again, tmp_path):
    whole = train(tmp_path / "whole", max_steps=2)
    (tmp_path / "cut" / left).parent.mkdir(parents=True)
    (tmp_path / "cut" / left).write_bytes(b'{"step": 1, "train/loss": 9}\n{"torn')
    shutil.copy2(tmp_path / "whole/config.yaml", tmp_path / "cut")
    cut = train(tmp_path / "cut", max_steps=2, resume_from_checkpoint=again)
    assert_same_tensors(trained_tensors(whole), trained_tensors(cut))
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")


@by_default(values=1)
@pytest.mark.parametrize("damage", ["torn", "empty", "text"])
def test_damaged_reference_errors_are_computed_anew(damage, tmp_path):
    fields: dict[str, Any] = {
        "max_steps": 2,
        "save_steps": 1,
        "precompute_ref_errors": True,
        "ref_error_draws": 2,
    }
    whole = train(tmp_path / "whole", **fields)
    train(tmp_path / "cut", max_steps=1, **{k: v for k, v in fields.items() if k != "max_steps"})
    file = tmp_path / "cut/reference_errors.safetensors"
    content = file.read_bytes()
    file.write_bytes(
        {"torn": content[: len(content) * 2 // 3], "empty": b"", "text": b"<html>"}[damage]
    )
    cut = train(tmp_path / "cut", resume_from_checkpoint="latest", **fields)
    assert_same_tensors(trained_tensors(whole), trained_tensors(cut))
    assert file.read_bytes() == content


@by_default(lambda damage: damage)
@pytest.mark.parametrize("damage", [False, True])
def test_precomputing_goes_on_where_it_was_stopped(damage, tmp_path, monkeypatch):
    from diffalign.training import data_pipeline as prepare

    monkeypatch.setattr(prepare, "_BATCHES_PER_PART", 2)
    fields: dict[str, Any] = {"max_steps": 2, "precompute_ref_errors": True, "ref_error_draws": 2}
    fields |= {"per_device_train_batch_size": 1, "rows": pair_rows(4)}
    counts: list[int] = []

    def run(folder: Path, stop: int | None = None) -> Any:
        trainer, calls = make_trainer(folder, peft_config=lora_config(), **fields), [0]
        errors = trainer.reference_errors

        def counted(batch: Any) -> Any:
            if calls[0] == stop:
                raise KeyboardInterrupt
            calls[0] += batch.reference_errors is None
            return errors(batch)

        trainer.reference_errors = counted
        try:
            trainer.train()
        finally:
            counts.append(calls[0])
        return trainer

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop=5)
    parts = list((tmp_path / "cut").glob(".reference_errors/*/shard-*"))
    assert len(parts) == 2
    if damage:
        parts[0].write_bytes(parts[0].read_bytes()[:20])
    cut = run(tmp_path / "cut")
    assert (
        counts == [8, 5, 8 if damage else 4] and not (tmp_path / "cut/.reference_errors").exists()
    )
    assert_same_tensors(trained_tensors(whole), trained_tensors(cut))
    name = "reference_errors.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_finished_runs_and_votes_are_never_started_over(tmp_path):
    train(tmp_path / "done", max_steps=1)
    shutil.rmtree(tmp_path / "done/checkpoint-1", ignore_errors=True)
    with pytest.raises(UserError, match="holds another run .it is finished"):
        train(tmp_path / "done", max_steps=1)
    (tmp_path / "votes/feedback/round-0").mkdir(parents=True)
    (tmp_path / "votes/feedback/round-0/votes.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="holds another run"):
        train(tmp_path / "votes", max_steps=1)


def test_a_new_run_removes_nothing_that_is_not_its_own(tmp_path):
    for name in ("samples", "pool", "feedback", "logs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    train(tmp_path, max_steps=1)
    assert all(
        (tmp_path / name / "mine.txt").is_file() for name in ("samples", "pool", "feedback", "logs")
    )


OTHERS_FILES = [
    "config.yaml",
    "README.md",
    "best/mine.txt",
    "samples/step-1.png",
    "samples/base/mine.png",
    "pool/mine.safetensors",
    "logs/metrics.jsonl",
    "model_index.json",
]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", OTHERS_FILES)
def test_a_folder_of_somebody_elses_files_is_refused(name, overwrite, tmp_path):
    file = tmp_path / "mine" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine: 1\n")
    with pytest.raises(UserError, match="output_dir.*is not a run of diffalign.*replace its"):
        train(tmp_path / "mine", max_steps=1, overwrite_output_dir=overwrite)
    assert file.read_text() == "mine: 1\n"
    left = {path.name for path in (tmp_path / "mine").rglob("*") if path.is_file()}
    assert left <= {file.name, LOCK}


@pytest.mark.parametrize("inside", [".", "runs/a"])
def test_a_run_does_not_write_into_its_dataset(inside, tmp_path):
    from PIL import Image

    for side, colour in (("chosen", "red"), ("rejected", "blue")):
        (tmp_path / side).mkdir()
        Image.new("RGB", (64, 64), colour).save(tmp_path / side / "a.png")
    (tmp_path / "chosen/a.txt").write_text("a red square")
    with pytest.raises(UserError, match=r"output_dir.*lies in data.dataset_name"):
        train(tmp_path / inside, rows=str(tmp_path), max_steps=1)
    assert not (tmp_path / "runs").exists()


class Stop(TrainerCallback):
    def on_save(self, *args: Any, **kwargs: Any) -> None:
        if kwargs["trainer"].state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.nightly
def test_a_signal_while_saving_leaves_the_evaluation_to_the_resumed_run(tmp_path):
    fields: dict[str, Any] = {
        "max_steps": 6,
        "save_steps": 2,
        "eval_steps": 2,
        "save_total_limit": None,
    }
    data = {"eval_dataset": method_rows("diffusion_dpo")}
    train(tmp_path / "whole", options=dict(data), **fields)
    make_trainer(
        tmp_path / "cut",
        peft_config=lora_config(dropout=0.2),
        options={"callbacks": [Stop()], **data},
        **fields,
    ).train()
    assert list_checkpoints(tmp_path / "cut")[-1].name == "checkpoint-2"
    train(tmp_path / "cut", options=dict(data), resume_from_checkpoint="latest", **fields)
    steps = [
        [row["step"] for row in rows(tmp_path / n) if any(k.startswith("eval/") for k in row)]
        for n in ("whole", "cut")
    ]
    assert steps[0] == steps[1] == [2, 4, 6]
