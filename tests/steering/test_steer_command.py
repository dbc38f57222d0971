"""`diffalign steer`: what it writes, going on where it stopped, and mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from diffalign import cli
from diffalign.cli import steer as steer_command

PROMPTS = [
    "a small red circle on the left of a gray background",
    "a large blue star in the center of a white background",
    "a small green cross on the right of a black background",
]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([*PROMPTS, "", PROMPTS[0]]) + "\n")
    return file


def steer(output: Path, *arguments: object) -> int:
    given = [
        "steer",
        "--scorer",
        "shapes-clip",
        "--lmbda",
        "5",
        "--num_inference_steps",
        "6",
        "--output_dir",
        output,
        *arguments,
    ]
    return cli.run([str(each) for each in given])


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for kind in ("images", "lineage")
        for p in sorted((folder / kind).iterdir())
    }


def numbers(folder: Path) -> list:
    results = json.loads((folder / "results.json").read_text())
    return results["populations"]


def test_files_and_table(tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert (
        steer(out, "--prompts", prompts, "--compare", "--judges", "shapes", "--num_seeds", 2) == 0
    )
    said = capsys.readouterr().out
    assert (
        "1 repeated prompts taken once" in said
        and "| reward, best particle |" in said
        and "| shapes, mean of 4 |" in said
    )
    assert len(list((out / "images").glob("*-particle?.png"))) == 3 * 2 * 4
    assert (
        len(list((out / "images").glob("*-best_of_n.png"))) == 6
        and len(list((out / "lineage").iterdir())) == 6
    )
    results = json.loads((out / "results.json").read_text())
    assert results["kernel"] == "ddim"  # the embedded scheduler is deterministic as it is called
    assert results["settings"]["prompts"] == PROMPTS and "torch" in results["versions"]
    first = results["populations"][0]
    assert (
        first["text"] == PROMPTS[0]
        and len(first["steering"]["rewards"]) == 4
        and len(first["steering"]["ess"]) == len(first["steering"]["scored_steps"]) + 1
    )
    assert (
        results["totals"]["best_of_n"]["model_rows"]
        == results["totals"]["steering"]["model_rows"]
        == 3 * 2 * 4 * 2 * 6
    )
    assert Image.open(out / "grid.png").width > 300 and (out / "table.md").read_text().startswith(
        "| | best of 4 | steering |"
    )
    assert (
        steer(out, "--prompts", prompts, "--compare", "--judges", "shapes", "--num_seeds", 2) == 0
    )
    assert "nothing was run again" in capsys.readouterr().out


def test_without_comparison_particles_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert (
        steer(
            out,
            "--prompt",
            PROMPTS[0],
            "--kernel",
            "scheduler",
            "--eta",
            1.0,
            "--resample_steps",
            "0.2,3",
            "--num_particles",
            2,
        )
        == 0
    )
    results = json.loads((out / "results.json").read_text())
    assert results["kernel"] == "scheduler" and results["populations"][0]["steering"][
        "scored_steps"
    ] == [1, 3]
    assert "| prompt | best reward |" in capsys.readouterr().out
    assert "best_of_n" not in results["populations"][0]


@pytest.mark.nightly
def test_a_killed_run_goes_on_with_the_same_bytes(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--prompts", prompts, "--prompts_per_call", 2, "--num_seeds", 2)
    arguments += ("--num_inference_steps", 3, "--num_particles", 2)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert steer(straight, *arguments) == 0
    original, calls = steer_command._Work.do, []

    def dying(self, *given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(self, *given)

    monkeypatch.setattr(steer_command._Work, "do", dying)
    assert steer(broken, *arguments) == 130
    assert not (broken / "results.json").exists() and len(list((broken / "records").iterdir())) == 1
    assert steer(broken, *arguments) == 0
    assert len(calls) == 4  # three calls in all: one before, one that died, two after
    assert files(straight) == files(broken) and numbers(straight) == numbers(broken)


@pytest.mark.nightly
def test_a_real_process(tmp_path: Path, prompts: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "diffalign",
        "steer",
        "--scorer",
        "shapes",
        "--ess_target",
        "0.5",
        "--prompts",
        str(prompts),
    ]
    done = subprocess.run(
        [*command, "--num_inference_steps", "4", "--num_particles", "3", "--output_dir", "out"],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "steering: 3/3 prompts" in done.stderr and (tmp_path / "out" / "grid.png").is_file()
    wrong = subprocess.run(
        [*command, "--lmbda", "2", "--output_dir", "other"], cwd=tmp_path, capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr and "not both" in wrong.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lmbda", "-1"], "--lmbda: expected float >= 0"),
        (["--lmbda", "nan"], "--lmbda: expected float >= 0"),
        (["--ess_target", "0.5"], "--lmbda: give lmbda or ess_target, not both"),
        (["--num_particles", "0"], "--num_particles: expected int >= 1, got 0"),
        (["--num_particles", "1", "--resample_steps", "2"],
         "--num_particles: 1 particle cannot be resampled"),
        (["--num_particles", "1", "--compare"],
         "--num_particles: a comparison with best-of-n needs at least 2"),
        (["--resample_steps", "0.2,x"], "--resample_steps: expected comma-separated numbers"),
        (["--resample_steps", "6"], "--resample_steps: 6 lies outside the run of 6 steps"),
        (["--resample_steps", "1.5"], "--resample_steps: a fraction of the run lies in"),
        (["--potential", "best"], "--potential: expected one of diff"),
        (["--kernel", "ode"], "--kernel: expected one of ddim"),
        (["--kernel", "ddim", "--eta", "2"], "--eta: expected a number in"),
        (["--scorer", "no-such"], "no-such"),
        (["--scorer", "geneval"], "geneval needs metadata"),
        (["--judges", "reward"], "--judges: expected different names"),
        (["--scorer_args", "{mps: {}}"], "--scorer_args.mps: no such scorer here"),
        (["--scorer_args", "5"], "--scorer_args: expected a mapping"),
        (["--prompts", "missing.txt"], "--prompts: there is no file 'missing.txt'"),
        (["--model", "missing-folder/model"], "missing-folder/model"),
        (["--max_prompts", "0"], "--max_prompts: expected int >= 1"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = arguments if "--prompts" in arguments else [*arguments, "--prompt", PROMPTS[0]]
    assert steer(tmp_path / "out", *given) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said and said.strip().count("\n") == 0


def test_prompts_are_needed_once(
    tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture
) -> None:
    assert steer(tmp_path / "out") == 2 and "give one of them" in capsys.readouterr().err
    assert (
        steer(tmp_path / "out", "--prompt", "x", "--prompts", prompts) == 2
        and "give one of them" in capsys.readouterr().err
    )
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    assert (
        steer(tmp_path / "out", "--prompts", empty) == 2
        and "holds no prompt" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_folders_of_others_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("words")
    assert (
        steer(taken, "--prompt", PROMPTS[0]) == 2
        and "holds something else" in capsys.readouterr().err
    )
    out = tmp_path / "out"
    assert steer(out, "--prompt", PROMPTS[0]) == 0
    assert (
        steer(out, "--prompt", PROMPTS[0], "--seed", 1) == 2
        and "holds a run with --seed 0, not 1" in capsys.readouterr().err
    )
    assert steer(out, "--prompt", PROMPTS[1]) == 2 and "other prompts" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["model", "scorer"])
def test_a_model_or_scorer_changed_in_its_place_is_another_run(
    part: str, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture
) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    from diffalign.shapes.models import weights_dir

    model, scorer = tmp_path / "model", tmp_path / "scorer.py"
    shutil.copytree(weights_dir("shapes"), model)
    code = (
        "class Size:\n"
        "    def __call__(self, images):\n"
        "        return [float(image.width) for image in images]\n"
    )
    scorer.write_text(code)
    options = ["--prompts", prompts, "--max_prompts", 1, "--num_particles", 2, "--model", model]
    options += ["--num_inference_steps", 4]
    options += ["--scorer", "shapes-clip" if part == "model" else f"{scorer}:Size"]
    options += [] if part == "model" else ["--trust_remote_code"]
    out = tmp_path / "out"
    assert steer(out, *options) == 0, capsys.readouterr()
    assert steer(out, *options) == 0
    assert "nothing was run again" in capsys.readouterr().out
    if part == "model":
        file = next((model / "unet").glob("*.safetensors"))
        weights = {name: tensor * 1.01 for name, tensor in load_file(file).items()}
        assert all(torch.isfinite(tensor).all() for tensor in weights.values())
        save_file(weights, file)
    else:
        scorer.write_text(code.replace("width", "height"))
    assert steer(out, *options) == 2
    assert "holds a run with other files of the model or the scorers" in capsys.readouterr().err


def test_options_that_draw_nothing_leave_the_folder_free(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    common = ["--prompt", PROMPTS[0], "--num_particles", 2]
    for options, words in (
        (["--kernel", "scheduler"], "use --kernel ddim"),
        (["--scorer_args", "{shapes-clip: {foo: 1}}"], "foo"),
        (["--tiny_decoder", tmp_path / "nowhere"], "--tiny_decoder"),
        (["--height", 100], "--height: 100 is not divisible by 8"),
        (["--kernel", "scheduler", "--eta", 5], "--eta: expected a number from 0 to 1, got 5"),
    ):
        assert steer(out, *common, *options) == 2
        assert words in capsys.readouterr().err
    assert steer(out, *common) == 0, capsys.readouterr()


def test_one_side_leaves_the_other_at_the_models(tmp_path: Path) -> None:
    common = ["--prompt", PROMPTS[0], "--num_particles", 2, "--height", 128]
    assert steer(tmp_path / "out", *common) == 0
    with Image.open(tmp_path / "out/images/0000-seed0-particle0.png") as image:
        assert image.size == (64, 128)


def test_a_flow_scheduler_takes_no_eta(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--prompt", PROMPTS[0], "--model", "shapes-flow", "--kernel", "scheduler"]
    assert steer(tmp_path / "out", *options, "--eta", 0.5) == 2
    assert "--eta: FlowMatchEulerDiscreteScheduler of " in capsys.readouterr().err


@pytest.mark.parametrize("compare", [False, True])
def test_a_particle_without_an_image_is_left_out(
    compare: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoencoderKL

    decode = AutoencoderKL.decode

    def broken(self: object, latents: object, *args: object, **kwargs: object) -> tuple:
        pixels = decode(self, latents, *args, **kwargs)[0].clone()  # type: ignore[arg-type]
        pixels[1:2, :, 3:, 3:] = float("nan")
        return (pixels,)

    monkeypatch.setattr(AutoencoderKL, "decode", broken)
    out = tmp_path / "out"
    options = ["--prompt", PROMPTS[0], *(["--compare"] if compare else [])]
    assert steer(out, *options) == 0
    assert not (out / "images/0000-seed0-particle1.png").exists()
    text = (out / "results.json").read_text()
    results = json.loads(text, parse_constant=pytest.fail)  # no NaN, no Infinity
    assert results["populations"][0]["steering"]["rewards"][1] is None


def test_a_prompt_that_the_scorer_does_not_know_stops_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ["--scorer", "shapes", "--num_particles", 2, "--prompts_per_call", 1]
    options += ["--prompt", "a cat on a mat", "--prompt", PROMPTS[0]]
    assert steer(tmp_path / "out", *options) == 0
    said = capsys.readouterr().out
    assert "1 of 2 prompts have no score" in said and "'a cat on a mat'" in said
    assert steer(tmp_path / "none", *options[:6], "--prompt", "a cat") == 2
    assert "--scorer: shapes gave no score to any image" in capsys.readouterr().err


def test_pictures_need_few_open_files(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 64
    out = tmp_path / "out"
    options = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--num_particles", 48]
    assert steer(out, *options) == 0
    (out / "results.json").unlink()  # the pictures are made again
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, limit[1]))
    try:
        assert steer(out, *options) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
