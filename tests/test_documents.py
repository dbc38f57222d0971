"""Every block of the README and of the pages runs: commands, Python, YAML, the notebook; links lead somewhere."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import ROOT, run

from diffalign.recipe import load_run

DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
ELSEWHERE = ("pip install", "ruff ", "mypy")  # .ci/run reads the README's and runs them


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


@pytest.mark.parametrize("document", having("bash"))
def test_commands_run(home: Path, document: str) -> None:
    for block in blocks(document, "bash"):
        for line in block.strip().splitlines():
            if line.startswith(ELSEWHERE):
                continue
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
        # A shell lets what it starts in the background ignore Ctrl-C, and so these tests and all that they start.
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


@pytest.mark.parametrize("document", having("python"))
def test_python_runs(home: Path, document: str) -> None:
    # One after the other, as a reader would paste them: what an earlier block named is there in a later one.
    done = run(sys.executable, "-c", "\n".join(blocks(document, "python")), cwd=home)
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
