"""Replies of web servers, read with a limit of size and a deadline for the whole, headers included."""

from __future__ import annotations

import functools
import http.client
import io
import time
import urllib.request
from typing import Any

_PART = 1 << 16


class _TimedReader(io.RawIOBase):
    """Reads a socket until a deadline: a byte now and then does not prolong it, as it does with a socket's own timeout."""

    def __init__(self, raw: Any, sock: Any, deadline: float, seconds: float) -> None:
        self.raw, self.sock, self.deadline, self.seconds = raw, sock, deadline, seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self.deadline - time.monotonic()
        try:
            if left > 0:
                self.sock.settimeout(left)
                return self.raw.readinto(buffer)
        except TimeoutError:
            pass
        raise TimeoutError(f"not there after {self.seconds:g} seconds")

    def close(self) -> None:
        self.raw.close()
        super().close()


class _TimedResponse(http.client.HTTPResponse):
    def __init__(
        self, sock: Any, *args: Any, deadline: float, seconds: float, **options: Any
    ) -> None:
        super().__init__(sock, *args, **options)
        self.fp = io.BufferedReader(_TimedReader(self.fp.detach(), sock, deadline, seconds))


class TimedConnection(http.client.HTTPConnection):
    """An HTTP connection whose `timeout` is the time from its beginning to the last byte of the reply."""

    def __init__(
        self, host: str, port: int | None = None, *, timeout: float = 60.0, **options: Any
    ) -> None:
        super().__init__(host, port, timeout=timeout, **options)
        deadline = time.monotonic() + timeout
        self.response_class = functools.partial(_TimedResponse, deadline=deadline, seconds=timeout)  # type: ignore[assignment]


class TimedTLSConnection(TimedConnection, http.client.HTTPSConnection):
    """`TimedConnection` for https."""


class TimedHandler(urllib.request.HTTPHandler):
    """Opens http addresses of urllib with a `TimedConnection`."""

    def http_open(self, req: Any) -> Any:
        return self.do_open(TimedConnection, req)


class TimedTLSHandler(urllib.request.HTTPSHandler):
    """Opens https addresses of urllib with a `TimedTLSConnection`."""

    def https_open(self, req: Any) -> Any:
        return self.do_open(TimedTLSConnection, req)


def read_reply(reply: http.client.HTTPResponse, most: int) -> bytes:
    """A reply's body.

    Args:
        reply: of a `TimedConnection`, its headers read.
        most: bytes to read. One that is longer comes back longer than `most`, but not whole.

    Raises:
        TimeoutError: it is not there in time.
        http.client.IncompleteRead: it was cut short.
    """
    parts, size = [], 0
    while size <= most:
        part = reply.read1(_PART)
        if not part:
            break
        parts.append(part)
        size += len(part)
    data = b"".join(parts)
    if reply.length and size <= most:  # announced and not sent
        raise http.client.IncompleteRead(data, reply.length)
    return data
