"""What was changed in its place is another thing: no earlier result comes back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import build_pipeline

from diffalign import cli, load_preferences, load_scorer
from diffalign.annotation.perturbers import RulePerturber
from diffalign.annotation.recaption import recaption
from diffalign.data.prompt_sets import load_prompts
from diffalign.errors import ConfigError, UserError
from diffalign.evaluation.compare import compare
from diffalign.evaluation.guidance_curves import best_index
from diffalign.evaluation.models import ModelSpec
from diffalign.shapes.models import embedded_origin, weights_dir
from diffalign.training.sections import ValidationConfig
from diffalign.training.validation_checks import validation_prompts

SCORER = """
SIGN = 1.0

def helper(image):
    return SIGN * float(image.width)

def size(images):
    return [helper(image) for image in images]
"""


def run(*arguments: object) -> int:
    return cli.run([str(each) for each in arguments])


def scale_weights(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    save_file({name: 1.01 * tensor for name, tensor in load_file(file).items()}, file)


def test_a_function_is_its_whole_file(tmp_path: Path) -> None:
    file, cache = tmp_path / "mine.py", tmp_path / "scores.sqlite"
    image = Image.new("RGB", (12, 8))
    values = []
    for text in (SCORER, SCORER.replace("SIGN = 1.0", "SIGN = -1.0")):
        file.write_text(text)
        scorer = load_scorer(f"{file}:size", trust_remote_code=True, cache=cache)
        values.append(float(scorer([image], ["p"])[0]))
    assert values == [12.0, -12.0]


def test_models_changed_in_their_place_have_another_fingerprint(tmp_path: Path) -> None:
    negative, scorer = tmp_path / "negative", tmp_path / "mine.py"
    shutil.copytree(weights_dir(), negative)
    scorer.write_text(SCORER)
    steer = {"scorer": f"{scorer}:size", "lmbda": 1.0}
    specs = [
        ModelSpec("n", "shapes", negative=str(negative)),
        ModelSpec("s", "shapes", steer=steer),
    ]
    before = [spec.fingerprint() for spec in specs]
    assert before == [spec.fingerprint() for spec in specs]
    scale_weights(negative / "unet")
    scorer.write_text(SCORER.replace("SIGN = 1.0", "SIGN = -1.0"))
    after = [spec.fingerprint() for spec in specs]
    assert before[0] != after[0] and before[1] != after[1]


@pytest.mark.parametrize("part", ["scheduler", "vae", "text_encoder", "unet"])
def test_every_part_of_a_loaded_pipeline_counts(part: str) -> None:
    pipe = build_pipeline("sd")
    before = ModelSpec("p", pipe).fingerprint()
    if part == "scheduler":
        from diffusers import EulerDiscreteScheduler

        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    else:
        with torch.no_grad():
            next(iter(getattr(pipe, part).parameters())).mul_(1.01)
    assert ModelSpec("p", pipe).fingerprint() != before


def test_a_copy_of_the_embedded_model_draws_its_images(tmp_path: Path) -> None:
    """As a full fine-tune of it does, whose folder has no name."""
    shutil.copytree(weights_dir(), tmp_path / "full")
    assert embedded_origin(str(tmp_path / "full")) == "shapes"
    assert embedded_origin(str(weights_dir("shapes-flow"))) == "shapes-flow"
    build_pipeline("sd").save_pretrained(tmp_path / "other")
    assert embedded_origin(str(tmp_path / "other")) is None
    result = compare(
        "shapes", str(tmp_path / "full"), max_prompts=2, num_images=1, output_dir=tmp_path / "out"
    )
    first, second = (np.asarray(values["shapes"]) for values in result.scores.values())
    assert np.array_equal(first, second)


def test_texts_of_another_captioner_or_level_are_made_anew(tmp_path: Path) -> None:
    row = {"prompt": "a red car on a wide road", "chosen": Image.new("RGB", (8, 8), "red")}
    row["rejected"] = Image.new("RGB", (8, 8), "blue")
    pairs = load_preferences([row], verbose=False)

    def captioner(word: str) -> Any:
        def caption(images: Any, prompts: Any) -> list[str]:
            return [f"{word} says so"] * len(images)

        return caption

    texts = []
    for word in ("BLIP", "LLaVA"):
        recaption(pairs, tmp_path / "c", "c", captioner=captioner(word))
        texts.append(load_preferences(tmp_path / "c/data", verbose=False)[0].prompts[0])
    assert texts == ["BLIP says so", "LLaVA says so"]
    found = []
    for level, seed in (("weak", 0), ("strong", 0), ("strong", 7)):
        recaption(pairs, tmp_path / "p", "p", perturber=RulePerturber(level, seed))
        together = load_preferences(tmp_path / "p/data", verbose=False)[0].prompts
        recaption(pairs, tmp_path / f"{level}{seed}", "p", perturber=RulePerturber(level, seed))
        alone = load_preferences(tmp_path / f"{level}{seed}/data", verbose=False)[0].prompts
        assert together == alone
        found.append(together)
    assert len(set(found)) > 1


@pytest.mark.parametrize("name", ["holiday.png", "best/holiday.png", "summary.json"])
def test_score_takes_no_folder_of_something_else(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, mine = tmp_path / "photos", tmp_path / "mine" / name
    photos.mkdir()
    Image.new("RGB", (16, 16), "red").save(photos / "a.png")
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    command = ["score", "--images", photos, "--scorers", "jpeg_compressibility"]
    command += ["--prompt", "a photo"]
    assert run(*command, "--output_dir", tmp_path / "mine") == 2
    assert "holds something else" in capsys.readouterr().err
    assert mine.read_text() == "mine"
    for _ in range(2):  # its own folder goes on
        assert run(*command, "--best", 1, "--output_dir", tmp_path / "own") == 0


def test_people_decide_which_image_is_chosen_and_conditions_are_no_results(tmp_path: Path) -> None:
    from diffalign.annotation.score_source import DatasetSource

    red, blue = (Image.new("RGB", (16, 16), color) for color in ("red", "blue"))
    row = {"prompt": "p", "chosen": red, "rejected": blue}
    pair = load_preferences([row | {"chosen_score": 0.1, "rejected_score": 0.9}], verbose=False)
    labels = [record.label for record in DatasetSource(pair).read(range(1)).records]
    assert labels == [1.0, 0.0]
    row = {"prompt": "p", "image": red, "conditioning_image": blue}
    chunk = DatasetSource(load_preferences([row], verbose=False)).read(range(1))
    assert len(chunk.records) == len(chunk.inputs) == 1


def test_the_card_of_a_build_names_what_it_wrote(tmp_path: Path) -> None:
    command = ["data", "build", "--models", "shapes", "--prompts", tmp_path / "p.txt"]
    (tmp_path / "p.txt").write_text("a small red circle on the left of a gray background\n")
    command += ["--num_images", 2, "--num_inference_steps", 2, "--output_dir", tmp_path / "db"]
    assert run(*command, "--scorers", "jpeg_compressibility", "--best", 1) == 0
    card = tmp_path / "db/README.md"
    assert "config_name: ranked" in card.read_text() and "config_name: best" in card.read_text()
    assert run(*command, "--scorers", "jpeg_incompressibility", "--format", "pairs") == 0
    text = card.read_text()
    assert "config_name: pairs" in text and "config_name: ranked" not in text
    assert "ranked is of an earlier run of this command" in text


def test_the_best_guidance_is_chosen_on_images_that_all_scales_have() -> None:
    first = np.array([[0.9], [0.0], [0.1], [0.0], [0.9], [0.0], [0.1], [0.0]])
    second = np.array([[0.6], [0.0], [np.nan], [0.0], [0.6], [0.0], [np.nan], [0.0]])
    assert best_index([first, second]) == 0
    assert best_index([np.full((8, 1), np.nan), first]) == 1


def test_prompts_are_texts_rows_or_datasets() -> None:
    import datasets

    rows = [{"caption": "a red circle", "category": "x"}, {"caption": "a star", "category": "y"}]
    for source in (rows, datasets.Dataset.from_list(rows)):
        prompts = load_prompts(source)
        assert prompts.prompts == ["a red circle", "a star"] and prompts.categories == ["x", "y"]
    for wrong in (None, [None], ["a", float("nan")], [{"words": "a"}], 3, {"prompt": "a"}):
        with pytest.raises(ConfigError, match="prompts: "):
            load_prompts(wrong)
    config = ValidationConfig(validation_prompts=["a", "b", "a"])
    assert validation_prompts(config) == ["a", "b"]


def test_own_scorers_judge_and_steer_a_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(SCORER)
    scorer = f"{tmp_path / 'mine.py'}:size"
    command = ["compare", "--base", "shapes", "--max_prompts", 1, "--num_images", 1]
    command += ["--num_inference_steps", 2, "--prompts", "shapes"]
    options = ["--tuned", "again=shapes", "--scorers", scorer, "--output_dir", tmp_path / "a"]
    assert run(*command, *options, "--trust_remote_code") == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "a/results.json").read_text())
    assert results
    assert run(*command, "--steer", "nosuch", "--lmbda", 2, "--output_dir", tmp_path / "b") == 2
    assert "steer.scorer: " in capsys.readouterr().err and not (tmp_path / "b").exists()
    options = ["--steer", "shapes-clip", "--lmbda", 2, "--num_particles", 2, "--scorers", "shapes"]
    options += ["--scorer_args", "{shapes-clip: {batch_size: 4}}", "--output_dir", tmp_path / "c"]
    assert run(*command, *options) == 0, capsys.readouterr().err


def test_errors_stay_errors() -> None:
    with pytest.raises(UserError):
        load_prompts("no/such/file.txt")
