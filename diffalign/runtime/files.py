"""Output folders of repeatable commands, and files that are never half-written."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .distributed import process_rank

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


def check_output_dir(folder: Path, marker: str, option: str = "--output_dir") -> None:
    """Refuse a folder with another command's files.

    Args:
        folder (`Path`): the output folder, which need not exist.
        marker (`str`): name of the file by which a command knows its own folders.
        option (`str`, *optional*, defaults to `"--output_dir"`): how messages name it.

    Raises:
        UserError: it is a file, or holds something else.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{option}: {str(folder)!r} is a file; name a folder")
    except (OSError, ValueError):  # a name that no folder can have
        make_folder(folder, option)
    # A process of several may come here while the first one writes the marker, and a
    # killed one may have left it half-written.
    unfinished = unfinished_names(marker)
    if (
        folder.is_dir()
        and any(p.name not in unfinished for p in folder.iterdir())
        and not (folder / marker).is_file()
    ):
        raise UserError(f"{option}: {str(folder)!r} holds something else; name another folder")


def claim_output_dir(
    folder: Path, marker: str, settings: Mapping[str, Any], long: tuple[str, ...] = ()
) -> None:
    """Claim an output folder for a run with these settings.

    The settings are written as `marker`. A run with the same ones goes on in the
    folder. Several processes may call it. The first one writes, and all must then wait
    for each other before they write anything else there.

    Args:
        folder (`Path`): the output folder.
        marker (`str`): name of the file that holds the settings.
        settings (`Mapping`): of the run.
        long (`tuple[str, ...]`, *optional*): names of settings whose values are too
            long for a message.

    Raises:
        UserError: it is a file, or holds something else or a run with other settings.
    """
    if not holds_run(folder, marker, settings, long) and process_rank() == 0:
        make_folder(folder)
        text = json.dumps(settings, default=str, indent=2)
        write_atomically(folder / marker, (text + "\n").encode())


def holds_run(
    folder: Path, marker: str, settings: Mapping[str, Any], long: tuple[str, ...] = ()
) -> bool:
    """Tell whether an output folder was claimed for a run with these settings.

    Nothing is written.

    Args:
        folder, marker, settings, long: as for `claim_output_dir`.

    Raises:
        UserError: it is a file, or holds something else or a run with other settings.
    """
    file = folder / marker
    check_output_dir(folder, marker)
    if not file.is_file():
        return False
    there = json.loads(file.read_text("utf-8"))
    for name, value in json.loads(json.dumps(settings, default=str)).items():
        if there.get(name) != value:
            difference = (
                f"other {name}" if name in long else f"--{name} {there.get(name)}, not {value}"
            )
            raise UserError(
                f"--output_dir: {str(folder)!r} holds a run with {difference}; use those "
                "settings or another folder"
            )
    return True


def _temporary(path: Path, rank: int = 0) -> Path:
    return path.with_name(f".{path.name}.{rank}.tmp" if rank else f".{path.name}.tmp")


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def unfinished_names(*names: str) -> set[str]:
    """Name what a killed command may leave in its folder beside its own files.

    Args:
        names (`str`): files that the command writes with `replacing`, and folders that
            it writes with `replacing_folder`.

    Returns:
        `set[str]`: their temporary files and folders, and the lock.
    """
    paths = [Path(name) for name in names]
    return {
        LOCK,
        *(_temporary(path).name for path in paths),
        *(_replaced(path).name for path in paths),
    }


LOCK = ".lock"
"""The file by which a command holds its output folder, see `folder_lock`."""


def make_folder(folder: Path, option: str = "--output_dir") -> bool:
    """Make an output folder.

    Args:
        folder (`Path`): with the parents that are missing.
        option (`str`, *optional*, defaults to `"--output_dir"`): how messages name it.

    Returns:
        `bool`: whether it was made. False if it was there.

    Raises:
        UserError: it cannot be made: a file, a dangling link, a name too long, a place
            that takes no folders.
    """
    try:
        if folder.is_symlink() and not folder.exists():
            target = os.readlink(folder)
            raise UserError(
                f"{option}: {str(folder)!r} is a symbolic link to {target!r}, which is not there; "
                "make that folder first"
            )
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{option}: {str(folder)!r} is a file; name a folder")
        there = folder.is_dir()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        if isinstance(error, UserError):
            raise
        name = str(folder) if len(str(folder)) < 200 else f"{str(folder)[:100]}..."
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{option}: the folder {name!r} cannot be made ({reason}); name another one"
        ) from error
    return not there


