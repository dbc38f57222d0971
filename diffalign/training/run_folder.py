"""The output folder of a run: whether it may be used, and what to resume."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..errors import ConfigError, UserError
from ..runtime.distributed import process_rank
from ..runtime.files import move_aside
from ..runtime.folder_lock import FolderLock
from .checkpoint import find_checkpoint, list_checkpoints
from .run_record import is_run_record
from .trained_weights import FINAL_FILES, REWARD_FILE, REWARD_RUN

REPLACED = (
    "config.yaml",
    "README.md",
    "best",
    "samples/step-*.png",
    "samples/base*",
    "pool/*.safetensors",
    "logs/metrics.jsonl",
    "reference_errors.safetensors",
    *FINAL_FILES,
)
"""What a run writes under the same names, or removes, when it starts anew."""


def check_outside(folder: Path, source: object, field: str) -> None:
    """Refuse an output folder in the folder of a dataset, whose rows it would become.

    Args:
        folder (`Path`): Output folder of the run.
        source: What `load_preferences` reads.
        field (`str`): How messages name the source.

    Raises:
        ConfigError: It lies there, or is that folder.
    """
    if not isinstance(source, (str, Path)):
        return
    data = Path(source).expanduser()
    if data.is_dir() and folder.resolve().is_relative_to(data.resolve()):
        raise ConfigError(
            "train.output_dir",
            f"{str(folder)!r} lies in {field} ({str(source)!r}), where files of the run would be "
            "read as data; name a folder elsewhere",
        )


def _is_finished(folder: Path) -> bool:
    """Return whether the folder holds final weights."""
    return any((folder / name).is_file() for name in FINAL_FILES)


def sample_pictures(folder: Path) -> list[Path]:
    """List the pictures of a run's validations, the newest first.

    Args:
        folder (`Path`): Output folder of the run.
    """

    def step_of(path: Path) -> int:
        number = path.stem.removeprefix("step-")
        return int(number) if number.isdigit() else -1

    return sorted((folder / "samples").glob("step-*.png"), key=step_of, reverse=True)


def begin(lock: FolderLock, resume: str | None, overwrite: bool) -> Path | None:
    """Find the checkpoint to resume, or make the folder free for a new run.

    Args:
        lock (`FolderLock`): Lock of the folder.
        resume (`str`, *optional*): `latest`, a path, or None for a new run.
        overwrite (`bool`): Move another run aside.

    Returns:
        `Path`, *optional*: The checkpoint. None for a new run.

    Raises:
        UserError: The folder holds another run.
    """
    folder = lock.folder
    if resume and (resume != "latest" or list_checkpoints(folder)):
        checkpoint = find_checkpoint(folder, resume)
        if checkpoint.resolve().parent == folder.resolve():
            return checkpoint
        _claim(lock, overwrite)
        return checkpoint
    _claim(lock, overwrite)
    if resume and process_rank() == 0:
        print(f"{folder} holds no checkpoint yet: the run starts from the beginning")
    return None


def _remove_leftovers(folder: Path) -> None:
    """Remove the files of a killed run and nothing else."""
    (folder / "logs" / "metrics.jsonl").unlink(missing_ok=True)
    for pattern in (
        "samples/step-*.png",
        "samples/base*/*.png",
        "samples/base*/*.missing",
        "pool/*.safetensors",
    ):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    for path in [folder / ".best.new", folder / ".best.old", *folder.glob("feedback/round-*")]:
        shutil.rmtree(path, ignore_errors=True)


def check_savable(folder: Path, own: Path) -> None:
    """Refuse a folder to save a model in whose files are not of a run.

    Args:
        folder (`Path`): Where to save.
        own (`Path`): Folder of the run, which has been checked.

    Raises:
        UserError: Files would be replaced that no run wrote.
    """
    inside = own.resolve() in (folder.resolve(), *folder.resolve().parents)
    if not inside and not is_run_record(folder / "config.yaml"):
        _check_foreign(folder, "output_dir")


def holds_model(folder: Path) -> bool:
    """Tell whether `save_model` has written into a folder."""
    return _is_finished(folder)


def _check_foreign(folder: Path, field: str = "train.output_dir") -> None:
    """Refuse a folder whose files are not of a run."""
    taken = [str(path.relative_to(folder)) for name in REPLACED for path in folder.glob(name)]
    if taken:
        raise UserError(
            f"{field}: {str(folder)!r} is not a run of diffalign, and a run would "
            f"replace its {', '.join(taken[:3])}; choose another folder"
        )


def _claim(lock: FolderLock, overwrite: bool) -> None:
    folder = lock.folder
    checkpoints = list_checkpoints(folder) if folder.is_dir() else []
    has_votes = any(folder.glob("feedback/round-*/votes*"))
    is_reward = any((folder / name).is_file() for name in (REWARD_FILE, REWARD_RUN))
    is_run = is_reward or is_run_record(folder / "config.yaml")
    if not (is_run or checkpoints or has_votes):
        _check_foreign(folder)
    has_best = is_run and (folder / "best" / "validation.json").is_file()
    if not (checkpoints or _is_finished(folder) or has_votes or has_best or (overwrite and is_run)):
        # The folder is empty, or its run was killed before the first checkpoint.
        if is_run and process_rank() == 0:
            _remove_leftovers(folder)
        return
    if not overwrite:
        state = (
            f"its last checkpoint is {checkpoints[-1].name}" if checkpoints else "it is finished"
        )
        go_on = "continue it (resume_from_checkpoint latest), " if checkpoints else ""
        raise UserError(
            f"train.output_dir: {str(folder)!r} holds another run ({state}); {go_on}"
            "choose another folder, or move it aside (overwrite_output_dir true)"
        )
    if process_rank() > 0:
        return  # one process of several moves it
    lock.release()
    move_aside(folder, "train.output_dir")
    lock.take()
