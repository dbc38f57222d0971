"""JSON over HTTP with a deadline and retries, for the remote scorer and the judge.

Redirects are not followed, nothing is unpickled, and a reply has a largest size.
"""

from __future__ import annotations

import base64
import io
import json
import random
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ...config.ranges import count
from ...config.yaml_text import shown
from ...errors import ConfigError, UserError
from ...runtime import decoding

if TYPE_CHECKING:
    from types import TracebackType

    import httpx
    from PIL import Image

RETRIED = (429, 500, 502, 503, 504)
"""Statuses after which a request is tried again."""
_LARGEST_REPLY = 64 << 20
_LARGEST_REFUSAL = 4096
_LONGEST_PAUSE = 20.0  # seconds
_LONGEST_TIMEOUT = 1e6  # seconds


class ServerFailure(UserError):
    """The server is down, refuses, or does not answer with a JSON object.

    Args:
        message (`str`): One sentence that names the server's address.
        status (`int`, *optional*): The HTTP status, if there was one.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def check_url(url: Any, field: str = "url") -> str:
    """Check the address of a server.

    Args:
        url (`str`): Any value of a configuration.
        field (`str`, defaults to "url"): Its name, for the message.

    Returns:
        `str`: The address without a slash at its end.

    Raises:
        ConfigError: It is not http or https with a host.
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
        value = without_password(url) if isinstance(url, str) else url
        raise ConfigError(
            field, f"expected an address such as http://127.0.0.1:8000, got {shown(value)}"
        )
    return url.rstrip("/")


