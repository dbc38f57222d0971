"""A scorer of another process or environment, behind `diffalign serve-scorer`."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ...errors import ConfigError, UserError
from ..base import Item, Scorer
from ..serving.client import (
    ServerFailure,
    check_calls,
    png_base64,
    request_json,
    without_password,
)
from ..serving.pool import ServerPool, check_urls
from ..serving.service import TOKEN
from ..spec import ScorerSpec


class RemoteScorer(Scorer):
    """Send images as PNG inside JSON and return the server's scores.

    Args:
        url (`str` or list of `str`, defaults to "http://127.0.0.1:8000"): Address of
            the server, or several addresses. Several servers must offer the same
            scorer. They share the requests, and the others take over where one fails.
        expect_fingerprint (`str`, *optional*): Fingerprint that the server's scorer
            must have. Another one is an error, never another number.
        scorer (`str`, *optional*): Name that the server's scorer must have.
        timeout (`float`, defaults to 600): Seconds for one request.
        retries (`int`, defaults to 3): Further tries when the connection fails or the
            server is busy.
        backoff (`float`, defaults to 0.5): The longest first pause, in seconds. It
            doubles.
        concurrency (`int`, defaults to 4): Requests at once, for each server.
        max_items (`int`, defaults to 16): Most images per request. The server's own
            limits of images and bytes hold too.
        token (`str`, *optional*): Secret that the server asks for. Defaults to the
            environment's `DIFFALIGN_SCORER_TOKEN`.
        on_error (`str`, defaults to "raise"): "raise", or "nan" to make scores missing
            when the server fails.
        **options: Options of every `Scorer`.

    Raises:
        ServerFailure: On loading, when the server cannot be reached. Later, under
            `on_error="raise"`.
        ConfigError: A server offers another scorer or another fingerprint.
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
        url: str | Sequence[str] = "http://127.0.0.1:8000",
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
        urls = check_urls(url)
        self.place = without_password(urls[0])  # for messages
        self.concurrency, self.on_error = concurrency * len(urls), on_error
        token = token or os.environ.get(TOKEN)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.pool = ServerPool(
            urls, timeout=timeout, retries=retries, backoff=backoff, headers=headers
        )
        self.remote_fingerprint = ""
        limits: dict[str, int] = {}
        for address in urls:
            self.place = without_password(address)
            info = request_json(
                f"{address}/info",
                timeout=min(timeout, 60.0),
                retries=retries,
                backoff=backoff,
                headers=headers,
            )
            known = self._check(info, scorer, expect_fingerprint or self.remote_fingerprint or None)
            self.remote_fingerprint = known
            for name, value in self._limits(info).items():
                limits[name] = min(value, limits.get(name, value))
        self.max_items = min(max_items, limits.get("max_items", max_items))
        self.max_bytes = limits.get("max_bytes", math.inf)
        self.spec = self._remote_spec(info)  # type: ignore[misc]

    def _check(self, info: dict[str, Any], scorer: str | None, expected: str | None) -> str:
        """The server's fingerprint, if it and the name are the expected ones.

        Raises:
            ServerFailure: The reply is not of a scorer.
            ConfigError: Another scorer or fingerprint.
        """
        fingerprint, card = info.get("fingerprint"), info.get("spec")
        if (
            not isinstance(fingerprint, str)
            or not isinstance(card, dict)
            or not isinstance(card.get("key"), str)
        ):
            raise ServerFailure(
                f"{self.place}/info answered without a fingerprint and a card; that is no scorer"
            )
        if scorer is not None and card["key"] != scorer:
            raise ConfigError(
                "scorer",
                f"{self.place} offers {card['key']!r}, not {scorer!r}; start the server for "
                "that scorer",
            )
        if expected is not None and fingerprint != expected:
            raise ConfigError(
                "expect_fingerprint",
                f"{self.place} has the fingerprint {fingerprint}, not {expected}: other weights, "
                "settings or version; their scores cannot be mixed",
            )
        return fingerprint

    def _limits(self, info: dict[str, Any]) -> dict[str, int]:
        """What the server allows, as far as it says.

        Raises:
            ServerFailure: The limits are no positive integers.
        """
        limits = info.get("limits") or {}
        if isinstance(limits, dict):
            known = {name: limits[name] for name in ("max_items", "max_bytes") if name in limits}
            if all(type(value) is int and value >= 1 for value in known.values()):
                return known
        raise ServerFailure(
            f"{self.place}/info answered limits that cannot be read ({limits}); "
            "update the server or this side"
        )

    def _remote_spec(self, info: dict[str, Any]) -> ScorerSpec:
        """The remote card, under the name `remote` and without a gradient.

        Raises:
            ServerFailure: The card cannot be read.
        """
        card = info["spec"]
        if not isinstance(card.get("higher_is_better", True), bool):
            raise ServerFailure(
                f"{self.place}/info answered a card whose higher_is_better is neither true nor "
                "false"
            )
        values: dict[str, Any] = {}
        for field in dataclasses.fields(ScorerSpec):
            if field.name in card:
                value = card[field.name]
                values[field.name] = tuple(value) if isinstance(value, list) else value
        try:
            spec = ScorerSpec(**values)
        except (TypeError, ValueError) as error:
            raise ServerFailure(
                f"{self.place}/info answered a card that cannot be read ({error}); "
                "update the server or this side"
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
        size = min(self.max_items, math.ceil(len(items) / len(self.pool.urls)))  # all servers work
        parts = [items[start : start + size] for start in range(0, len(items), size)]
        scores: list[float] = []
        errors: dict[int, str] = {}
        with ThreadPoolExecutor(self.concurrency) as pool:
            for part_scores, part_errors in pool.map(self._ask, parts):
                errors.update({len(scores) + i: text for i, text in part_errors.items()})
                scores += part_scores
        return scores, errors

    def _ask(self, items: Sequence[Item]) -> tuple[list[float], dict[int, str]]:
        return self._send([self._encoded(item) for item in items])

    def _encoded(self, item: Item) -> tuple[dict[str, Any], int]:
        """What is sent of an item, and its bytes.

        Raises:
            UserError: JSON cannot hold the metadata.
        """
        image = png_base64(item.image)
        try:
            rest = json.dumps([item.prompt, item.metadata])
        except (TypeError, ValueError) as error:
            raise UserError(
                f"metadata: cannot be sent as JSON ({error}); give text, numbers, lists and "
                "mappings"
            ) from error
        content = {"image": image, "prompt": item.prompt, "metadata": item.metadata}
        return content, len(image) + len(rest) + 64

    def _send(
        self, encoded: list[tuple[dict[str, Any], int]]
    ) -> tuple[list[float], dict[int, str]]:
        """Make one request, or several where one would be too large for the server."""
        count, size = len(encoded), 256 + sum(size for _, size in encoded)
        if size > self.max_bytes and count > 1:
            first, errors = self._send(encoded[: count // 2])
            second, more = self._send(encoded[count // 2 :])
            return first + second, errors | {len(first) + i: text for i, text in more.items()}
        payload = {
            "expect_fingerprint": self.remote_fingerprint,
            "items": [content for content, _ in encoded],
        }
        try:
            if size > self.max_bytes:
                raise ServerFailure(
                    f"{self.place} takes {self.max_bytes} bytes at most, one image has {size}; "
                    "raise its --max_bytes"
                )
            place, reply = self.pool.request("/score", payload)
            return self._read(place, reply, count)
        except ServerFailure as error:
            if self.on_error == "raise":
                raise
            return [math.nan] * count, dict.fromkeys(range(count), str(error))

    def _read(
        self, place: str, reply: dict[str, Any], count: int
    ) -> tuple[list[float], dict[int, str]]:
        """Scores and the reasons of missing ones.

        Raises:
            ServerFailure: The server has another scorer now, or answered something else
                than `count` scores.
        """
        scores, errors = reply.get("scores"), reply.get("errors") or [None] * count
        if reply.get("fingerprint") != self.remote_fingerprint:
            raise ServerFailure(
                f"{place} answered with the fingerprint {reply.get('fingerprint')}, not "
                f"{self.remote_fingerprint}: it was restarted with another scorer; load this one "
                "again"
            )
        if (
            not isinstance(scores, list)
            or not isinstance(errors, list)
            or not len(scores) == len(errors) == count
            or not all(score is None or type(score) in (int, float) for score in scores)
        ):
            raise ServerFailure(f"{place} answered no list of {count} scores; that is no scorer")
        try:
            values = [math.nan if score is None else float(score) for score in scores]
        except OverflowError:
            raise ServerFailure(
                f"{place} answered a score that no float holds; that is no scorer"
            ) from None
        reasons = {
            i: str(errors[i] or "the server gave no score")[:300]
            for i, value in enumerate(values)
            if math.isnan(value)
        }
        return values, reasons
