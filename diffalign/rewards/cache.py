"""Scores on disk, keyed by what was scored and by what: a changed image, prompt, weight or setting is never answered from the past.

One SQLite file in write-ahead mode, shared by any number of processes of one machine. Only values are stored.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..exceptions import UserError

if TYPE_CHECKING:
    from PIL import Image

_SCHEMA = 1
_APPLICATION = 0x64616C67  # marks the file as ours
_CHUNK = 900  # parameters per statement, under SQLite's oldest limit
_SETTLED = 2.0  # seconds after which a file's change time is trusted
_WAIT = 60.0  # seconds to wait for another process's write


def pixel_digest(image: Image.Image) -> bytes:
    """SHA-256 of a decoded image: mode, size, palette and transparency where it has them, and the pixels."""
    digest = hashlib.sha256(f"{image.mode}:{image.width}x{image.height}:".encode())
    if image.mode in ("P", "PA"):
        palette = image.palette
        digest.update(palette.tobytes() if palette is not None else b"")
    transparency = image.info.get("transparency")
    if transparency is not None:
        digest.update(repr(transparency).encode())
    digest.update(image.tobytes())
    return digest.digest()


def file_digest(source: bytes | str | Path) -> bytes:
    """SHA-256 of an encoded file or of its bytes."""
    return hashlib.sha256(source if isinstance(source, bytes) else Path(source).read_bytes()).digest()


def stamp_digest(path: str | Path, now: float) -> bytes | None:
    """A digest of a file's place, size and change times, by which an untouched file is known without reading it.

    None for a file touched within two seconds of `now`: a second change within the clock's tick would not show.
    """
    try:
        status = os.stat(path)
    except OSError:
        return None
    if now - max(status.st_mtime, status.st_ctime) < _SETTLED:
        return None
    place = os.fspath(path)
    place = place if place.startswith("/") else os.path.abspath(place)
    stamp = f"{place}\0{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"
    return hashlib.sha256(stamp.encode("utf-8", "surrogateescape")).digest()


def content_key(image: bytes, prompt: str | None, metadata: Mapping[str, Any] | None = None) -> bytes:
    """32 bytes that identify what is scored: the image's digest, the prompt in Unicode normal form C, the metadata."""
    digest = hashlib.sha256(image)
    text = (
        b""
        if prompt is None
        else (prompt if prompt.isascii() else unicodedata.normalize("NFC", prompt)).encode("utf-8", "surrogatepass")
    )
    digest.update(b"%d:%d:" % (prompt is not None, len(text)) + text)
    if metadata:
        digest.update(json.dumps(metadata, sort_keys=True, ensure_ascii=True, default=str).encode())
    return digest.digest()


