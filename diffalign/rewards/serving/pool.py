"""Share requests among several servers of the same thing."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from typing import Any

from ...errors import ConfigError
from .client import RETRIED, ServerFailure, check_url, request_json, without_password

_PAUSE = 30.0  # seconds without a server that failed
_LONGEST_PAUSE = 20.0


def check_urls(url: Any) -> list[str]:
    """Check one address or several.

    Args:
        url (`str` or sequence of `str`): Any value of a configuration.

    Returns:
        `list[str]`: The addresses without slashes at their ends.

    Raises:
        ConfigError: There is none, one is no address, or one is there twice.
    """
    values = [url] if isinstance(url, str) or not isinstance(url, Sequence) else list(url)
    if not values:
        raise ConfigError("url", "expected the address of a server, or several")
    urls = [check_url(value) for value in values]
    if len(set(urls)) < len(urls):
        twice = next(one for one in urls if urls.count(one) > 1)
        raise ConfigError("url", f"{without_password(twice)} is listed twice; list it once")
    return urls


class ServerPool:
    """Asks the least busy of several servers, and another one where it fails.

    A server that cannot be reached, or is too busy, is left alone for half a minute
    while others answer.

    Args:
        urls (`Sequence[str]`): Addresses, see `check_urls`.
        timeout (`float`): Seconds for one request.
        retries (`int`): Further tries of a request, over all servers.
        backoff (`float`): The longest first pause between tries, in seconds.
        headers (`dict[str, str]`, *optional*): Further headers.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        timeout: float,
        retries: int,
        backoff: float,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.urls, self.headers = list(urls), headers or {}
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self._lock = threading.Lock()
        self._busy = dict.fromkeys(self.urls, 0)
        self._down_until = dict.fromkeys(self.urls, 0.0)
        self._turn = 0

    def request(self, path: str, payload: object) -> tuple[str, dict[str, Any]]:
        """Send a request to one of the servers.

        Args:
            path (`str`): What is added to its address.
            payload: What is sent as JSON.

        Returns:
            `tuple[str, dict]`: Address of the server that answered, for messages, and
            its reply.

        Raises:
            ServerFailure: The request is refused, or no server answered.
        """
        failures: dict[str, ServerFailure] = {}
        for attempt in range(max(self.retries + 1, len(self.urls))):
            url = self._taken(failures)
            try:
                reply = request_json(
                    f"{url}{path}", payload, timeout=self.timeout, retries=0, headers=self.headers
                )
            except ServerFailure as failure:
                if failure.status is not None and failure.status not in RETRIED:
                    raise
                failures[url] = failure
                with self._lock:
                    self._down_until[url] = time.monotonic() + _PAUSE
            else:
                with self._lock:
                    self._down_until[url] = 0.0
                return without_password(url), reply
            finally:
                with self._lock:
                    self._busy[url] -= 1
            if len(failures) == len(self.urls) and attempt < self.retries:
                time.sleep(random.uniform(0, min(self.backoff * 2**attempt, _LONGEST_PAUSE)))
        last = failures[url]
        if len(self.urls) == 1:
            tries = f" after {self.retries + 1} tries" if self.retries else ""
            raise ServerFailure(f"{last}{tries}", last.status)
        raise ServerFailure(f"none of {len(self.urls)} servers answered; {last}", last.status)

    def _taken(self, failed: dict[str, ServerFailure]) -> str:
        """Choose a server and count it as busy.

        First those that are up, then those that this request has not tried, then the
        least busy one. Equal ones take turns.
        """
        with self._lock:
            now, count = time.monotonic(), len(self.urls)
            order = {url: (i - self._turn) % count for i, url in enumerate(self.urls)}
            url = min(
                self.urls,
                key=lambda u: (
                    u in failed,
                    self._down_until[u] > now,
                    self._busy[u],
                    order[u],
                ),
            )
            self._turn = (self.urls.index(url) + 1) % count
            self._busy[url] += 1
            return url
