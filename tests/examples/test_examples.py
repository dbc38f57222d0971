"""The examples run as they stand, after a quickstart."""

from __future__ import annotations

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
