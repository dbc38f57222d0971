"""`compare` and its command: pairing, resuming, processes, files, mistakes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from commands import TORCHRUN
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from PIL import Image
from tiny import build_pipeline

from diffalign import FKSteering, compare, load_scorer
from diffalign.cli.entry import run
from diffalign.errors import UserError
from diffalign.evaluation.comparison import image_name
from diffalign.evaluation.models import ModelSpec, parse_model
from diffalign.generation.pipelines import base_pipeline
from diffalign.rewards.registry import register_scorer

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare.py"
SMALL: dict[str, Any] = {"max_prompts": 3, "num_images": 2, "num_inference_steps": 3}
TINY: dict[str, Any] = {"num_images": 2, "num_inference_steps": 2, "height": 32, "width": 32}
ARGUMENTS = [
    "--max_prompts",
    "3",
    "--num_images",
    "2",
    "--num_inference_steps",
    "3",
    "--batch_size",
    "4",
]


@register_scorer("compare-dark", requires=("image",), higher_is_better=False)
def dark(images: list[Any]) -> list[float]:
    """Mean of the pixels, lower is better."""
    return [float(np.asarray(image).mean()) for image in images]


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the embedded pipeline, with random weights that change images."""
    folder = tmp_path_factory.mktemp("lora")
    pipe = base_pipeline()
    torch.manual_seed(0)
    pipe.unet.add_adapter(
        LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_v"])
    )
    from peft import get_peft_model_state_dict

    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=get_peft_model_state_dict(pipe.unet)
    )
    return folder


