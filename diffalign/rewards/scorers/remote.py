"""A scorer that lives in another process or environment, behind ``diffalign serve-scorer``."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ...errors import ConfigError, UserError
from ..base import Item, Scorer
from ..serving.http_client import (
    ServerFailure,
    check_calls,
    check_url,
    png_base64,
    request_json,
    without_password,
)
from ..spec import ScorerSpec


class RemoteScorer(Scorer):
    """Sends images as PNG inside JSON and returns the server's scores.

    Args:
        url: address of the server, e.g. ``http://127.0.0.1:8000``.
        expect_fingerprint: fingerprint that the server's scorer must have; another one is an error, never another number.
        scorer: name that the server's scorer must have.
        timeout: seconds for one request.
        retries: further tries when the connection fails or the server is busy.
        backoff: seconds of the first pause at most; it doubles.
        concurrency: requests at once.
        max_items: images per request at most; the server's own limits, also that of bytes, are kept too.
        on_error: ``raise``, or ``nan`` to make scores missing when the server fails.

    Raises:
        ServerFailure: on loading, when the server cannot be reached; later, under ``on_error="raise"``.
        ConfigError: the server offers another scorer or another fingerprint.
    """

    spec = ScorerSpec(
        key="remote",
        summary="whatever a diffalign serve-scorer process offers",
        licence="of the scorer behind it",
        requires=("image", "prompt"),
        preprocess="png",
        text="json",
        citation="this package, diffalign serve-scorer",
    )

    def __init__(
        self,
        *,
        url: str = "http://127.0.0.1:8000",
        expect_fingerprint: str | None = None,
        scorer: str | None = None,
        timeout: float = 600.0,
        retries: int = 3,
        backoff: float = 0.5,
        concurrency: int = 4,
        max_items: int = 16,
        token: str | None = None,
        on_error: str = "raise",
        **options: Any,
    ) -> None:
        options.setdefault("batch_size", 64)
        super().__init__(**options)
        check_calls(timeout, retries, concurrency, on_error)
        if isinstance(max_items, bool) or not isinstance(max_items, int) or max_items < 1:
            raise ConfigError("max_items", f"expected int >= 1, got {max_items!r}")
        self.url, self.timeout, self.retries, self.backoff = (
            check_url(url),
            timeout,
            retries,
            backoff,
        )
        self.place = without_password(self.url)  # for messages
        self.concurrency, self.on_error = concurrency, on_error
        token = token or os.environ.get("DIFFALIGN_SCORER_TOKEN")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        info = request_json(
            f"{self.url}/info",
            timeout=min(timeout, 60.0),
            retries=retries,
            backoff=backoff,
            headers=self._headers,
        )
        self.remote_fingerprint = self._check(info, scorer, expect_fingerprint)
        limits = self._limits(info)
        self.max_items, self.max_bytes = (
            min(max_items, limits.get("max_items", max_items)),
            limits.get("max_bytes", math.inf),
        )
        self.spec = self._remote_spec(info)  # type: ignore[misc]

    def _check(self, info: dict[str, Any], scorer: str | None, expected: str | None) -> str:
        found, card = info.get("fingerprint"), info.get("spec")
        if (
            not isinstance(found, str)
            or not isinstance(card, dict)
            or not isinstance(card.get("key"), str)
        ):
            raise ServerFailure(
                f"{self.place}/info answered without a fingerprint and a card; that is no scorer"
            )
        if scorer is not None and card["key"] != scorer:
            raise ConfigError(
                "scorer",
                f"{self.place} offers {card['key']!r}, not {scorer!r}; start the server for that scorer",
            )
        if expected is not None and found != expected:
            raise ConfigError(
                "expect_fingerprint",
                f"{self.place} has the fingerprint {found}, not {expected}: other weights, settings or version; their scores cannot be mixed",
            )
        return found

    def _limits(self, info: dict[str, Any]) -> dict[str, int]:
        """What the server allows, as far as it says."""
        limits = info.get("limits") or {}
        found = (
            {name: limits[name] for name in ("max_items", "max_bytes") if name in limits}
            if isinstance(limits, dict)
            else None
        )
        if found is None or not all(type(value) is int and value >= 1 for value in found.values()):
            raise ServerFailure(
                f"{self.place}/info answered limits that cannot be read ({limits}); update the server or this side"
            )
        return found

    def _remote_spec(self, info: dict[str, Any]) -> ScorerSpec:
        """The remote card, under the name `remote` and without a gradient."""
        fields = {f.name for f in dataclasses.fields(ScorerSpec)}
        if not isinstance(info["spec"].get("higher_is_better", True), bool):
            raise ServerFailure(
                f"{self.place}/info answered a card whose higher_is_better is neither true nor false"
            )
        values: dict[str, Any] = {
            n: tuple(v) if isinstance(v, list) else v
            for n, v in info["spec"].items()
            if n in fields
        }
        try:
            spec = ScorerSpec(**values)
        except (TypeError, ValueError) as error:
            raise ServerFailure(
                f"{self.place}/info answered a card that cannot be read ({error}); update the server or this side"
            ) from error
        return dataclasses.replace(
            spec,
            key="remote",
            summary=f"{spec.key}: {spec.summary}",
            aliases=(),
            differentiable=False,
        )

    def identity(self) -> dict[str, Any]:
        return {"remote": self.remote_fingerprint}

    def score_batch(self, items: list[Item]) -> tuple[list[float], dict[int, str]]:
        parts = [
            items[start : start + self.max_items] for start in range(0, len(items), self.max_items)
        ]
        values: list[float] = []
        notes: dict[int, str] = {}
        with ThreadPoolExecutor(self.concurrency) as pool:
            for scores, errors in pool.map(self._ask, parts):
                notes.update({len(values) + i: sentence for i, sentence in errors.items()})
                values += scores
        return values, notes

    def _ask(self, items: Sequence[Item]) -> tuple[list[float], dict[int, str]]:
        return self._send([self._encoded(item) for item in items])

    def _encoded(self, item: Item) -> tuple[dict[str, Any], int]:
        """What is sent of an item, and its bytes."""
        image = png_base64(item.image)
        try:
            rest = json.dumps([item.prompt, item.metadata])
        except (TypeError, ValueError) as error:
            raise UserError(
                f"metadata: cannot be sent as JSON ({error}); give text, numbers, lists and mappings"
            ) from error
        return {"image": image, "prompt": item.prompt, "metadata": item.metadata}, len(image) + len(
            rest
        ) + 64

    def _send(
        self, encoded: list[tuple[dict[str, Any], int]]
    ) -> tuple[list[float], dict[int, str]]:
        """One request, or several where the server would refuse it for its size."""
        count, size = len(encoded), 256 + sum(size for _, size in encoded)
        if size > self.max_bytes and count > 1:
            first, notes = self._send(encoded[: count // 2])
            second, more = self._send(encoded[count // 2 :])
            return first + second, notes | {
                len(first) + i: sentence for i, sentence in more.items()
            }
        payload = {
            "expect_fingerprint": self.remote_fingerprint,
            "items": [item for item, _ in encoded],
        }
        try:
            if size > self.max_bytes:
                raise ServerFailure(
                    f"{self.place} takes {self.max_bytes} bytes at most, one image has {size}; raise its --max_bytes"
                )
            reply = request_json(
                f"{self.url}/score",
                payload,
                timeout=self.timeout,
                retries=self.retries,
                backoff=self.backoff,
                headers=self._headers,
            )
            return self._read(reply, count)
        except ServerFailure as error:
            if self.on_error == "raise":
                raise
            return [math.nan] * count, dict.fromkeys(range(count), str(error))

    def _read(self, reply: dict[str, Any], count: int) -> tuple[list[float], dict[int, str]]:
        scores, errors = reply.get("scores"), reply.get("errors") or [None] * count
        if reply.get("fingerprint") != self.remote_fingerprint:
            raise ServerFailure(
                f"{self.place} answered with the fingerprint {reply.get('fingerprint')}, not {self.remote_fingerprint}: it was restarted with "
                "another scorer; load this one again"
            )
        good = (
            isinstance(scores, list)
            and isinstance(errors, list)
            and len(scores) == len(errors) == count
        )
        if not good or not all(score is None or type(score) in (int, float) for score in scores):  # type: ignore[union-attr]
            raise ServerFailure(
                f"{self.place} answered no list of {count} scores; that is no scorer"
            )
        try:
            values = [math.nan if score is None else float(score) for score in scores]  # type: ignore[union-attr]
        except OverflowError:
            raise ServerFailure(
                f"{self.place} answered a score that no float holds; that is no scorer"
            ) from None
        return values, dict(self._said(values, errors))

    @staticmethod
    def _said(values: Sequence[float], errors: Sequence[Any]) -> Iterator[tuple[int, str]]:
        for i, (value, error) in enumerate(zip(values, errors, strict=True)):
            if math.isnan(value):
                yield i, str(error or "the server gave no score")[:300]
