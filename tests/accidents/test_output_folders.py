"""Output folders: one run at a time, odd names, links, full disks, lost pipes."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import run
from tiers import by_default
from tiny import lora_config, make_trainer, picture

from diffalign.cli import exit_codes
from diffalign.data.cache import TensorCache
from diffalign.errors import UserError
from diffalign.rewards.cache import ScoreCache
from diffalign.runtime.files import LOCK, make_folder, move_aside, replacing_folder, save_tensors
from diffalign.runtime.folder_lock import FolderLock

HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom diffalign.runtime.folder_lock import "
    "FolderLock\nFolderLock(Path(sys.argv[1])).take()\nprint('held', flush=True)\ntime.sleep(600)"
)


@pytest.fixture
def holder(tmp_path):
    """Another process that uses the folder `out`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_in_use_is_refused_and_free_after_a_kill(tmp_path, holder):
    with pytest.raises(
        UserError, match=rf"'{tmp_path}/out' is in use by another run \(process {holder.pid} on "
    ):
        FolderLock(tmp_path / "out").take()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with FolderLock(tmp_path / "out"):
        assert (tmp_path / "out" / LOCK).is_file()
    assert not (tmp_path / "out" / LOCK).exists()


@pytest.mark.nightly
def test_every_command_with_an_output_folder_respects_the_lock(tmp_path, holder):
    picture(100, 1).save(tmp_path / "a.png")
    (tmp_path / "p.txt").write_text("a cat\n")
    common = ["--scorers", "jpeg_compressibility", "--output_dir", "out"]
    for arguments in (
        ["score", "--images", "a.png", *common],
        ["compare", "--base", "shapes", "--tuned", "x=shapes", "--prompts", "p.txt", *common],
        ["data", "build", "--prompts", "p.txt", *common],
        ["quickstart", "--output_dir", "out"],
    ):
        done = run("diffalign", *arguments, cwd=tmp_path)
        assert (
            done.returncode == 2
            and "is in use by another run" in done.stderr
            and "Traceback" not in done.stderr
        ), arguments
    with pytest.raises(UserError, match="train.output_dir: .* is in use"):
        make_trainer(tmp_path / "out", peft_config=lora_config()).train()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_worker_does_not_keep_the_lock_of_its_parent(tmp_path):
    reader, writer = os.pipe()
    if (parent := os.fork()) == 0:
        FolderLock(tmp_path / "out").take()
        if os.fork() == 0:
            os.write(writer, b"x")
            time.sleep(60)  # a data-loader worker that outlives its parent
            os._exit(0)
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    with pytest.raises(UserError, match="in use"):
        FolderLock(tmp_path / "out").take()
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    FolderLock(tmp_path / "out").take()


def test_folders_made_for_nothing_are_removed(tmp_path):
    with pytest.raises(ValueError), FolderLock(tmp_path / "a/b/c"):
        raise ValueError
    assert not list(tmp_path.iterdir())
    with FolderLock(tmp_path / "a/b"):
        (tmp_path / "a/b/x").write_text("kept")
    assert (tmp_path / "a/b/x").is_file()


ODD = ["x" * 300, "a\0b", "/proc/nothing", "/dev/null/x", "file/x", "dangling"]


@pytest.mark.parametrize("name", ODD)
def test_folders_that_cannot_be_made_are_one_sentence(name, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for take in (lambda: make_folder(tmp_path / name), FolderLock(tmp_path / name).take):
        with pytest.raises(UserError) as caught:
            take()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    with pytest.raises(UserError):
        make_trainer(tmp_path / name, peft_config=lora_config()).train()


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["x" * 300, "/proc/nothing", "dangling"])
def test_odd_folders_on_the_command_line(name, tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    picture(100, 1).save(tmp_path / "a.png")
    for arguments in (
        ["score", "--images", "a.png", "--scorers", "jpeg_compressibility"],
        ["sample", "--prompt", "a cat", "--num_images", "1"],
    ):
        done = run("diffalign", *arguments, "--output_dir", name, cwd=tmp_path)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-500:]


