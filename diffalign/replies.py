"""Replies of web servers, read with a limit of size and a deadline for the whole."""

from __future__ import annotations

import http.client
import time

_PART = 1 << 16


def read_reply(reply: http.client.HTTPResponse, most: int, seconds: float, deadline: float) -> bytes:
    """A reply's body.

    Args:
        reply: whose headers were read.
        most: bytes to read. One that is longer comes back longer than `most`, but not whole.
        seconds: the time that there was, for the message.
        deadline: of `time.monotonic`, for all of it: a byte now and then does not prolong it.

    Raises:
        TimeoutError: it is not there in time.
        http.client.IncompleteRead: it was cut short.
    """
    parts, size = [], 0
    while size <= most:
        if time.monotonic() > deadline:
            raise TimeoutError(f"not there after {seconds:g} seconds")
        part = reply.read1(_PART)
        if not part:
            break
        parts.append(part)
        size += len(part)
    data = b"".join(parts)
    if reply.length and size <= most:  # announced and not sent
        raise http.client.IncompleteRead(data, reply.length)
    return data
