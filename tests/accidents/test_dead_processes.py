"""Processes that die: the others end, somebody says which one it was, and a run that
goes on loses at most one checkpoint interval."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accidents.killed_script import EVERY, STEPS
from commands import ROOT, TORCHRUN
from safetensors.torch import load_file

from diffalign.cli.entry import run
from diffalign.training.checkpoint import checkpoint_step, list_checkpoints

SCRIPT = Path(__file__).parent / "killed_script.py"
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="signals of Linux")
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def start(folder: Path, processes: int) -> subprocess.Popen[str]:
    launcher = [sys.executable, *(TORCHRUN if processes == 2 else [])]
    return subprocess.Popen(
        [*launcher, str(SCRIPT), str(folder), str(4 // processes)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=300)
    return text


def kill_some_process(process: subprocess.Popen[str], chance: random.Random) -> tuple[int, int]:
    """Kill one process of a run after some steps: its first and last step."""
    assert process.stdout is not None
    first = last = -1
    pids: dict[str, int] = {}
    moment: float | None = None
    for line in process.stdout:
        match = re.match(r"step (\d+) of process (\d+) (\d+)", line)
        if match is None:
            continue
        last, pids[match[2]] = int(match[1]), int(match[3])
        first = last if first < 0 else first
        if moment is None:
            moment = time.monotonic() + chance.uniform(0, 0.6)
        if time.monotonic() >= moment:
            os.kill(chance.choice(list(pids.values())), signal.SIGKILL)
            break
    began = time.monotonic()
    finish(process)
    assert time.monotonic() - began < 60
    return first, last


@LINUX
@pytest.mark.nightly
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_survives_twenty_kills(tmp_path: Path, processes: int) -> None:
    assert "ended" in finish(start(tmp_path / "straight", processes))
    chance, reached, kills = random.Random(processes), 0, 0
    while kills < 20:
        first, last = kill_some_process(start(tmp_path / "killed", processes), chance)
        if last < 0:
            break  # it had ended before
        assert first >= reached - EVERY + 1  # what it had done, less one interval
        reached, kills = max(reached, last), kills + 1
        newest = list_checkpoints(tmp_path / "killed")
        assert checkpoint_step(newest[-1]) >= reached - EVERY if newest else reached <= EVERY
        if reached > STEPS - 10:  # from the beginning again, with the kills that are left
            assert "ended" in finish(start(tmp_path / "killed", processes))
            same(tmp_path / "straight", tmp_path / "killed")
            (tmp_path / "killed").rename(tmp_path / f"killed-{kills}")
            reached = 0
    if (tmp_path / "killed").is_dir():
        finish(start(tmp_path / "killed", processes))
        same(tmp_path / "straight", tmp_path / "killed")


def same(straight: Path, killed: Path) -> None:
    for name in ("pytorch_lora_weights.safetensors", f"checkpoint-{STEPS}/ema.safetensors"):
        one, other = load_file(straight / name), load_file(killed / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


def launched(folder: Path, *options: object) -> list[str]:
    return [
        *(sys.executable, "-m", "diffalign", "train", "--config"),
        str(ROOT / "configs" / "diffusion_dpo" / "shapes.yaml"),
        *("--train.output_dir", str(folder), "--num_processes", "2"),
        *map(str, options),
    ]


@LINUX
@pytest.mark.nightly
def test_the_launcher_names_the_process_that_was_killed(tmp_path: Path, pairs: Any) -> None:
    command = launched(
        tmp_path / "run", "--data.dataset_name", pairs, "--train.max_steps", 5000,
        "--train.save_steps", 2, "--train.per_device_train_batch_size", 2,
        "--validation", "null", "--data.cache_latents", "null",
        "--data.cache_text_embeddings", "null",
    )  # fmt: skip
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not list_checkpoints(tmp_path / "run") and time.monotonic() < deadline:
            time.sleep(0.2)
        workers = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
        ).stdout.split()
        ranks = {rank_of(int(pid)): int(pid) for pid in workers}
        os.kill(ranks["1"], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert "diffalign: process 1 was killed by SIGKILL, so the others were stopped" in errors
    assert "Traceback" not in errors
    assert all((path / "trainer_state.json").is_file() for path in (tmp_path / "run").glob("ch*"))


def rank_of(pid: int) -> str | None:
    values = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((v.decode()[5:] for v in values if v.startswith(b"RANK=")), None)


@LINUX
@pytest.mark.nightly
def test_a_mistake_that_processes_meet_is_one_sentence(tmp_path: Path) -> None:
    command = launched(tmp_path / "run", "--data.dataset_name", tmp_path / "absent.parquet")
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "there is no such file or folder" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    import datasets
    from tiny import pair_rows

    path = tmp_path / "pairs.parquet"
    datasets.Dataset.from_list(pair_rows(8, 64)).to_parquet(path)
    return path


@pytest.mark.parametrize(
    ("name", "words"),
    [("fsdp3", "neither a file nor one of ddp, fsdp2, hsdp, zero2"), ("zero2", "needs GPUs")],
)
def test_configurations_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    if name == "zero2" and torch.accelerator.is_available():
        pytest.skip("DeepSpeed may work here")
    config = str(ROOT / "configs" / "diffusion_dpo" / "shapes.yaml")
    assert run(["train", "--config", config, "--accelerate_config", name]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("stage", [2, 3])
def test_only_zero_3_is_refused(stage: int) -> None:
    from types import SimpleNamespace

    from diffalign.errors import ConfigError
    from diffalign.training.sharding import check_engine

    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
    accelerator: Any = SimpleNamespace(state=state, distributed_type="DEEPSPEED")
    if stage == 2:
        check_engine(accelerator)
        return
    with pytest.raises(ConfigError, match="ZeRO-3 gathers weights"):
        check_engine(accelerator)
