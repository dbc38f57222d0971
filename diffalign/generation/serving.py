"""Offer a pipeline over HTTP, as the image API of OpenAI and the servers of diffusion
do.

- `POST /v1/images/generations` draws: `prompt`, `n`, `size` ("512x512"), `seed`,
  `num_inference_steps`, `guidance_scale`, `negative_prompt`, and `lora` (`{"name",
  "path", "scale"}`), as vLLM-Omni has it. Image i has the seed `seed` + i. The answer
  is `{"created", "data": [{"b64_json"}]}` with PNGs.
- `POST /v1/set_lora` (`lora_nickname`, `lora_path`, `strength`), `POST
  /v1/unmerge_lora_weights` and `GET /v1/list_loras` load a LoRA for all requests, as
  SGLang has it.
- `GET /v1/models` and `GET /health`.

It is meant for tests and for one training run on one machine. Images are drawn one
request at a time.
"""

from __future__ import annotations

import math
import re
import sys
import threading
import time
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from ..errors import UserError, one_line
from ..rewards.serving.client import png_base64
from ..rewards.serving.server import ScorerServer
from ..runtime.missing import Missing
from .pipelines import with_lora
from .sampling import generate

if TYPE_CHECKING:
    from ..runtime.protocols import LoraPipeline

_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
_MOST_IMAGES = 64
_LARGEST_SIDE = 4096
_LARGEST_BODY = 1 << 20


class BadRequest(Exception):
    """A request that cannot be answered. The text is for the client."""


def _whole(value: object, field: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadRequest(f"{field}: expected a whole number from {low} to {high}, got {value!r}")
    return value


def _number(value: object, field: str) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):  # type: ignore[arg-type]
        raise BadRequest(f"{field}: expected a number, got {value!r}")
    return float(value)  # type: ignore[arg-type]


class ModelService:
    """Draws images with a pipeline, with or without a LoRA.

    Args:
        pipe (`DiffusionPipeline`): A text-to-image pipeline.
        name (`str`): Name under which it is listed.
        batch_size (`int`, *optional*, defaults to `8`): Images per forward pass.
    """

    # While diffusers loads a LoRA, every thread makes modules without values.
    lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, pipe: LoraPipeline, name: str, batch_size: int = 8) -> None:
        self.pipe, self.name, self.batch_size = pipe, name, batch_size
        self.active: dict[str, Any] | None = None
        self._loaded = ExitStack()

    def draw(self, request: dict[str, Any]) -> list[str | Missing]:
        """Draw the images of a request.

        Args:
            request (`dict`): See the top of this file.

        Returns:
            `list[str]`: PNGs as base64. A `Missing` replaces an image that is not
            finite.

        Raises:
            BadRequest: A field makes no sense.
            UserError: The LoRA cannot be loaded.
        """
        prompt = request.get("prompt")
        if not isinstance(prompt, str):
            raise BadRequest(f"prompt: expected a text, got {type(prompt).__name__}")
        count = _whole(request.get("n", 1), "n", 1, _MOST_IMAGES)
        seed = _whole(request.get("seed", 0), "seed", 0, 2**63 - 1 - count)
        settings = self._settings(request)
        lora = request.get("lora")
        with self.lock, self._lora(lora):
            try:
                images = generate(
                    self.pipe,
                    [prompt] * count,
                    [seed + i for i in range(count)],
                    batch_size=self.batch_size,
                    progress=False,
                    **settings,
                )
            except ValueError as error:  # for instance a size that is no multiple of 8
                raise BadRequest(one_line(error)) from None
        return [image if isinstance(image, Missing) else png_base64(image) for image in images]

    def _settings(self, request: dict[str, Any]) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        if request.get("size") is not None:
            match = _SIZE.fullmatch(str(request["size"]))
            if match is None or not 0 < int(match[1]) * int(match[2]) <= _LARGEST_SIDE**2:
                raise BadRequest(
                    f'size: expected a text such as "512x512", got {request["size"]!r}'
                )
            settings |= {"width": int(match[1]), "height": int(match[2])}
        if request.get("num_inference_steps") is not None:
            steps = _whole(request["num_inference_steps"], "num_inference_steps", 1, 1000)
            settings["num_inference_steps"] = steps
        if request.get("guidance_scale") is not None:
            settings["guidance_scale"] = _number(request["guidance_scale"], "guidance_scale")
        if request.get("negative_prompt"):
            settings["negative_prompt"] = str(request["negative_prompt"])
        for name, allowed in (("response_format", "b64_json"), ("output_format", "png")):
            if request.get(name, allowed) != allowed:
                raise BadRequest(f"{name}: this server gives {allowed}, not {request[name]!r}")
        return settings

    def _lora(self, lora: Any) -> Any:
        """A context in which a request's own LoRA is loaded."""
        if lora is None:
            return nullcontext()
        if not isinstance(lora, dict) or not isinstance(lora.get("path"), str):
            raise BadRequest(f'lora: expected {{"name", "path", "scale"}}, got {lora!r}')
        if self.active is not None:
            raise BadRequest("lora: set_lora has loaded one for all requests; unmerge it first")
        scale = _number(lora.get("scale", 1.0), "lora.scale")
        return with_lora(self.pipe, lora["path"], scale, "served")

    def set_lora(self, request: dict[str, Any]) -> None:
        """Load a LoRA for all further requests, in place of an earlier one.

        Args:
            request (`dict`): `lora_nickname`, `lora_path` and `strength`.

        Raises:
            BadRequest: A field makes no sense.
            UserError: The LoRA cannot be loaded.
        """
        name, path = request.get("lora_nickname"), request.get("lora_path")
        if not isinstance(name, str) or not isinstance(path, str):
            raise BadRequest("lora_nickname, lora_path: expected two texts")
        strength = _number(request.get("strength", 1.0), "strength")
        with self.lock:
            self._unload()
            self._loaded.enter_context(with_lora(self.pipe, path, strength, "served"))
            self.active = {"nickname": name, "path": path, "strength": strength}

    def unset_lora(self) -> None:
        """Take the LoRA of all requests out."""
        with self.lock:
            self._unload()

    def _unload(self) -> None:
        self._loaded.close()
        self.active = None


