"""The web application in front of a scorer: JSON with images as base64 inside.

- `GET /info` gives the card, the fingerprint and the limits.
- `POST /score` takes `{"expect_fingerprint", "items": [{"image", "prompt",
  "metadata"}]}` and gives `{"scores": [number or null], "errors": [sentence or null],
  "fingerprint"}`.
- `GET /health` says ok.

Nothing is unpickled, and no path or traceback of this machine is told.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import sys
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ...errors import UserError
from .service import Refused, ScoringService, without_places

ROUTES = "there are GET /info, GET /health and POST /score"


class _JSON(JSONResponse):
    """JSON in ASCII, which can also carry half a character of a broken prompt."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


def _refusal(status: int, message: str) -> Response:
    # The rest of a refused body is not read, so it must not be taken for a request.
    return _JSON({"error": message}, status, {"Connection": "close"})


def create_app(service: ScoringService, token: str | None = None) -> FastAPI:
    """Put a service behind addresses.

    Args:
        service (`ScoringService`): Scores the items.
        token (`str`, *optional*): A secret that every request but `/health` must carry,
            as `Authorization: Bearer TOKEN`.

    Returns:
        `FastAPI`: An ASGI application. It does not limit how slowly a request arrives;
        `server` does.
    """
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    one_at_a_time = asyncio.Lock()  # decoded images of many requests would fill the memory

    def may_ask(request: Request) -> bool:
        header = request.headers.get("Authorization", "").encode("latin-1", "replace")
        return token is None or hmac.compare_digest(header, f"Bearer {token}".encode())

    async def check_token(request: Request) -> None:
        if not may_ask(request):
            raise Refused(401, "this server asks for a token")

    @app.get("/health")
    async def health(request: Request) -> Response:
        return _answer(request, {"status": "ok"})

    @app.get("/info", dependencies=[Depends(check_token)])
    async def info(request: Request) -> Response:
        return _answer(request, service.info())

    @app.post("/score", dependencies=[Depends(check_token)])
    async def score(request: Request) -> Response:
        try:
            body = await _body(request, service.limits.max_bytes)
            items = await run_in_threadpool(service.items, body)
            del body
            async with one_at_a_time:
                return _JSON(await run_in_threadpool(service.score, items))
        except (Refused, ClientDisconnect):
            raise
        except UserError as error:  # what the scorer says of this request
            print(f"refused: {error}", file=sys.stderr, flush=True)
            return _refusal(400, without_places(str(error)))
        except asyncio.CancelledError:
            return _refusal(503, "the server is stopping")
        except Exception as error:
            print(f"{type(error).__name__} while scoring: {error}", file=sys.stderr, flush=True)
            return _refusal(500, "the scorer failed; see the log of the server")

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return _refusal(error.status, str(error))

    @app.exception_handler(ClientDisconnect)
    async def client_gone(request: Request, error: ClientDisconnect) -> Response:
        return _refusal(400, "the request was cut short")  # nobody reads it

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> Response:
        if request.method not in ("GET", "POST"):
            return _refusal(501, f"the request is not understood; {ROUTES}")
        if request.method == "GET" and not may_ask(request):
            return _refusal(401, "this server asks for a token")
        return _refusal(404, ROUTES)

    return app


def _answer(request: Request, content: dict[str, Any]) -> Response:
    """Answer a GET. The body of a GET is not read, so it ends the connection."""
    has_body = (
        request.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in request.headers
    )
    return _JSON(content, headers={"Connection": "close"} if has_body else None)


async def _body(request: Request, max_bytes: int) -> bytearray:
    """Read the body of a request that says beforehand how long it is.

    Raises:
        Refused: 411 for an unknown length, 413 for more than `max_bytes`.
    """
    length = request.headers.get("Content-Length", "")
    if "Transfer-Encoding" in request.headers or not length.isdecimal():
        raise Refused(411, "send a Content-Length")
    if int(length) > max_bytes:
        raise Refused(413, f"the request is larger than {max_bytes} bytes")
    body = bytearray()
    async for part in request.stream():
        body += part
    return body
