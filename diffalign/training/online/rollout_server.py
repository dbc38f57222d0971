"""Images drawn elsewhere, by a server that holds the model and takes a LoRA.

It speaks OpenAI's image API with the LoRA loading of vLLM-Omni (a field of each
request) or of SGLang (a state of the server), and asks which of the two it is.
`diffalign serve-model` knows both. Only images come back. They are encoded by the
autoencoder, so this is for methods that need no log-probabilities.

The LoRA is passed as a path, so server and training must see the same disk. Every push
has a path of its own, because servers keep what they have read by its path. SGLang also
keeps a LoRA for every name, so there the name is always the same.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ...rewards.serving.client import ServerFailure, request_json
from ...rewards.serving.pool import ServerPool, check_urls
from ...runtime.decoding import UnreadableImage, decode
from ...runtime.missing import MaybeImage, Missing

_CHECK_PROMPT = "a photo"
_CHECK_SCALE = 64.0
"""The check draws with a LoRA that is so much stronger, since that of the first steps
changes no pixel."""
_NICKNAME = "diffalign"
_CHUNK = 8  # images that are scored together
_TIMEOUT, _RETRIES, _BACKOFF = 600.0, 3, 0.5


class RolloutServer:
    """One server or several that draw the images of a run.

    Args:
        url (`str` or sequence of `str`): Address, or several with the same model.
        settings (`dict`): What every request says: `size`, `num_inference_steps`,
            `guidance_scale`.
        concurrency (`int`, *optional*, defaults to `4`): Requests at once, for each
            server.

    Attributes:
        keeps_lora (`bool`): Whether the LoRA is a state of the server, as with SGLang.

    Raises:
        ConfigError: An address is none.
        UserError: A server cannot be reached.
    """

    def __init__(
        self, url: str | Sequence[str], settings: dict[str, Any], concurrency: int = 4
    ) -> None:
        self.urls, self.settings = check_urls(url), settings
        self.pool = ServerPool(self.urls, timeout=_TIMEOUT, retries=_RETRIES, backoff=_BACKOFF)
        self.workers = concurrency * len(self.urls)
        self.lora: dict[str, Any] | None = None
        kinds = {self._keeps_lora(address) for address in self.urls}
        if len(kinds) > 1:
            raise UserError(
                "rollout_server: the servers load LoRAs in different ways; give servers of one kind"
            )
        self.keeps_lora = kinds.pop()

    @staticmethod
    def _keeps_lora(address: str) -> bool:
        try:
            request_json(f"{address}/v1/list_loras", timeout=60.0, retries=_RETRIES)
        except ServerFailure as failure:
            if failure.status in (404, 405):
                return False
            raise UserError(f"rollout_server: {failure}") from None
        return True

    def push(self, folder: Path, name: str) -> None:
        """Make all servers draw with a LoRA, and check that it is active.

        Args:
            folder (`Path`): Folder with the LoRA, of a name that was never used before.
            name (`str`): Name of the LoRA.

        Raises:
            UserError: A server refuses it, or draws as without it.
        """
        path = str(folder.resolve())
        with ThreadPoolExecutor(len(self.urls)) as pool:
            list(pool.map(lambda address: self._push_to(address, path, name), self.urls))
        self.lora = {"name": name, "path": path, "scale": 1.0}

    def _push_to(self, address: str, path: str, name: str) -> None:
        """Make one server draw with a LoRA, and check that it is active."""
        plain = self._check_image(address, None)
        if isinstance(plain, Missing):
            raise UserError(f"rollout_server: {address} drew no image: {plain.reason}")
        strong = {"name": f"{name}-check", "path": path, "scale": _CHECK_SCALE}
        changed = self._check_image(address, strong)
        # So strong a LoRA may well break the image.
        if not isinstance(changed, Missing) and np.array_equal(
            np.asarray(plain), np.asarray(changed)
        ):
            raise UserError(
                f"rollout_server: {address} draws the same image with and without the LoRA "
                f"in {path}; its files must lie on a disk that the server sees, and their "
                "layers must be those of its model"
            )
        if self.keeps_lora:
            self._set(address, {"name": name, "path": path, "scale": 1.0})

    def clear(self) -> None:
        """Make all servers draw without a LoRA."""
        if self.keeps_lora:
            for address in self.urls:
                self._set(address, None)
        self.lora = None

    def _set(self, address: str, lora: dict[str, Any] | None) -> None:
        """Change the LoRA that a server keeps."""
        path, body = "/v1/unmerge_lora_weights", {}
        if lora is not None:
            path = "/v1/set_lora"
            body = {
                "lora_nickname": _NICKNAME,
                "lora_path": lora["path"],
                "strength": lora["scale"],
                # Merging rounds a small LoRA away.
                "merge_mode": "dynamic",
            }
        try:
            request_json(f"{address}{path}", body, timeout=_TIMEOUT, retries=_RETRIES)
        except ServerFailure as failure:
            raise UserError(f"rollout_server: {failure}") from None

    def _check_image(self, address: str, lora: dict[str, Any] | None) -> MaybeImage:
        body: dict[str, Any] = self._body(_CHECK_PROMPT, 0)
        if self.keeps_lora:
            self._set(address, lora)
        elif lora is not None:
            body["lora"] = lora
        try:
            reply = request_json(
                f"{address}/v1/images/generations", body, timeout=_TIMEOUT, retries=_RETRIES
            )
        except ServerFailure as failure:
            raise UserError(f"rollout_server: {failure}") from None
        return _image(reply, address)

    def _body(self, prompt: str, seed: int) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "n": 1,
            "seed": seed,
            "response_format": "b64_json",
            "output_format": "png",
            **self.settings,
        }

    def _of_size(self, image: MaybeImage, place: str) -> MaybeImage:
        """Refuse an image of another size than the run's.

        Raises:
            UserError: It has another size.
        """
        asked = self.settings.get("size")
        if isinstance(image, Missing) or asked is None:
            return image
        size = "{}x{}".format(*image.size)
        if size != asked:
            raise UserError(
                f"rollout_server: {place} drew an image of {size} pixels where {asked} were asked "
                "for; serve the model at the run's resolution"
            )
        return image

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        on_images: Callable[[int, list[MaybeImage]], None] | None = None,
    ) -> list[MaybeImage]:
        """Draw one image per prompt and seed.

        Args:
            prompts (`Sequence[str]`): n prompts.
            seeds (`Sequence[int]`): n seeds, from 0 to 2^31 - 1.
            on_images (`Callable`, *optional*): Receives the index of a chunk's first
                image and the chunk's images, as soon as they are there.

        Returns:
            `list`: n images. Some may be `Missing`, if the server says so.

        Raises:
            UserError: No server answers, or one answers without an image.
        """

        def one(prompt: str, seed: int) -> MaybeImage:
            body = self._body(prompt, seed)
            if self.lora is not None and not self.keeps_lora:
                body["lora"] = self.lora
            try:
                place, reply = self.pool.request("/v1/images/generations", body)
            except ServerFailure as failure:
                raise UserError(f"rollout_server: {failure}") from None
            return self._of_size(_image(reply, place), place)

        images: list[MaybeImage] = []
        told = 0
        with ThreadPoolExecutor(self.workers) as pool:
            for image in pool.map(one, prompts, seeds):
                images.append(image)
                if on_images is not None and (
                    len(images) - told == _CHUNK or len(images) == len(prompts)
                ):
                    on_images(told, images[told:])
                    told = len(images)
        return images


def _image(reply: dict[str, Any], place: str) -> MaybeImage:
    """Read the image of an answer.

    Raises:
        UserError: There is none.
    """
    try:
        entry = reply["data"][0]
        if entry.get("b64_json") is None and entry.get("error"):
            return Missing(str(entry["error"])[:200])
        return decode(base64.b64decode(entry["b64_json"]))
    except (
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        binascii.Error,
        UnreadableImage,
    ) as error:
        raise UserError(
            f"rollout_server: {place} answered without an image ({type(error).__name__}); "
            "it must give b64_json"
        ) from None