def test_a_link_stays_when_its_run_is_moved_aside(tmp_path):
    (tmp_path / "disk/run").mkdir(parents=True)
    (tmp_path / "disk/run/x").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "disk/run")
    assert move_aside(tmp_path / "link", "o") == tmp_path / "disk/run.old-1"
    assert (tmp_path / "link").is_symlink() and not list((tmp_path / "link").iterdir())
    (tmp_path / "link/y").write_text("newer")
    assert move_aside(tmp_path / "link", "o").name == "run.old-2"


def test_the_working_directory_is_not_moved(tmp_path, monkeypatch):
    (tmp_path / "a/b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a/b")
    for folder in (Path("."), Path(".."), tmp_path / "a"):
        with pytest.raises(UserError, match="cannot be moved aside"):
            move_aside(folder, "o")
    with pytest.raises(UserError, match="mounted file system"):
        move_aside(Path("/"), "o")


def test_a_replaced_folder_is_the_old_or_the_new_one(tmp_path):
    for text in ("one", "two"):
        with replacing_folder(tmp_path / "d") as folder:
            (folder / "x").write_text(text)
    with pytest.raises(FileNotFoundError), replacing_folder(tmp_path / "d") as folder:
        (folder / "x").rename(tmp_path / "gone")
    assert [p.name for p in tmp_path.iterdir()] == ["d"] and (tmp_path / "d/x").read_text() == "two"


@pytest.fixture
def small_files():
    """Files of at most 8 kB, which looks like a full disk to whoever writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, small_files):
    with pytest.raises(Exception) as caught:
        save_tensors({"a": torch.zeros(9000)}, tmp_path / "a.safetensors")
    assert exit_codes.no_space(caught.value)
    cache = TensorCache(tmp_path / "cache")
    cache.add("k", {"a": torch.zeros(9000)})
    with pytest.raises(Exception) as caught:
        cache.flush()
    assert exit_codes.no_space(caught.value)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    with pytest.raises(Exception) as caught:
        torch.save(torch.zeros(9000), tmp_path / "t.pt")
    assert exit_codes.no_space(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        sqlite3.OperationalError("database or disk is full"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        OSError("4096 requested and 512 written"),
    ],
)
def test_libraries_words_for_a_full_disk(error):
    assert (
        exit_codes.no_space(error)
        and exit_codes.no_space(RuntimeError("x").with_traceback(None)) is False
    )
    wrapped = ValueError("outer")
    wrapped.__cause__ = error
    assert exit_codes.no_space(wrapped)
    assert not exit_codes.no_space(UserError("no space left on this page"))


def test_a_full_score_cache_is_no_mistake_of_the_user(tmp_path, monkeypatch):
    cache = ScoreCache(tmp_path / "c.sqlite")
    with pytest.raises(OSError, match="No space left"), cache._translated():
        raise sqlite3.OperationalError("database or disk is full")


def test_old_temporaries_leave_a_shared_cache_and_fresh_ones_stay(tmp_path):
    cache = TensorCache(tmp_path)
    for name, age in ((".tmpAb12Cd", 7200), (".x.tmp", 7200), (".tmpFresh1", 0)):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    cache.add("k", {"a": torch.zeros(3)})
    cache.flush()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == [".tmpFresh1"]


def test_files_of_a_cache_can_be_read_by_others(tmp_path):
    before = os.umask(0o022)
    try:
        save_tensors({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.nightly
@by_default(values=1)
@pytest.mark.parametrize(
    "arguments", [["scorers"], ["train", "--help"], ["env"], ["compare", "--help"]]
)
def test_a_reader_that_has_seen_enough_is_no_failure(arguments, tmp_path):
    command = f"{sys.executable} -m diffalign {' '.join(arguments)} | head -c 1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
