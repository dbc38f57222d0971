"""Keep scores on disk, by what was scored and by which scorer.

A changed image, prompt, weight or setting is never answered from the past. The file is
an SQLite database in write-ahead mode, which any number of processes of one machine
share. Only values are stored.
"""

from __future__ import annotations

import errno
import os
import random
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError

_SCHEMA = 1
_APPLICATION = 0x64616C67  # marks the file as ours
_CHUNK = 900  # parameters per statement, under SQLite's oldest limit
_WAIT = 60.0  # seconds to wait for another process's write


class ScoreCache:
    """Scores on disk, by scorer fingerprint and content key.

    Threads share one connection and take turns. A forked or unpickled cache opens its
    own.

    Args:
        path (path): the file. It and its folder are made on first use.

    Raises:
        UserError: on first use, when the file is something else, was written by a newer
            version, is damaged or cannot be written.

    Example:
        ```python
        cache = ScoreCache("scores.sqlite")
        cache.put_many("fingerprint", {b"content key": 0.5})
        assert cache.get_many("fingerprint", [b"content key", b"other"]) == {
            b"content key": 0.5
        }
        ```
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.Lock()
        self._ids: dict[str, int] = {}
        _CACHES.add(self)

    def __reduce__(self) -> tuple[type[ScoreCache], tuple[Path]]:
        return type(self), (self.path,)  # a connection must not cross a process boundary

    def __bool__(self) -> bool:
        return True  # an empty cache is a cache

    def __enter__(self) -> ScoreCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. It is opened again when needed."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection, self._ids = None, {}

    def _connect(self) -> sqlite3.Connection:
        """Open the file, waiting for other processes.

        Making the file and turning on write-ahead mode fail at once, without waiting,
        when others do the same.
        """
        deadline = time.monotonic() + _WAIT
        while True:
            try:
                return self._try_to_connect()
            except UserError as error:
                if "locked" not in str(error.__cause__) or time.monotonic() > deadline:
                    raise
                time.sleep(random.uniform(0.005, 0.05))

    def _try_to_connect(self) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(
                self.path, timeout=_WAIT, isolation_level=None, check_same_thread=False
            )
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"cache: {str(self.path)!r} cannot be opened ({error}); "
                "name a file that you may write to"
            ) from error
        try:
            self._check(connection)  # first, for another program's file must stay as it is
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            with _transaction(connection):  # two processes may make a new file at once
                if self._check(connection):
                    _make_tables(connection)
        except sqlite3.OperationalError as error:
            connection.close()
            raise UserError(
                f"cache: {str(self.path)!r} cannot be used ({error}); "
                "name a file that you may write to"
            ) from error
        except sqlite3.DatabaseError as error:
            connection.close()
            raise UserError(
                f"cache: {str(self.path)!r} is no score cache or is damaged ({error}); "
                "name another file, or delete it if it was one"
            ) from error
        except BaseException:
            connection.close()
            raise
        return connection

    def _check(self, connection: sqlite3.Connection) -> bool:
        """Return whether the file is new.

        Raises:
            UserError: it is not a cache that this version can use.
        """
        # One look, not three.
        query = "SELECT application_id, user_version, (SELECT count(*) FROM sqlite_master)"
        mark, version, tables = connection.execute(
            f"{query} FROM pragma_application_id, pragma_user_version"
        ).fetchone()
        if not (mark or version or tables):
            return True
        if mark != _APPLICATION:
            raise UserError(
                f"cache: {str(self.path)!r} is another program's database; name another file"
            )
        if version > _SCHEMA:
            raise UserError(
                f"cache: {str(self.path)!r} was written by a newer diffalign; "
                "update, or name another file"
            )
        return False

    @contextmanager
    def _guarded(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._translated():
            if self._connection is None:
                self._connection = self._connect()
            yield self._connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn SQLite's errors into a sentence."""
        try:
            yield
        except (sqlite3.ProgrammingError, sqlite3.IntegrityError):
            raise  # values of a wrong type: no reason to delete the file
        except sqlite3.OperationalError as error:
            # The disk's fault has another exit code than a user's mistake.
            if "full" in str(error) or "disk I/O" in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path)) from error
            raise UserError(
                f"cache: {str(self.path)!r} cannot be used ({error}); "
                "check the disk, or run without a cache"
            ) from error
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"cache: {str(self.path)!r} is damaged ({error}); delete it and run again"
            ) from error

    def _id(self, connection: sqlite3.Connection, fingerprint: str, create: bool) -> int | None:
        if fingerprint not in self._ids:
            if create:
                connection.execute(
                    "INSERT OR IGNORE INTO fingerprints (fingerprint) VALUES (?)", (fingerprint,)
                )
            row = connection.execute(
                "SELECT id FROM fingerprints WHERE fingerprint = ?", (fingerprint,)
            ).fetchone()
            if row is None:
                return None
            self._ids[fingerprint] = row[0]
        return self._ids[fingerprint]

    def get_many(self, fingerprint: str, keys: Sequence[bytes]) -> dict[bytes, float]:
        """Return the known ones of `keys` with their scores.

        Args:
            fingerprint (`str`): of the scorer.
            keys (list of `bytes`): content keys.
        """
        scores: dict[bytes, float] = {}
        with self._guarded() as connection:
            number = self._id(connection, fingerprint, create=False)
            if number is None:
                return scores
            for start in range(0, len(keys), _CHUNK):
                part = keys[start : start + _CHUNK]
                marks = ",".join("?" * len(part))
                scores.update(
                    connection.execute(
                        f"SELECT key, value FROM scores WHERE scorer = {number} AND key IN "
                        f"({marks})",
                        part,
                    )
                )
        return scores

    def put_many(self, fingerprint: str, values: Mapping[bytes, float]) -> None:
        """Store scores in one transaction.

        A missing score (NaN) is not stored, for it may be there next time.

        Args:
            fingerprint (`str`): of the scorer.
            values (`dict[bytes, float]`): content key -> score.
        """
        with self._guarded() as connection:
            try:
                with _transaction(connection):
                    number = self._id(connection, fingerprint, create=True)
                    rows = [
                        (number, key, float(value))
                        for key, value in values.items()
                        if value == value
                    ]
                    connection.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", rows)
            except BaseException:
                self._ids.pop(fingerprint, None)
                raise

    def pixel_digests(self, file_digests: Sequence[bytes]) -> dict[bytes, bytes]:
        """Look up which pixels known files hold.

        Args:
            file_digests (list of `bytes`): digests of files or of their stamps.

        Returns:
            file (or stamp) digest -> pixel digest, of the known ones.
        """
        pixels: dict[bytes, bytes] = {}
        with self._guarded() as connection:
            for start in range(0, len(file_digests), _CHUNK):
                part = file_digests[start : start + _CHUNK]
                pixels.update(
                    connection.execute(
                        "SELECT file, pixels FROM files WHERE file IN "
                        f"({','.join('?' * len(part))})",
                        part,
                    )
                )
        return pixels

    def remember_files(self, digests: Mapping[bytes, bytes]) -> None:
        """Note which pixels files hold: file digest -> pixel digest."""
        with self._guarded() as connection, _transaction(connection):
            connection.executemany("INSERT OR REPLACE INTO files VALUES (?, ?)", digests.items())

    def __len__(self) -> int:
        with self._guarded() as connection:
            return int(connection.execute("SELECT count(*) FROM scores").fetchone()[0])

    def stats(self) -> dict[str, int]:
        """Count the scores of each fingerprint."""
        query = (
            "SELECT fingerprint, count(key) FROM fingerprints "
            "LEFT JOIN scores ON scorer = id GROUP BY id"
        )
        with self._guarded() as connection:
            return dict(connection.execute(query))


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _make_tables(connection: sqlite3.Connection) -> None:
    connection.execute(f"PRAGMA application_id={_APPLICATION}")
    connection.execute(f"PRAGMA user_version={_SCHEMA}")
    connection.execute(
        "CREATE TABLE fingerprints (id INTEGER PRIMARY KEY, fingerprint TEXT UNIQUE NOT NULL)"
    )
    connection.execute(
        "CREATE TABLE scores (scorer INTEGER, key BLOB, value REAL NOT NULL, PRIMARY KEY "
        "(scorer, key)) WITHOUT ROWID"
    )
    connection.execute(
        "CREATE TABLE files (file BLOB PRIMARY KEY, pixels BLOB NOT NULL) WITHOUT ROWID"
    )


# SQLite keeps its locks on a file per process and believes that a fork still holds
# them. A fork that inherits an open connection would write without any, and lose what
# it wrote when the parent closes the file. So nothing is open while a process forks.
_CACHES: weakref.WeakSet[ScoreCache] = weakref.WeakSet()
_HELD: list[ScoreCache] = []


def _before_fork() -> None:
    held = sorted(_CACHES, key=id)
    for cache in held:
        cache._lock.acquire()
        cache._close()
    _HELD[:] = held


def _after_fork() -> None:
    for cache in _HELD:
        cache._lock.release()
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork
    )
