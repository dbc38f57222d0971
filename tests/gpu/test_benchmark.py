"""`benchmarks/gpu.py` is ready for a GPU: all of it but the kernels, on the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.nightly
@pytest.mark.skipif(torch.cuda.is_available(), reason="the benchmark itself runs here")
def test_small_networks_go_all_the_way(tmp_path: Path) -> None:
    parts = ["sd15", "sdxl", "flux", "sampling", "peer sd15"]
    command = [sys.executable, str(SCRIPT), "--tiny", "--parts", *parts]
    command += ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "gpu.md")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / "gpu.md").read_text()
    assert "failed" not in text and "no time was left" not in text
    for row in ("| sd15 | cached, precomputed |", "| sdxl | plain |", "| flux | cached |"):
        assert row in text
    assert "| D3PO rollout |" in text and "peer sd15: not run, no script was given" in text


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("--tiny tries the benchmark itself on the CPU")
