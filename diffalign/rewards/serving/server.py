"""Listen for an application: uvicorn, with deadlines for slow clients.

There is no encryption. The server listens on this machine only unless told otherwise.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
import signal
import socket
import sys
import threading
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ...errors import ConfigError
from .app import ROUTES, create_app
from .service import Limits, ScoringService

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ..base import Scorer

_READ_SECONDS = 30.0  # between two parts of a request
_REQUEST_SECONDS = 120.0  # for a whole request, however slowly it drips
_GRACE_SECONDS = 5  # for the requests that are there when the server is told to stop
_WAITING = 512  # connections that the system holds until they are taken
_CONTENT_LENGTH = re.compile(rb"^content-length:[ \t]*(-?\d*)", re.IGNORECASE | re.MULTILINE)
_TRANSFER_ENCODING = re.compile(rb"^transfer-encoding:", re.IGNORECASE | re.MULTILINE)


class _TimedProtocol(H11Protocol):
    """HTTP/1.1 of uvicorn, with a deadline for every request and refusals in JSON.

    uvicorn waits for ever for the rest of a request.
    """

    _timer: asyncio.TimerHandle | None = None
    _deadline = 0.0
    _head = b""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_request()
        self._watch()

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.IDLE:
            self._head += data
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        self._expect_request()
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def _expect_request(self) -> None:
        self._head, self._deadline = b"", self.loop.time() + _REQUEST_SECONDS

    def _watch(self) -> None:
        """Close the connection unless more comes in time.

        Once the request is there the clock stands still: scoring takes as long as it
        takes.
        """
        if self._timer is not None:
            self._timer.cancel()
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            time = min(self._deadline, self.loop.time() + _READ_SECONDS)
            self._timer = self.loop.call_at(time, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, and lengths of a body that are no number."""
        length = _CONTENT_LENGTH.search(self._head)
        status, message = 400, f"the request is not understood; {ROUTES}"
        if length is not None and length[1].startswith(b"-"):
            status, message = 413, "Content-Length must not be negative"
        elif length is not None or _TRANSFER_ENCODING.search(self._head):
            status, message = 411, "send a Content-Length"
        body = json.dumps({"error": message}).encode()
        headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ]
        reason = HTTPStatus(status).phrase.encode()
        response = h11.Response(status_code=status, headers=headers, reason=reason)
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class ScorerServer:
    """A scorer at an address of this machine.

    It listens from the beginning and answers once `serve_forever` runs, best in a
    thread.

    Args:
        app (ASGI application): From `create_app`.
        host (`str`, defaults to "127.0.0.1"): Name or address to listen on.
        port (`int`, defaults to 0): 0 takes a free one.

    Attributes:
        server_address (`tuple`): Host and port, and more for IPv6.

    Raises:
        OSError: The port is taken or the host is not of this machine.
    """

    def __init__(self, app: FastAPI, host: str = "127.0.0.1", port: int = 0) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=_WAITING)
        self.server_address = self._socket.getsockname()
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http=_TimedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            headers=[("Server", "diffalign")],
            backlog=_WAITING,
            timeout_keep_alive=int(_READ_SECONDS),
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        self._uvicorn = uvicorn.Server(config)
        self._idle = threading.Event()
        self._idle.set()

    def serve_forever(self) -> None:
        """Answer requests until `stop` or `shutdown` is called."""
        self._idle.clear()
        try:
            self._uvicorn.run(sockets=[self._socket])
        finally:
            self._idle.set()

    def stop(self) -> None:
        """Tell `serve_forever` to end, without waiting, also in a signal handler."""
        self._uvicorn.should_exit = True

    def shutdown(self) -> None:
        """Tell `serve_forever` to end and wait for it.

        Requests that are there get five seconds. What is not scored by then gets 503.
        """
        self.stop()
        self._idle.wait()

    def server_close(self) -> None:
        """Stop listening."""
        self._socket.close()


def make_server(
    scorer: Scorer,
    host: str = "127.0.0.1",
    port: int = 0,
    limits: Limits | None = None,
    *,
    token: str | None = None,
) -> ScorerServer:
    """Make a server that is not running yet.

    Args:
        scorer (`Scorer`): Gives the scores.
        host (`str`, defaults to "127.0.0.1"): Name or address to listen on.
        port (`int`, defaults to 0): 0 takes a free one.
        limits (`Limits`, defaults to `Limits()`): What one request may ask for.
        token (`str`, *optional*): A secret that every request but `/health` must carry.

    Returns:
        `ScorerServer`: Call `serve_forever`, best in a thread, then `shutdown`.

    Raises:
        OSError: The port is taken or the host is not of this machine.
    """
    return ScorerServer(create_app(ScoringService(scorer, limits), token), host, port)


def serve(
    scorer: Scorer,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    *,
    token: str | None = None,
) -> None:
    """Serve until SIGTERM, and print the address first.

    Ctrl-C ends it too and raises KeyboardInterrupt. Call it in the main thread.

    Args:
        scorer (`Scorer`): Gives the scores.
        host (`str`, defaults to "127.0.0.1"): Name or address to listen on.
        port (`int`, defaults to 8000): 0 takes a free one.
        limits (`Limits`, defaults to `Limits()`): What one request may ask for.
        token (`str`, *optional*): A secret that every request but `/health` must carry.

    Raises:
        ConfigError: The port is taken or the host is not of this machine.
    """
    app = create_app(ScoringService(scorer, limits), token)
    title = f"{scorer.name} ({scorer.fingerprint()})"
    run_until_told(app, host, port, title, has_token=bool(token))


def run_until_told(
    app: FastAPI, host: str, port: int, title: str, *, has_token: bool = False
) -> None:
    """Serve an application until SIGTERM, and print its address first.

    Ctrl-C ends it too and raises KeyboardInterrupt. Call it in the main thread.

    Args:
        app (`FastAPI`): The application.
        host (`str`): Name or address to listen on.
        port (`int`): 0 takes a free one.
        title (`str`): What is served, for the message.
        has_token (`bool`, defaults to `False`): Whether clients need a secret.

    Raises:
        ConfigError: The port is taken or the host is not of this machine.
    """
    try:
        server = ScorerServer(app, host, port)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            "--port", f"cannot listen on {host}:{port} ({error}); choose another port"
        ) from error
    # A daemon, as are the threads in which it works: a batch under way does not hold up
    # the end of the process.
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    previous = signal.signal(signal.SIGTERM, lambda *_: server.stop())
    thread.start()
    try:
        _announce(title, *server.server_address[:2], has_token=has_token)
        while thread.is_alive():
            thread.join(1.0)  # Windows lets Ctrl-C through only between two waits
    finally:
        server.stop()
        thread.join()
        signal.signal(signal.SIGTERM, previous)


def _announce(title: str, host: str, port: int, *, has_token: bool) -> None:
    """Print the address, and a warning where other machines can reach it."""
    place = f"[{host}]" if ":" in host else host
    print(f"{title} at http://{place}:{port}", flush=True)
    if not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        who = "who knows the token" if has_token else "who reaches it (--token asks for a secret)"
        print(
            f"listening beyond this machine, without encryption: everybody {who} can use it",
            file=sys.stderr,
            flush=True,
        )
