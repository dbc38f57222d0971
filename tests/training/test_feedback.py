"""People as judges: what is written, what votes may look like, how the run goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from PIL import Image
from tiny import (
    assert_same_tensors,
    brightness,
    lora_config,
    make_trainer,
    pair_rows,
    trained_tensors,
)

from diffalign import cli
from diffalign.errors import UserError
from diffalign.methods.d3po import D3POTrainer
from diffalign.runtime.missing import NOT_FINITE, Missing
from diffalign.training.online.feedback import read_votes, round_folder


def asking(folder: Path, **options: Any) -> Any:
    options = {
        "images_per_prompt": 3,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
    } | options
    return make_trainer(
        folder,
        "sd",
        "d3po",
        peft_config=lora_config(),
        feedback="people",
        options={"scorers": None},
        **options,
    )


def vote_for_bright(folder: Path, name: str = "votes.json", annotator: str = "me") -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    votes = []
    for group in manifest["groups"]:
        images = group["images"]
        values = brightness([Image.open(folder / image["file"]) for image in images], None).tolist()
        for i in range(len(images)):
            for j in range(i + 1, len(images)):
                preference = "a" if values[i] > values[j] else "b"
                votes.append(
                    {
                        "image_a": images[i]["id"],
                        "image_b": images[j]["id"],
                        "preference": preference,
                        "annotator": annotator,
                    }
                )
    (folder / name).write_text(json.dumps(votes))


@pytest.fixture
def waiting(tmp_path: Path) -> Path:
    """The folder of a round that waits for votes."""
    output = asking(tmp_path / "run").train()
    assert output.waiting_for == round_folder(tmp_path / "run", 0) and output.global_step == 0
    return output.waiting_for


def test_votes_train_as_the_same_scores_would(waiting: Path) -> None:
    run = waiting.parents[1]
    assert (run / "checkpoint-0").is_dir() and not (
        run / "pytorch_lora_weights.safetensors"
    ).exists()
    manifest = json.loads((waiting / "manifest.json").read_text())
    assert len(manifest["groups"]) == 2 and all(
        (waiting / i["file"]).is_file() for g in manifest["groups"] for i in g["images"]
    )
    assert manifest["groups"][0]["images"][0]["id"] in (waiting / "index.html").read_text()
    vote_for_bright(waiting)
    again = asking(run, resume_from_checkpoint="latest").train()
    assert again.global_step == 1 and again.waiting_for == round_folder(run, 1)
    vote_for_bright(round_folder(run, 1))
    trainer = asking(run, resume_from_checkpoint="latest")
    assert (
        trainer.train().waiting_for is None and (run / "pytorch_lora_weights.safetensors").is_file()
    )
    scored = make_trainer(
        run.with_name("scored"),
        "sd",
        "d3po",
        peft_config=lora_config(),
        images_per_prompt=3,
        per_device_train_batch_size=2,
        max_steps=2,
        learning_rate=1e-2,
    )
    scored.train()
    assert_same_tensors(trained_tensors(trainer), trained_tensors(scored))


def test_nobody_is_asked_about_a_missing_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"

    def broken(trainer: D3POTrainer, batch: Any, purpose: str = "rollout") -> Any:
        drawn, scores = sample(trainer, batch, purpose)
        drawn.images[0][1] = Missing(NOT_FINITE)
        drawn.images[1][:2] = [Missing(NOT_FINITE)] * 2
        return drawn, scores

    sample = D3POTrainer.sample
    with monkeypatch.context() as patch:
        patch.setattr(D3POTrainer, "sample", broken)
        waiting = asking(run).train().waiting_for
    assert "3 of 6 images of this round" in capsys.readouterr().out
    groups = json.loads((waiting / "manifest.json").read_text())["groups"]
    assert [[i["id"][-1] for i in group["images"]] for group in groups] == [["0", "2"]]
    assert len(list((waiting / "images").iterdir())) == 3
    vote_for_bright(waiting)
    assert asking(run, resume_from_checkpoint="latest").train().global_step == 1


def test_a_round_with_nothing_to_vote_on_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(trainer: D3POTrainer, batch: Any, purpose: str = "rollout") -> Any:
        drawn, scores = sample(trainer, batch, purpose)
        drawn.images = [[images[0], *[Missing(NOT_FINITE)] * 2] for images in drawn.images]
        return drawn, scores

    sample = D3POTrainer.sample
    monkeypatch.setattr(D3POTrainer, "sample", broken)
    with pytest.raises(UserError, match="no prompt with two images that can be used"):
        asking(tmp_path / "run").train()
    assert not list((tmp_path / "run").rglob("manifest.json"))


def test_nothing_is_drawn_twice(waiting: Path) -> None:
    """A second start without votes; one after a death between images and manifest."""
    run = waiting.parents[1]
    before = {p.name: p.stat().st_mtime_ns for p in (waiting / "images").iterdir()}
    assert asking(run, resume_from_checkpoint="latest").train().waiting_for == waiting
    assert {p.name: p.stat().st_mtime_ns for p in (waiting / "images").iterdir()} == before
    manifest = (waiting / "manifest.json").read_text()
    (waiting / "manifest.json").unlink()
    asking(run, resume_from_checkpoint="latest").train()
    assert (waiting / "manifest.json").read_text() == manifest


def test_a_dry_run_asks_nobody(tmp_path: Path) -> None:
    asking(tmp_path / "run").dry_run()
    assert not (tmp_path / "run").exists()


def test_votes_of_any_form_are_averaged(waiting: Path) -> None:
    a, b, c = (
        image["id"]
        for image in json.loads((waiting / "manifest.json").read_text())["groups"][0]["images"]
    )
    (waiting / "votes-1.json").write_text(
        json.dumps({"votes": [{"image_a": a, "image_b": b, "preference": "a", "annotator": "x"}]})
    )
    (waiting / "votes-2.csv").write_text(
        f"image_a,image_b,preference,annotator\n{b},{a},tie,y\n{a},{c},0.5,y\n"
    )
    pyarrow.parquet.write_table(
        pyarrow.table({"chosen": [c], "rejected": [b]}), waiting / "votes-3.parquet"
    )
    (waiting / "votes-4.jsonl").write_text(
        json.dumps({"image_a": b, "image_b": a, "preference": -1}) + "\n\n"
    )
    votes = read_votes(waiting)
    assert votes.preference[a, b] == pytest.approx(2 / 3) and votes.preference[
        b, a
    ] == pytest.approx(-2 / 3)
    assert votes.preference[a, c] == 0.5 and votes.preference[b, c] == -1
    assert (votes.count, votes.annotators, votes.conflicts) == (5, 2, 1)
    assert (
        votes.summary()
        == "5 votes of 2 annotators on 3 pairs; on 1 pairs they differ and are averaged"
    )


@pytest.mark.parametrize(
    ("votes", "words"),
    [
        (
            [{"image_a": "A", "image_b": "other", "preference": "a"}],
            "there is no image 'other' in this round .*other images",
        ),
        ([{"image_a": "A", "image_b": "A", "preference": "a"}], "are not two images of one prompt"),
        (
            [{"image_a": "A", "image_b": "B", "preference": "best"}],
            "preference is 'best'; expected a, b, tie",
        ),
        (
            [{"image_a": "A", "image_b": "B", "preference": 2}],
            "expected a, b, tie or a number from -1 to 1",
        ),
        ([{"image_a": "A"}], "expected image_a, image_b and preference"),
        ([], "hold no vote"),
        ("text", "expected a list of votes"),
    ],
)
def test_votes_that_do_not_fit(waiting: Path, votes: Any, words: str) -> None:
    first, second = (
        i["id"]
        for i in json.loads((waiting / "manifest.json").read_text())["groups"][0]["images"][:2]
    )
    text = json.dumps(votes).replace('"A"', json.dumps(first)).replace('"B"', json.dumps(second))
    (waiting / "votes.json").write_text(text)
    with pytest.raises(UserError, match=words):
        asking(waiting.parents[1], resume_from_checkpoint="latest").train()
    (waiting / "votes.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as votes"):
        read_votes(waiting)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = tmp_path / "prompts.txt"
    rows.write_text("\n".join(row["prompt"] for row in pair_rows(4)) + "\n\n")
    values = {
        "method": "d3po",
        "model": "shapes",
        "lora": {"r": 2},
        "data": {"dataset_name": str(rows)},
        "train": {
            "output_dir": str(tmp_path / "run"),
            "feedback": "people",
            "num_inference_steps": 2,
            "per_device_train_batch_size": 2,
            "max_steps": 1,
        },
    }
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    collect = ["feedback", "collect", "--config", str(config)]
    assert cli.run([*collect, "--no_wait"]) == 0
    said = capsys.readouterr().out
    assert "votes wanted" in said
    assert cli.run(["feedback", "status", str(tmp_path / "run")]) == 0
    assert "round-0000: 2 prompts, 4 images; no votes yet" in capsys.readouterr().out
    vote_for_bright(round_folder(tmp_path / "run", 0))
    assert (
        cli.run(["train", "--config", str(config), "--train.resume_from_checkpoint", "latest"]) == 0
    )
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()
    assert "round 0: 2 votes of 1 annotators on 2 pairs" in capsys.readouterr().out
    values["train"]["feedback"] = "scorers"
    config.write_text(yaml.safe_dump(values))
    assert cli.run(collect) == 2
    assert "uses no human feedback" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run")
    assert cli.run(["feedback", "status", str(tmp_path / "run")]) == 2
