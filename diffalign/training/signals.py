"""End a run after the current step on Ctrl-C, SIGTERM or SIGUSR1.

The run writes a checkpoint. A second Ctrl-C ends it at once. Schedulers of clusters
send SIGUSR1 before they take a machine away, if a job asks for it.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopSignals:
    """Context manager that records the first signal instead of ending the process.

    Attributes:
        received (`int`, *optional*): Number of the signal.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def __enter__(self) -> StopSignals:
        # Python allows handlers in the main thread alone.
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if hasattr(signal, "SIGUSR1"):  # not on Windows
                numbers.append(signal.SIGUSR1)
            for number in numbers:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
