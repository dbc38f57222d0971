"""No network, one thread unless OMP_NUM_THREADS says otherwise, and the tiers of tests.

Equal calls repeat bit for bit with one thread. Every folder of tests may
`from tiny import ...`.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # processes that are compared must at least have equal thread counts
sys.path.insert(0, str(Path(__file__).parents[1]))  # `tools`
sys.path.insert(0, str(Path(__file__).parent))  # `tiny`

import pytest
from tiers import holds_unit_tests, mark_tiers, split_off

gc.disable()  # until all files are imported; their modules are no garbage


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", metavar="K/N", help="run the K-th of N parts of the tests")


# Before pytest reads `-m`, which must find the marks.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_tiers(items)
    if config.option.part:
        kept, left = split_off(items, config.option.part)
        items[:] = kept
        config.hook.pytest_deselected(items=left)


def pytest_collection_finish() -> None:
    # A full collection would look at half a million objects of imported modules again
    # and again.
    gc.freeze()
    gc.set_threshold(5000, 10, 10)
    gc.enable()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # Importing every file takes longer than the unit tests do.
    if config.option.markexpr == "unit" and not holds_unit_tests(collection_path):
        return True
    return None


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small quickstart, made once for all workers. Read only."""
    from commands import small_quickstart
    from filelock import FileLock

    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # the workers have this folder in common
    folder, done = base / "quickstart", base / "quickstart.done"
    with FileLock(base / "quickstart.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            small_quickstart(folder)
            done.touch()
    return folder


@pytest.fixture
def home(quickstart: Path, tmp_path: Path) -> Path:
    """A folder that looks as after a small quickstart, and belongs to this test."""
    return Path(shutil.copytree(quickstart, tmp_path / "home", symlinks=True))
