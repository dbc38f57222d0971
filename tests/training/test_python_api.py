"""Trainers as Python objects: several in one process, called again, with the user's
pipelines, datasets, functions and streams."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from tiny import (
    assert_same_tensors,
    brightness,
    build_pipeline,
    lora_config,
    make_trainer,
    pair_rows,
    trained_tensors,
)

from diffalign import DiffusionDPOConfig, DiffusionDPOTrainer, TrainerCallback, load_preferences
from diffalign.data import DataConfig
from diffalign.errors import ConfigError, UserError


def test_trainers_with_other_accumulation_do_not_disturb_each_other(tmp_path: Path) -> None:
    options = {"max_steps": 2, "gradient_accumulation_steps": 2, "peft_config": lora_config()}
    alone = make_trainer(tmp_path / "alone", **options)
    alone.train()
    first = make_trainer(tmp_path / "first", **options)
    first.setup()
    make_trainer(tmp_path / "second", peft_config=lora_config()).setup()
    first.train()
    assert_same_tensors(trained_tensors(first), trained_tensors(alone))


def test_an_error_within_a_step_leaves_no_gradient_behind(tmp_path: Path) -> None:
    options = {"max_steps": 2, "gradient_accumulation_steps": 3, "peft_config": lora_config()}
    whole = make_trainer(tmp_path / "a", save_steps=1, **options)
    whole.train()
    trainer = make_trainer(tmp_path / "b", save_steps=1, **options)
    compute, calls = trainer.compute_loss, [0]

    def failing(batch: Any) -> Any:
        calls[0] += 1
        if calls[0] == 5:  # within the second step
            raise RuntimeError("power cut")
        return compute(batch)

    trainer.compute_loss = failing
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.train()
    with pytest.raises(UserError, match="has taken 1 steps; build a new one"):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert_same_tensors(trained_tensors(trainer), trained_tensors(whole))


def test_more_steps_continue_a_finished_run(tmp_path: Path) -> None:
    options = {"save_steps": 1, "peft_config": lora_config(), "lr_scheduler": "constant"}
    whole = make_trainer(tmp_path / "a", max_steps=4, **options)
    whole.train()
    trainer = make_trainer(tmp_path / "b", max_steps=2, **options)
    trainer.train()
    trainer.args.max_steps = 4
    assert trainer.train(resume_from_checkpoint=True).global_step == 4
    assert_same_tensors(trained_tensors(trainer), trained_tensors(whole))


def test_a_config_changed_for_the_next_trainer_changes_no_other(tmp_path: Path) -> None:
    args = DiffusionDPOConfig(output_dir=str(tmp_path / "a"), beta=1.0, max_steps=1)
    trainer = DiffusionDPOTrainer(build_pipeline("sd"), args=args, train_dataset=pair_rows(4))
    args.beta, args.output_dir = 999.0, str(tmp_path / "b")
    assert trainer.args.beta == 1.0 and trainer.output_dir == tmp_path / "a"


def test_evaluation_data_are_never_the_training_rows(tmp_path: Path) -> None:
    rows = pair_rows(6)
    good, broken = Dataset.from_list(_paths(rows, tmp_path)), Dataset.from_list([{"x": 1}])

    def trainer(**splits: Dataset) -> Any:
        data = DatasetDict(train=good, **splits)
        return make_trainer(
            tmp_path / "out", rows=data, options={"eval_dataset": data}, peft_config=lora_config()
        )

    assert len(trainer(validation=good.select([0, 1])).eval_dataset) == 2
    with pytest.raises(UserError):
        trainer(test=broken)
    with pytest.raises(ConfigError, match="data.dataset_test_split: name the split"):
        trainer(first=good, second=good)


def _paths(rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The same rows with images as files, named by `Path`s."""
    found = []
    for i, row in enumerate(rows):
        images = {}
        for side in ("chosen", "rejected"):
            path = folder / f"{i}-{side}.png"
            row[side].save(path)
            images[side] = str(path)
        found.append({"prompt": row["prompt"], **images})
    return found


def test_rows_may_hold_paths_and_transforms_are_not_ignored(tmp_path: Path) -> None:
    rows = _paths(pair_rows(2), tmp_path)
    as_paths = [{**row, "chosen": Path(row["chosen"])} for row in rows]
    assert len(load_preferences(as_paths)) == 2
    changed = Dataset.from_list(rows).with_transform(lambda batch: batch)
    with pytest.raises(UserError, match=r"has a transform .* apply it with map\(\) first"):
        load_preferences(changed)


@pytest.mark.parametrize("method", ["grpo", "diffusion_dpo"])
def test_a_dry_run_uses_nothing_up(method: str, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_dropout=0.5 if method == "diffusion_dpo" else 0.0)
    online = {"online": {"k": 2, "num_inference_steps": 2}} if method == "diffusion_dpo" else None
    results = []
    for name in ("a", "b"):
        trainer = make_trainer(
            tmp_path / name, method=method, max_steps=2, peft_config=config, data=online,
            rows=[{"prompt": text} for text in "abcdef"], options={"scorers": brightness},
            **({"num_inference_steps": 2, "images_per_prompt": 2} if method == "grpo" else {}),
        )  # fmt: skip
        if name == "b":
            trainer.dry_run()
        trainer.train()
        results.append(trained_tensors(trainer))
    assert_same_tensors(*results)


