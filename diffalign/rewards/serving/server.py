"""``diffalign serve-scorer``: one scorer over HTTP, JSON with PNG images inside, for judges that need an environment of their own.

``GET /info`` gives the card, the fingerprint and the limits; ``POST /score`` takes ``{"expect_fingerprint", "items": [{"image": base64,
"prompt", "metadata"}]}`` and gives ``{"scores": [number or null], "errors": [sentence or null], "fingerprint"}``; ``GET /health`` says ok.
Nothing is unpickled, sizes and counts are limited, and no path or traceback of this machine is ever told. There is no authentication: it
listens on this machine only unless told otherwise.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hmac
import io
import ipaddress
import json
import math
import re
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, UserError
from ...runtime import decoding

if TYPE_CHECKING:
    from ..base import Scorer

_FORMATS = ("PNG", "JPEG", "WEBP")
_READ_SECONDS = 30.0
_REQUEST_SECONDS = 120.0  # for a whole request, however slowly it drips
_WAITING = 512  # connections that the system holds until a thread takes them
_VALUES_PER_ITEM = 5_000  # of JSON, counted before it is parsed: a body of `[],` needs thirty times its size as objects
_FEW_VALUES = 100_000  # which no memory minds
TOKEN = "DIFFALIGN_SCORER_TOKEN"
_PIXELS_AT_ONCE = 1 << 25  # decoded before they are scored: 128 MiB of RGBA
_PLACE = re.compile(r"""(['"])(?:[~/]|[A-Za-z]:\\)[^'"]*\1|(?<![\w:/.])/[^\s'",;)]+""")


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_items: int = 64
    """Images."""
    max_bytes: int = 128 << 20
    """Bytes of the request."""
    max_pixels: int = 4096 * 4096
    """Pixels of one decoded image."""
    max_prompt: int = 20_000
    """Characters of one prompt."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ConfigError(f"--{name}", f"expected int >= 1, got {value}")


def _public(sentence: str) -> str:
    """The sentence without the places of files on this machine, such as that of a cache which cannot be read."""
    return _PLACE.sub("(a file of the server)", sentence)


class _Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Server(ThreadingHTTPServer):
    request_queue_size = _WAITING
    daemon_threads = True


def make_server(
    scorer: Scorer,
    host: str = "127.0.0.1",
    port: int = 0,
    limits: Limits | None = None,
    *,
    token: str | None = None,
) -> ThreadingHTTPServer:
    """A server that is not running yet: call `serve_forever`, best in a thread, and `shutdown`. `server_address` has the port.

    Args:
        token: a secret that every request but /health must carry, as ``Authorization: Bearer TOKEN``.
    """
    service = _Service(scorer, limits or Limits())
    handler = type("Handler", (_Handler,), {"service": service, "token": token})
    return _Server((host, port), handler)


