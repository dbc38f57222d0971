"""The score cache: what it keeps apart, several processes at once, files that are something else."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from diffalign import UserError
from diffalign.rewards.cache import ScoreCache, content_key, file_digest, pixel_digest, stamp_digest


def keys(count: int, start: int = 0) -> list[bytes]:
    return [content_key(bytes([1]) * 32, f"prompt {i}") for i in range(start, start + count)]


def test_values_come_back_exactly_and_only_under_their_fingerprint(tmp_path):
    cache = ScoreCache(tmp_path / "deep" / "scores.sqlite")
    values = {key: value for key, value in zip(keys(4), (0.1, -3.0e-12, 1e30, float(np.float32(1 / 3))), strict=True)}
    cache.put_many("aa", values)
    assert cache.get_many("aa", [*values, content_key(b"other", "p")]) == values
    assert cache.get_many("bb", list(values)) == {}
    cache.put_many("bb", {keys(1)[0]: 7.0})
    assert cache.get_many("aa", keys(1)) == {keys(1)[0]: 0.1}
    assert len(cache) == 5 and cache.stats() == {"aa": 4, "bb": 1}
    with ScoreCache(cache.path) as again:
        assert again.get_many("aa", list(values)) == values


def test_missing_scores_are_not_stored(tmp_path):
    cache = ScoreCache(tmp_path / "s.sqlite")
    first, second = keys(2)
    cache.put_many("aa", {first: float("nan"), second: 1.0})
    assert cache.get_many("aa", [first, second]) == {second: 1.0}


def test_many_keys_in_one_call(tmp_path):
    cache = ScoreCache(tmp_path / "s.sqlite")
    values = {key: float(i) for i, key in enumerate(keys(5000))}
    cache.put_many("aa", values)
    assert cache.get_many("aa", list(values)) == values


def test_keys_follow_the_content():
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    changed = image.copy()
    changed.putpixel((0, 0), (9, 9, 9))
    assert pixel_digest(image) == pixel_digest(image.copy()) != pixel_digest(changed)
    assert pixel_digest(image) != pixel_digest(image.convert("RGBA"))
    turned = Image.frombytes("RGB", (2, 8), image.tobytes())
    assert pixel_digest(turned) != pixel_digest(image)  # the same bytes in another shape
    palettes = []
    for shift in (0, 1):
        paletted = Image.new("P", (2, 2), 1)
        paletted.putpalette([(value + shift) % 256 for value in range(256)] * 3)
        palettes.append(pixel_digest(paletted))
    assert palettes[0] != palettes[1]
    digest = pixel_digest(image)
    assert content_key(digest, "a") != content_key(digest, "b") != content_key(digest, None)
    assert content_key(digest, "") != content_key(digest, None)
    assert content_key(digest, "a", {"x": 1}) != content_key(digest, "a", {"x": 2}) != content_key(digest, "a")
    assert content_key(digest, "a", {"x": 1, "y": 2}) == content_key(digest, "a", {"y": 2, "x": 1})
    assert content_key(digest, "caf\u00e9") == content_key(digest, "cafe\u0301")  # one text in two Unicode forms
    assert content_key(digest, "a lone \ud800 surrogate")


def test_stamps_know_untouched_files_only(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"first")
    now = time.time()
    assert stamp_digest(path, now) is None  # written a moment ago: the clock may not show the next change
    first = stamp_digest(path, now + 100)
    assert first == stamp_digest(str(path), now + 200)
    path.write_bytes(b"other")
    os.utime(path, (1_600_000_000, 1_600_000_000))
    assert stamp_digest(path, now + 100) != first
    assert stamp_digest(tmp_path / "nowhere.png", now) is None
    assert file_digest(path) == file_digest(b"other")


def _write(path, start, count):
    cache = ScoreCache(path)
    for i in range(start, start + count, 10):
        cache.put_many("aa", {key: float(j) for j, key in enumerate(keys(10, i), i)})


def test_four_processes_write_at_once_and_lose_nothing(tmp_path):
    path = tmp_path / "s.sqlite"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write, args=(path, 50 * i, 100)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    wanted = keys(250)
    found = ScoreCache(path).get_many("aa", wanted)
    assert [found[key] for key in wanted] == [float(i) for i in range(250)]


def test_a_killed_writer_leaves_a_readable_file(tmp_path):
    path = tmp_path / "s.sqlite"
    code = (
        "import sys; from diffalign.rewards.cache import ScoreCache, content_key\n"
        f"cache = ScoreCache({str(path)!r})\n"
        "cache.put_many('aa', {content_key(b'x', 'kept'): 1.0}); print('ready', flush=True)\n"
        "i = 0\n"
        "while True:\n"
        "    cache.put_many('aa', {content_key(b'x', str(i)): 2.0}); i += 1\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    cache = ScoreCache(path)
    assert cache.get_many("aa", [content_key(b"x", "kept")]) == {content_key(b"x", "kept"): 1.0}
    cache.put_many("aa", {content_key(b"x", "after"): 3.0})
    assert len(cache) >= 2


def test_a_cache_crosses_a_process_boundary_without_its_connection(tmp_path):
    cache = ScoreCache(tmp_path / "s.sqlite")
    cache.put_many("aa", {keys(1)[0]: 1.0})
    assert pickle.loads(pickle.dumps(cache)).get_many("aa", keys(1)) == {keys(1)[0]: 1.0}


def test_files_that_are_something_else_are_one_sentence(tmp_path):
    text = tmp_path / "text.sqlite"
    text.write_text("no database at all " * 100)
    foreign = tmp_path / "foreign.sqlite"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    newer = tmp_path / "newer.sqlite"
    ScoreCache(newer).put_many("aa", {keys(1)[0]: 1.0})
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version=99")
    (tmp_path / "file").write_text("")
    for path, message in (
        (text, "is no score cache or is damaged"),
        (foreign, "is another program's database"),
        (newer, "was written by a newer diffalign"),
        (tmp_path / "file" / "s.sqlite", "cannot be opened"),
        (tmp_path, "cannot be opened|cannot be used"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            ScoreCache(path).get_many("aa", keys(1))
        assert "\n" not in str(caught.value)
    assert foreign.read_bytes().startswith(b"SQLite") and sqlite3.connect(foreign).execute("SELECT * FROM theirs").fetchall() == []
