"""Arguments of a trainer in the forms that people pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import lora_config, make_trainer, pair_rows

from diffalign.errors import ConfigError
from diffalign.training.callbacks import TrainerCallback


class Counter(TrainerCallback):
    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps += 1


def trainer_of(folder: Path, **options: Any) -> Any:
    return make_trainer(folder, peft_config=lora_config(), max_steps=1, options=options)


@pytest.mark.parametrize("form", ["bare", "list", "class", "added"])
def test_callbacks_may_be_one_many_or_a_class(form: str, tmp_path: Path) -> None:
    value = {"bare": Counter(), "list": [Counter()], "class": Counter, "added": None}[form]
    trainer = trainer_of(tmp_path, callbacks=value)
    if form == "added":
        trainer.add_callback(Counter)
    trainer.train()
    assert trainer.callbacks[0].steps == 1


def test_a_callback_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="callbacks: expected diffalign.TrainerCallback, got int"):
        trainer_of(tmp_path, callbacks=[3])


def test_an_optimizer_object_is_refused_with_the_way_to_write_it(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ConfigError, match=r"optimizers: expected functions.*SGD.*lambda"):
        trainer_of(tmp_path, optimizers=(optimizer, None))
    with pytest.raises(ConfigError, match=r"expected \(make_optimizer, make_schedule\)"):
        trainer_of(tmp_path, optimizers=optimizer)
    assert trainer_of(tmp_path, optimizers=None).optimizers == (None, None)


def test_sections_may_be_mappings(tmp_path: Path) -> None:
    from tiny import build_pipeline

    from diffalign import DiffusionDPOTrainer

    def build(**options: Any) -> Any:
        return DiffusionDPOTrainer(build_pipeline("sd"), train_dataset=pair_rows(4), **options)

    trainer = build(
        args={"output_dir": str(tmp_path), "beta": 7.0},
        data={"resolution": 32},
        validation={"prompts": "shapes", "validation_steps": 3},
    )
    assert (trainer.args.beta, trainer.data_config.resolution) == (7.0, 32)
    assert trainer.validation_config.validation_steps == 3
    with pytest.raises(ConfigError, match=r"data.resolutoin: unknown key.*resolution"):
        build(data={"resolutoin": 32})
    with pytest.raises(ConfigError, match="data: expected DataConfig, got str"):
        build(data="folder")


def test_resume_takes_true_and_false_and_save_model_the_folder_of_the_run(tmp_path: Path) -> None:
    trainer_of(tmp_path / "run").train()
    make_trainer(tmp_path / "run", peft_config=lora_config(), max_steps=2).train(
        resume_from_checkpoint=True
    )
    with pytest.raises(Exception, match="holds another run"):
        make_trainer(tmp_path / "run", max_steps=2, resume_from_checkpoint="latest").train(
            resume_from_checkpoint=False
        )
    trainer = trainer_of(tmp_path / "other")
    trainer.save_model()
    assert (tmp_path / "other/pytorch_lora_weights.safetensors").is_file()


def test_evaluation_data_of_one_split_are_read_whole(tmp_path: Path) -> None:
    from PIL import Image

    lines = []
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{number}.png")
        lines.append({"prompt": "a", "chosen": f"{number}.png", "rejected": f"{2 - number}.png"})
    lines.pop(1)
    for name in ("pairs.jsonl", "folder/pairs.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        rows = [
            {key: v if key == "prompt" else str(tmp_path / v) for key, v in line.items()}
            for line in lines
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"allow_outside_paths": True}
    for name in ("pairs.jsonl", "folder"):
        trainer = make_trainer(
            tmp_path / "run",
            peft_config=lora_config(),
            data=data,
            options={"eval_dataset": str(tmp_path / name)},
        )
        assert len(trainer.eval_dataset) == 2
        assert "eval/loss" in trainer.evaluate(str(tmp_path / name))
