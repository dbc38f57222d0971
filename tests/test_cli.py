"""The installed command: what a user's mistakes look like. One sentence, exit code 2,
no traceback, nothing left behind."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import write_world

import diffalign.cli.entry
from diffalign.data import load_preferences


def command(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the installed command as a user would."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    program = Path(sys.executable).with_name("diffalign")
    start = [str(program)] if program.exists() else [sys.executable, "-m", "diffalign"]
    return subprocess.run(
        [*start, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=environment
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, pairs and a run file."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


def fails(world: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs `diffalign train` in this process with the run file and options; returns the
    one sentence."""
    before = {p for p in world.rglob("*")}
    code = diffalign.cli.entry.run(
        ["train", "--config", str(world / "run.yaml"), *map(str, arguments)]
    )
    printed = capsys.readouterr().err.strip()
    assert code == 2, printed
    said = printed.splitlines()[-1]  # before it there may be progress bars
    assert (
        said.startswith("diffalign: ")
        and printed.count("diffalign: ") == 1
        and "Traceback" not in printed
    )
    assert {p for p in world.rglob("*")} == before, "something was left behind"
    return said


@pytest.mark.nightly
def test_mistakes_through_the_installed_command(world: Path) -> None:
    (world / "bad.yaml").write_text(
        (world / "run.yaml").read_text().replace("max_steps", "max_stepz")
    )
    for arguments, expected in [
        (
            ["train", "--config", world / "bad.yaml"],
            "train.max_stepz: unknown key (did you mean 'max_steps'?)",
        ),
        (["train", "--config", world / "nowhere.yaml"], "there is no file"),
        (
            ["train", "--config", world / "run.yaml", "--train.beta", "five"],
            "train.beta: expected float > 0 or auto, got 'five'",
        ),
        (
            ["train", "--config", world / "run.yaml", "--model", world / "pairs"],
            "has no model_index.json",
        ),
        (["quickstart", "--output_dir", world], "is no quickstart"),
        (["data", "inspect", world / "nothing"], "nothing"),
        (["frobnicate"], "invalid choice"),
        (["sample", "--model", world / "gone", "--prompt", "x"], "there is no folder"),
    ]:
        done = command(*arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert expected in done.stderr
        assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--train.beta", "-1"], "train.beta: expected float > 0 or auto, got -1"),
        (["--train.beta", "nan"], "train.beta: expected float > 0 or auto, got 'nan'"),
        (["--train.max_steps", "1.5"], "train.max_steps: expected int or null, got 1.5"),
        (["--train.optim", "sgd"], "train.optim: expected one of adamw"),
        (
            ["--train.max_steps", "1", "--train.num_train_epochs", "2"],
            "set either max_steps or num_train_epochs",
        ),
        (["--data.ties", "win"], "data.ties: expected one of drop, keep"),
        (["--method", "diffusion_dpoo"], "did you mean 'diffusion_dpo'?"),
        (["--lora.rank", "4"], "lora.rank: unknown key"),
        (["--trian.beta", "4"], "unknown option"),
        (["--train.beta"], "expected a value"),
        (["--model", "./gone"], "there is no folder './gone'"),
        (["--data.resolution", "33"], "33 is not divisible by 2"),
        (["--lora.target_modules", "[nothing_like_it]"], "matches no module"),
        (["--train.attention", "nonsense"], "the backend 'nonsense' cannot be used here"),
        (["--train.mixed_precision", "fp16"], "fp16 needs a GPU"),
        (["--train.optim", "prodigy"], "pip install 'diffalign[optim]'"),
        (["--train.resume_from_checkpoint", "nowhere"], "is no checkpoint"),
        (["--data.columns", "{prompt: nope}"], "nope"),
        (
            ["--data.cache_latents", "c", "--data.random_flip", "true"],
            "cached latents cannot be cropped or flipped anew",
        ),
    ],
)
def test_wrong_settings(
    world: Path, capsys: pytest.CaptureFixture[str], options: list[str], expected: str
) -> None:
    assert expected in fails(world, capsys, *options)


def dataset(folder: Path, rows: list[dict[str, Any]]) -> Path:
    from datasets import Dataset

    folder.mkdir(parents=True)
    Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    return folder