class ScoreCache:
    """Scores by scorer fingerprint and content key.

    Args:
        path: the file; it and its folder are made on first use.

    Raises:
        UserError: on first use, when the file is something else, was written by a newer version, is damaged or cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._connection: sqlite3.Connection | None = None
        self._pid = 0
        self._ids: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A connection must not cross a process boundary.
        return {"path": self.path, "_connection": None, "_pid": 0, "_ids": {}}

    def __enter__(self) -> ScoreCache:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; it is opened again when needed."""
        if self._connection is not None and self._pid == os.getpid():
            self._connection.close()
        self._connection, self._ids = None, {}

    def _open(self) -> sqlite3.Connection:
        if self._connection is None or self._pid != os.getpid():
            self._connection, self._pid, self._ids = self._connect(), os.getpid(), {}
        return self._connection

    def _connect(self) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=_WAIT, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"cache: {str(self.path)!r} cannot be opened ({error}); name a file that you may write to") from error
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            self._prepare(connection)
        except sqlite3.OperationalError as error:
            connection.close()
            raise UserError(f"cache: {str(self.path)!r} cannot be used ({error}); name a file that you may write to") from error
        except sqlite3.DatabaseError as error:
            connection.close()
            raise UserError(
                f"cache: {str(self.path)!r} is no score cache or is damaged ({error}); delete it or name another file"
            ) from error
        except UserError:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Makes the tables, unless the file has them."""
        connection.execute("BEGIN IMMEDIATE")  # two processes may open a new file at once
        try:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            mark = connection.execute("PRAGMA application_id").fetchone()[0]
            tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if tables and mark != _APPLICATION:
                raise UserError(f"cache: {str(self.path)!r} is another program's database; name another file")
            if version > _SCHEMA:
                raise UserError(f"cache: {str(self.path)!r} was written by a newer diffalign; update, or name another file")
            if not tables:
                connection.execute(f"PRAGMA application_id={_APPLICATION}")
                connection.execute(f"PRAGMA user_version={_SCHEMA}")
                connection.execute("CREATE TABLE fingerprints (id INTEGER PRIMARY KEY, fingerprint TEXT UNIQUE NOT NULL)")
                connection.execute(
                    "CREATE TABLE scores (scorer INTEGER, key BLOB, value REAL NOT NULL, PRIMARY KEY (scorer, key)) WITHOUT ROWID"
                )
                connection.execute("CREATE TABLE files (file BLOB PRIMARY KEY, pixels BLOB NOT NULL) WITHOUT ROWID")
        finally:
            connection.execute("COMMIT")

    @contextmanager
    def _guarded(self) -> Iterator[sqlite3.Connection]:
        connection = self._open()
        try:
            yield connection
        except sqlite3.OperationalError as error:
            raise UserError(
                f"cache: {str(self.path)!r} cannot be used ({error}); check the disk, or run without a cache"
            ) from error
        except sqlite3.DatabaseError as error:
            raise UserError(f"cache: {str(self.path)!r} is damaged ({error}); delete it and run again") from error

    def _id(self, connection: sqlite3.Connection, fingerprint: str, create: bool) -> int | None:
        if fingerprint not in self._ids:
            if create:
                connection.execute("INSERT OR IGNORE INTO fingerprints (fingerprint) VALUES (?)", (fingerprint,))
            row = connection.execute("SELECT id FROM fingerprints WHERE fingerprint = ?", (fingerprint,)).fetchone()
            if row is None:
                return None
            self._ids[fingerprint] = row[0]
        return self._ids[fingerprint]

    def get_many(self, fingerprint: str, keys: Sequence[bytes]) -> dict[bytes, float]:
        """The known ones of `keys`."""
        found: dict[bytes, float] = {}
        with self._guarded() as connection:
            number = self._id(connection, fingerprint, create=False)
            if number is None:
                return found
            for start in range(0, len(keys), _CHUNK):
                part = keys[start : start + _CHUNK]
                marks = ",".join("?" * len(part))
                found.update(
                    connection.execute(f"SELECT key, value FROM scores WHERE scorer = {number} AND key IN ({marks})", part)
                )
        return found

    def put_many(self, fingerprint: str, values: Mapping[bytes, float]) -> None:
        """Stores scores in one transaction. A missing score (NaN) is not stored: it may be there next time."""
        with self._guarded() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                number = self._id(connection, fingerprint, create=True)
                rows = [(number, key, float(value)) for key, value in values.items() if value == value]
                connection.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", rows)
            except BaseException:
                connection.execute("ROLLBACK")
                self._ids.pop(fingerprint, None)
                raise
            connection.execute("COMMIT")

    def pixel_digests(self, file_digests: Sequence[bytes]) -> dict[bytes, bytes]:
        """Which pixels known files hold: file (or stamp) digest -> pixel digest."""
        found: dict[bytes, bytes] = {}
        with self._guarded() as connection:
            for start in range(0, len(file_digests), _CHUNK):
                part = file_digests[start : start + _CHUNK]
                found.update(
                    connection.execute(f"SELECT file, pixels FROM files WHERE file IN ({','.join('?' * len(part))})", part)
                )
        return found

    def remember_files(self, digests: Mapping[bytes, bytes]) -> None:
        """Notes which pixels files hold."""
        with self._guarded() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                connection.executemany("INSERT OR REPLACE INTO files VALUES (?, ?)", digests.items())
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    def __len__(self) -> int:
        with self._guarded() as connection:
            return int(connection.execute("SELECT count(*) FROM scores").fetchone()[0])

    def stats(self) -> dict[str, int]:
        """Number of scores per fingerprint."""
        query = "SELECT fingerprint, count(key) FROM fingerprints LEFT JOIN scores ON scorer = id GROUP BY id"
        with self._guarded() as connection:
            return dict(connection.execute(query))
