"""The installed command as a user runs it, and the documents' small quickstart."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A free port each: tests run beside each other.
TORCHRUN = [
    "-m",
    "torch.distributed.run",
    "--nproc_per_node",
    "2",
    "--rdzv_endpoint",
    "localhost:0",
    "--rdzv_backend",
    "c10d",
]
SMALL = [
    "--num_prompts",
    "16",
    "--images_per_prompt",
    "3",
    "--max_steps",
    "6",
    "--batch_size",
    "4",
    "--eval_prompts",
    "8",
    "--eval_images",
    "1",
]


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    return subprocess.run(
        [str(a) for a in arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def torchrun(script: Path, *arguments: object, timeout: int) -> subprocess.CompletedProcess[str]:
    """A script by two processes on the CPU."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    launch = [sys.executable, *TORCHRUN, str(script), *map(str, arguments)]
    return subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=timeout)


def small_quickstart(folder: Path) -> Path:
    """A working folder in which a small quickstart ran; the recipes and scripts of the
    repository are beside it."""
    for name in ("configs", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    done = run(sys.executable, "-m", "diffalign", "quickstart", *SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "win-rate of tuned over base" in done.stdout and "next: diffalign sample" in done.stdout
    return folder
