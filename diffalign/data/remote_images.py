"""Fetch images behind web addresses, each once, when the user allows it.

`data.allow_remote_images` allows it. A dataset's author decides what its cells say, so
only public addresses are fetched, over http and https, with limits of size and time.
"""

from __future__ import annotations

import http.client
import ipaddress
import os
import socket
import ssl
import time
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from diffalign.runtime.decoding import UnreadableImage
from diffalign.runtime.files import write_atomically
from diffalign.runtime.hashing import text_hash
from diffalign.runtime.replies import TimedConnection, read_reply

MAX_BYTES = 64 << 20
TOTAL_SECONDS = 60.0
_REDIRECTS = 3


def cache_folder() -> Path:
    """Return the folder of fetched images: `images` in the cache.

    The cache is `DIFFALIGN_CACHE`, or `~/.cache/diffalign`.
    """
    return (
        Path(os.environ.get("DIFFALIGN_CACHE") or Path.home() / ".cache" / "diffalign") / "images"
    )


def fetch(url: str) -> Path:
    """Fetch a web address unless `cache_folder()` holds it already.

    Args:
        url (`str`): An http or https address.

    Returns:
        `Path`: The file with its content.

    Raises:
        UnreadableImage: Offline mode is on, the address is not public, or the answer is
            late, too large or a refusal.
    """
    file = cache_folder() / text_hash(url)
    if not file.is_file():
        if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
            raise UnreadableImage(
                f"its image {url[:100]!r} is not fetched in offline mode (HF_HUB_OFFLINE)"
            )
        try:
            content = _download(url, time.monotonic() + TOTAL_SECONDS)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UnreadableImage(f"its image {url[:100]!r} cannot be fetched: {error}") from error
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content)
    return file


def _download(url: str, deadline: float) -> bytes:
    for _ in range(_REDIRECTS + 1):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url[:100]!r} is no http or https address")
        connection = _connection(parts.scheme, parts.hostname, parts.port, deadline)
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"User-Agent": "diffalign"})
            reply = connection.getresponse()
            if reply.status in (301, 302, 303, 307, 308):
                url = urljoin(url, reply.getheader("Location") or "")
                continue
            if reply.status != 200:
                raise ValueError(f"the server answered {reply.status}")
            content = read_reply(reply, MAX_BYTES)
            if len(content) > MAX_BYTES:
                raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
            return content
        finally:
            connection.close()
    raise ValueError(f"more than {_REDIRECTS} redirects")


def _connection(
    scheme: str, host: str, port: int | None, deadline: float
) -> http.client.HTTPConnection:
    """Connect to the checked address itself.

    A second look-up of the name could lead elsewhere.
    """
    port = port or (443 if scheme == "https" else 80)
    address = public_address(host, port)
    connection = TimedConnection(host, port, timeout=max(0.1, deadline - time.monotonic()))
    connection.sock = socket.create_connection((address, port), timeout=connection.timeout)
    if scheme == "https":
        connection.sock = ssl.create_default_context().wrap_socket(
            connection.sock, server_hostname=host
        )
    return connection


def public_address(host: str, port: int) -> str:
    """Return the first address of a host, all of whose addresses must be public.

    Args:
        host (`str`): Name of the host.
        port (`int`): The port.

    Raises:
        ValueError: An address belongs to this machine or to a private network.
    """
    addresses = [
        str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    ]
    for address in addresses:
        if not ipaddress.ip_address(address.split("%")[0]).is_global:
            raise ValueError(f"{host!r} is no public address")
    return addresses[0]
