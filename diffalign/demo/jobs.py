"""Run work in a thread that reports while it runs and can be stopped."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Cancelled(Exception):
    """The visitor no longer wants the result."""


class Job:
    """Run `work(job)` in a thread.

    Iterating starts the work and yields what it reports, and at last `("result",
    value)`. Leaving the iteration early, or `cancel`, ends the work at its next report.

    Args:
        work (`Callable`): The work. It gets this job and calls `report`.
    """

    def __init__(self, work: Callable[[Job], object]) -> None:
        self._work = work
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._cancelled = threading.Event()

    def report(self, kind: str, value: object) -> None:
        """Report something. The work calls this.

        Args:
            kind (`str`): What is reported.
            value: The report.

        Raises:
            Cancelled: Nobody wants the result.
        """
        if self._cancelled.is_set():
            raise Cancelled
        self._queue.put((kind, value))

    def cancel(self) -> None:
        """End the work at its next report."""
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
