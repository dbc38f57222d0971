"""Run a command of this package in several processes, and say which one failed."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config.yaml_text import read_yaml_file
from ..errors import UserError

_OPTION = "--accelerate_config"
_CONFIGS = Path(__file__).parents[1] / "accelerate_configs"
_OLD_NAMES = {"multi_gpu": "ddp"}


def accelerate_config(name: str) -> Path:
    """Find a configuration of accelerate.

    Args:
        name (`str`): `ddp`, `fsdp2`, `hsdp`, `zero2` or a file.

    Raises:
        UserError: It is none of these.
    """
    path = Path(name) if Path(name).is_file() else _CONFIGS / f"{_OLD_NAMES.get(name, name)}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in _CONFIGS.glob("*.yaml")))
        raise UserError(f"{_OPTION}: {name!r} is neither a file nor one of {known}")
    return path


def launch(program: list[str], config: str | None, processes: int | None) -> int:
    """Run `python -m diffalign` in several processes, by accelerate's launcher.

    Without GPUs torchrun starts the processes.

    Args:
        program (`list[str]`): Command and options.
        config (`str`, *optional*): See `accelerate_config`.
        processes (`int`, *optional*): How many. Defaults to the configuration's.

    Returns:
        `int`: Exit code: that of the first process that failed, or 128 + the signal
        that killed it.

    Raises:
        UserError: The configuration cannot be used here.
    """
    import torch

    path = None if config is None else accelerate_config(config)
    on_cpus = not torch.accelerator.is_available()
    # torch would print where in its own code a process ended.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with _forwarding():
        try:
            if on_cpus:
                _on_cpus(path, processes, program)
            else:
                _by_accelerate(path, processes, program)
        except _child_failed() as error:
            return _explained(error)
        except _signalled() as error:
            return 128 + int(error.sigval)
        except subprocess.CalledProcessError as error:  # one process, without torchrun
            return error.returncode if error.returncode > 0 else 128 - error.returncode
    return 0


def _child_failed() -> Any:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    return ChildFailedError


def _signalled() -> Any:
    from torch.distributed.elastic.multiprocessing.api import SignalException

    return SignalException


def _by_accelerate(path: Path | None, processes: int | None, program: list[str]) -> None:
    from accelerate.commands.launch import launch_command, launch_command_parser

    options = [] if path is None else ["--config_file", str(path)]
    options += [] if processes is None else ["--num_processes", str(processes)]
    arguments = launch_command_parser().parse_args([*options, "-m", "diffalign", *program])
    launch_command(arguments)


def _on_cpus(path: Path | None, processes: int | None, program: list[str]) -> None:
    from torch.distributed import run as torchrun

    config = {} if path is None else read_yaml_file(path, _OPTION)
    if not isinstance(config, dict):
        raise UserError(f"{_OPTION}: {path} is no configuration of accelerate")
    if config.get("distributed_type") == "DEEPSPEED":
        raise UserError(f"{_OPTION}: DeepSpeed needs GPUs; take ddp or fsdp2")
    sharding, mesh = config.get("fsdp_config") or {}, config.get("parallelism_config") or {}
    # What accelerate's launcher sets on GPUs.
    variables = {
        "ACCELERATE_USE_FSDP": str(bool(sharding)).lower(),
        "ACCELERATE_USE_PARALLELISM_CONFIG": str(bool(mesh)).lower(),
    }
    for name, value in {**sharding, **mesh}.items():
        variables[name.upper()] = str(value).lower() if isinstance(value, bool) else str(value)
    os.environ.update(variables)
    count = processes or config.get("num_processes") or 1
    torchrun.run(
        torchrun.parse_args(
            ["--standalone", "--nproc_per_node", str(count), "-m", "diffalign", *program]
        )
    )


@contextlib.contextmanager
def _forwarding() -> Iterator[None]:
    """Do not end at a preemption signal that the processes answer with a checkpoint."""
    number = getattr(signal, "SIGUSR1", None)
    if number is None:
        yield
        return
    before = signal.signal(number, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(number, before)


def _explained(error: Any) -> int:
    """Say which process failed first, and return the exit code."""
    rank, failure = error.get_first_failure()
    code = failure.exitcode
    if code == 2 or code > 128:
        return code  # the process has said why, or every process got a signal
    if code < 0:
        reason = f"was killed by {signal.Signals(-code).name}"
    else:
        reason = f"ended with code {code}"
    print(
        f"diffalign: process {rank} {reason}, so the others were stopped; go on from the last "
        "checkpoint with --train.resume_from_checkpoint latest",
        file=sys.stderr,
        flush=True,
    )
    return code if code > 0 else 128 - code
