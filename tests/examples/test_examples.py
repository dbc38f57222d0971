"""The examples run as they stand, after a quickstart."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from commands import ROOT, run, small_quickstart

EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_quickstart(tmp_path_factory.mktemp("home"))


def test_there_are_some_and_each_says_how_it_is_run() -> None:
    assert len(EXAMPLES) >= 5
    for name in EXAMPLES:
        assert f"python examples/{name}.py" in (ROOT / "examples" / f"{name}.py").read_text()


@pytest.mark.nightly
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(home: Path, name: str) -> None:
    done = run(sys.executable, ROOT / "examples" / f"{name}.py", cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()


NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


@pytest.mark.nightly
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert code[0].startswith("%pip") and not any(cell.get("outputs") for cell in cells)
    done = run(sys.executable, "-c", "\n".join(code[1:]), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
