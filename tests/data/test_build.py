"""`diffalign data build` end to end on real pipelines, and how scores become labels."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
from commands import TORCHRUN
from PIL import Image
from tiny import build_pipeline, lora_config, make_trainer

from diffalign import UserError, load_preferences, register_scorer
from diffalign.annotation.best import ranked_images
from diffalign.annotation.build_output import label
from diffalign.cli.entry import run
from diffalign.data.prompt_sets import read_prompts
from diffalign.rewards import registry
from diffalign.rewards.panel import Panel
from diffalign.runtime.seeds import image_seed

ROOT = Path(__file__).parents[2]
FAST = ["--num_inference_steps", "2", "--guidance_scale", "1.0"]
NAN = float("nan")


@pytest.fixture(autouse=True)
def _scorers(monkeypatch):
    """Three scorers that read their numbers off the image's path or pixels."""
    monkeypatch.setattr(registry, "_registered", {})

    @register_scorer("bright", requires=("image",))
    def bright(images):
        return [float(np.asarray(image.convert("RGB")).mean()) for image in images]

    @register_scorer("dark", requires=("image",))
    def dark(images):
        return [-float(np.asarray(image.convert("RGB")).mean()) for image in images]

    @register_scorer("often_missing", requires=("image",))
    def often_missing(images):
        means = [float(np.asarray(image.convert("RGB")).mean()) for image in images]
        return [mean if int(mean * 1000) % 2 else None for mean in means]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(
        "a large red circle in the center of a gray background\n\n../../etc/passwd\n<b>"
        + "x" * 10_000
        + "\n../../etc/passwd\n"
    )
    return file


def build(prompts, output, *more, scorers="bright"):
    return run(
        [
            "data",
            "build",
            "--prompts",
            str(prompts),
            "--scorers",
            scorers,
            "--output_dir",
            str(output),
            *FAST,
            *more,
        ]
    )


