"""The options of `diffalign sample` that say how much of which model guides."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from diffalign import cli
from diffalign.cli.entry import build_parser


def parse(*arguments: str) -> argparse.Namespace:
    return build_parser().parse_args(["sample", "--prompt", "a red circle", *arguments])


def test_both_shares_are_whole_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse()
    assert (options.positive_share, options.negative_share) == (1.0, 1.0)
    options = parse("--positive_share", "0.5", "--negative_share", "0.7")
    assert (options.positive_share, options.negative_share) == (0.5, 0.7)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("old", "new"), [("--alpha", "--positive_share"), ("--beta", "--negative_share")]
)
def test_an_old_name_works_and_says_the_new_one(
    old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = parse(old, "0.5")
    said = capsys.readouterr().err
    assert vars(options)[new.removeprefix("--")] == 0.5
    assert said == f"diffalign: {old} is now called {new}; the old name goes in version 0.3\n"


def test_help_names_the_new_ones_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.run(["sample", "--help"])
    text = capsys.readouterr().out
    assert "--positive_share" in text and "--negative_share" in text
    assert "--alpha" not in text and "--beta" not in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lora_scale", "3"], "--lora_scale: has no effect without --lora"),
        (["--negative_share", "0.5"], "--negative_share: has no effect without --negative_lora"),
        (
            ["--negative_lora", "runs/npo", "--guidance_scale", "1"],
            "--guidance_scale: at 1 the negative model has no effect",
        ),
    ],
)
def test_options_without_an_effect_are_refused(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["sample", "--prompt", "a red circle", *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["--lora", "--negative_lora"])
def test_weights_that_are_not_there_show_before_the_first_image(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from diffalign.generation import sampling

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sampling, "generate", lambda *a, **k: pytest.fail("something was drawn"))
    assert cli.run(["sample", "--prompt", "a red circle", name, "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_images_of_a_changed_model_take_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    from diffalign.runtime.folder_lock import FolderLock
    from diffalign.shapes.models import weights_dir

    monkeypatch.chdir(tmp_path)
    shutil.copytree(weights_dir("shapes"), "model")
    draw = ["sample", "--model", "model", "--prompt", "a small red circle", "--num_images", "1"]
    draw += ["--num_inference_steps", "2"]
    assert cli.run(draw) == 0
    file = next((tmp_path / "model" / "unet").glob("*.safetensors"))
    save_file({name: tensor * 1.1 for name, tensor in load_file(file).items()}, file)
    assert cli.run(draw) == 0
    with FolderLock(tmp_path / "diffalign-samples-3"):  # another command is drawing there
        assert cli.run([*draw, "--seed", "7"]) == 0
    folders = sorted(path.name for path in tmp_path.glob("diffalign-samples*"))
    assert folders == ["diffalign-samples", "diffalign-samples-2", "diffalign-samples-4"]