def create_model_app(service: ModelService) -> FastAPI:
    """Put a pipeline behind addresses.

    Args:
        service (`ModelService`): Draws the images.

    Returns:
        `FastAPI`: An ASGI application.
    """
    app = FastAPI(openapi_url=None, redirect_slashes=False)

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [{"id": service.name, "object": "model"}]})

    @app.get("/v1/list_loras")
    async def loras() -> JSONResponse:
        active = [] if service.active is None else [service.active]
        loaded = [{"nickname": one["nickname"], "path": one["path"]} for one in active]
        return JSONResponse({"loaded_adapters": loaded, "active": {"transformer": active}})

    @app.post("/v1/images/generations")
    async def generations(request: Request) -> JSONResponse:
        def answer(body: dict[str, Any]) -> dict[str, Any]:
            images = service.draw(body)
            data = [
                {"b64_json": None, "error": image.reason}
                if isinstance(image, Missing)
                else {"b64_json": image}
                for image in images
            ]
            return {"created": int(time.time()), "data": data}

        return await _answered(request, answer)

    @app.post("/v1/set_lora")
    async def set_lora(request: Request) -> JSONResponse:
        def answer(body: dict[str, Any]) -> dict[str, Any]:
            service.set_lora(body)
            return {"status": "ok", "message": "Successfully set LoRA adapter(s)"}

        return await _answered(request, answer)

    @app.post("/v1/unmerge_lora_weights")
    async def unset_lora(request: Request) -> JSONResponse:
        def answer(body: dict[str, Any]) -> dict[str, Any]:
            service.unset_lora()
            return {"status": "ok", "message": "Successfully unmerged LoRA weights"}

        return await _answered(request, answer)

    return app


async def _answered(request: Request, answer: Any) -> JSONResponse:
    """Answer a POST, or say in one sentence why not."""
    length = request.headers.get("Content-Length", "")
    if not length.isdecimal() or int(length) > _LARGEST_BODY:
        return _refused(413, f"send a Content-Length of at most {_LARGEST_BODY} bytes")
    try:
        body = await request.json() if int(length) else {}
    except ValueError:
        body = None
    if not isinstance(body, dict):
        return _refused(400, "expected a JSON object")
    try:
        return JSONResponse(await run_in_threadpool(answer, body))
    except BadRequest as error:
        return _refused(400, str(error))
    except UserError as error:
        return _refused(400, str(error))
    except Exception as error:
        print(f"{type(error).__name__} while drawing: {error}", file=sys.stderr, flush=True)
        return _refused(500, "drawing failed; see the log of the server")


def _refused(status: int, message: str) -> JSONResponse:
    return JSONResponse(
        {"error": {"message": message, "type": "invalid_request_error", "code": status}}, status
    )


def make_model_server(
    service: ModelService, host: str = "127.0.0.1", port: int = 0
) -> ScorerServer:
    """Make a server that is not running yet.

    Args:
        service (`ModelService`): Draws the images.
        host (`str`, defaults to "127.0.0.1"): Name or address to listen on.
        port (`int`, defaults to 0): 0 takes a free one.

    Returns:
        `ScorerServer`: Call `serve_forever`, best in a thread, then `shutdown`.

    Raises:
        OSError: The port is taken or the host is not of this machine.
    """
    return ScorerServer(create_model_app(service), host, port)
