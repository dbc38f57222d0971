"""Every block of the README and the pages runs; links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import ROOT, run
from tiers import by_default

import diffalign.cli.entry
from diffalign.methods import METHODS
from diffalign.recipe import load_run
from diffalign.rewards import registry

DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
]
ELSEWHERE = (
    "pip install",
    "ruff ",
    "mypy",
    "pytest",
    "lint-imports",
    ".ci/run",
)  # .ci/run reads the README's and runs them


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.S | re.M)


def having(language: str) -> list[str]:
    return [document for document in DOCUMENTS if blocks(document, language)]


def test_only_languages_that_are_run() -> None:
    found = {
        language
        for document in DOCUMENTS
        for language in re.findall(r"^```(\w+)$", (ROOT / document).read_text(), re.M)
    }
    assert found <= {"bash", "python", "yaml", "text"}


def command_lines(document: str) -> list[str]:
    lines = [line for block in blocks(document, "bash") for line in block.strip().splitlines()]
    return [line for line in lines if not line.startswith(ELSEWHERE)]


# What makes a documented command quick. At night all runs as it is written.
QUICK = {
    "train": {"--train.max_steps": 1, "--train.per_device_train_batch_size": 4},
    "sample": {"--num_inference_steps": 2},
    "compare": {"--max_prompts": 4, "--num_inference_steps": 2},
    "steer": {"--max_prompts": 2, "--num_inference_steps": 4},
    "data build": {"--max_prompts": 4, "--num_inference_steps": 4},
}


def quick(arguments: list[str]) -> list[str]:
    """The arguments of a command, and after them the smaller sizes, which win."""
    name = " ".join(arguments[: 2 if arguments[0] == "data" else 1])
    sizes = dict(QUICK.get(name, {}))
    if name == "train":
        recipe = yaml.safe_load(Path(arguments[arguments.index("--config") + 1]).read_text())
        if "validation" in recipe:
            sizes |= {
                "--validation.num_validation_images": 1,
                "--validation.num_inference_steps": 2,
            }
    return [*arguments, *(str(part) for size in sizes.items() for part in size)]


def run_quickly(document: str) -> None:
    """Run a document's commands in this process and folder."""
    for line in command_lines(document):
        program, *arguments = shlex.split(line)
        if program == "diffalign" and arguments != ["demo"]:
            assert diffalign.cli.entry.run(quick(arguments)) == 0, line


def program_text(document: str) -> str:
    """All Python of a document: a later block may use what an earlier one named."""
    return "\n".join(blocks(document, "python"))


def quick_text(document: str) -> str:
    """The same with fewer steps, like the commands."""
    text = re.sub(r"\bmax_steps=\d+", "max_steps=2", program_text(document))
    return re.sub(r"\bnum_inference_steps=\d+", "num_inference_steps=4", text)


# Tests of the rooms call by default what these pages call.
FOR_THE_NIGHT = ("building-data", "evaluation", "guidance", "online", "steering")