def files_of(folder: Path) -> dict[str, str]:
    """Digest of every image and table."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".png", ".parquet", ".md", ".json")
    }


def test_from_prompts_to_a_trained_step(prompts, tmp_path, capsys):
    out = tmp_path / "out"
    assert build(prompts, out, "--num_images", "3", "--seed", "5") == 0
    said = capsys.readouterr().out
    assert (
        "3 prompts, 1 empty prompts left out, 1 repeated prompts taken once; 9 images of 1 models"
        in said
    )
    table = pyarrow.parquet.read_table(out / "scores.parquet").to_pylist()
    assert len(table) == 9 and len({row["image"] for row in table}) == 9
    for row in table:
        assert row["seed"] == image_seed(5, row["prompt"], row["number"])
        with Image.open(out / row["image"]) as image:
            assert row["score_bright"] == pytest.approx(
                np.asarray(image.convert("RGB")).mean(), abs=1e-3
            )
    pairs = load_preferences(str(out / "pairs"), verbose=False)
    ranked = load_preferences(str(out / "ranked"), verbose=False)
    assert (pairs.kind, len(pairs), ranked.kind, len(ranked)) == ("pair", 3, "ranked", 3)
    rows = pyarrow.parquet.read_table(out / "ranked").to_pylist()
    for row in rows:
        assert row["scores"] == [1.0, 0.5, 0.0]
        assert row["scores_bright"] == sorted(row["scores_bright"], reverse=True)
    for row in pyarrow.parquet.read_table(out / "pairs").to_pylist():
        assert (row["margin"], row["chosen_score"], row["rejected_score"]) == (1.0, 1.0, 0.0)
    assert max(Image.open(out / "sheet.png").size) > 300
    card = (out / "README.md").read_text()
    assert "judged by scorers, not by people" in card and str(tmp_path) not in card
    trainer = make_trainer(
        tmp_path / "run",
        rows=pairs,
        peft_config=lora_config(),
        max_steps=1,
        per_device_train_batch_size=2,
    )
    trainer.train()
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()


def test_the_best_of_all_prompts_are_a_dataset_of_single_images(prompts, tmp_path, capsys):
    out = tmp_path / "out"
    assert build(prompts, out, "--num_images", "3", "--best", "4") == 0
    said = capsys.readouterr().out
    assert "4 best images of" in said and "configs/diffusion_dro/" in said
    table = pyarrow.parquet.read_table(out / "scores.parquet").to_pylist()
    rows = pyarrow.parquet.read_table(out / "best").to_pylist()
    scores = sorted((row["score_bright"] for row in table), reverse=True)
    assert [row["bright"] for row in rows] == scores[:4]
    data = load_preferences(str(out / "best"), verbose=False)
    assert (data.kind, len(data)) == ("single", 4)
    assert "config_name: best" in (out / "README.md").read_text()
    assert build(prompts, out, "--best", "0") == 2


def test_scorers_of_other_scales_count_by_their_ranks_among_all_images():
    panel = Panel({"bright": 1.0, "dark": 2.0})
    first = [5.0, 1.0, 2.0, 2.0, NAN]
    second = [10.0, 4000.0, 2000.0, 2000.0, 9000.0]
    # Ranks from 0 are 3, 0, 1.5, 1.5 and 0, 3, 1.5, 1.5; the second count twice.
    assert ranked_images(panel, {"bright": first, "dark": second}) == [1, 2, 3, 0]
    assert ranked_images(panel, {"bright": first, "dark": [0.0] * 5})[:2] == [0, 2]


@pytest.mark.nightly
def test_two_models_share_seeds_and_a_lora_is_a_model_of_its_own(prompts, tmp_path, capsys):
    folder = tmp_path / "models" / "mine"
    build_pipeline("sd").save_pretrained(folder)
    out = tmp_path / "out"
    assert (
        build(
            prompts,
            out,
            "--models",
            str(folder),
            str(folder),
            "--num_images",
            "2",
            "--resolution",
            "64",
        )
        == 0
    )
    rows = pyarrow.parquet.read_table(out / "scores.parquet").to_pylist()
    assert {row["model"] for row in rows} == {"mine", "mine-2"}
    drawn = {
        (row["model"], row["prompt"], row["number"]): (out / row["image"]).read_bytes()
        for row in rows
    }
    for (model, prompt, number), data in drawn.items():
        assert data == drawn["mine", prompt, number], model
    assert "all images equal" not in capsys.readouterr().out  # the two images of one model differ

    trainer = make_trainer(
        tmp_path / "lora",
        model=str(folder),
        peft_config=lora_config(),
        max_steps=1,
        learning_rate=0.3,
    )
    trainer.train()
    tuned = tmp_path / "tuned"
    assert (
        build(
            prompts,
            tuned,
            "--models",
            str(folder),
            "--lora",
            str(tmp_path / "lora"),
            "--num_images",
            "1",
            "--resolution",
            "64",
        )
        == 0
    )
    rows = pyarrow.parquet.read_table(tuned / "scores.parquet").to_pylist()
    by_model = {
        row["model"]: (tuned / row["image"]).read_bytes() for row in rows if row["number"] == 0
    }
    assert set(by_model) == {"mine", "lora"} and by_model["mine"] != by_model["lora"]
    assert "chosen, rejected: mine" in capsys.readouterr().out


@pytest.mark.nightly
def test_an_interrupted_build_goes_on_to_the_same_bytes(prompts, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    arguments = ("--num_images", "3", "--batch_size", "2")
    assert build(prompts, straight, *arguments) == 0
    assert build(prompts, broken, *arguments) == 0
    images = sorted(broken.rglob("*.png"))
    for path in images[1::2]:
        path.unlink()
    for name in (
        "scores.parquet",
        "README.md",
        "pairs/train-00000-of-00001.parquet",
        "scores.sqlite",
    ):
        (broken / name).unlink()
    (images[0].parent / "half.tmp").write_bytes(b"cut short")
    assert build(prompts, broken, *arguments) == 0
    (images[0].parent / "half.tmp").unlink()
    assert files_of(broken) == files_of(straight)


def test_more_prompts_images_and_scorers_are_added_to_what_is_there(prompts, tmp_path, capsys):
    out = tmp_path / "out"
    assert build(prompts, out, "--num_images", "2", "--max_prompts", "2") == 0
    before = {
        path: path.stat().st_mtime_ns for path in out.rglob("*.png") if path.name != "sheet.png"
    }
    assert build(prompts, out, "--num_images", "3", scorers="bright,dark") == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len([path for path in out.rglob("*.png") if path.name != "sheet.png"]) == 9
    assert "Kendall's W: 0.00" in capsys.readouterr().out  # bright against dark
    assert not (out / "pairs").exists()  # all phi are one half: nothing to choose
    assert build(prompts, out, "--num_images", "2", "--seed", "1") == 2
    assert "holds images drawn with --seed 0, not 1" in capsys.readouterr().err


@pytest.mark.nightly
def test_two_processes_build_what_one_builds(tmp_path):
    arguments = [
        "--prompts",
        "shapes",
        "--max_prompts",
        "40",
        "--num_images",
        "2",
        "--scorers",
        "shapes-clip,shapes",
        *FAST,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name, command in (("one", []), ("two", TORCHRUN)):
        script = [sys.executable, *command, str(ROOT / "scripts" / "build_dataset.py"), *arguments]
        done = subprocess.run(
            [*script, "--output_dir", str(tmp_path / name)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("40 prompts") == 1
    one, two = files_of(tmp_path / "one"), files_of(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        if name.startswith("images/"):  # other processes may round otherwise
            pixels = [
                np.asarray(Image.open(tmp_path / n / name)).astype(int) for n in ("one", "two")
            ]
            assert np.abs(pixels[0] - pixels[1]).max() <= 1
    tables = [
        pyarrow.parquet.read_table(tmp_path / n / "scores.parquet").to_pydict()
        for n in ("one", "two")
    ]
    for column in ("prompt", "model", "number", "seed", "image"):
        assert tables[0][column] == tables[1][column]
    np.testing.assert_allclose(
        tables[0]["score_shapes-clip"], tables[1]["score_shapes-clip"], atol=1e-3
    )


def fake(
    columns: dict[str, list[float]],
    groups: list[int],
    selection="best_worst",
    min_margin=0.0,
    **combine,
):
    """Labels of made-up scores."""
    names = ["bright", "dark", "often_missing"][: len(columns)]
    panel = Panel(names, combine or None, placement="exclusive")
    return label(
        panel,
        [SimpleNamespace(group=group) for group in groups],
        dict(zip(names, columns.values(), strict=True)),
        selection,
        min_margin,
    )


def test_selections():
    scores, groups = {"a": [3.0, 1.0, 2.0, 5.0, 5.0, 4.0]}, [0, 0, 0, 1, 1, 1]
    found = fake(scores, groups)
    assert found.lists == [[0, 2, 1], [3, 4, 5]]
    assert found.pairs == [(0, 1), (3, 5)]
    assert fake(scores, groups, "best_vs_rest").pairs == [(0, 2), (0, 1), (3, 5)]  # 3 and 4 tie
    assert fake(scores, groups, "all").pairs == [(0, 2), (0, 1), (2, 1), (3, 5), (4, 5)]
    few = fake(scores, groups, min_margin=0.9)
    assert few.pairs == [(0, 1)] and few.dropped == {"margin below 0.9 (kept as a list)": 1}


def test_ties_and_missing_scores_are_never_in_a_pair():
    found = fake({"a": [1.0, 1.0, NAN, 4.0, NAN, 2.0, 3.0]}, [0, 0, 1, 1, 2, 2, 2])
    assert found.pairs == [(6, 5)] and found.lists == [[6, 5]]
    assert found.dropped == {"all images equal": 1, "fewer than two images with a score": 1}


def test_unanimous_pairs_need_every_scorer():
    scores = {"a": [3.0, 2.0, 1.0, 1.0, 2.0], "b": [2.0, 3.0, 1.0, 2.0, 1.0]}
    found = fake(scores, [0, 0, 0, 1, 1], "unanimous", method="zscore")
    assert [pair[1] for pair in found.pairs] == [2] and found.dropped == {"all images equal": 1}
    wide = fake(scores, [0, 0, 0, 1, 1], "unanimous", method="zscore", margins=[1.5, 1.5])
    assert wide.pairs == []


def test_prompts_from_files_and_datasets(tmp_path, monkeypatch):
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n{"prompt": "one"}\n')
    assert read_prompts(str(tmp_path / "p.jsonl")) == (
        ["one", "two"],
        ["1 repeated prompts taken once"],
    )
    assert len(read_prompts("shapes")[0]) == 600 and len(read_prompts("shapes-held-out", 7)[0]) == 7
    (tmp_path / "p.txt").write_text("one\n\ntwo\none\n")
    assert read_prompts(str(tmp_path / "p.txt")) == (
        ["one", "two"],
        ["1 empty prompts left out", "1 repeated prompts taken once"],
    )
    (tmp_path / "PartiPrompts.tsv").write_text(
        'Prompt\tCategory\na "cat"\tAnimals\na dog\tAnimals\n'
    )
    monkeypatch.setenv("DIFFALIGN_PROMPTS", str(tmp_path))
    assert read_prompts("partiprompts", 1)[0] == ['a "cat"']
    (tmp_path / "empty.txt").write_text("\n  \n")
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(str(tmp_path / "empty.txt"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_images", "1"], "one image per prompt leaves nothing to compare"),
        (["--num_images", "0"], "--num_images: expected int >= 1"),
        (["--scorers", "brihgt"], "unknown scorer 'brihgt'; did you mean bright"),
        (["--scorers", "geneval"], "it needs metadata for every prompt"),
        (["--scorers", "pickscore"], "are not on this machine"),
        (["--models", "nowhere/at/all"], "there is no folder 'nowhere/at/all'"),
        (["--lora", "nowhere"], "there is no file or folder with safetensors"),
        (["--min_margin", "-1"], "--min_margin: expected float >= 0"),
        (["--prompts", "none.txt"], "none.txt"),
        (["--rewards_config", "none.yaml"], "--scorers, --rewards_config: give one of them"),
        (["--scorer_args", "{dark: {}}"], "no such scorer"),
    ],
)
def test_mistakes_come_before_anything_is_drawn(arguments, message, prompts, tmp_path, capsys):
    options = {
        "--prompts": str(prompts),
        "--scorers": "bright",
        "--output_dir": str(tmp_path / "out"),
    }
    options |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert run(["data", "build", *(part for item in options.items() for part in item)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not list((tmp_path / "out").rglob("*.png"))


def test_another_folder_is_left_alone(prompts, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    assert build(prompts, tmp_path / "out") == 2
    assert "holds something else" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    manifest = {"settings": {}, "models": {}}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    assert build(prompts, tmp_path / "out") == 2
