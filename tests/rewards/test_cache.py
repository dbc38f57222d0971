"""The score cache: what it keeps apart, several processes at once, foreign files."""

from __future__ import annotations

import datetime
import io
import multiprocessing
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffalign import UserError
from diffalign.rewards.cache import ScoreCache
from diffalign.rewards.content_key import content_key, file_digest, pixel_digest, stamp_digest

IMAGE = b"i" * 32


def keys(count: int, start: int = 0) -> list[bytes]:
    return [content_key(bytes([1]) * 32, f"prompt {i}") for i in range(start, start + count)]


def key(i: int) -> bytes:
    return keys(1, i)[0]


def picture(seed: int = 0, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def encoded(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", **options)
    return buffer.getvalue()


def test_values_come_back_exactly_and_only_under_their_fingerprint(tmp_path):
    cache = ScoreCache(tmp_path / "deep" / "scores.sqlite")
    values = {
        key: value
        for key, value in zip(keys(4), (0.1, -3.0e-12, 1e30, float(np.float32(1 / 3))), strict=True)
    }
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
    assert (
        content_key(digest, "a", {"x": 1})
        != content_key(digest, "a", {"x": 2})
        != content_key(digest, "a")
    )
    assert content_key(digest, "a", {"x": 1, "y": 2}) == content_key(digest, "a", {"y": 2, "x": 1})
    assert content_key(digest, "caf\u00e9") == content_key(
        digest, "cafe\u0301"
    )  # one text in two Unicode forms
    assert content_key(digest, "a lone \ud800 surrogate")


def test_stamps_know_untouched_files_only(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"first")
    now = time.time()
    assert (
        stamp_digest(path, now) is None
    )  # written a moment ago: the clock may not show the next change
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
    assert (
        foreign.read_bytes().startswith(b"SQLite")
        and sqlite3.connect(foreign).execute("SELECT * FROM theirs").fetchall() == []
    )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_a_changed_pixel_changes_the_digest(mode):
    image = Image.new(mode, (5, 4), 0)
    before = pixel_digest(image)
    assert pixel_digest(image.copy()) == before and len(before) == 32
    image.putpixel(
        (3, 2),
        {"LA": (0, 255), "RGB": (0, 0, 1), "RGBA": (0, 0, 0, 1), "CMYK": (0, 0, 0, 1)}.get(mode, 1),
    )
    assert pixel_digest(image) != before


def test_mode_size_palette_and_transparency_are_part_of_the_digest():
    digests = {
        pixel_digest(Image.new(mode, size))
        for mode in ("L", "P")
        for size in ((6, 4), (4, 6), (3, 8))
    }
    assert len(digests) == 6
    red = Image.new("P", (4, 4))
    red.putpalette([255, 0, 0])
    blue = Image.new("P", (4, 4))
    blue.putpalette([0, 0, 255])
    assert red.tobytes() == blue.tobytes() and pixel_digest(red) != pixel_digest(blue)
    clear = red.copy()
    clear.info["transparency"] = 0
    assert pixel_digest(clear) != pixel_digest(red)


def test_files_and_memory_share_a_digest(tmp_path):
    image = picture()
    best, fast = encoded(image, compress_level=9), encoded(image, compress_level=1)
    assert file_digest(best) != file_digest(fast)
    assert (
        pixel_digest(Image.open(io.BytesIO(best)))
        == pixel_digest(Image.open(io.BytesIO(fast)))
        == pixel_digest(image)
    )
    for data in (encoded(picture().quantize(17)), encoded(picture().quantize(17), transparency=3)):
        lazy, loaded = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(data))
        loaded.load()
        assert pixel_digest(lazy) == pixel_digest(loaded) == pixel_digest(lazy)
    (tmp_path / "image.png").write_bytes(best)
    assert (
        file_digest(tmp_path / "image.png")
        == file_digest(str(tmp_path / "image.png"))
        == file_digest(best)
    )
    with pytest.raises(UserError, match=r"images: '.*gone.png' cannot be read \(No such file"):
        file_digest(tmp_path / "gone.png")


def test_every_field_is_part_of_the_key():
    keys = [
        content_key(IMAGE, "a cat"),
        content_key(b"j" * 32, "a cat"),
        content_key(IMAGE, "a cat "),
        content_key(IMAGE, "A cat"),
        content_key(IMAGE, ""),
        content_key(IMAGE, None),
        content_key(IMAGE, "a cat", {"count": 1}),
        content_key(IMAGE, "a cat", {"count": 2}),
        content_key(IMAGE, "a cat", {"count": "1"}),
        content_key(IMAGE, 'a cat{"count": 1}'),
        content_key(IMAGE, None, {"prompt": "a cat"}),
    ]
    assert len(set(keys)) == len(keys) and {len(k) for k in keys} == {32}
    # fields do not run into one another
    assert content_key(b"i" + b"1:1:", "a") != content_key(b"i", "1:1:a")


def test_metadata_counts_in_full_and_in_any_order():
    def of(value):
        return content_key(IMAGE, "p", {"a": value, "b": {"c": [1, None]}})

    assert content_key(IMAGE, "p", {"x": 1, "y": 2}) == content_key(IMAGE, "p", {"y": 2, "x": 1})
    assert content_key(IMAGE, "p", {}) == content_key(IMAGE, "p")
    zeros = np.zeros(5000)
    other = zeros.copy()
    other[2500] = 1  # where numpy's printed form has dots
    assert str(zeros) == str(other) and of(zeros) != of(other) and of(zeros) == of(zeros.copy())
    assert of(picture(0)) != of(picture(1)) and of(picture(0)) == of(picture(0))
    assert of(b"\xff") != of(b"\xfe") and of({1, 2}) == of({2, 1}) != of({1, 3})
    assert of(np.int64(3)) == of(3) and of(datetime.date(2024, 1, 2)) != of(
        datetime.date(2024, 1, 3)
    )
    with pytest.raises(UserError, match=r"metadata: cannot be hashed.*a object has no plain value"):
        of(object())
    with pytest.raises(UserError, match=r"metadata: cannot be hashed"):
        content_key(IMAGE, "p", {1: "a", "b": 2})


def test_an_empty_cache_is_a_cache(tmp_path):
    path = tmp_path / "new" / "c.db"
    cache = ScoreCache(path)
    assert cache and not path.exists()  # made when first used
    assert cache.get_many("f", keys(2)) == {} and cache.stats() == {} and len(cache) == 0
    assert cache.get_many("f", []) == {} and cache.pixel_digests([]) == {}
    files = {key(i): key(i + 1) for i in range(2500)}
    cache.remember_files(files)
    assert cache.pixel_digests([key(i) for i in range(5000)]) == files
    infinite = {key(0): float("inf"), key(1): -float("inf"), key(2): 5e-324}
    cache.put_many("f", infinite)
    assert cache.get_many("f", list(infinite)) == infinite


def test_a_failed_write_leaves_nothing_and_the_cache_usable(tmp_path):
    cache = ScoreCache(tmp_path / "c.db")
    with pytest.raises(ValueError, match="could not convert"):
        cache.put_many("f", {key(1): 1.0, key(2): "high"})
    with pytest.raises(sqlite3.Error):  # and no advice to delete the file
        cache.put_many("f", {key(1): 1.0, ("no", "bytes"): 2.0})
    assert cache.stats() == {}
    cache.put_many("f", {key(1): 1.0})
    assert cache.stats() == {"f": 1}


def _make_and_write(path, writer, barrier):
    barrier.wait(120)
    ScoreCache(path).put_many("f", {key(writer): float(writer), key(100): 100.0})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_processes_that_make_one_file_at_once(tmp_path):
    # Forks, as they start within a moment: turning on write-ahead mode fails at once
    # when another process does the same.
    context = multiprocessing.get_context("fork")
    for attempt in range(8):
        path, barrier = tmp_path / str(attempt) / "c.db", context.Barrier(6)
        writers = [
            context.Process(target=_make_and_write, args=(path, writer, barrier))
            for writer in range(6)
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert [writer.exitcode for writer in writers] == [0] * 6
        assert ScoreCache(path).get_many("f", keys(101)) == {
            key(i): float(i) for i in [*range(6), 100]
        }


def test_threads_take_turns(tmp_path):
    cache, failures = ScoreCache(tmp_path / "c.db"), []

    def work(thread: int) -> None:
        try:
            for i in range(60):
                cache.put_many(f"thread {thread}", {key(i): float(i)})
                assert cache.get_many(f"thread {thread}", [key(i)]) == {key(i): float(i)}
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and cache.stats() == {f"thread {thread}": 60 for thread in range(4)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_keeps_what_it_writes_after_its_parent_closed(tmp_path):
    # SQLite believes that the fork of an open connection holds its parent's locks; see
    # _before_fork.
    cache = ScoreCache(tmp_path / "c.db")
    cache.put_many("f", {key(0): 0.0})
    (read, wrote), (wait, closed) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            cache.put_many("f", {key(1): 1.0})
            os.write(wrote, b".")
            os.read(wait, 1)
            cache.put_many("f", {key(2): 2.0})
            os._exit(0)
        finally:
            os._exit(1)
    os.close(wrote)
    assert os.read(read, 1) == b"."
    assert cache.get_many("f", [key(1)]) == {key(1): 1.0}
    cache.close()
    os.write(closed, b".")
    assert os.waitpid(child, 0)[1] == 0
    assert cache.get_many("f", [key(0), key(1), key(2)]) == {key(i): float(i) for i in range(3)}


_KILLED = """
import sys, time
from diffalign.rewards.cache import ScoreCache, _transaction
cache = ScoreCache(sys.argv[1])
cache.put_many("f", {bytes([i]) * 32: float(i) for i in range(100)})
with _transaction(cache._connection):
    cache._connection.execute("INSERT INTO scores VALUES (1, x'00', 0.5)")
    print("writing", flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_writer_killed_in_a_transaction(tmp_path):
    path = tmp_path / "c.db"
    writer = subprocess.Popen([sys.executable, "-c", _KILLED, str(path)], stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None and writer.stdout.readline() == b"writing\n"
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    cache = ScoreCache(path)
    assert cache.get_many("f", [bytes([i]) * 32 for i in range(100)]) == {
        bytes([i]) * 32: float(i) for i in range(100)
    }
    cache.put_many("f", {b"new": 1.0})
    assert cache.stats() == {"f": 101}  # what was not finished is not there
    cache.close()
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def one_sentence(path: Path, action=len) -> str:
    with pytest.raises(UserError) as raised:
        action(ScoreCache(path))
    message = str(raised.value)
    assert message.startswith(f"cache: {str(path)!r} ") and "\n" not in message
    return message


def test_other_files_are_refused_and_stay_as_they_are(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("no database " * 200)
    assert "is no score cache or is damaged" in one_sentence(
        text
    ) and "name another file" in one_sentence(text)

    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE scores (a)")
    connection.close()
    assert "another program's database; name another file" in one_sentence(foreign)
    contents = {path: path.read_bytes() for path in (text, foreign)}
    assert contents[text] == b"no database " * 200
    assert sqlite3.connect(foreign).execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign.db", "notes.txt"]


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "c.db"
    with ScoreCache(path) as cache:
        cache.put_many("f", {key(i): float(i) for i in range(3000)})
    whole = path.read_bytes()
    path.write_bytes(whole[:2048] + b"\xff" * (len(whole) - 2048))
    assert "damaged" in one_sentence(
        path, lambda cache: cache.get_many("f", [key(i) for i in range(3000)])
    )
    path.write_bytes(whole[: len(whole) // 3])
    assert "damaged" in one_sentence(
        path, lambda cache: cache.get_many("f", [key(i) for i in range(3000)])
    )
    path.write_bytes(b"")  # an empty file, as tempfile makes it, is a new cache
    assert len(ScoreCache(path)) == 0


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere"
)
def test_a_read_only_folder_is_named(tmp_path):
    folder = tmp_path / "locked"
    with ScoreCache(folder / "old.db") as cache:
        cache.put_many("f", {key(1): 1.0})
    (folder / "old.db").chmod(0o444)
    folder.chmod(0o555)
    try:
        assert "name a file that you may write to" in one_sentence(folder / "c.db")
        assert "name a file that you may write to" in one_sentence(folder / "deeper" / "c.db")
        assert "name a file that you may write to" in one_sentence(folder / "old.db")
    finally:
        folder.chmod(0o755)
