"""What progress looks like in a terminal, in a file and when nobody wants it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from diffalign.runtime import progress
from diffalign.runtime.progress import QUIET, clock, plural, progress_bar, track

SCRIPT = """
import sys
from diffalign.runtime.progress import note, progress_bar, track
with progress_bar(total=3, desc="outer", unit="step") as outer:
    for number in range(3):
        for item in track(range(2), desc="inner", unit="batch", leave=False):
            pass
        outer.set_postfix({"loss": f"0.{number}"})
        outer.update()
    print("printed meanwhile")
with progress_bar(total=None, desc="endless") as bar:
    bar.update(7)
"""


def test_a_file_gets_whole_lines(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.delenv("TQDM_MININTERVAL", raising=False)
    with progress_bar(total=100, desc="drawing", unit="image", initial=20) as bar:
        for _ in range(8):
            now[0] += 10
            bar.set_postfix({"loss": "0.5"})
            bar.update(10)
    assert capsys.readouterr().err.splitlines() == [
        "drawing: 50/100 images, 0:30, 0:50 left, loss 0.5",
        "drawing: 80/100 images, 1:00, 0:20 left, loss 0.5",
        "drawing: 100/100 images, 1:20, loss 0.5",
    ]


def test_short_work_inside_of_other_work_leaves_no_line(capsys) -> None:
    assert list(track([1, 2], desc="inner", unit="batch", leave=False)) == [1, 2]
    assert capsys.readouterr().err == ""


def test_what_is_taken_back_is_not_counted(capsys) -> None:
    with progress_bar(total=4, desc="sampling") as bar:
        bar.update(3)
        bar.update(-3)
        bar.update(4)
    assert bar.n == 4 and capsys.readouterr().err.startswith("sampling: 4/4 steps")


@pytest.mark.parametrize("value", ["1", "yes"])
def test_quiet_shows_nothing(capsys, monkeypatch, value: str) -> None:
    monkeypatch.setenv(QUIET, value)
    assert list(track(range(3), desc="x", unit="row")) == [0, 1, 2]
    progress.note("a remark")
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_terminal_gets_live_lines(term: str) -> None:
    import fcntl
    import pty
    import struct
    import termios

    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))
    environment = {**os.environ, "TERM": term, "COLUMNS": "120", "NO_COLOR": "1"}
    environment.pop(QUIET, None)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stderr=inner, stdout=subprocess.PIPE, env=environment
    )
    os.close(inner)
    content = b""
    try:
        while chunk := os.read(outer, 65536):
            content += chunk
    except OSError:  # the other end is closed
        pass
    assert process.stdout is not None and process.stdout.read() == b"printed meanwhile\n"
    assert process.wait() == 0
    text = content.decode()
    assert "outer" in text and "3/3" in text and "7 steps" in text.replace("7step", "7 steps")
    if term == "xterm" and find_spec("rich"):
        assert "loss 0.2" in text and text.count("\x1b[?25l") == text.count("\x1b[?25h")


def test_words() -> None:
    assert [clock(s) for s in (0, 61, 3723)] == ["0:00", "1:01", "1:02:03"]
    assert [plural(u) for u in ("step", "batch")] == ["steps", "batches"]