def test_wrong_data(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = (Path(__file__).parent / "data" / "missing").name.encode()
    strange = dataset(tmp_path / "strange", [{"foo": "a", "bar": 1}])
    said = fails(world, capsys, "--data.dataset_name", strange)
    assert "foo" in said and "data.columns" in said and "chosen" in said
    tied = {"caption": "a", "jpg_0": png, "jpg_1": png, "label_0": 0.5, "label_1": 0.5}
    said = fails(
        world,
        capsys,
        "--data.dataset_name",
        dataset(tmp_path / "tied", [tied] * 3),
        "--data.verify_images",
        "none",
    )
    assert "ties" in said
    broken = {**tied, "label_0": 1.0, "label_1": 0.0}
    assert "row" in fails(
        world, capsys, "--data.dataset_name", dataset(tmp_path / "broken", [broken] * 3)
    )
    assert "prompt" in fails(
        world, capsys, "--data.dataset_name", dataset(tmp_path / "prompts", [{"prompt": "a"}])
    )


def test_pickled_weights_are_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    class Payload:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (os.system, (f"touch {tmp_path}/executed",))

    shutil.copytree(world / "model", tmp_path / "model")
    for file in (tmp_path / "model" / "unet").glob("*.safetensors"):
        file.unlink()
    (tmp_path / "model" / "unet" / "diffusion_pytorch_model.bin").write_bytes(
        pickle.dumps(Payload())
    )
    assert "is a pickle" in fails(world, capsys, "--model", tmp_path / "model")
    assert not (tmp_path / "executed").exists()
    (tmp_path / "model.ckpt").write_bytes(pickle.dumps(Payload()))
    assert "is no safetensors file" in fails(world, capsys, "--model", tmp_path / "model.ckpt")
    assert not (tmp_path / "executed").exists()


def test_an_unsupported_pipeline_is_named(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    said = fails(world, capsys, "--model", tmp_path)
    assert "KandinskyPipeline" in said and "StableDiffusionXLPipeline" in said


def test_a_pipeline_without_a_scheduler_is_named(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    said = fails(world, capsys, "--model", tmp_path)
    assert "is incomplete: its model_index.json names no scheduler" in said


@pytest.mark.nightly
def test_a_run_trains_is_not_overwritten_and_resumes(world: Path) -> None:
    output = world / "out"
    script = Path(__file__).parents[1] / "scripts" / "train.py"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "1",
        "--cpu",
        str(script),
    ]
    done = subprocess.run(
        [*launch, "--config", str(world / "run.yaml"), "--train.save_steps", "1"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "beta 5000" in done.stdout and "0.693" in done.stdout
    assert (output / "pytorch_lora_weights.safetensors").is_file() and (
        output / "checkpoint-2"
    ).is_dir()
    again = command("train", "--config", world / "run.yaml")
    assert again.returncode == 2 and "holds another run" in again.stderr
    more = command(
        "train",
        "--config",
        world / "run.yaml",
        "--train.resume_from_checkpoint",
        "latest",
        "--train.max_steps",
        3,
    )
    assert more.returncode == 0 and "at step 2 of 3" in more.stdout, more.stderr
    from_config = command(
        "train", "--config", output / "config.yaml", "--train.output_dir", world / "repeat"
    )
    assert (
        from_config.returncode == 0
        and (world / "repeat" / "pytorch_lora_weights.safetensors").is_file()
    ), from_config.stderr


def said_here(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command that ends well prints in this process."""
    assert diffalign.cli.entry.run([str(each) for each in arguments]) == 0
    return capsys.readouterr().out


def test_dry_run_writes_nothing(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry = ("--dry_run", "--train.output_dir", tmp_path / "dry")
    printed = said_here(capsys, "train", "--config", world / "run.yaml", *dry)
    for said in (
        "parameters train",
        "per optimizer step",
        "3 per epoch",
        "beta 5000",
        "layout trl",
        "peak resident memory",
        "dry run",
    ):
        assert said in printed
    assert not (tmp_path / "dry").exists()


def test_help_names_every_field_and_needs_no_config(capsys: pytest.CaptureFixture[str]) -> None:
    printed = said_here(capsys, "train", "--help")
    assert "--train.beta (default 5000.0)" in printed and "--data.cache_latents" in printed
    assert "torch" in said_here(capsys, "env")


@pytest.mark.nightly
def test_the_installed_command_says_the_same(world: Path) -> None:
    done = command("train", "--help")
    assert done.returncode == 0 and "--train.beta (default 5000.0)" in done.stdout
    done = command("train", "--config", world / "run.yaml", "--dry_run")
    assert done.returncode == 0 and "dry run" in done.stdout, done.stderr
    assert "torchao" not in done.stderr and "pytree" not in done.stderr  # noise of libraries
    done = command("env")
    assert done.returncode == 0 and "torch" in done.stdout


def test_import_and_help_load_no_torch() -> None:
    code = (
        "import sys, diffalign, diffalign.cli.entry; diffalign.cli.entry.build_parser(); "
        "sys.exit(','.join(m for m in ('torch', 'diffusers', 'transformers', 'datasets', 'gradio', "
        "'wandb') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_options_of_all_methods_load_torch_and_nothing_of_diffusers() -> None:
    code = (
        "import sys; from diffalign.methods import METHODS, config_class; "
        "[config_class(method) for method in METHODS]; sys.exit(','.join(m for m in ('diffusers', "
        "'transformers', 'peft', 'datasets', 'torch._dynamo') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.nightly
def test_data_commands(world: Path, tmp_path: Path) -> None:
    seen = command("data", "inspect", world / "pairs")
    assert seen.returncode == 0 and "6" in seen.stdout and "pair" in seen.stdout, seen.stderr
    done = command(
        "data", "convert", world / "pairs", "--output_dir", tmp_path / "single", "--kind", "single"
    )
    assert done.returncode == 0, done.stderr
    assert len(load_preferences(str(tmp_path / "single"), verbose=False)) == 6
    assert (
        command("data", "convert", world / "pairs", "--output_dir", tmp_path / "single").returncode
        == 2
    )


@pytest.mark.nightly
def test_sample_draws_base_and_lora(world: Path, tmp_path: Path) -> None:
    lora = world / "out"
    if not (lora / "pytorch_lora_weights.safetensors").is_file():
        assert command("train", "--config", world / "run.yaml").returncode == 0
    done = command(
        "sample", "--model", world / "model", "--lora", lora, "--lora_scale", 0,
        "--prompt", "a red circle", "--num_images", 2, "--num_inference_steps", 2,
        "--output_dir", tmp_path / "s",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = sorted(p.name for p in (tmp_path / "s").glob("*.png"))
    assert names == [
        "000-seed0-base.png",
        "000-seed0-tuned.png",
        "000-seed1-base.png",
        "000-seed1-tuned.png",
        "comparison.png",
    ]
    base, tuned = (
        (tmp_path / "s" / f"000-seed1-{side}.png").read_bytes() for side in ("base", "tuned")
    )
    assert base == tuned, "a LoRA at scale 0 must be the base, bit for bit"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command says that ends with exit code 2."""
    assert diffalign.cli.entry.run([str(each) for each in arguments]) == 2
    return capsys.readouterr().err


def test_results_are_not_written_over_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, "doctor", "--report", tmp_path)
    assert "--report" in said and "is a folder; name a file" in said
    said = refusal(capsys, "data", "inspect", tmp_path, "--picture", tmp_path)
    assert "--picture" in said and "is a folder; name a file" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "dpo", "--model", "shapes"], "did you mean 'diffusion_dpo'?"),
        (["--method", "sft", "--dry-run"], "--dry-run: unknown option (did you mean --dry_run?)"),
        (
            ["--method", "sft", "--model", "shapes", "--ref_model", "nowhere"],
            "ref_model: there is no folder 'nowhere'",
        ),
        (
            ["--method", "sft", "--model", "shapes", "--hub.push_to_hub", "true"],
            "hub.push_to_hub: HF_HUB_OFFLINE is set",
        ),
    ],
)
def test_mistakes_of_a_training_command_are_answered(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert words in refusal(capsys, "train", *arguments)


def test_sample_replaces_no_other_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sample(prompt: str) -> int:
        options = ["--num_images", "1", "--num_inference_steps", "2", "--model", "shapes"]
        return diffalign.cli.entry.run(
            ["sample", *options, "--prompt", prompt, "--output_dir", str(tmp_path / "s")]
        )

    assert sample("a small red circle") == 0
    before = (tmp_path / "s/000-seed0-base.png").read_bytes()
    assert sample("a small red circle") == 0
    assert sample("a large blue star") == 2
    assert "holds a run with other prompt" in capsys.readouterr().err
    assert (tmp_path / "s/000-seed0-base.png").read_bytes() == before


def test_the_next_command_can_be_pasted(tmp_path: Path) -> None:
    import shlex

    from diffalign.cli.train import _next_command
    from diffalign.recipe import load_run

    folder = tmp_path / "my run #1"
    folder.mkdir()
    (folder / "pytorch_lora_weights.safetensors").touch()
    run = load_run(None, ["--method", "sft", "--model", "shapes"])
    words = shlex.split(_next_command(run, folder) or "", comments=True)
    assert words[-4:] == ["--tuned", str(folder), "--output_dir", f"{folder}-compared"]


def test_sample_without_a_folder_takes_a_free_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--num_images", "1", "--num_inference_steps", "2", "--model", "shapes"]
    for prompt in ("a small red circle", "a large blue star", "a small red circle"):
        assert diffalign.cli.entry.run(["sample", *options, "--prompt", prompt]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "diffalign-samples",
        "diffalign-samples-2",
    ]
