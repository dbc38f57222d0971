"""Output folders of commands that can be run again, and files that are whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .exceptions import UserError
from .processes import process_rank


def check_output_dir(folder: Path, marker: str) -> None:
    """Refuses a folder with another command's files; the file `marker` tells one's own.

    Raises:
        UserError: it is a file, or holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir: {str(folder)!r} is a file; name a folder")
    # A process of several may come here while the first one writes the marker, and a killed one may have left it half-written.
    unfinished = _temporary(folder / marker, 0).name
    if folder.is_dir() and any(p.name != unfinished for p in folder.iterdir()) and not (folder / marker).is_file():
        raise UserError(f"--output_dir: {str(folder)!r} holds something else; name another folder")


def claim_output_dir(folder: Path, marker: str, settings: Mapping[str, Any], long: tuple[str, ...] = ()) -> None:
    """Takes a folder for a run with these settings, written as `marker`; a run with the same ones goes on in it.

    Several processes may call it, of which the first one writes; all must then wait for each other before they write anything else there.

    Args:
        long: names of settings whose values are too long for a message.

    Raises:
        UserError: it is a file, holds something else, or a run with other settings.
    """
    file = folder / marker
    check_output_dir(folder, marker)
    wanted = json.loads(json.dumps(settings, default=str))
    if file.is_file():
        there = json.loads(file.read_text("utf-8"))
        for name, value in wanted.items():
            if there.get(name) != value:
                said = f"other {name}" if name in long else f"--{name} {there.get(name)}, not {value}"
                raise UserError(f"--output_dir: {str(folder)!r} holds a run with {said}; use those settings or another folder")
        return
    if process_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, (json.dumps(wanted, indent=2) + "\n").encode())


def _temporary(path: Path, rank: int) -> Path:
    return path.with_name(f".{path.name}.{rank}.tmp" if rank else f".{path.name}.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write, which then takes the place of `path`: that is there whole or not at all.

    Processes of one run may write the same file at the same time. The temporary name holds their rank, and not the number that the system
    gave them, so that what a killed run left behind is overwritten by the next one.
    """
    temporary = _temporary(path, process_rank())
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """A file that is there whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
