"""One way to show progress: a live line in a terminal, a widget in a notebook, and
in a file a plain line now and then.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
QUIET = "DIFFALIGN_QUIET"
"""Environment variable that switches all bars off, also in launched processes."""

INTERVAL = "TQDM_MININTERVAL"
"""Environment variable with the seconds between two lines in a file."""

_SECONDS = 30.0


def is_quiet() -> bool:
    """Return whether `--quiet` or the environment asks for no progress."""
    return os.environ.get(QUIET, "") not in ("", "0")


class Bar:
    """Progress of some work. This one shows nothing, its subclasses do.

    It is a context manager, which ends it.

    Args:
        total (`float`, *optional*): Units of the whole work.
        desc (`str`): What is done.
        unit (`str`): What is counted, in the singular.
        initial (`float`): Units that an earlier run has done.
        leave (`bool`): Whether it stays to be seen when it is finished.

    Attributes:
        n (`float`): Units done.
    """

    def __init__(
        self, total: float | None, desc: str, unit: str, initial: float, leave: bool
    ) -> None:
        self.total, self.desc, self.unit = total, desc, unit
        self.n, self.initial, self.leave = initial, initial, leave
        self.postfix: dict[str, str] = {}
        self.closed = False

    def update(self, n: float = 1) -> None:
        """Count units. A negative number takes some back.

        Args:
            n (`float`, *optional*, defaults to `1`): How many.
        """
        self.n += n
        self._show()

    def set_postfix(self, values: Mapping[str, str]) -> None:
        """Show values beside the bar.

        Args:
            values (`Mapping[str, str]`): Name -> value.
        """
        self.postfix = dict(values)

    def close(self) -> None:
        """End it. Ending it again does nothing."""
        if not self.closed:
            self.closed = True
            self._end()

    def _show(self) -> None:
        pass

    def _end(self) -> None:
        pass

    def _count(self) -> str:
        of = "" if self.total is None else f"/{self.total:g}"
        return f"{self.n:g}{of} {plural(self.unit)}"

    def _values(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.postfix.items())

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _TqdmBar(Bar):
    """A bar of tqdm: a widget in a notebook, else a line in a terminal."""

    def __init__(self, *args: Any) -> None:
        from tqdm.auto import tqdm

        super().__init__(*args)
        self._bar = tqdm(
            total=self.total, desc=self.desc, unit=self.unit, initial=self.n, leave=self.leave
        )

    def _show(self) -> None:
        self._bar.update(self.n - self._bar.n)

    def set_postfix(self, values: Mapping[str, str]) -> None:
        self._bar.set_postfix(values, refresh=False)

    def _end(self) -> None:
        self._bar.close()


class _LineBar(Bar):
    """Whole lines in a file, at most one in half a minute, and one at the end."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._start = self._last = time.monotonic()
        try:
            self._interval = float(os.environ.get(INTERVAL, _SECONDS))
        except ValueError:
            self._interval = _SECONDS

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._last >= self._interval and (self.total is None or self.n < self.total):
            self._last = now
            self._write(now)

    def _end(self) -> None:
        if self.leave and self.n > self.initial:
            self._write(time.monotonic())

    def _write(self, now: float) -> None:
        seconds, done = now - self._start, self.n - self.initial
        text = f"{self.desc}: {self._count()}, {clock(seconds)}"
        if self.total is not None and 0 < self.n < self.total and done > 0:
            text += f", {clock(seconds / done * (self.total - self.n))} left"
        values = self._values()
        print(text + (f", {values}" if values else ""), file=sys.stderr, flush=True)


