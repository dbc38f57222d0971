"""Work that reports while it runs and can be stopped: a thread with a queue."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Cancelled(Exception):
    """The visitor does not want the result any more."""


class Job:
    """Runs `work(job)` in a thread; iterating gives what it reports, and at last its result as ``("result", value)``.

    Leaving the iteration early, or `cancel`, ends the work at its next report.
    """

    def __init__(self, work: Callable[[Job], Any]) -> None:
        self._work = work
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._cancelled = threading.Event()

    def report(self, kind: str, value: Any) -> None:
        """Called by the work.

        Raises:
            Cancelled: nobody listens any more.
        """
        if self._cancelled.is_set():
            raise Cancelled
        self._queue.put((kind, value))

    def cancel(self) -> None:
        """Ends the work at its next report."""
        self._cancelled.set()

    def _run(self) -> None:
        try:
            self._queue.put(("result", self._work(self)))
        except BaseException as error:
            self._queue.put(("error", error))

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        threading.Thread(target=self._run, daemon=True).start()
        try:
            while True:
                kind, value = self._queue.get()
                if kind == "error":
                    raise value
                yield kind, value
                if kind == "result":
                    return
        finally:
            self.cancel()