class _Service:
    """What is behind the addresses; knows nothing of HTTP."""

    def __init__(self, scorer: Scorer, limits: Limits) -> None:
        self.scorer, self.limits = scorer, limits
        self.fingerprint = scorer.fingerprint()
        self._lock = threading.Lock()  # one forward pass at a time

    def info(self) -> dict[str, Any]:
        return {
            "spec": self.scorer.spec.as_dict(),
            "fingerprint": self.fingerprint,
            "limits": asdict(self.limits),
        }

    def score(self, request: Any) -> dict[str, Any]:
        """Checks and scores a request.

        Raises:
            _Refused: 400 for what is malformed, 409 for another fingerprint, 413 for too many items.
        """
        if not isinstance(request, Mapping):
            raise _Refused(400, "expected a JSON object with items")
        expected = request.get("expect_fingerprint")
        if expected is not None and expected != self.fingerprint:
            raise _Refused(
                409, f"this scorer has the fingerprint {self.fingerprint}, not the expected one"
            )
        wanted = request.get("scorer")
        if wanted is not None and wanted != self.scorer.spec.key:
            raise _Refused(
                409, f"this is {self.scorer.spec.key}, not the scorer that was asked for"
            )
        items = request.get("items")
        if not isinstance(items, list) or not items:
            raise _Refused(400, "items: expected a list of at least one object with an image")
        if len(items) > self.limits.max_items:
            raise _Refused(
                413, f"items: {len(items)} are more than the limit of {self.limits.max_items}"
            )
        scores: list[float | None] = [None] * len(items)
        errors: list[str | None] = [None] * len(items)
        ready: list[tuple[int, Any, str, dict[str, Any]]] = []
        with self._lock:  # decoding too, so that many requests do not fill the memory together
            for i, item in enumerate(items):
                try:
                    ready.append((i, *self._read(item)))
                except ValueError as error:
                    errors[i] = str(error)
                if sum(image.width * image.height for _, image, _, _ in ready) >= _PIXELS_AT_ONCE:
                    self._score_ready(ready, scores, errors)
            self._score_ready(ready, scores, errors)
        return {"scores": scores, "errors": errors, "fingerprint": self.fingerprint}

    def _score_ready(
        self, ready: list[Any], scores: list[float | None], errors: list[str | None]
    ) -> None:
        """Scores what was decoded and lets go of it."""
        if not ready:
            return
        for place, value, error in self._scored(ready):
            scores[place], errors[place] = value, error
        ready.clear()

    def _scored(self, ready: list[Any]) -> list[tuple[int, float | None, str | None]]:
        """(place, score, error) of items; where the scorer fails on them together, one by one, so that a bad one costs no other.

        Where it fails on all of them the fault is not an item's, and the request fails: its client tries again.
        """
        places, images, prompts, metadata = zip(*ready, strict=True)
        try:
            result = self.scorer.score(list(images), list(prompts), list(metadata), on_error="nan")
        except Exception:
            if len(ready) == 1:
                raise
            return self._one_by_one(ready)
        rows: list[tuple[int, float | None, str | None]] = []
        for number, (place, value) in enumerate(zip(places, result.values.tolist(), strict=True)):
            good = math.isfinite(value)
            rows.append(
                (
                    place,
                    value if good else None,
                    None if good else _public(result.errors.get(number, "no score")),
                )
            )
        return rows

    def _one_by_one(self, ready: list[Any]) -> list[tuple[int, float | None, str | None]]:
        rows: list[tuple[int, float | None, str | None]] = []
        failures: list[Exception] = []
        for item in ready:
            try:
                rows += self._scored([item])
            except Exception as error:
                failures.append(error)
                print(
                    f"no score for an item: {type(error).__name__}: {error}",
                    file=sys.stderr,
                    flush=True,
                )
                reason = (
                    str(error)
                    if isinstance(error, UserError)
                    else "the scorer failed on this item; its own output says why"
                )
                rows.append((item[0], None, _public(reason)))
        if len(failures) == len(ready):
            raise failures[0]
        return rows

    def _read(self, item: Any) -> tuple[Any, str, dict[str, Any]]:
        """(image, prompt, metadata) of one item.

        Raises:
            ValueError: with the sentence for this item.
        """
        if not isinstance(item, Mapping):
            raise ValueError("expected an object with an image")
        image, prompt, metadata = (
            self._image(item.get("image")),
            item.get("prompt"),
            item.get("metadata"),
        )
        # A score for a prompt that nobody gave would be a made-up number.
        for name, value in (("prompt", prompt), ("metadata", metadata)):
            if value is None and name in self.scorer.spec.requires:
                raise ValueError(f"{name}: {self.scorer.spec.key} needs it with every image")
        prompt, metadata = "" if prompt is None else prompt, {} if metadata is None else metadata
        if not isinstance(prompt, str) or len(prompt) > self.limits.max_prompt:
            raise ValueError(
                f"prompt: expected text of at most {self.limits.max_prompt} characters"
            )
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ValueError("prompt: holds half a character (an unpaired surrogate)")
        if not isinstance(metadata, dict):
            raise ValueError("metadata: expected an object")
        return image, prompt, metadata

    def _image(self, text: Any) -> Any:
        from PIL import Image

        if not isinstance(text, str):
            raise ValueError("image: expected base64 text")
        try:
            image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=_FORMATS)
        except (binascii.Error, ValueError, OSError, SyntaxError, Image.DecompressionBombError):
            raise ValueError(f"image: expected {', '.join(_FORMATS)} as base64") from None
        # Before decoding: a few bytes may claim gigapixels.
        if image.width * image.height > self.limits.max_pixels:
            raise ValueError(
                f"image: {image.width}x{image.height} is more than {self.limits.max_pixels} pixels"
            )
        try:
            image.load()
            return decoding.to_rgb(image)
        except Exception as error:  # PIL's plugins raise whatever the bad bytes lead them to
            reason = f" ({error})" if isinstance(error, decoding.UnreadableImage) else ""
            raise ValueError(f"image: cannot be decoded{reason}") from None


