"""Scorers made of neural towers: prompts encoded once, images prepared in threads, gradients where declared."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, UserError
from ..runtime.devices import read_dtype
from .base import Call, Item, Scorer
from .images import ImageInput, Preprocess, check_pixels, read_images

_TEXTS_KEPT = 512  # prompts whose features stay in memory between calls


class ModelScorer(Scorer):
    """A scorer made of neural towers: unique prompts are encoded once, images are prepared in threads while the towers run.

    A new one writes `text_features`, `image_features` and `similarity`, and sets `preprocess`.
    """

    preprocess: Preprocess

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._texts: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()

    # What a scorer writes

    def text_features(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """What `similarity` needs of prompts: tensors with one row per prompt, on the device."""
        raise NotImplementedError

    def image_features(self, pixels: Tensor) -> Tensor:
        """Features of normalised pixels (n, 3, size, size) of the towers' dtype; one row per image."""
        raise NotImplementedError

    def similarity(self, image: Tensor, text: tuple[Tensor, ...]) -> Tensor:
        """Scores (n,) of rows of features, float32 or wider."""
        raise NotImplementedError

    def towers(self) -> Iterable[nn.Module]:
        """Networks that run in `dtype`."""
        return ()

    def heads(self) -> Iterable[nn.Module]:
        """Networks that stay in float32 when the towers run in half precision."""
        return ()

    # How it works

    def score_tensor(self, pixels: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        if not self.differentiable:
            return super().score_tensor(pixels, prompts)
        check_pixels(pixels)
        if pixels.dtype == torch.uint8:
            raise UserError(
                "pixels: expected floats in [0, 1], got uint8, which carries no gradient; call scorer(images, prompts)"
            )
        texts = [
            item.prompt
            for item in self._items([ImageInput("pixels", b"")] * len(pixels), prompts, None)
        ]
        with torch.autocast(self.device.type, enabled=False):
            pixels = pixels.to(self.device)
            if self.dtype != torch.float64:
                pixels = pixels.float()
            with torch.no_grad():
                features = self._gather(texts, batch_size=len(pixels))
            prepared = self.preprocess.normalise(self.preprocess.tensor(pixels))
            return self.similarity(self.image_features(prepared.to(self.dtype)), features)

    @torch.no_grad()
    def embed(self, images: Any) -> Tensor:
        """Image embeddings (n, d), float32 on the CPU, as `image_features` makes them.

        Raises:
            UserError: unreadable images, or a scorer whose features are no single vector per image.
        """
        rows = []
        for given in read_images(images):
            pixels = self.preprocess.normalise(
                self.preprocess.exact(given.image)[None].to(self.device)
            )
            rows.append(self.image_features(pixels.to(self.dtype)).float().cpu())
        found = torch.cat(rows)
        if found.ndim != 2:
            raise UserError(
                f"{self.name} has no single embedding per image; take a CLIP scorer such as clip-b32 or pickscore"
            )
        return found

    def modules(self) -> Iterable[nn.Module]:
        return [*self.towers(), *self.heads()]

    def to(self, device: Any = None, dtype: Any = None) -> Scorer:
        """Moves the networks. Precision that was given up cannot be had back: errors as loading, and `ConfigError` on widening."""
        if dtype is not None and self.dtype.itemsize < 4 and read_dtype(dtype) != self.dtype:
            held = str(self.dtype).removeprefix("torch.")
            raise ConfigError(
                "dtype",
                f"{self.name} was rounded to {held} and cannot be widened; load it again with that dtype",
            )
        super().to(device, dtype)
        if dtype is not None:
            for tower in self.towers():
                tower.to(self.dtype)
            for head in self.heads():
                head.to(torch.promote_types(self.dtype, torch.float32))
        self._texts.clear()
        return self

    def _run(self, items: Mapping[bytes, Item], size: int, call: Call) -> dict[bytes, float]:
        if not items:
            return {}
        values: dict[bytes, float] = {}
        keys = list(items)
        # Beside a GPU the next batch is prepared while the towers run. On a CPU the two would only take each other's cores.
        ahead = size if self.device.type != "cpu" else 0
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:

            def prepare(start: int) -> dict[bytes, Any]:
                return {
                    key: pool.submit(self._pixels, items[key]) for key in keys[start : start + size]
                }

            ready = prepare(0) if ahead else {}
            self._encode([items[key].prompt for key in keys], size)
            for start in range(0, len(keys), size):
                current = ready if ahead else prepare(start)
                ready = prepare(start + ahead) if ahead else {}
                pixels = {
                    key: value
                    for key, future in current.items()
                    if (value := call.result_of(key, future)) is not None
                }
                if pixels:
                    rows = _Rows(
                        self.preprocess.stack(list(pixels.values())),
                        [items[key].prompt for key in pixels],
                    )
                    values.update(
                        zip(pixels, self._with_halving(self._score_rows, rows)[0], strict=True)
                    )
        return values

    def _pixels(self, item: Item) -> Tensor:
        pixels = self.preprocess.exact(item.image)
        item.input.release()
        return pixels

    def _score_rows(self, rows: _Rows) -> tuple[list[float], dict[int, str]]:
        pixels = self.preprocess.normalise(rows.pixels.to(self.device, non_blocking=True))
        features = self.image_features(pixels.to(self.dtype))
        scores = self.similarity(features, self._gather(rows.prompts, batch_size=len(rows)))
        return scores.float().cpu().tolist(), {}

    def _encode(self, prompts: Sequence[str], batch_size: int) -> None:
        """Features of prompts not known yet, a batch at a time."""
        unknown = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        for start in range(0, len(unknown), batch_size):
            part = unknown[start : start + batch_size]
            features = self.text_features(part)
            for i, prompt in enumerate(part):
                self._texts[prompt] = tuple(feature[i] for feature in features)
        for prompt in dict.fromkeys(
            prompts
        ):  # those that are wanted now are the last to be forgotten
            self._texts.move_to_end(prompt)
        while len(self._texts) > max(_TEXTS_KEPT, len(set(prompts))):
            self._texts.popitem(last=False)

    def _gather(self, prompts: Sequence[str], batch_size: int) -> tuple[Tensor, ...]:
        self._encode(prompts, batch_size)
        rows = [self._texts[prompt] for prompt in prompts]
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))


@dataclass
class _Rows:
    """Prepared images with their prompts; slices like a list."""

    pixels: Tensor
    prompts: list[str]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, part: slice) -> _Rows:
        return _Rows(self.pixels[part], self.prompts[part])
