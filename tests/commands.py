"""The installed command as a user runs it, and the documents' small quickstart."""

from __future__ import annotations

import contextlib
import io
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
    "--choice_prompts",
    "3",
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


def torchrun(
    script: Path,
    *arguments: object,
    timeout: int,
    processes: int = 2,
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """A script by several processes on the CPU."""
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **(environment or {}),
    }
    launch = [sys.executable, *TORCHRUN, str(script), *map(str, arguments)]
    launch[launch.index("--nproc_per_node") + 1] = str(processes)
    return subprocess.run(launch, env=variables, capture_output=True, text=True, timeout=timeout)


def small_quickstart(folder: Path) -> Path:
    """A working folder in which a small quickstart ran; the recipes and scripts of the
    repository are beside it."""
    for name in ("configs", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    from diffalign import cli

    # In this process, which has imported everything already.
    before, printed = Path.cwd(), io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(printed):
            assert cli.run(["quickstart", *SMALL]) == 0
    finally:
        os.chdir(before)
    text = printed.getvalue()
    assert "tuned at its best guidance against base" in text and "next: diffalign sample" in text
    return folder