def check_output_file(file: Path, option: str) -> None:
    """Check that a file can be written, before the work whose result it is to hold.

    Args:
        file (`Path`): the file. The folder that it lies in is made.
        option (`str`): how messages name it.

    Raises:
        UserError: it is a folder, or its folder cannot be made or written to.
    """
    if file.is_dir():
        raise UserError(f"{option}: {str(file)!r} is a folder; name a file")
    make_folder(file.parent, option)
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UserError(f"{option}: {str(file)!r} cannot be written; name a file elsewhere")


def _holds_this_command(folder: Path) -> bool:
    """Whether the working directory is a resolved folder, or lies in it."""
    return Path.cwd().is_relative_to(folder)


def move_aside(folder: Path, option: str) -> Path:
    """Rename a folder to ``<folder>.old-<n>`` and make it anew.

    A symbolic link stays, and the folder it leads to is moved.

    Args:
        folder (`Path`): the folder.
        option (`str`): how messages name it.

    Returns:
        `Path`: the renamed folder.

    Raises:
        UserError: the command runs in it, or it is a mounted file system.
    """
    real = folder.resolve()
    if _holds_this_command(real) or os.path.ismount(real):
        where = "a mounted file system" if os.path.ismount(real) else "where this command runs"
        raise UserError(
            f"{option}: {str(folder)!r} is {where}, so it cannot be moved aside; name another "
            "folder"
        )
    number = next(
        n for n in range(1, 10_000) if not real.with_name(f"{real.name}.old-{n}").exists()
    )
    old = real.with_name(f"{real.name}.old-{number}")
    os.rename(real, old)
    real.mkdir()
    return old


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file that is never half-written.

    It has the permissions of new files.

    Args:
        tensors (`dict[str, Tensor]`): name -> tensor.
        path (`Path`): the file.
        metadata (`dict[str, str]`, *optional*): text entries of the header.
    """
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # safetensors writes files for their owner alone


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file, each tensor into memory of its own.

    The tensors of a mapped file lie at any address, where a CPU may round otherwise
    than in memory that torch allocated. Computing with copies keeps a resumed run
    bit-equal. It also frees the file.

    Args:
        path (`Path`): the file.

    Returns:
        `tuple[dict[str, Tensor], dict[str, str]]`: tensors and metadata.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG that is never half-written."""
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def check_replaceable(folder: Path) -> None:
    """Refuse to replace the folder in which the command runs.

    Args:
        folder (`Path`): the folder.

    Raises:
        UserError: the working directory is this folder, or lies in it.
    """
    if _holds_this_command(folder.resolve()):
        raise UserError(
            f"{str(folder)!r} is where this command runs, so it cannot be replaced; run the "
            "command from another folder"
        )


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Fill a temporary folder in a block, which then takes the place of a folder.

    If anything fails, the old folder stays.

    Args:
        path (`Path`): the folder to replace.

    Raises:
        UserError: see `check_replaceable`.
    """
    check_replaceable(path)
    if path.name in ("", ".."):
        path = path.resolve()
    temporary, old = _temporary(path), _replaced(path)
    for left in (temporary, old):
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            path.rename(old)
        try:
            temporary.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def remove_temporaries(folder: Path, older_than: float = 0.0) -> None:
    """Remove what a killed process left half-written.

    Args:
        folder (`Path`): where to look.
        older_than (`float`, *optional*, defaults to `0.0`): seconds. Where other
            processes write too, only old files are known to belong to a dead one.
    """
    for path in [*folder.glob(".*.tmp"), *folder.glob(".tmp??????")]:
        with suppress(OSError):  # another process removed it
            if path.is_file() and time.time() - path.stat().st_mtime >= older_than:
                path.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a temporary file in a block, which then takes the place of a file.

    Readers thus never see half of it. Processes of one run may write the same file at
    the same time. The temporary name holds their rank, and not the number that the
    system gave them. The next run thus overwrites what a killed one left behind.

    Args:
        path (`Path`): the file to replace.
    """
    temporary = _temporary(path, process_rank())
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is never half-written."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
