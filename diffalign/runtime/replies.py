"""Replies of web servers, read with a limit of size and one deadline.

The deadline includes the headers.
"""

from __future__ import annotations

import functools
import http.client
import io
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import socket

    from _typeshed import WriteableBuffer

_PART = 1 << 16


class _TimedReader(io.RawIOBase):
    """Read a socket until a deadline.

    A byte now and then does not prolong it, as it does with a socket's own timeout.
    """

    def __init__(
        self, raw: io.RawIOBase, sock: socket.socket, deadline: float, seconds: float
    ) -> None:
        self.raw, self.sock, self.deadline, self.seconds = raw, sock, deadline, seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int | None:
        left = self.deadline - time.monotonic()
        try:
            if left > 0:
                self.sock.settimeout(left)
                return self.raw.readinto(buffer)
        except TimeoutError:
            pass
        raise TimeoutError(f"no complete reply within {self.seconds:g} seconds")

    def close(self) -> None:
        self.raw.close()
        super().close()


class _TimedResponse(http.client.HTTPResponse):
    def __init__(
        self, sock: socket.socket, *args: Any, deadline: float, seconds: float, **options: Any
    ) -> None:
        super().__init__(sock, *args, **options)
        self.fp = io.BufferedReader(_TimedReader(self.fp.detach(), sock, deadline, seconds))


class TimedConnection(http.client.HTTPConnection):
    """An HTTP connection with one deadline for everything.

    Args:
        host (`str`): The server.
        port (`int`, *optional*): Its port.
        timeout (`float`, defaults to 60): Seconds from the beginning of the connection
            to the last byte of the reply.
        **options: Further arguments of `http.client.HTTPConnection`.
    """

    def __init__(
        self, host: str, port: int | None = None, *, timeout: float = 60.0, **options: Any
    ) -> None:
        super().__init__(host, port, timeout=timeout, **options)
        deadline = time.monotonic() + timeout
        self.response_class = functools.partial(  # type: ignore[assignment]
            _TimedResponse, deadline=deadline, seconds=timeout
        )


def read_reply(reply: http.client.HTTPResponse, most: int) -> bytes:
    """Read the body of a reply.

    Args:
        reply (`http.client.HTTPResponse`): Of a `TimedConnection`, its headers read.
        most (`int`): Bytes to read.

    Returns:
        `bytes`: The body. One that is longer than `most` comes back longer than that,
        but not whole.

    Raises:
        TimeoutError: It is not there in time.
        http.client.IncompleteRead: It was cut short.
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
