"""JSON over HTTP with a deadline and bounded retries: what the remote scorer and the judge share. Nothing is ever unpickled."""

from __future__ import annotations

import base64
import http.client
import io
import json
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from ...config.ranges import count
from ...config.yaml_text import shown
from ...errors import ConfigError, UserError
from ...runtime import decoding
from ...runtime.replies import TimedHandler, TimedTLSHandler, read_reply

_RETRIED = (429, 500, 502, 503, 504)
_LARGEST_REPLY = 64 << 20
_LONGEST_PAUSE = 20.0  # seconds
_LONGEST_TIMEOUT = 1e6  # seconds


class ServerFailure(UserError):
    """The server is down, refuses, or answers what is no JSON object; the sentence names its address."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could lead anywhere, also out of HTTP."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect, TimedHandler, TimedTLSHandler)


def check_url(url: Any, field: str = "url") -> str:
    """The address without a trailing slash.

    Raises:
        ConfigError: anything that is not http or https with a host.
    """
    try:
        parts = urllib.parse.urlsplit(url) if isinstance(url, str) and url.isascii() else None
        good = (
            parts is not None
            and parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.port != 0
        )
    except ValueError:  # a port or an IPv6 address that is none
        good = False
    if not good:
        given = without_password(url) if isinstance(url, str) else url
        raise ConfigError(
            field, f"expected an address such as http://127.0.0.1:8000, got {shown(given)}"
        )
    return url.rstrip("/")


def check_calls(timeout: Any, retries: Any, concurrency: Any, on_error: Any) -> None:
    """Raises ConfigError for values that make no sense."""
    if (
        isinstance(timeout, bool)
        or not isinstance(timeout, (int, float))
        or not 0 < timeout <= _LONGEST_TIMEOUT
    ):
        raise ConfigError("timeout", f"expected seconds above 0, got {shown(timeout)}")
    count(0, 100).check("retries", retries)
    count(1, 1024).check("concurrency", concurrency)
    if on_error not in ("raise", "nan"):
        raise ConfigError("on_error", f"expected raise or nan, got {on_error!r}")


def request_json(
    url: str,
    payload: Any = None,
    *,
    timeout: float = 30.0,
    retries: int = 3,
    backoff: float = 0.5,
    headers: dict[str, str] | None = None,
) -> dict[str, Any]:
    """GET, or POST where there is a payload.

    `timeout` is the time for a whole try, from the connection to the last byte. A connection that fails, a reply that is cut short,
    429 and 5xx are tried again `retries` times, after a random pause of at most ``backoff * 2^attempt`` seconds, so that many clients
    do not come back at once; other refusals are final.

    Raises:
        ServerFailure: with the last reason.
    """
    shown_url = without_password(url)
    body = None if payload is None else json.dumps(payload).encode()
    request = urllib.request.Request(
        url, data=body, headers={"Content-Type": "application/json", **(headers or {})}
    )
    for attempt in range(retries + 1):
        try:
            with _OPENER.open(request, timeout=max(0.001, timeout)) as reply:
                return _object(shown_url, read_reply(reply, _LARGEST_REPLY))
        except urllib.error.HTTPError as error:
            failure = ServerFailure(
                f"{shown_url} answered {error.code}: {_reason(error)}", error.code
            )
            if error.code not in _RETRIED:
                raise failure from None
        except (
            OSError,
            http.client.HTTPException,
        ) as error:  # refused, reset, timed out, cut short
            reason = getattr(error, "reason", error)
            failure = ServerFailure(
                f"{shown_url} cannot be reached ({reason}); start the server, or check the address"
            )
        if attempt < retries:
            time.sleep(random.uniform(0, min(backoff * 2**attempt, _LONGEST_PAUSE)))
    tries = f" after {retries + 1} tries" if retries else ""
    raise ServerFailure(f"{failure}{tries}", failure.status)


def without_password(url: str) -> str:
    """An address for messages, without the user and password that it may hold."""
    parts = urllib.parse.urlsplit(url)
    return (
        url
        if "@" not in parts.netloc
        else parts._replace(netloc=f"...@{parts.netloc.rpartition('@')[2]}").geturl()
    )


def _object(url: str, data: bytes) -> dict[str, Any]:
    if len(data) > _LARGEST_REPLY:
        raise ServerFailure(
            f"{url} answered more than {_LARGEST_REPLY >> 20} MiB; that is no scorer"
        )
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ServerFailure(
            f"{url} answered what is no JSON object ({data[:60]!r}); that is no scorer"
        )
    return value


def _reason(error: urllib.error.HTTPError) -> str:
    """What the server says of a refusal, in one line."""
    try:
        text = error.read(4096).decode("utf-8", "replace")
    except OSError:
        return str(error.reason)
    try:
        value = json.loads(text)
        text = value.get("error", text) if isinstance(value, dict) else text
        text = text.get("message", str(text)) if isinstance(text, dict) else text
    except (ValueError, RecursionError):
        pass
    return " ".join(str(text).split())[:300] or str(error.reason)


def png_base64(image: Any) -> str:
    """A decoded image as base64 PNG, without loss: the other side sees the pixels that are scored here."""
    buffer = io.BytesIO()
    decoding.to_rgb(image).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
