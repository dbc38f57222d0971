"""Where a dataset's cells may point to: not to the web, not out of its folder, unless
the user says so."""

from __future__ import annotations

import http.server
import json
import threading
from pathlib import Path

import pytest
from tiny import picture

from diffalign import load_preferences
from diffalign.data import remote_images
from diffalign.data.images import ImagePlaces, resolve
from diffalign.errors import UserError
from diffalign.runtime.decoding import UnreadableImage


@pytest.fixture
def served(tmp_path):
    """A picture on the loopback address, the requests it got, and other pages."""
    picture(200, 1).save(tmp_path / "a.png")
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path == "/away":
                self.send_response(302)
                self.send_header("Location", "http://10.0.0.1/secret.png")
                self.end_headers()
                return
            body = b"x" * 5000 if self.path == "/large" else (tmp_path / "a.png").read_bytes()
            self.send_response(404 if self.path == "/none" else 200)
            self.send_header("Content-Length", str(len(body) + (100 if self.path == "/cut" else 0)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()


@pytest.fixture
def online(monkeypatch, tmp_path):
    """As if the loopback address were public: to try fetching without a network."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "cache"))
    real = remote_images.public_address
    monkeypatch.setattr(
        remote_images,
        "public_address",
        lambda host, port: host if host == "127.0.0.1" else real(host, port),
    )


def table(folder: Path, *paths: str) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "p", "image": path}) + "\n" for path in paths))
    return file


@pytest.mark.parametrize(
    "address",
    [
        "HTTP://127.0.0.1:9/a.png",
        "https://example.invalid/a.png",
        "ftp://a/b.png",
        "s3://b/k.png",
        "file:///etc/hosts",
        "hf://datasets/a/b/c.png",
        "zip://a.png::https://example.invalid/a.zip",
        "github://a:b@main/c.png",
        "memory://x",
    ],
)
def test_addresses_are_refused_by_default(tmp_path, address):
    with pytest.raises(UserError, match="address"):
        load_preferences(table(tmp_path, address), verbose=False)


@pytest.mark.parametrize(
    "address",
    [
        "ftp://a/b.png",
        "s3://b/k.png",
        "file:///etc/hosts",
        "zip://a.png::https://example.invalid/a.zip",
    ],
)
def test_only_http_is_ever_fetched(tmp_path, address):
    with pytest.raises(UserError, match="is not opened"):
        load_preferences(table(tmp_path, address), verbose=False, allow_remote_images=True)


def test_nothing_is_asked_for_unless_it_is_allowed(tmp_path, served):
    url, asked = served
    with pytest.raises(UserError, match="not fetched.*data.allow_remote_images"):
        load_preferences(table(tmp_path, f"{url}/a.png"), verbose=False)
    assert asked == []


def test_private_addresses_are_refused_even_then(tmp_path, served, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    url, asked = served
    for host in (
        url,
        "http://localhost:1/a.png",
        "http://10.0.0.1/a.png",
        "http://169.254.169.254/latest",
        "http://[::1]/a.png",
    ):
        with pytest.raises(UserError, match="is no public address"):
            load_preferences(table(tmp_path, f"{host}"), verbose=False, allow_remote_images=True)
    assert asked == []


def test_offline_mode_is_honoured(tmp_path, served, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="offline mode"):
        load_preferences(
            table(tmp_path, f"{served[0]}/a.png"), verbose=False, allow_remote_images=True
        )


def test_a_picture_is_fetched_once(tmp_path, served, online):
    url, asked = served
    file = table(tmp_path, f"{url}/a.png", f"{url}/a.png")
    for _ in range(2):
        data = load_preferences(file, verbose=False, allow_remote_images=True)
        assert data[0].open_images()[0].size == picture(200, 1).size
    assert asked == ["/a.png"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/none", "answered 404"),
        ("/cut", "cut short|more expected"),
        ("/large", "larger than"),
        ("/away", "no public address"),
    ],
)
def test_replies_that_are_no_picture(tmp_path, served, online, path, reason, monkeypatch):
    monkeypatch.setattr(remote_images, "MAX_BYTES", 4000)
    with pytest.raises(UnreadableImage, match=reason):
        resolve(served[0] + path, ImagePlaces(remote=True))
    assert not list(remote_images.cache_folder().glob("*"))


def test_a_dripping_server_is_left_after_the_total_time(tmp_path, online, monkeypatch):
    monkeypatch.setattr(remote_images, "TOTAL_SECONDS", 0.6)
    stop = threading.Event()

    class Drip(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            while not stop.wait(0.1):
                try:
                    self.wfile.write(b"x")
                except OSError:
                    return

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Drip)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(UnreadableImage, match="no complete reply within|timed out"):
        resolve(f"http://127.0.0.1:{server.server_address[1]}/a.png", ImagePlaces(remote=True))
    stop.set()
    server.shutdown()


def test_paths_out_of_the_folder_need_permission(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "other").mkdir()
    picture(200, 1).save(tmp_path / "other/a.png")
    picture(90, 1).save(tmp_path / "set/b.png")
    for path in (str(tmp_path / "other/a.png"), "../other/a.png", "x/../../other/a.png"):
        (tmp_path / "set/x").mkdir(exist_ok=True)
        file = table(tmp_path / "set", path)
        with pytest.raises(
            UserError, match="lies outside the dataset's folder.*data.allow_outside_paths"
        ):
            load_preferences(file, verbose=False)
        assert len(load_preferences(file, verbose=False, allow_outside_paths=True)) == 1
        assert len(load_preferences(file, verbose=False, data_dir=tmp_path / "other")) == 1
    for path in (str(tmp_path / "set/b.png"), "b.png", "./b.png", "x/../b.png"):
        assert len(load_preferences(table(tmp_path / "set", path), verbose=False)) == 1


def test_rows_made_in_code_and_links_within_a_folder_are_free(tmp_path):
    (tmp_path / "set").mkdir()
    picture(200, 1).save(tmp_path / "blob", "PNG")
    (tmp_path / "set/a.png").symlink_to(tmp_path / "blob")  # as in the Hub's cache
    assert (
        len(load_preferences([{"prompt": "p", "image": str(tmp_path / "blob")}], verbose=False))
        == 1
    )
    assert len(load_preferences(table(tmp_path / "set", "a.png"), verbose=False)) == 1


def test_tables_made_on_windows(tmp_path):
    (tmp_path / "img/deep").mkdir(parents=True)
    picture(200, 1).save(tmp_path / "img/deep/a.png")
    assert len(load_preferences(table(tmp_path, "img\\deep\\a.png"), verbose=False)) == 1
    with pytest.raises(UserError, match="does not exist"):
        load_preferences(table(tmp_path, "img\\deep\\b.png"), verbose=False)