class _Handler(BaseHTTPRequestHandler):
    service: _Service
    token: str | None = None
    timeout = _READ_SECONDS  # a client that stops in the middle does not hold a thread for ever
    server_version, sys_version = "diffalign", ""
    protocol_version = "HTTP/1.1"

    def handle_one_request(self) -> None:
        """One request, for whose reading there is a deadline: a byte now and then would hold a thread for ever."""
        self._timer = threading.Timer(_REQUEST_SECONDS, self._cut)
        self._timer.daemon = True
        self._timer.start()
        try:
            super().handle_one_request()
        finally:
            self._timer.cancel()

    def _cut(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _may_ask(self) -> bool:
        given = self.headers.get("Authorization", "").encode("latin-1", "replace")
        return self.token is None or hmac.compare_digest(given, f"Bearer {self.token}".encode())

    def do_GET(self) -> None:
        if self.headers.get("Content-Length", "0") != "0" or self.headers.get("Transfer-Encoding"):
            self.close_connection = (
                True  # a body that nobody reads must not be taken for the next request
            )
        if self.path != "/health" and not self._may_ask():
            self.close_connection = True
            self._answer(401, {"error": "this server asks for a token"})
        elif self.path == "/info":
            self._answer(200, self.service.info())
        elif self.path == "/health":
            self._answer(200, {"status": "ok"})
        else:
            self._answer(404, {"error": "there are GET /info, GET /health and POST /score"})

    def do_POST(self) -> None:
        try:
            if self.path != "/score":
                raise _Refused(404, "there are GET /info, GET /health and POST /score")
            if not self._may_ask():
                raise _Refused(401, "this server asks for a token")
            body = self._body()
            self._timer.cancel()  # scoring takes as long as it takes
            self._answer(200, self.service.score(body))
        except _Refused as refused:
            self.close_connection = True  # the rest of the body was not read
            self._answer(refused.status, {"error": str(refused)})
        except UserError as error:  # what the scorer says of this request
            print(f"refused: {error}", file=sys.stderr, flush=True)
            self._answer(400, {"error": _public(str(error))})
        except OSError:
            self.close_connection = True
        except Exception as error:
            print(f"{type(error).__name__} while scoring: {error}", file=sys.stderr, flush=True)
            self._answer(500, {"error": "the scorer failed; its own output says why"})

    def _body(self) -> Any:
        if self.headers.get("Transfer-Encoding"):
            raise _Refused(411, "send a Content-Length")
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            raise _Refused(411, "send a Content-Length") from None
        if length < 0 or length > self.service.limits.max_bytes:
            raise _Refused(413, f"the request is larger than {self.service.limits.max_bytes} bytes")
        data = self.rfile.read(length)
        values = data.count(b",") + data.count(b"[") + data.count(b"{")
        if values > max(_FEW_VALUES, _VALUES_PER_ITEM * self.service.limits.max_items):
            raise _Refused(
                413,
                f"the request holds about {values} values, more than {self.service.limits.max_items} items need",
            )
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise _Refused(400, "the body is not JSON") from None

    def _answer(self, status: int, value: Mapping[str, Any]) -> None:
        body = json.dumps(value).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            self.close_connection = True  # the client has gone

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses, such as other methods: as JSON too."""
        self.close_connection = True
        self._answer(
            code,
            {
                "error": "the request is not understood; there are GET /info, GET /health and POST /score"
            },
        )

    def log_message(self, format: str, *values: Any) -> None:
        """Requests are not logged."""