class _RichBar(Bar):
    """A line of the live display in a terminal."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._display = _Display.take()
        self._task = self._display.add_task(
            self.desc, total=self.total, completed=self.n, count=self._count(), values=""
        )

    def _show(self) -> None:
        self._display.update(
            self._task, completed=self.n, count=self._count(), values=self._values()
        )

    def _end(self) -> None:
        if self.leave:
            self._show()
            self._display.stop_task(self._task)
        else:
            self._display.remove_task(self._task)
        _Display.release()


class _Display:
    """The one live display, which all open bars share."""

    _lock = threading.Lock()
    _progress: Any = None
    _bars = 0

    @classmethod
    def take(cls) -> Any:
        """Return the display, and start it for the first bar."""
        from rich import progress
        from rich.console import Console

        with cls._lock:
            if cls._progress is None:
                columns = (
                    progress.TextColumn("{task.description}"),
                    progress.BarColumn(bar_width=24),
                    progress.TextColumn("{task.fields[count]}"),
                    progress.TimeElapsedColumn(),
                    progress.TextColumn("left"),
                    progress.TimeRemainingColumn(),
                    progress.TextColumn("{task.fields[values]}"),
                )
                cls._progress = progress.Progress(
                    *columns,
                    console=Console(stderr=True),
                    # What goes to a file must not appear in the terminal.
                    redirect_stdout=sys.stdout.isatty(),
                )
                cls._progress.start()
            cls._bars += 1
            return cls._progress

    @classmethod
    def release(cls) -> None:
        """Stop the display after the last bar."""
        with cls._lock:
            cls._bars -= 1
            if cls._bars <= 0:
                cls._stop()

    @classmethod
    def stop(cls) -> None:
        """Stop the display, whatever is open, so that the cursor comes back."""
        with cls._lock:
            cls._stop()

    @classmethod
    def _stop(cls) -> None:
        if cls._progress is not None:
            cls._progress.stop()
        cls._progress, cls._bars = None, 0


atexit.register(_Display.stop)


def progress_bar(
    *,
    total: float | None,
    desc: str,
    unit: str = "step",
    initial: float = 0,
    leave: bool = True,
    disable: bool = False,
) -> Bar:
    """Show the progress of some work.

    Args:
        total (`float`, *optional*): Units of the whole work, where it is known.
        desc (`str`): What is done.
        unit (`str`, *optional*, defaults to `"step"`): What is counted (singular).
        initial (`float`, *optional*, defaults to `0`): Units done before.
        leave (`bool`, *optional*, defaults to `True`): Let it stay when it is finished.
        disable (`bool`, *optional*, defaults to `False`): Show nothing.

    Returns:
        `Bar`, of the kind that fits a terminal, a notebook or a file.
    """
    kind = Bar if disable or is_quiet() else _kind()
    return kind(total, desc, unit, initial, leave)


def track(
    items: Collection[T],
    *,
    desc: str,
    unit: str,
    leave: bool = True,
    disable: bool = False,
) -> Iterator[T]:
    """Yield items, and show how many were taken.

    Args:
        items (`Collection`): The items.
        desc (`str`): What is done.
        unit (`str`): What an item is, in the singular.
        leave (`bool`, *optional*, defaults to `True`): See `progress_bar`.
        disable (`bool`, *optional*, defaults to `False`): Show nothing.
    """
    with progress_bar(total=len(items), desc=desc, unit=unit, leave=leave, disable=disable) as bar:
        for item in items:
            yield item
            bar.update()


def _kind() -> type[Bar]:
    if _in_notebook():
        return _TqdmBar
    if not getattr(sys.stderr, "isatty", bool)():  # of a logger's stream
        return _LineBar
    if os.environ.get("TERM") != "dumb" and find_spec("rich") is not None:
        return _RichBar
    return _TqdmBar


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"


def note(text: str) -> None:
    """Write a remark above the bars.

    Args:
        text (`str`): One line.
    """
    if not is_quiet():
        print(text, file=sys.stderr, flush=True)


def close_display() -> None:
    """End the live display of a terminal, before an error is printed."""
    _Display.stop()


def plural(unit: str) -> str:
    """Return the plural of a unit.

    Args:
        unit (`str`): For example `"batch"`.
    """
    return unit + ("es" if unit.endswith(("ch", "s", "x")) else "s")


def clock(seconds: float) -> str:
    """Write a duration as `m:ss` or `h:mm:ss`.

    Args:
        seconds (`float`): The duration.
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
