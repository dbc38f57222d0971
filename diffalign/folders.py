"""Output folders of commands that can be run again."""

from __future__ import annotations

from pathlib import Path

from .exceptions import UserError


def check_output_dir(folder: Path, marker: str) -> None:
    """Refuses a folder with another command's files; the file `marker` tells one's own.

    Raises:
        UserError: it is a file, or holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir: {str(folder)!r} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise UserError(f"--output_dir: {str(folder)!r} holds something else; name another folder")
