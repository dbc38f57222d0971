"""No network, one thread unless OMP_NUM_THREADS says otherwise (equal calls repeat bit for bit), and `from tiny import ...` from every folder of tests."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # processes that are compared must at least have equal thread counts
sys.path.insert(0, str(Path(__file__).parents[1]))  # `tools`
sys.path.insert(0, str(Path(__file__).parent))  # `tiny`

import pytest


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small quickstart."""
    from commands import small_quickstart

    return small_quickstart(tmp_path_factory.mktemp("home"))