@by_default(lambda document: Path(document).stem not in FOR_THE_NIGHT)
@pytest.mark.parametrize("document", sorted({*having("bash"), *having("python")}))
def test_a_document_runs_in_one_process(
    home: Path, document: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    run_quickly(document)
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    module = types.ModuleType("document")
    monkeypatch.setitem(sys.modules, "document", module)
    exec(compile(quick_text(document), document, "exec", dont_inherit=True), vars(module))


# One small run of each command; at night in a process of its own, which imports in
# another order. By default other tests start `quickstart`, `demo`, `serve-scorer` and
# `scorers`, and run `train`, `env` and `steer`.
LORA = "diffalign-quickstart/lora"
DATASET = "diffalign-quickstart/dataset"
PROMPT = "a small red circle on the left of a gray background"
ALONE = {
    "sample": f"--lora {LORA} --num_inference_steps 2 --prompt '{PROMPT}'",
    "merge": f"--model shapes --inputs {LORA} {LORA} --weights 0.5 0.5",
    "compare": f"--tuned {LORA} --max_prompts 2 --num_images 1 --num_inference_steps 2",
    "score": f"--images {DATASET} --scorers shapes",
    "data build": "--prompts shapes --max_prompts 2 --scorers shapes --num_inference_steps 2",
    "data convert": f"{DATASET} --kind pair",
    "data recaption": f"{DATASET} --strategy h --captioner shapes --perturber shapes",
    "data inspect": DATASET,
    "scorers": "pickscore",
    "doctor": "--scorers shapes",
}


def alone(command: str, folder: Path) -> list[str]:
    """The arguments of such a run, which writes to the folder."""
    arguments = [*command.split(), *shlex.split(ALONE[command])]
    if command not in ("data inspect", "scorers", "doctor"):
        arguments += ["--output_dir", str(folder / "out")]
    return arguments


@pytest.mark.parametrize("command", ALONE)
def test_each_command_runs(
    home: Path, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    assert diffalign.cli.entry.run(alone(command, tmp_path)) == 0


@pytest.mark.nightly
@pytest.mark.parametrize("command", ALONE)
def test_each_command_runs_in_a_process_of_its_own(
    home: Path, command: str, tmp_path: Path
) -> None:
    done = run("diffalign", *alone(command, tmp_path), cwd=home)
    assert done.returncode == 0, done.stderr


@pytest.mark.nightly
@pytest.mark.parametrize("document", having("bash"))
def test_commands_run(home: Path, document: str) -> None:
    for line in command_lines(document):
        if line == "diffalign demo":
            serves(home)
            continue
        done = run("bash", "-euc", line, cwd=home)
        assert done.returncode == 0, (line, done.stderr)


def serves(folder: Path) -> None:
    """It would run for ever: it has said where, and ends on Ctrl-C."""
    demo = subprocess.Popen(
        ["diffalign", "demo", "--port", "0"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # What a shell starts in the background ignores Ctrl-C, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert demo.stdout is not None
        assert any("the demo runs at http" in line for line in demo.stdout)
    finally:
        demo.send_signal(signal.SIGINT)
        try:
            demo.wait(60)
        finally:
            demo.kill()


@pytest.mark.nightly
@pytest.mark.parametrize("document", having("python"))
def test_python_runs(home: Path, document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    run_quickly(document)  # the Python of docs/guidance.md reads what its commands wrote
    done = run(sys.executable, "-c", program_text(document), cwd=home)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("document", having("yaml"))
def test_yaml_is_part_of_a_run_file(document: str, tmp_path: Path) -> None:
    for block in blocks(document, "yaml"):
        given: dict[str, Any] = yaml.safe_load(block)
        if "combine" in given:  # a panel stands alone in a file of its own
            given = {"rewards": given}
        file = {
            "method": "d3po",
            "model": "shapes",
            "data": {"dataset_name": "x"},
            "train": {"output_dir": "x"},
            **given,
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(file))
        load_run(tmp_path / "run.yaml", [])


def test_the_figures_of_the_methods_are_those_of_the_leaderboards() -> None:
    pages = [ROOT / "benchmarks" / f"leaderboard{suffix}.md" for suffix in ("", "_flow")]
    measured = "".join(page.read_text() for page in pages)
    rate = r"\d+\.\d \(\d+\.\d-\d+\.\d\)"
    claimed = re.findall(rate, (ROOT / "docs" / "guides" / "which-method.md").read_text())
    assert len(claimed) > 10 and all(figure in measured for figure in claimed)


@pytest.mark.nightly
def test_the_notebook_runs(home: Path) -> None:
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 6
    done = run(sys.executable, "-c", "\n".join(code), cwd=home)
    assert done.returncode == 0, done.stderr
    assert "win-rate" in done.stdout


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http://", "https://")):
            assert ((ROOT / document).parent / target).exists(), target


def test_every_option_of_the_moving_guide_exists() -> None:
    from dataclasses import fields

    from diffalign.data.config import DataConfig
    from diffalign.methods import METHODS, config_class
    from diffalign.reward_training.config import RewardConfig
    from diffalign.training.sections import LoraSection, ValidationConfig

    classes: dict[str, list[Any]] = {
        "train": [RewardConfig, *(config_class(name) for name in METHODS)],
        "data": [DataConfig],
        "lora": [LoraSection],
        "validation": [ValidationConfig],
    }
    known = {f"{name}.{f.name}" for name, many in classes.items() for c in many for f in fields(c)}
    rows = re.findall(r"^\|.*\|$", (ROOT / "docs" / "guides" / "moving.md").read_text(), re.M)
    ours = [cell for row in rows for cell in row.strip("|").split(" | ")[1:]]
    named = {
        name
        for cell in ours
        for name in re.findall(r"`((?:train|data|lora|validation)\.[a-z_0-9]+)", cell)
    }
    assert len(named) > 50 and named <= known, named - known
    scorers = set(registry.list_scorers())
    loaded = re.findall(r'load_scorer\("([^"]+)"\)', "".join(ours))
    assert loaded and set(loaded) <= scorers
    for path in re.findall(r"`?(configs/\S+\.yaml)", (ROOT / "docs/guides/moving.md").read_text()):
        assert (ROOT / path).is_file()


def test_every_method_has_a_column_in_the_table_of_models():
    from tools.compatibility import METHODS as columns

    assert set(columns) == set(METHODS)
    table = (ROOT / "docs" / "models.md").read_text().split("<!-- compatibility: begin -->\n")[1]
    headings = [cell.strip() for cell in table.splitlines()[0].split("|")[2:-1]]
    assert headings == list(columns.values())
