"""Settings that would have no effect, or another one than was meant, are said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import brightness, labelled_rows, lora_config, make_trainer, pair_rows

from diffalign.data import load_preferences
from diffalign.errors import ConfigError


def trainer_of(folder: Path, **fields: Any) -> Any:
    return make_trainer(folder, peft_config=lora_config(), **fields)


def test_evaluations_need_data_and_data_need_evaluations(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.eval_steps: there are no evaluation data"):
        trainer_of(tmp_path, eval_steps=1)
    trainer = trainer_of(
        tmp_path, data={"dataset_test_split": "train"}, options={"eval_dataset": pair_rows(2)}
    )
    assert any("is evaluated only when evaluate() is called" in note for note in trainer.notes)


def test_scorers_of_a_method_without_a_reward_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rewards: Diffusion-DPO scores no images here"):
        trainer_of(tmp_path, options={"scorers": [brightness]})


def test_one_column_is_not_both_images(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"chosen and rejected are both 'image'"):
        load_preferences(
            [
                {"prompt": "p", "image": row["chosen"], "other": row["rejected"]}
                for row in pair_rows(2)
            ],
            columns={"chosen": "image", "rejected": "image"},
        )


def test_scores_against_the_preference_are_counted(tmp_path: Path) -> None:
    rows = [
        row | {"chosen_score": float(number), "rejected_score": 1.0}
        for number, row in enumerate(pair_rows(4))
    ]
    trainer = trainer_of(tmp_path, rows=rows, score_margin=1.0)
    assert any("1 of 4 pairs have a chosen_score below" in note for note in trainer.notes)


@pytest.mark.parametrize(("liked", "word"), [(True, "liked"), (False, "disliked")])
def test_likes_of_one_kind_are_noted(liked: bool, word: str, tmp_path: Path) -> None:
    rows = [row | {"label": liked} for row in labelled_rows(4)]
    trainer = trainer_of(tmp_path, method="diffusion_kto", rows=rows)
    assert any(f"all images are {word}" in note for note in trainer.notes)
    both = trainer_of(tmp_path, method="diffusion_kto", rows=labelled_rows(4))
    assert not any("all images are" in note for note in both.notes)


def test_disliked_images_are_left_out_where_single_images_are_wanted() -> None:
    rows = [
        {"prompt": f"p{number}", "image": row["chosen"], "label": number % 2 == 0}
        for number, row in enumerate(pair_rows(4))
    ]
    data = load_preferences(rows, wanted="single", verbose=False).as_kind("single")
    assert [group.prompts[0] for group in data] == ["p0", "p2"]
    classes = [row | {"label": number} for number, row in enumerate(rows)]
    data = load_preferences(classes, wanted="single", verbose=False)
    assert len(data) == 4  # numbers may be classes
