"""Score images with any scorer: everything that happens around `score_batch`.

`score` checks its input, merges equal items, asks the cache, and hands the rest to
`score_batch` in micro-batches that fit into memory.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from ..errors import ConfigError, UserError
from .cache import ScoreCache
from .content_key import content_key
from .images import ImageInput, Images, UnreadableImage, read_images
from .spec import ScorerSpec

if TYPE_CHECKING:
    from PIL import Image

_LARGEST = torch.finfo(torch.float32).max
_T = TypeVar("_T")

BatchScores: TypeAlias = (
    Sequence[float] | Tensor | tuple[Sequence[float] | Tensor, Mapping[int, str]]
)
"""What `score_batch` returns: scores, or scores and the reasons for missing ones."""


@dataclass
class ScoreResult:
    """Scores of one call, in the order of the images.

    Attributes:
        values (`Tensor`): float32 (n,) on the CPU. NaN marks a missing score.
        errors (`dict[int, str]`): index of a missing score -> one sentence why.
        cached (`int`): how many scores came from the cache.
        quantiles (`Tensor`, *optional*): (n, levels), where they were asked for.

    Example:
        ```python
        scorer = load_scorer("jpeg_compressibility")
        result = scorer.score([b"no image"], on_error="nan")
        assert result.values.isnan().all() and "cannot be used" in result.errors[0]
        ```
    """

    values: Tensor
    errors: dict[int, str] = field(default_factory=dict)
    cached: int = 0
    quantiles: Tensor | None = None


@dataclass
class Item:
    """One image with its prompt and metadata, as `score_batch` gets it.

    Attributes:
        input (`ImageInput`): the image as the caller gave it.
        prompt (`str`): "" for a scorer that reads no prompt.
        metadata (`dict`): empty for a scorer that reads none.
        prepared (`Any`): what the scorer's `prepare_item` returned, None before that.
    """

    input: ImageInput
    prompt: str
    metadata: dict[str, Any]
    prepared: Any = None

    @property
    def image(self) -> Image.Image:
        """The decoded PIL image, 8-bit RGB."""
        return self.input.image

    def release(self) -> None:
        """Free the pixels. They are read again from the file when needed."""
        self.prepared = None
        self.input.release()


class BatchScorer(Protocol):
    """What `score` needs of a scorer. `Scorer` documents the members."""

    device: torch.device
    batch_size: int | None
    cache: ScoreCache | None
    largest_batch: int | None

    @property
    def spec(self) -> ScorerSpec: ...
    @property
    def name(self) -> str: ...
    @property
    def deterministic(self) -> bool: ...
    def fingerprint(self) -> str: ...
    def prepare_prompts(self, prompts: Sequence[str], batch_size: int) -> None: ...
    def prepare_item(self, item: Item) -> object: ...
    def score_batch(self, items: list[Item]) -> BatchScores: ...


@dataclass
class _Call:
    """One call of `score`: where equal items stand, and what went wrong.

    Attributes:
        on_error: ``raise`` or ``nan``.
        places: content key of an item -> its indices in the call.
        errors: index -> why its score is missing.
    """

    on_error: str
    places: dict[bytes, list[int]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)

    def mark_missing(self, key: bytes, reason: str) -> None:
        """Note why all items with this key have no score."""
        self.errors.update(dict.fromkeys(self.places[key], reason))

    def read_or_note(self, indices: Iterable[int], read: Callable[[], _T]) -> _T | None:
        """Return `read()`, or None and a noted reason if the image is unreadable.

        Raises:
            UnreadableImage: under ``on_error="raise"``.
        """
        try:
            return read()
        except UnreadableImage as error:
            if self.on_error == "raise":
                raise
            self.errors.update(dict.fromkeys(indices, str(error)))
            return None


def score(
    scorer: BatchScorer,
    images: Images,
    prompts: Sequence[str] | None = None,
    metadata: Sequence[Mapping[str, Any]] | None = None,
    *,
    batch_size: int | None = None,
    on_error: str = "raise",
) -> ScoreResult:
    """Score images exactly as the published code does, without gradients.

    Args:
        scorer (`BatchScorer`): any `Scorer`.
        images: n images in any form that `diffalign.rewards.images.read_images` takes.
        prompts (list of `str`, *optional*): one per image. Write ``[prompt] * n`` to
            score many images against one prompt.
        metadata (list of mappings, *optional*): one per image, for scorers that
            require it.
        batch_size (`int`, *optional*): images per forward pass. It changes no more than
            the last digits. Defaults to the scorer's own.
        on_error (`str`, *optional*, defaults to "raise"): ``raise``, or ``nan`` to make
            an unreadable image a missing score.

    Returns:
        `ScoreResult`: the scores, and why some are missing.

    Raises:
        ConfigError: an unknown `on_error`, or a `batch_size` below 1.
        UserError: lengths that differ, an empty list, a prompt that is no text, an
            image that cannot be read, or one image that does not fit into memory.
    """
    if on_error not in ("raise", "nan"):
        raise ConfigError("on_error", f"expected raise or nan, got {on_error!r}")
    items = make_items(scorer, read_images(images), prompts, metadata)
    size = _micro_batch_size(scorer, batch_size)
    call = _Call(on_error)
    distinct = _merge_equal(scorer, items, call)
    cached = _read_cache(scorer, list(distinct))
    uncached = {key: item for key, item in distinct.items() if key not in cached}
    with torch.no_grad(), torch.autocast(scorer.device.type, enabled=False):
        scores = _score_in_batches(scorer, uncached, size, call)
    _write_cache(scorer, scores)
    values = _in_order(cached | scores, len(items), call)
    return ScoreResult(values, call.errors, sum(len(call.places[key]) for key in cached))


# Input


def make_items(
    scorer: BatchScorer,
    inputs: Sequence[ImageInput],
    prompts: Sequence[str] | None,
    metadata: Sequence[Mapping[str, Any]] | None,
) -> list[Item]:
    """Pair each image with its prompt and metadata.

    Args:
        scorer (`BatchScorer`): says what it requires.
        inputs (list of `ImageInput`): the images.
        prompts: one text per image, or None for a scorer that reads no prompt.
        metadata: one mapping per image, or None for a scorer that reads none.

    Raises:
        UserError: something required is not there, lengths differ, or a type is wrong.
    """
    count = len(inputs)
    uses_text = "prompt" in scorer.spec.requires
    if isinstance(prompts, str):
        raise UserError(
            "prompts: expected a list with one prompt per image, got one text; "
            f"write [prompt] * {count}"
        )
    if prompts is None:
        if uses_text:
            raise UserError(
                f"prompts: {scorer.name} scores an image against its prompt; "
                "give one prompt per image"
            )
        prompts = [""] * count
    if len(prompts) != count:
        raise UserError(
            f"prompts: expected one per image, got {len(prompts)} prompts for {count} images"
        )
    if metadata is None:
        if "metadata" in scorer.spec.requires:
            raise UserError(f"metadata: {scorer.name} needs one mapping per image, see its card")
        metadata = [{}] * count
    if len(metadata) != count:
        raise UserError(f"metadata: expected one per image, got {len(metadata)} for {count} images")
    for i, (prompt, extra) in enumerate(zip(prompts, metadata, strict=True)):
        left_out = prompt is None and not uses_text
        if not isinstance(prompt, str) and not left_out:
            raise UserError(f"prompts[{i}]: expected text, got {prompt!r}; an empty prompt is ''")
        if not isinstance(extra, Mapping):
            raise UserError(f"metadata[{i}]: expected a mapping, got {type(extra).__name__}")
    return [
        Item(image, (prompt or "") if uses_text else "", dict(extra))
        for image, prompt, extra in zip(inputs, prompts, metadata, strict=True)
    ]


def _micro_batch_size(scorer: BatchScorer, batch_size: int | None) -> int:
    """Return how many images go into one forward pass."""
    # The caches of a CPU hold no more than 8.
    size = batch_size or scorer.batch_size or (8 if scorer.device.type == "cpu" else 16)
    if not isinstance(size, int) or size < 1:
        raise ConfigError("batch_size", f"expected int >= 1, got {batch_size!r}")
    return min(size, scorer.largest_batch or size)


# Duplicates


def _merge_equal(scorer: BatchScorer, items: Sequence[Item], call: _Call) -> dict[bytes, Item]:
    """Return the first of each group of equal items, by content key.

    Two items are equal when image, prompt and metadata are. Unreadable images are left
    out.
    """
    uses_metadata = "metadata" in scorer.spec.requires
    distinct: dict[bytes, Item] = {}
    image_keys = _image_keys(scorer.cache, items, call)
    for i, (item, image_key) in enumerate(zip(items, image_keys, strict=True)):
        if image_key is None:
            continue
        key = content_key(image_key, item.prompt, item.metadata if uses_metadata else None)
        call.places.setdefault(key, []).append(i)
        distinct.setdefault(key, item)
    return distinct


def _image_keys(cache: ScoreCache | None, items: Sequence[Item], call: _Call) -> list[bytes | None]:
    """Return what identifies each image; None where it cannot be read.

    Without a cache an encoded file is known by its bytes, and stays undecoded until a
    batch needs it. With a cache it is known by its pixels, so that a re-encoded image
    is found too. The cache also remembers which pixels a file holds: by the file's
    bytes and, for a file that has not been touched since, by its change times.
    """
    if cache is None:
        return [
            _key(call, i, item.input.file_key) or _key(call, i, item.input.pixel_key)
            for i, item in enumerate(items)
        ]
    now = time.time()
    stamps = [item.input.stamp_key(now) for item in items]
    keys = _known_pixels(cache, stamps)
    files = [
        _key(call, i, item.input.file_key) if keys[i] is None else None
        for i, item in enumerate(items)
    ]
    by_content = _known_pixels(cache, files)
    new_files: dict[bytes, bytes] = {}
    for i, item in enumerate(items):
        if keys[i] is not None:
            continue
        key = keys[i] = by_content[i] or _key(call, i, item.input.pixel_key)
        if key is not None:
            digests = (stamps[i], files[i])
            new_files.update({digest: key for digest in digests if digest is not None})
    if new_files:
        cache.remember_files(new_files)
    return keys


def _key(call: _Call, index: int, read: Callable[[], bytes | None]) -> bytes | None:
    """Return `read()`, or None for an image that is unreadable or known to be."""
    return None if index in call.errors else call.read_or_note([index], read)


def _known_pixels(cache: ScoreCache, digests: Sequence[bytes | None]) -> list[bytes | None]:
    """Return the pixel digests of known files, None for the others."""
    distinct = [digest for digest in dict.fromkeys(digests) if digest is not None]
    known = cache.pixel_digests(distinct) if distinct else {}
    return [known.get(digest) if digest is not None else None for digest in digests]


# Cache


def _read_cache(scorer: BatchScorer, keys: list[bytes]) -> dict[bytes, float]:
    """Return the cached scores among those of `keys`."""
    if scorer.cache is None or not scorer.deterministic:
        return {}
    return scorer.cache.get_many(scorer.fingerprint(), keys)


def _write_cache(scorer: BatchScorer, scores: Mapping[bytes, float]) -> None:
    """Keep the finite ones of new scores."""
    if scorer.cache is None or not scorer.deterministic or not scores:
        return
    finite = {key: value for key, value in scores.items() if math.isfinite(value)}
    scorer.cache.put_many(scorer.fingerprint(), finite)


# Micro-batches


def _score_in_batches(
    scorer: BatchScorer, items: Mapping[bytes, Item], size: int, call: _Call
) -> dict[bytes, float]:
    """Score distinct items, `size` at a time. Images are prepared in threads."""
    keys = list(items)
    batches = [keys[start : start + size] for start in range(0, len(keys), size)]
    if not batches:
        return {}
    scores: dict[bytes, float] = {}
    # Beside a GPU the next batch is prepared while the towers run. On a CPU the two
    # would only take each other's cores.
    ahead = scorer.device.type != "cpu"
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:

        def prepare(number: int) -> dict[bytes, Future[object]]:
            batch = batches[number] if number < len(batches) else []
            return {key: pool.submit(scorer.prepare_item, items[key]) for key in batch}

        upcoming = prepare(0) if ahead else {}
        scorer.prepare_prompts([items[key].prompt for key in keys], size)
        for number in range(len(batches)):
            current = upcoming if ahead else prepare(number)
            upcoming = prepare(number + 1) if ahead else {}
            readable = []
            for key, future in current.items():
                prepared = call.read_or_note(call.places[key], future.result)
                if call.places[key][0] not in call.errors:
                    items[key].prepared = prepared
                    readable.append(key)
            if readable:
                batch = [items[key] for key in readable]
                values, reasons = _score_or_halve(scorer, batch)
                scores.update(zip(readable, values, strict=True))
                for i, reason in reasons.items():
                    call.mark_missing(readable[i], reason)
                for item in batch:
                    item.release()
    return scores


def _score_or_halve(scorer: BatchScorer, items: list[Item]) -> tuple[list[float], dict[int, str]]:
    """Score a batch, in two halves if the device's memory does not hold it.

    The smaller size is remembered in `largest_batch` for the calls that follow.
    """
    try:
        return checked_scores(scorer, items)
    except torch.OutOfMemoryError:
        if len(items) == 1:
            raise UserError(
                f"{scorer.name}: one image does not fit into the memory of {scorer.device}; "
                "use device='cpu', a half-precision dtype, or placement: exclusive for a panel"
            ) from None
    if scorer.device.type == "cuda":
        torch.cuda.empty_cache()
    half = len(items) // 2
    scorer.largest_batch = min(scorer.largest_batch or half, half)
    first, reasons = _score_or_halve(scorer, items[:half])
    second, more = _score_or_halve(scorer, items[half:])
    return first + second, reasons | {half + i: reason for i, reason in more.items()}


def checked_scores(scorer: BatchScorer, items: list[Item]) -> tuple[list[float], dict[int, str]]:
    """Call `score_batch` once and check that it returns one score per item.

    Returns:
        the scores, NaN where missing, and index -> why it is missing.

    Raises:
        UserError: the number of scores is not that of the items.
    """
    output = scorer.score_batch(items)
    scores, reasons = output if isinstance(output, tuple) else (output, {})
    if isinstance(scores, Tensor):
        scores = scores.tolist()
    values = [math.nan if value is None else float(value) for value in scores]
    if len(values) != len(items):
        raise UserError(
            f"{scorer.name}: returned {len(values)} scores for {len(items)} images; "
            "a scorer returns one per image"
        )
    return values, dict(reasons)


def _in_order(scores: Mapping[bytes, float], count: int, call: _Call) -> Tensor:
    """Give every item of the call its score: float32 (count,), NaN where missing."""
    row = [math.nan] * count
    for key, value in scores.items():
        if abs(value) > _LARGEST:
            call.mark_missing(key, "the score is infinite")
            value = math.nan
        for place in call.places[key]:
            row[place] = value
    return torch.tensor(row, dtype=torch.float32)