def check_calls(timeout: object, retries: object, concurrency: object, on_error: object) -> None:
    """Check the options that say how a server is asked.

    Args:
        timeout (`float`): Seconds for one request, above 0.
        retries (`int`): Further tries, up to 100.
        concurrency (`int`): Requests at once, from 1 to 1024.
        on_error (`str`): "raise" or "nan".

    Raises:
        ConfigError: One of them makes no sense.
    """
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
    payload: object = None,
    *,
    timeout: float = 30.0,
    retries: int = 3,
    backoff: float = 0.5,
    headers: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Send a GET, or a POST where there is a payload, and read a JSON object.

    A connection that fails, a reply that is cut short, 429 and 5xx are tried again.
    Other refusals are final. Pauses are random, so that many clients do not come back
    at once.

    Args:
        url (`str`): The address.
        payload (*optional*): What is sent as JSON.
        timeout (`float`, defaults to 30): Seconds of a whole try, from the connection
            to the last byte.
        retries (`int`, defaults to 3): Further tries.
        backoff (`float`, defaults to 0.5): The longest first pause, in seconds. It
            doubles.
        headers (`dict`, *optional*): Further headers.

    Returns:
        `dict`: The reply.

    Raises:
        ServerFailure: With the reason of the last try.
    """
    import httpx

    shown_url = without_password(url)
    body = None if payload is None else json.dumps(payload).encode()
    for attempt in range(retries + 1):
        try:
            status, phrase, data = _exchange(url, body, headers or {}, max(0.001, timeout))
        except httpx.LocalProtocolError:  # its text would show a token
            raise ServerFailure(
                f"{shown_url} cannot be asked: a header holds characters that HTTP does not allow"
            ) from None
        # ImportError and ValueError: a proxy of a kind that httpx does not know.
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ImportError, ValueError) as error:
            failure = ServerFailure(
                f"{shown_url} cannot be reached ({str(error) or type(error).__name__}); "
                "start the server, or check the address"
            )
        else:
            if 200 <= status < 300:
                return _object(shown_url, data)
            failure = ServerFailure(
                f"{shown_url} answered {status}: {_reason(data) or phrase}", status
            )
            if status not in RETRIED:
                raise failure
        if attempt < retries:
            time.sleep(random.uniform(0, min(backoff * 2**attempt, _LONGEST_PAUSE)))
    tries = f" after {retries + 1} tries" if retries else ""
    raise ServerFailure(f"{failure}{tries}", failure.status)


def without_password(url: str) -> str:
    """Hide the user and the password that an address may hold, for messages.

    Args:
        url (`str`): The address.

    Returns:
        `str`: The address with `...` in their place.
    """
    parts = urllib.parse.urlsplit(url)
    if "@" not in parts.netloc:
        return url
    return parts._replace(netloc=f"...@{parts.netloc.rpartition('@')[2]}").geturl()


def png_base64(image: Image.Image) -> str:
    """Encode an image without loss, so that the other side sees the same pixels.

    Args:
        image (`PIL.Image.Image`): In any mode.

    Returns:
        `str`: An RGB PNG as base64.
    """
    buffer = io.BytesIO()
    decoding.to_rgb(image).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _exchange(
    url: str, body: bytes | None, headers: dict[str, str], seconds: float
) -> tuple[int, str, bytes]:
    """Make one request on a connection of its own.

    Returns:
        Status, its phrase, and the body. Of a refusal the body is only its beginning,
        and empty when it did not arrive.
    """
    import httpx

    address = httpx.URL(url)
    credentials = (address.username, address.password) if address.userinfo else None
    address = address.copy_with(username=None, password=None)  # httpx logs it
    # The certificates that the system trusts: httpx has a list of its own.
    verify = ssl.create_default_context() if address.scheme == "https" else False
    # Encoded replies would be as large as they like once decoded.
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", **headers}
    with (
        _Deadline(seconds) as deadline,
        httpx.Client(
            verify=verify, proxy=_proxy(address), trust_env=False, timeout=seconds
        ) as client,
        client.stream(
            "GET" if body is None else "POST",
            address,
            content=body,
            headers=headers,
            auth=credentials,
            extensions={"trace": deadline.trace},
        ) as reply,
    ):
        if 200 <= reply.status_code < 300:
            data = _read(reply, _LARGEST_REPLY)
            deadline.check()
        else:
            data = b""
            with suppress(httpx.HTTPError):
                data = _read(reply, _LARGEST_REFUSAL)[:_LARGEST_REFUSAL]
        return reply.status_code, reply.reason_phrase, data


class _Deadline:
    """Cut a connection when its time is over.

    The timeouts of httpx are for one read, so a byte now and then would prolong them.

    Raises:
        TimeoutError: When the context ends with an error of httpx and the time was
            over.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.expired = seconds, False
        self._connection: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        import httpx

        self._timer.cancel()
        if isinstance(error, httpx.TimeoutException):
            self.expired = True
        if isinstance(error, httpx.HTTPError):
            self.check()

    def check(self) -> None:
        """Raise TimeoutError if the time was over: a cut body may seem whole."""
        if self.expired:
            raise TimeoutError(f"no complete reply within {self.seconds:g} seconds")

    def trace(self, event: str, details: dict[str, Any]) -> None:
        """The `trace` extension of a request, through which httpx shows its socket."""
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            self._connection = details["return_value"].get_extra_info("socket")
            if self.expired:
                self._expire()

    def _expire(self) -> None:
        self.expired = True
        if self._connection is not None:
            with suppress(OSError):
                socket.socket.shutdown(self._connection, socket.SHUT_RDWR)


def _read(reply: httpx.Response, most: int) -> bytes:
    """Read a body. Stop when it is longer than `most` bytes."""
    data = bytearray()
    for part in reply.iter_raw():
        data += part
        if len(data) > most:
            break
    return bytes(data)


def _proxy(address: httpx.URL) -> str | None:
    """Look up the proxy that the environment names for an address.

    By the rules of urllib: `ALL_PROXY`, which many desktops set for other programs,
    does not count.
    """
    if urllib.request.proxy_bypass(address.netloc.decode()):
        return None
    proxy = urllib.request.getproxies().get(address.scheme)
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy


def _object(url: str, data: bytes) -> dict[str, Any]:
    """Parse a reply.

    Raises:
        ServerFailure: It is too large or no JSON object.
    """
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


def _reason(data: bytes) -> str:
    """What the server says about a refusal, in one line."""
    text = data.decode("utf-8", "replace")
    try:
        value = json.loads(text)
        text = value.get("error", text) if isinstance(value, dict) else text
        text = text.get("message", str(text)) if isinstance(text, dict) else text
    except (ValueError, RecursionError):
        pass
    return " ".join(str(text).split())[:300]
