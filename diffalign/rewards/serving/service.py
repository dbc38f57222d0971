"""Score the items of one request, one bad item at a time.

Nothing here knows HTTP. `app` puts a service behind addresses, `server` listens.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ...errors import ConfigError, UserError
from ...runtime import decoding

if TYPE_CHECKING:
    from PIL import Image

    from ..base import Scorer

TOKEN = "DIFFALIGN_SCORER_TOKEN"
"""Environment variable of the secret that a server asks for and a client sends."""

_FORMATS = ("PNG", "JPEG", "WEBP")
# Values of JSON are counted before they are parsed: a body of `[],` needs thirty times
# its size as objects. A few values are no matter, whatever the limit of items is.
_VALUES_PER_ITEM = 5_000
_FEW_VALUES = 100_000
_PIXELS_AT_ONCE = 1 << 25  # decoded before they are scored: 128 MiB of RGBA
_PLACE = re.compile(r"""(['"])(?:[~/]|[A-Za-z]:\\)[^'"]*\1|(?<![\w:/.])/[^\s'",;)]+""")

ReadyItem: TypeAlias = "tuple[int, Image.Image, str, dict[str, Any]]"
"""Place in the request, decoded image, prompt and metadata of an item."""

Row = tuple[int, float | None, str | None]
"""Place in the request, score and error of an item."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Raises:
        ConfigError: A limit is below 1.
    """

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


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status (`int`): The HTTP status.
        message (`str`): What the client is told.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def without_places(sentence: str) -> str:
    """Replace the paths of files on this machine, such as that of a damaged cache.

    Args:
        sentence (`str`): A message for the client.

    Returns:
        `str`: The sentence with "(a file of the server)" for every path.
    """
    return _PLACE.sub("(a file of the server)", sentence)


class ScoringService:
    """One scorer and the limits of a request.

    Args:
        scorer (`Scorer`): Gives the scores.
        limits (`Limits`, defaults to `Limits()`): What one request may ask for.
    """

    def __init__(self, scorer: Scorer, limits: Limits | None = None) -> None:
        self.scorer, self.limits = scorer, limits or Limits()
        self.fingerprint = scorer.fingerprint()

    def info(self) -> dict[str, Any]:
        """Describe the scorer.

        Returns:
            `dict`: The card (`spec`), the `fingerprint` and the `limits`.
        """
        return {
            "spec": self.scorer.spec.as_dict(),
            "fingerprint": self.fingerprint,
            "limits": asdict(self.limits),
        }

    def items(self, body: bytes | bytearray) -> list[object]:
        """Parse a request and check everything that concerns all of its items.

        Args:
            body (`bytes`): JSON with `items`, and perhaps the `expect_fingerprint` and
                the name (`scorer`) that the client counts on.

        Returns:
            `list`: The items, unchecked.

        Raises:
            Refused: 400 for what is malformed, 409 for another scorer than the expected
                one, 413 for too many items or values.
        """
        values = body.count(b",") + body.count(b"[") + body.count(b"{")
        if values > max(_FEW_VALUES, _VALUES_PER_ITEM * self.limits.max_items):
            raise Refused(
                413,
                f"the request holds about {values} values, more than "
                f"{self.limits.max_items} items need",
            )
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            raise Refused(400, "the body is not JSON") from None
        if not isinstance(request, Mapping):
            raise Refused(400, "expected a JSON object with items")
        fingerprint = request.get("expect_fingerprint")
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise Refused(
                409, f"this scorer has the fingerprint {self.fingerprint}, not the expected one"
            )
        key = request.get("scorer")
        if key is not None and key != self.scorer.spec.key:
            raise Refused(409, f"this is {self.scorer.spec.key}, not the scorer that was asked for")
        items = request.get("items")
        if not isinstance(items, list) or not items:
            raise Refused(400, "items: expected a list of at least one object with an image")
        if len(items) > self.limits.max_items:
            raise Refused(
                413, f"items: {len(items)} are more than the limit of {self.limits.max_items}"
            )
        return items

    def score(self, items: list[object]) -> dict[str, Any]:
        """Decode and score items, a limited number of pixels at a time.

        Two calls at once would need twice the memory, so the caller makes one at a
        time.

        Args:
            items (`list`): From `items()`.

        Returns:
            `dict`: `scores` (a number or None per item), `errors` (a sentence or None
            per item) and the `fingerprint`.

        Raises:
            Exception: What the scorer raises when it fails on all items together. The
                fault is then not an item's, and the client may try again.
        """
        scores: list[float | None] = [None] * len(items)
        errors: list[str | None] = [None] * len(items)
        ready: list[ReadyItem] = []

        def score_ready() -> None:
            for place, score, error in self._scored(ready) if ready else ():
                scores[place], errors[place] = score, error
            ready.clear()

        for place, item in enumerate(items):
            try:
                ready.append((place, *self._read(item)))
            except ValueError as error:
                errors[place] = str(error)
            if sum(image.width * image.height for _, image, _, _ in ready) >= _PIXELS_AT_ONCE:
                score_ready()
        score_ready()
        return {"scores": scores, "errors": errors, "fingerprint": self.fingerprint}

    def _scored(self, ready: list[ReadyItem]) -> list[Row]:
        """Score items together, or one by one where that fails."""
        places, images, prompts, metadata = zip(*ready, strict=True)
        try:
            result = self.scorer.score(list(images), list(prompts), list(metadata), on_error="nan")
        except Exception:
            if len(ready) == 1:
                raise
            return self._one_by_one(ready)
        rows: list[Row] = []
        for number, (place, score) in enumerate(zip(places, result.values.tolist(), strict=True)):
            if math.isfinite(score):
                rows.append((place, score, None))
            else:
                reason = result.errors.get(number, "no score")
                rows.append((place, None, without_places(reason)))
        return rows

    def _one_by_one(self, ready: list[ReadyItem]) -> list[Row]:
        """Score items alone, so that a bad one does not end the others.

        Raises:
            Exception: The first failure, when the scorer fails on every item.
        """
        rows: list[Row] = []
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
                    else "the scorer failed on this item; see the log of the server"
                )
                rows.append((item[0], None, without_places(reason)))
        if len(failures) == len(ready):
            raise failures[0]
        return rows

    def _read(self, item: object) -> tuple[Image.Image, str, dict[str, Any]]:
        """Check and decode one item.

        Raises:
            ValueError: With the sentence for this item.
        """
        if not isinstance(item, Mapping):
            raise ValueError("expected an object with an image")
        image = self._image(item.get("image"))
        prompt, metadata = item.get("prompt"), item.get("metadata")
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

    def _image(self, text: object) -> Image.Image:
        """Decode an image from base64.

        Raises:
            ValueError: It is no image of a known format, too large, or damaged.
        """
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
        except Exception as error:  # PIL's plugins raise whatever bad bytes lead them to
            reason = f" ({error})" if isinstance(error, decoding.UnreadableImage) else ""
            raise ValueError(f"image: cannot be decoded{reason}") from None