@pytest.mark.parametrize("family", ["sd", "sd3"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_pipeline_comes_back_as_it_can_be_used(
    family: str, precision: str, tmp_path: Path
) -> None:
    pipe = build_pipeline(family)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}
    trainer = make_trainer(
        tmp_path, family, model=pipe, mixed_precision=precision, max_steps=2, save_steps=1,
        peft_config=LoraConfig(r=4, lora_dropout=0.5, target_modules=["to_q"]),
    )  # fmt: skip
    trainer.train()
    first, again = (
        pipe("a cat", generator=torch.Generator().manual_seed(0), **call).images for _ in "ab"
    )
    assert (first == again).all()  # without dropout
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.float32}
    # And the run can go on with it.
    trainer.args.max_steps = 3
    assert trainer.train(resume_from_checkpoint=True).global_step == 3


def test_a_callback_that_ends_the_run_leaves_a_log_and_a_checkpoint(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    trainer = make_trainer(
        tmp_path, max_steps=6, logging_steps=100, peft_config=lora_config(),
        options={"callbacks": [Stop()]},
    )  # fmt: skip
    output = trainer.train()
    assert output.global_step == 3 and "train/loss" in output.metrics
    assert (tmp_path / "checkpoint-3").is_dir()
    other = make_trainer(tmp_path, max_steps=6, peft_config=lora_config())
    assert other.train(resume_from_checkpoint="latest").global_step == 6


def test_functions_are_called_by_the_names_of_their_arguments(tmp_path: Path) -> None:
    from diffalign.training.online.reward_function import RewardFunction

    images, prompts = [row["chosen"] for row in pair_rows(2)], ["ab", "abc"]

    def trl(prompts: list[str], images: list[Any], **kwargs: Any) -> list[float | None]:
        return [float(len(prompt)) for prompt in prompts[:-1]] + [None]

    class Length:
        def __call__(self, images: list[Any]) -> list[float]:
            return [1.0] * len(images)

    scores = RewardFunction([trl, Length, lambda pictures, texts: [2.0] * len(texts)])
    columns = scores(images, prompts)
    assert columns[0].tolist() == [2.0, 1.0, 2.0] and columns[1].isnan().tolist() == [True, 0, 0]


def test_home_folders_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert DataConfig(cache_latents="~/cache").cache_latents == str(tmp_path / "cache")
    build_pipeline("sd").save_pretrained(tmp_path / "model")
    trainer = make_trainer(tmp_path / "run", model="~/model", peft_config=lora_config())
    trainer.save_model("~/saved")
    assert (tmp_path / "saved" / "pytorch_lora_weights.safetensors").is_file()
    assert not (tmp_path / "~").exists()


def test_a_model_is_not_saved_over_files_of_others(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "README.md").write_text("mine")
    trainer = make_trainer(tmp_path / "run", peft_config=lora_config())
    with pytest.raises(UserError, match=r"output_dir: .* would replace its README.md"):
        trainer.save_model(project)
    assert (project / "README.md").read_text() == "mine"
    trainer.save_model(tmp_path / "new")
    trainer.save_model(tmp_path / "new")


def test_an_upload_saves_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    uploads: list[dict[str, Any]] = []

    class Api:
        def create_repo(self, name: str, **kwargs: Any) -> Any:
            return type("Repo", (), {"repo_id": name})()

        def upload_folder(self, **kwargs: Any) -> None:
            uploads.append(kwargs | {"files": [p.name for p in kwargs["folder_path"].iterdir()]})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    make_trainer(tmp_path / "run", peft_config=lora_config()).push_to_hub("first version")
    assert uploads[0]["commit_message"] == "first version"
    assert "pytorch_lora_weights.safetensors" in uploads[0]["files"]


def test_a_logger_in_place_of_stderr_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tee:
        def write(self, text: str) -> int:
            return len(text)

        def flush(self) -> None:
            pass

    monkeypatch.setattr(sys, "stderr", Tee())
    make_trainer(tmp_path, max_steps=1, peft_config=lora_config()).train()


def test_other_arguments(tmp_path: Path) -> None:
    import transformers

    with pytest.raises(ConfigError, match="callbacks: expected diffalign.TrainerCallback"):
        make_trainer(tmp_path, options={"callbacks": [transformers.TrainerCallback()]})
    options = {"optimizers": (torch.optim.AdamW, None)}
    make_trainer(tmp_path, max_steps=1, peft_config=lora_config(), options=options).train()


def test_panels_leave_the_entries_of_the_user_alone() -> None:
    from diffalign.rewards.panel import Panel, RewardEntry

    entry = RewardEntry(scorer="jpeg_compressibility")
    before = copy.copy(entry)
    panel = Panel([entry])
    panel.entries[0].on_error = "nan"
    assert entry == before
