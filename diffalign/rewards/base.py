"""What every scorer does around its model: inputs checked, duplicates scored once, the cache asked, micro-batches, missing values.

Two modes, never mixed: `score` reads 8-bit images exactly as the published code does, without gradients; `score_tensor` is
differentiable with respect to float pixels.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError, UserError
from ..runtime.devices import read_device, read_dtype
from .cache import ScoreCache
from .content_key import content_key
from .images import ImageInput, UnreadableImage, read_images
from .spec import ScorerSpec

_LARGEST = torch.finfo(torch.float32).max


@dataclass
class ScoreResult:
    """What `Scorer.score` returns.

    Attributes:
        values: float32 on the CPU, (N,); NaN where a score is missing, never a made-up number.
        errors: index of a missing score -> one sentence why.
        cached: how many were answered from the cache.
    """

    values: Tensor
    errors: dict[int, str] = field(default_factory=dict)
    cached: int = 0


@dataclass
class Item:
    """One image with its prompt and metadata, as a micro-batch sees it."""

    input: ImageInput
    prompt: str
    metadata: dict[str, Any]

    @property
    def image(self) -> Any:
        return self.input.image


@dataclass
class Call:
    """One call of `score`: where equal items stand, and what went wrong."""

    result: ScoreResult
    on_error: str
    places: dict[bytes, list[int]] = field(default_factory=dict)

    def missing(self, key: bytes, sentence: str) -> None:
        self.result.errors.update(dict.fromkeys(self.places[key], sentence))

    def guard(self, place: int, read: Callable[[], bytes | None]) -> bytes | None:
        """`read()`, or None for an image that is known or found to be unreadable."""
        if place in self.result.errors:
            return None
        try:
            return read()
        except UnreadableImage as error:
            if self.on_error == "raise":
                raise
            self.result.errors[place] = str(error)
            return None

    def readable(self, key: bytes, item: Item) -> bool:
        return self.result_of(key, lambda: item.image) is not None

    def result_of(self, key: bytes, source: Any) -> Any:
        """What a future or function returns; None when its image cannot be read and that is no reason to stop."""
        try:
            return source() if callable(source) else source.result()
        except UnreadableImage as error:
            if self.on_error == "raise":
                raise
            self.missing(key, str(error))
            return None


class Scorer:
    """Base class of all scorers. A new one sets `spec` and writes `score_batch`.

    Args:
        device (`str` or `torch.device`, *optional*): where it runs; None takes the GPU when there is one.
        dtype (`torch.dtype` or its name, *optional*): of the towers; None is float32, the reference. Heads, normalisation and dot
            products stay in float32.
        batch_size (`int`, *optional*): images per forward pass; None takes 16, and 8 on a CPU, whose caches hold no more.
        cache (`ScoreCache` or path, *optional*): scores are looked up there first and written there.
    """

    spec: ClassVar[ScorerSpec]
    deterministic: ClassVar[bool] = True

    def __init__(
        self,
        *,
        device: Any = None,
        dtype: Any = None,
        batch_size: int | None = None,
        cache: ScoreCache | str | Path | None = None,
    ) -> None:
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ConfigError("batch_size", f"expected int >= 1, got {batch_size!r}")
        self.device = read_device(device)
        self.dtype = read_dtype(dtype)
        self.batch_size = batch_size
        self.cache = ScoreCache(cache) if isinstance(cache, (str, Path)) else cache
        self._fits: int | None = None  # the micro-batch that last fitted into memory
        self._fingerprint: tuple[torch.dtype, str] | None = None

    # What a scorer writes

    def score_batch(
        self, items: list[Item]
    ) -> Sequence[float] | Tensor | tuple[Sequence[float] | Tensor, Mapping[int, str]]:
        """Scores of one micro-batch, NaN = missing; with a second value, index -> why it is missing."""
        raise NotImplementedError(f"{type(self).__name__} must write score_batch")

    def identity(self) -> dict[str, Any]:
        """Everything beyond the card that changes its numbers: weights' hash, options. Part of the fingerprint."""
        return {}

    def modules(self) -> Iterable[nn.Module]:
        """The networks, for `to` and `close`."""
        return ()

    # What users call

    @property
    def name(self) -> str:
        return self.spec.key

    @property
    def differentiable(self) -> bool:
        """Whether `score_tensor` works."""
        return self.spec.differentiable

    def __call__(
        self,
        images: Any,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        *,
        batch_size: int | None = None,
    ) -> Tensor:
        """Scores as a float32 tensor (N,) on the CPU, NaN = missing. Arguments and errors as `score`."""
        return self.score(images, prompts, metadata, batch_size=batch_size).values

    def score(
        self,
        images: Any,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        *,
        batch_size: int | None = None,
        on_error: str = "raise",
    ) -> ScoreResult:
        """Scores images in the exact mode.

        Args:
            images: see `diffalign.rewards.images.read_images`.
            prompts: one per image. One prompt for many images must be asked for: ``[prompt] * n``.
            metadata: one mapping per image, for scorers that require it.
            batch_size: images per forward pass; it changes no more than the last digits.
            on_error: ``raise``, or ``nan`` to make an unreadable image a missing score.

        Raises:
            UserError: lengths that differ, an empty list, a prompt that is no text, an image that cannot be read.
        """
        if on_error not in ("raise", "nan"):
            raise ConfigError("on_error", f"expected raise or nan, got {on_error!r}")
        inputs = read_images(images)
        items = self._items(inputs, prompts, metadata)
        size = batch_size or self.batch_size or (8 if self.device.type == "cpu" else 16)
        if not isinstance(size, int) or size < 1:
            raise ConfigError("batch_size", f"expected int >= 1, got {batch_size!r}")
        call = Call(ScoreResult(torch.empty(0)), on_error)
        distinct = self._distinct(items, call)
        values = self._look_up(list(distinct))
        call.result.cached = sum(len(call.places[key]) for key in values)
        fresh = {key: item for key, item in distinct.items() if key not in values}
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            found = self._run(fresh, min(size, self._fits or size), call)
        if self.cache is not None and self.deterministic and found:
            self.cache.put_many(
                self.fingerprint(),
                {key: value for key, value in found.items() if math.isfinite(value)},
            )
        row = [math.nan] * len(items)
        for key, value in (values | found).items():
            if abs(value) > _LARGEST:
                call.missing(key, "the score is infinite")
                value = math.nan
            for place in call.places[key]:
                row[place] = value
        call.result.values = torch.tensor(row, dtype=torch.float32)
        return call.result

    def score_tensor(self, pixels: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        """Differentiable scores (N,) of float pixels (N, 3, H, W) in [0, 1], on the scorer's device.

        Raises:
            UserError: this scorer has no gradient, or the pixels are out of range or not finite.
        """
        raise UserError(
            f"{self.name}: has no gradient; call scorer(images, prompts), or take a differentiable scorer"
        )

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change whenever a number could: definition, weights, preprocessing, precision, options."""
        if self._fingerprint is None or self._fingerprint[0] != self.dtype:
            facts = {
                "key": self.spec.key,
                "version": self.spec.version,
                "preprocess": self.spec.preprocess,
                "text": self.spec.text,
                "dtype": str(self.dtype),
                **self.identity(),
            }
            digest = hashlib.sha256(
                json.dumps(facts, sort_keys=True, default=str).encode()
            ).hexdigest()[:16]
            self._fingerprint = (self.dtype, digest)
        return self._fingerprint[1]

    def to(self, device: Any = None, dtype: Any = None) -> Scorer:
        """Moves the networks."""
        self.device = read_device(device) if device is not None else self.device
        self.dtype = read_dtype(dtype) if dtype is not None else self.dtype
        for module in self.modules():
            module.to(self.device)
        self._fits = None
        return self

    def offload(self) -> Scorer:
        """Moves the weights to the CPU and frees the device's memory."""
        device = self.device
        self.to("cpu")
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return self

    def close(self) -> None:
        """Frees the weights; the scorer cannot score afterwards."""
        for module in self.modules():
            module.to("meta")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # How it works

    def _items(self, inputs: list[ImageInput], prompts: Any, metadata: Any) -> list[Item]:
        count = len(inputs)
        if isinstance(prompts, str):
            raise UserError(
                f"prompts: expected a list with one prompt per image, got one text; write [prompt] * {count}"
            )
        if prompts is None:
            if "prompt" in self.spec.requires:
                raise UserError(
                    f"prompts: {self.name} scores an image against its prompt; give one prompt per image"
                )
            prompts = [""] * count
        if len(prompts) != count:
            raise UserError(
                f"prompts: expected one per image, got {len(prompts)} prompts for {count} images"
            )
        if metadata is None:
            if "metadata" in self.spec.requires:
                raise UserError(f"metadata: {self.name} needs one mapping per image, see its card")
            metadata = [{}] * count
        if len(metadata) != count:
            raise UserError(
                f"metadata: expected one per image, got {len(metadata)} for {count} images"
            )
        for i, (prompt, extra) in enumerate(zip(prompts, metadata, strict=True)):
            if not isinstance(prompt, str) and not (
                prompt is None and "prompt" not in self.spec.requires
            ):
                raise UserError(
                    f"prompts[{i}]: expected text, got {prompt!r}; an empty prompt is ''"
                )
            if not isinstance(extra, Mapping):
                raise UserError(f"metadata[{i}]: expected a mapping, got {type(extra).__name__}")
        uses_text = "prompt" in self.spec.requires
        return [
            Item(image, (prompt or "") if uses_text else "", dict(extra))
            for image, prompt, extra in zip(inputs, prompts, metadata, strict=True)
        ]

    def _distinct(self, items: list[Item], call: Call) -> dict[bytes, Item]:
        """Content key -> the first of the items with that image, prompt and metadata: equal ones are scored once."""
        uses_metadata = "metadata" in self.spec.requires
        distinct: dict[bytes, Item] = {}
        for i, (item, image_key) in enumerate(
            zip(items, self._image_keys(items, call), strict=True)
        ):
            if image_key is None:
                continue
            key = content_key(image_key, item.prompt, item.metadata if uses_metadata else None)
            call.places.setdefault(key, []).append(i)
            distinct.setdefault(key, item)
        return distinct

    def _image_keys(self, items: list[Item], call: Call) -> list[bytes | None]:
        """What identifies each image; None where it cannot be read.

        Without a cache an encoded file is known by its bytes and stays undecoded until a batch needs it. With one it is known by its
        pixels, so that a re-encoded image is still found; which pixels a file holds is remembered too, by its bytes and, for a file
        that has not been touched since, by its change times.
        """
        if self.cache is None:
            return [
                call.guard(i, item.input.file_key) or call.guard(i, item.input.pixel_key)
                for i, item in enumerate(items)
            ]
        now = time.time()
        stamps = [item.input.stamp_key(now) for item in items]
        keys: list[bytes | None] = self._remembered(stamps)
        files = [
            call.guard(i, item.input.file_key) if keys[i] is None else None
            for i, item in enumerate(items)
        ]
        by_content = self._remembered(files)
        fresh: dict[bytes, bytes] = {}
        for i, item in enumerate(items):
            if keys[i] is None:
                key = keys[i] = by_content[i] or call.guard(i, item.input.pixel_key)
                fresh.update(
                    {
                        digest: key
                        for digest in (stamps[i], files[i])
                        if digest is not None and key is not None
                    }
                )
        if fresh:
            self.cache.remember_files(fresh)
        return keys

    def _remembered(self, digests: list[bytes | None]) -> list[bytes | None]:
        """Pixel digests of known files, None for the others."""
        assert self.cache is not None
        asked = [digest for digest in dict.fromkeys(digests) if digest is not None]
        known = self.cache.pixel_digests(asked) if asked else {}
        return [known.get(digest) if digest is not None else None for digest in digests]

    def _look_up(self, keys: list[bytes]) -> dict[bytes, float]:
        if self.cache is None or not self.deterministic:
            return {}
        return self.cache.get_many(self.fingerprint(), keys)

    def _run(self, items: Mapping[bytes, Item], size: int, call: Call) -> dict[bytes, float]:
        """Scores distinct items in micro-batches."""
        values: dict[bytes, float] = {}
        keys = list(items)
        for start in range(0, len(keys), size):
            batch = [key for key in keys[start : start + size] if call.readable(key, items[key])]
            if not batch:
                continue
            found, notes = self._with_halving(self._scored, [items[key] for key in batch])
            values.update(zip(batch, found, strict=True))
            for i, sentence in notes.items():
                call.missing(batch[i], sentence)
            for key in batch:
                items[key].input.release()
        return values

    def _scored(self, batch: list[Item]) -> tuple[list[float], dict[int, str]]:
        found = self.score_batch(batch)
        scores, notes = found if isinstance(found, tuple) else (found, {})
        values = [
            float(value) if value is not None else math.nan
            for value in (scores.tolist() if isinstance(scores, Tensor) else scores)
        ]
        if len(values) != len(batch):
            raise UserError(
                f"{self.name}: returned {len(values)} scores for {len(batch)} images; a scorer returns one per image"
            )
        return values, dict(notes)

    def _with_halving(
        self, function: Callable[[Any], tuple[list[float], dict[int, str]]], batch: Any
    ) -> Any:
        """`function(batch)`; when the device's memory does not hold it, two halves, and smaller batches from then on."""
        try:
            return function(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise UserError(
                    f"{self.name}: one image does not fit into the memory of {self.device}; use device='cpu', a half-precision dtype, "
                    "or placement: exclusive for a panel"
                ) from None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(batch) // 2
        self._fits = min(self._fits or half, half)
        first, notes = self._with_halving(function, batch[:half])
        second, more = self._with_halving(function, batch[half:])
        return first + second, notes | {half + i: sentence for i, sentence in more.items()}