@pytest.fixture(scope="module")
def done(lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Base against a LoRA at three scales and against itself."""
    folder = tmp_path_factory.mktemp("done") / "out"
    tuned = ["again=shapes", f"off={lora}@0", f"half={lora}@0.5", str(lora)]
    return compare("shapes", tuned, scorers=["shapes", "shapes-clip"], output_dir=folder, **SMALL)


def test_the_same_model_on_both_sides_is_exactly_one_half(done: Any) -> None:
    for model in ("again", "off"):
        for scorer in done.scorers:
            won = done.win_rate(model, scorer)
            assert (won.rate, won.ties) == (0.5, 1.0)
        for p in range(3):
            for n in range(2):
                assert done.file(model, p, n).read_bytes() == done.file("base", p, n).read_bytes()


def test_a_lora_changes_images_and_nothing_else(done: Any, lora: Path) -> None:
    assert done.tuned == ["again", "off", "half", lora.name]
    assert not np.array_equal(
        np.asarray(done.images(lora.name, 0)[0]), np.asarray(done.images("base", 0)[0])
    )
    assert not np.array_equal(
        np.asarray(done.images(lora.name, 0)[0]), np.asarray(done.images("half", 0)[0])
    )


def test_images_are_those_of_the_plain_pipeline(done: Any) -> None:
    rows = pq.read_table(done.folder / "scores.parquet").to_pylist()
    row = next(r for r in rows if r["model"] == "base" and r["number"] == 1)
    pipe = base_pipeline()
    pipe.set_progress_bar_config(disable=True)
    seeds = [r["seed"] for r in rows if r["model"] == "base"]
    prompts = [r["prompt"] for r in rows if r["model"] == "base"]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    plain = pipe(prompts, generator=generators, num_inference_steps=3, guidance_scale=2.0).images[1]
    assert np.array_equal(np.asarray(Image.open(done.folder / row["image"])), np.asarray(plain))


def test_scores_are_the_scorers(done: Any) -> None:
    scorer = load_scorer("shapes-clip")
    for p, prompt in enumerate(done.prompts.prompts):
        expected = scorer(done.images("half", p), [prompt] * 2)
        assert np.allclose(done.scores["half"]["shapes-clip"][p], expected.numpy(), atol=1e-5)


def test_swapping_the_sides_mirrors_everything(done: Any, lora: Path, tmp_path: Path) -> None:
    swapped = compare(
        {"lora": str(lora), "model": "shapes", "name": "lora"},
        "plain=shapes",
        output_dir=tmp_path / "b",
        **SMALL,
    )
    forward, backward = done.win_rate(lora.name), swapped.win_rate("plain")
    assert forward.rate == 1 - backward.rate
    assert forward.low == pytest.approx(1 - backward.high, abs=1e-12)
    assert done.sign_test(lora.name) == swapped.sign_test("plain")


def test_what_is_written(done: Any) -> None:
    results = json.loads((done.folder / "results.json").read_text())
    assert results["prompts"]["name"] == "shapes" and results["prompts"]["notes"] == [
        "3 of 120 prompts, evenly spaced"
    ]
    assert results["comparisons"]["again"]["shapes"]["rate"] == 0.5
    assert results["models"]["base"]["diversity"]["mean"] == pytest.approx(
        done.mean_diversity("base")[0]
    )
    assert {"torch", "diffusers"} <= set(results["versions"])
    rows = pq.read_table(done.folder / "scores.parquet").to_pylist()
    assert len(rows) == 5 * 3 * 2 and all((done.folder / row["image"]).is_file() for row in rows)
    assert Image.open(done.folder / "grid.png").width > 500
    table = (done.folder / "table.md").read_text()
    assert (
        "| again | shapes | 50.0 (50.0 to 50.0) |" in table
        and "Only 3 prompts: with fewer than 8" in table
    )


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        self.images += [value or "" for name, value in attrs if tag == "img" and name == "src"]


def test_the_page_opens_from_disk(done: Any) -> None:
    links = _Links()
    links.feed((done.folder / "report.html").read_text())
    assert "grid.png" in links.images and len(links.images) > 2
    assert all((done.folder / link).is_file() for link in links.images)


def test_diversity_is_what_it_says(done: Any) -> None:
    first, second = (np.asarray(image, dtype=float) / 255 for image in done.images("base", 1))
    assert done.diversity["base"][1] == pytest.approx(np.sqrt(((first - second) ** 2).mean()))


def test_html_in_a_prompt_is_text(tmp_path: Path) -> None:
    pipe = build_pipeline("sd")
    prompts = ["<script>alert(1)</script> & <img src=x onerror=alert(1)>", "a cat"]
    other = build_pipeline("sd", seed=1)
    compare(pipe, other, prompts, ["compare-dark"], output_dir=tmp_path / "o", **TINY)
    page = (tmp_path / "o" / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "onerror=alert(1)&gt;" in page


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_other_families_and_steering(family: str, tmp_path: Path) -> None:
    pipe = build_pipeline(family)
    steering = FKSteering(
        pipe,
        lambda images, prompts: [float(np.asarray(i).mean()) for i in images],
        num_particles=2,
        lmbda=1.0,
        kernel="auto",
    )
    comparison = compare(
        pipe,
        [steering, {"model": pipe, "name": "same"}],
        ["a cat", "a dog"],
        ["compare-dark"],
        output_dir=tmp_path / "o",
        **TINY,
    )
    assert comparison.tuned == ["tuned", "same"] or comparison.tuned == ["steered", "same"]
    assert comparison.win_rate("same").rate == 0.5
    # Lower is better here, so the brighter steered images lose.
    assert (
        comparison.mean(comparison.tuned[0])[0] >= comparison.mean("base")[0]
        and comparison.win_rate(comparison.tuned[0]).rate <= 0.5
    )


def test_a_pipeline_is_left_as_it_was(lora: Path, tmp_path: Path) -> None:
    pipe = base_pipeline()
    pipe.load_lora_weights(str(lora), adapter_name="mine")
    pipe.set_adapters("mine", 0.25)
    compare(
        pipe,
        {"model": pipe, "lora": str(lora), "name": "more"},
        ["a small red circle on the left of a gray background"],
        output_dir=tmp_path / "o",
        scorers=["shapes"],
        num_images=1,
        num_inference_steps=1,
    )
    assert pipe.get_active_adapters() == ["mine"] and list(pipe.unet.peft_config) == ["mine"]
    from diffalign.backbones.lora import active_adapters

    assert active_adapters(pipe.unet) == {"mine": 0.25}


def test_images_without_a_score_are_left_out_and_counted(tmp_path: Path) -> None:
    prompts = [
        "a small red circle on the left of a gray background",
        "a cat",
        "a large blue star in the center of a white background",
    ]
    comparison = compare(
        "shapes",
        "again=shapes",
        prompts,
        ["shapes"],
        output_dir=tmp_path / "o",
        num_images=1,
        num_inference_steps=1,
    )
    assert (
        np.isnan(comparison.scores["base"]["shapes"][1, 0])
        and comparison.win_rate("again").rate == 0.5
    )
    assert "shapes has no score for 1 images of base" in comparison.table()
    with pytest.raises(
        UserError, match="shapes has no score for any image of base .*not of the shapes world"
    ):
        compare(
            "shapes",
            "again=shapes",
            ["a cat"],
            ["shapes"],
            output_dir=tmp_path / "p",
            num_images=1,
            num_inference_steps=1,
        )


# Resuming and processes


def results(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "results.json").read_text())
    content.pop("seconds")
    return content


def assert_close_comparisons(one: Path, two: Path) -> None:
    """Check that files, settings and counts are equal.

    Pixels may differ by one level and scores a little, because other processes may
    round otherwise.
    """
    files = [
        sorted(p.relative_to(folder) for p in (folder / "images").rglob("*.png"))
        for folder in (one, two)
    ]
    assert files[0] == files[1]
    for file in files[0]:
        pixels = [np.asarray(Image.open(folder / file)).astype(int) for folder in (one, two)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1
    assert_close_values(results(one), results(two))


def assert_close_values(one: Any, two: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_close_values(one[key], two[key])
    elif isinstance(one, list):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_close_values(a, b)
    elif isinstance(one, float):
        assert two == pytest.approx(one, abs=0.1, nan_ok=True)
    else:
        assert one == two


KILLED = """
import os, signal, sys
from diffalign.cli.entry import main

replace = os.replace

def deadly(source, target):
    if str(target).endswith(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = deadly
main(["compare", *sys.argv[2:]])
"""


@pytest.mark.nightly
def test_killed_and_run_again_equals_uninterrupted(lora: Path, tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    arguments = ["--tuned", f"tuned={lora}", *ARGUMENTS]
    assert run(["compare", *arguments, "--output_dir", str(straight)]) == 0
    # Killed in the middle of the second batch of the base, with an image that has been
    # written and has no name yet.
    cut = image_name("base", 2, 1)
    command = [sys.executable, "-c", KILLED, cut, *arguments, "--output_dir", str(broken)]
    assert subprocess.run(command, capture_output=True, timeout=600).returncode == -9
    assert (broken / image_name("base", 2, 0)).is_file() and not (broken / cut).exists()
    assert len(list(broken.rglob("*.tmp"))) == 1 and not (broken / "results.json").exists()
    assert run(["compare", *arguments, "--output_dir", str(broken)]) == 0
    assert_close_comparisons(straight, broken)
    assert not list(broken.rglob("*.tmp"))


@pytest.mark.nightly
def test_two_processes_equal_one(lora: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ["--tuned", f"tuned={lora}", *ARGUMENTS]
    assert run(["compare", *arguments, "--output_dir", str(one)]) == 0
    launch = [sys.executable, *TORCHRUN, str(SCRIPT)]
    done = subprocess.run(
        [*launch, *arguments, "--output_dir", str(two)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert_close_comparisons(one, two)
    assert done.stdout.count("report.html") == 1


RACE = """
import os, sys, time
from pathlib import Path
import diffalign.evaluation.compare as compare
from diffalign.cli.entry import main

late, folder, rank = sys.argv.pop(1), Path(sys.argv[-1]), os.environ["RANK"]
looked = folder.with_name("looked")  # the other process has been at the folder
claim, draw, replace = compare.claim_output_dir, compare._draw, os.replace

def wait(path, seconds):
    end = time.time() + seconds
    while not path.exists() and time.time() < end:
        time.sleep(0.01)
    return path.exists()

def claiming(*arguments, **options):
    if rank == late == "1":
        assert wait(folder / ".compare.json.tmp", 120)
    if rank == late == "0":
        assert wait(looked, 120)
        wait(folder / "images", 3)  # nobody may draw now
    try:
        claim(*arguments, **options)
    finally:
        if rank == "1":
            looked.touch()

def drawing(*arguments):  # loading the model takes longer than some machines are late
    if rank == "1":
        (folder / "images").mkdir(parents=True, exist_ok=True)
    draw(*arguments)

def replacing(source, target):
    if rank == "0" and late == "1" and Path(target).name == "compare.json":
        assert wait(looked, 120)
    replace(source, target)

compare.claim_output_dir, compare._draw, os.replace = claiming, drawing, replacing
main(["compare", *sys.argv[1:]])
"""


@pytest.mark.nightly
@pytest.mark.parametrize("late", ["0", "1"])
def test_processes_may_come_to_the_folder_in_any_order(
    lora: Path, tmp_path: Path, late: str
) -> None:
    """If the first one is late, the other must not draw before the folder is claimed.

    If the other one is late, it finds a half-written claim.
    """
    script = tmp_path / "race.py"
    script.write_text(RACE)
    more = ["--tuned", f"tuned={lora}", *ARGUMENTS, "--output_dir", str(tmp_path / "o")]
    done = subprocess.run(
        [sys.executable, *TORCHRUN, str(script), late, *more],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr


def test_a_folder_with_nothing_but_a_half_written_claim_is_taken(
    lora: Path, tmp_path: Path
) -> None:
    (tmp_path / ".compare.json.tmp").write_text('{"models"')
    assert run(["compare", "--tuned", str(lora), *ARGUMENTS, "--output_dir", str(tmp_path)]) == 0
    assert not list(tmp_path.rglob("*.tmp"))


# The command


def test_the_command_with_scales_and_steering(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [
        "--lora_scales",
        "0,1",
        "--steer",
        "shapes-clip",
        "--num_particles",
        "2",
        "--lmbda",
        "5",
        "--scorers",
        "shapes-clip",
    ]
    few = [*ARGUMENTS, "--max_prompts", "2", "--num_images", "1"]
    arguments = ["compare", "--tuned", str(lora), *more, *few, "--output_dir", str(tmp_path / "o")]
    code = run(arguments)
    output = capsys.readouterr().out
    assert (
        code == 0
        and f"| {lora.name}@0 | shapes-clip | 50.0 (50.0 to 50.0) |" in output
        and "| steered |" in output
    )
    # A second run has nothing to draw, and says the same.
    shutil.rmtree(tmp_path / "o" / "parts")
    assert run(arguments) == 0
    assert capsys.readouterr().out == output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--tuned: name at least one model"),
        (["--tuned", "nowhere/at/all"], "there is no"),
        (["--tuned", "shapes", "--num_images", "0"], "num_images: expected int >= 1, got 0"),
        (["--tuned", "shapes", "--max_prompts", "0"], "--max_prompts: expected int >= 1, got 0"),
        (["--tuned", "shapes", "--prompts", "shape"], "neither a file.*did you mean.*shapes"),
        (["--tuned", "shapes", "--scorers", "pickscor"], "pickscore"),
        (["--tuned", "shapes", "--lora_scales", "0,1"], "no LoRA among --tuned"),
        (
            ["--tuned", "shapes", "--lora_scales", "a"],
            "--lora_scales: expected comma-separated numbers",
        ),
        (["--steer", "shapes-clip"], "--lmbda: --steer needs one"),
        (
            ["--tuned", "{lora: x.safetensors}"],
            "no file or folder with safetensors 'x.safetensors'",
        ),
        (["--tuned", "{modle: shapes}"], "unknown key.*did you mean.*model"),
        (["--tuned", "{steer: {lmbda: 1}}"], "names no scorer"),
        (["--tuned", "a=shapes", "--tuned", "a=shapes"], "two models called 'a'"),
        (["--tuned", "shapes", "--diversity", "shapes"], "no image embedding"),
        (["--tuned", "shapes", "--prompts", "OTHER.txt"], "name at least one, e.g. pickscore"),
        (["--tuned", "shapes", "--output_dir", "OTHER.txt"], "is a file"),
    ],
)
def test_mistakes(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "OTHER.txt").write_text("a cat\n")
    small = [
        a
        for pair in zip(ARGUMENTS[::2], ARGUMENTS[1::2], strict=True)
        if pair[0] not in arguments
        for a in pair
    ]
    assert run(["compare", *arguments, *small]) == 2
    output = capsys.readouterr().err
    assert output.count("\n") == 1 and "Traceback" not in output
    assert re.search(says, output), output
    assert not list(tmp_path.rglob("*.png"))


def test_a_folder_of_another_comparison_is_refused(done: Any) -> None:
    with pytest.raises(UserError, match="holds a run with --seed 0, not 1"):
        compare(
            done.models[0],
            done.models[1:],
            output_dir=done.folder,
            seed=1,
            scorers=["shapes"],
            **SMALL,
        )
    with pytest.raises(UserError, match="other models"):
        compare("shapes", ["again=shapes"], output_dir=done.folder, scorers=["shapes"], **SMALL)


def test_names_of_models(lora: Path) -> None:
    base = parse_model("shapes", "base")
    assert base.name == "base"
    spec = parse_model(f"mine={lora}@0.5", "tuned", base=base)
    assert (spec.name, spec.lora, spec.lora_scale, spec.model) == (
        "mine",
        str(lora),
        0.5,
        "shapes",
    )
    assert parse_model(str(lora), "tuned", base=base, taken=[lora.name]).name == f"{lora.name}-2"
    assert parse_model(spec, "tuned", base=base) == spec
    assert isinstance(
        parse_model({"steer": {"scorer": "shapes", "lmbda": 1}}, "tuned", base=base), ModelSpec
    )
    assert (
        os.path.basename(parse_model({"negative": str(lora)}, "tuned", base=base).name) == lora.name
    )
