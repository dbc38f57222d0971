"""Let one command at a time into an output folder.

The system frees the lock when the process ends, also after SIGKILL.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path
from typing import ClassVar

from ..errors import UserError
from .distributed import process_rank
from .files import LOCK, make_folder

_FAR = 1 << 30  # place of the locked byte on Windows, behind the text that others read


def _try_lock(file: int) -> bool:
    """Try to take the lock, and return False when another process holds it.

    A file system without locks counts as free.
    """
    try:
        import fcntl
    except ImportError:
        return _try_lock_on_windows(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def _try_lock_on_windows(file: int) -> bool:
    try:
        import msvcrt
    except ImportError:  # a system with neither
        return True
    try:
        os.lseek(file, _FAR, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    except OSError:
        return False
    return True


class FolderLock:
    """Holds an output folder for one command, and makes the folder if it is not there.

    Of several processes, only the first one takes the lock.

    Args:
        folder (`Path`): the output folder.
        option (`str`, *optional*, defaults to `"--output_dir"`): how messages name it.

    Raises:
        UserError: on entering, when another command is using the folder or it cannot be
            made.
    """

    _held: ClassVar[set[int]] = set()

    def __init__(self, folder: Path, option: str = "--output_dir") -> None:
        self.folder, self.option = folder, option
        self._file = -1
        self._made: list[Path] = []

    def take(self) -> None:
        """Take the lock.

        Raises:
            UserError: another command is using the folder, or it cannot be made.
        """
        if process_rank() > 0:
            return
        self._made = (
            [
                folder
                for folder in (self.folder, *self.folder.parents)
                if not os.path.lexists(folder)
            ]
            if self._is_short()
            else []
        )
        make_folder(self.folder, self.option)
        path = self.folder / LOCK
        while True:
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                raise UserError(
                    f"{self.option}: {str(self.folder)!r} cannot be written to "
                    f"({error.strerror}); name another folder"
                ) from error
            if not _try_lock(file):
                holder = os.read(file, 200).decode("utf-8", "replace").strip()
                os.close(file)
                by = f" ({holder})" if holder else ""
                raise UserError(
                    f"{self.option}: {str(self.folder)!r} is in use by another run{by}; wait for "
                    "its end, or name another folder"
                )
            # The holder may have removed the file between its opening and its locking.
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(file), os.stat(path)):
                    break
            os.close(file)
        self._file = file
        self._held.add(file)
        with contextlib.suppress(OSError):  # a full disk holds no name, but the lock holds
            os.ftruncate(file, 0)
            os.lseek(file, 0, os.SEEK_SET)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def _is_short(self) -> bool:
        """Tell whether the system accepts the name. `make_folder` says why not."""
        try:
            os.path.lexists(self.folder)
        except ValueError:
            return False
        return True

    def release(self) -> None:
        """Free the lock, and remove the folder if it was made for it and is empty."""
        if self._file < 0:
            return
        self._held.discard(self._file)
        with contextlib.suppress(OSError):  # Windows removes no open file
            (self.folder / LOCK).unlink()
        os.close(self._file)
        self._file = -1
        with contextlib.suppress(OSError):
            for folder in self._made:  # for a run that wrote nothing
                folder.rmdir()

    def __enter__(self) -> FolderLock:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _forget_in_child() -> None:
    """Close the lock in a forked worker, which would outlive its parent with it."""
    for file in FolderLock._held:
        os.close(file)
    FolderLock._held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
