"""What the command says about an error, and the exit code that follows.

0: done. 2: the user's mistake, told in one sentence without a traceback. 1: a failure.
128 + n: after signal n.
"""

from __future__ import annotations

import errno
import re
import sys
import time

from ..errors import UserError
from ..runtime.distributed import process_count, process_rank

_PERMISSION = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FREE_SPACE = "free some space and run the command again"
_NO_MEMORY = (
    "the GPU is out of memory; a smaller batch needs less, and for a training run `diffalign "
    "estimate --config RUN.yaml --gpu 24GB` lists what else saves memory, and how much"
)
_PATIENCE = 5  # seconds
_FAILURES = ("CheckpointError", "NonFiniteLoss", "NonFiniteWeights")
"""Errors of training that are told in one sentence; named, since importing them loads
torch."""


def report(error: BaseException) -> int | None:
    """Say an expected error in one line on stderr.

    Args:
        error (`BaseException`): what ended the command.

    Returns:
        `int`, *optional*: Exit code. None for an error that nobody expected, which
        deserves its traceback.
    """
    if isinstance(error, UserError):
        return say(str(error), 2)
    if isinstance(error, KeyboardInterrupt):
        return say("interrupted", 130)
    if isinstance(error, BrokenPipeError):
        return None
    if isinstance(error, OSError) and error.errno in _PERMISSION:
        return say(
            f"cannot write {error.filename!r} ({error.strerror}); "
            "name a folder that you may write to",
            2,
        )
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return say(
            f"cannot write {error.filename or 'a file'} ({error.strerror}); {_FREE_SPACE}", 1
        )
    name = type(error).__name__
    if process_count() > 1 and _LOST.search(_whole_text(error)):
        return say("another process ended, so this one cannot go on", 1)
    if name in _FAILURES:
        return say(str(error), 1)
    if name == "OutOfMemoryError":
        return say(_NO_MEMORY, 1)
    if type(error).__module__.split(".")[0] in _WRITERS and _REFUSED.search(str(error)):
        return say(f"cannot write a file ({error}); name a folder that you may write to", 2)
    if no_space(error):
        return say(f"cannot write a file (no space left on device); {_FREE_SPACE}", 1)
    if name == "Interrupted":
        return say(str(error), 128 + error.signal)  # type: ignore[attr-defined]
    return None


# What gloo, NCCL and torch's store say when a peer is gone.
_LOST = re.compile(
    r"Connection (closed|reset) by peer|remote process exited|NCCL .*(remote|abort|timeout)"
    r"|Broken pipe|failed to recv, got 0 bytes|Timed out waiting \d+ms",
    re.IGNORECASE,
)


def _whole_text(error: BaseException | None) -> str:
    """The messages of an error and its causes."""
    parts: list[str] = []
    while error is not None and len(parts) < 10:
        parts.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(parts)


_FULL = re.compile(
    r"No space left on device|File too large|Disk quota exceeded|database or disk is full"
    r"|requested and \d+ written|inline_container.cc.*unexpected pos",
    re.IGNORECASE,
)
_REFUSED = re.compile(r"Permission denied|Read-only file system|readonly database")
# Libraries whose errors are no OSError when the disk is full.
_WRITERS = ("safetensors", "sqlite3", "pyarrow")


def no_space(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, says that the disk is full."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        library = type(error).__module__.split(".")[0]
        if _FULL.search(str(error)) and (
            isinstance(error, (OSError, RuntimeError)) or library in _WRITERS
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def say(message: str, code: int) -> int:
    """Print a message in one line on stderr, from one process if all meet it.

    Args:
        message (`str`): the sentence.
        code (`int`): the exit code.

    Returns:
        `int`: The exit code.
    """
    rank = process_rank()
    if rank > 0:
        if code > 128:
            return code  # a signal, which all processes got
        # Mostly all processes meet the same mistake, and the launcher ends this one
        # as soon as the first has reported it. If not, the mistake is this one's own.
        time.sleep(_PATIENCE)
        message = f"process {rank}: {message}"
    print(f"diffalign: {_one_line(message)}", file=sys.stderr, flush=True)
    return code


_LONGEST = 1500  # characters of a message


def _one_line(message: str) -> str:
    """A message as one printable line.

    Names from files may be long, and hold line breaks and control characters.
    """
    text = "".join(c if c.isprintable() or c == " " else repr(c)[1:-1] for c in message)
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    encoding = sys.stderr.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
