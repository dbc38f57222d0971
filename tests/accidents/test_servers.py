"""Servers and clients that go wrong.

Crowds, bad items, bodies that would fill the memory, replies that are cut or drip.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import random
import shutil
import socket
import ssl
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from mutations import damaged
from PIL import Image

from diffalign import load_scorer
from diffalign.errors import ConfigError, UserError
from diffalign.rewards.serving import server as scorer_server
from diffalign.rewards.serving import service as scoring_service
from diffalign.rewards.serving.client import (
    ServerFailure,
    check_calls,
    check_url,
    request_json,
    without_password,
)
from diffalign.rewards.serving.server import Limits, make_server


def png(size: tuple[int, int] = (8, 8)) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@contextmanager
def serving(name: str = "jpeg_compressibility", scorer=None, **options):
    server = make_server(scorer or load_scorer(name), **options)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def post(port: int, items, headers=None, raw: bytes | None = None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(
        "POST", "/score", json.dumps({"items": items}) if raw is None else raw, headers or {}
    )
    reply = connection.getresponse()
    return reply.status, json.loads(reply.read())


class Fragile(type(load_scorer("jpeg_compressibility"))):
    """Fails as a whole at a prompt that says so."""

    def score(self, images, prompts=None, metadata=None, **options):
        if any("bad" in prompt for prompt in prompts or ()):
            raise RuntimeError("inside the model")
        return super().score(images, prompts, metadata, **options)


class Slow(type(load_scorer("jpeg_compressibility"))):
    """Takes its time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.begun = seconds, threading.Event()

    def score(self, images, prompts=None, metadata=None, **options):
        self.begun.set()
        time.sleep(self.seconds)
        return super().score(images, prompts, metadata, **options)


def test_a_crowd_is_answered():
    with serving() as port:
        gate, statuses = threading.Barrier(120), []

        def ask() -> None:
            gate.wait()
            try:
                statuses.append(post(port, [{"image": png()}])[0])
            except OSError as error:
                statuses.append(str(error))

        threads = [threading.Thread(target=ask) for _ in range(120)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert statuses == [200] * 120


ITEMS = [
    {"image": png(), "prompt": "\ud800"},
    {"image": "no base64!"},
    {"image": 3},
    {"image": png(), "prompt": 5},
    {"image": png(), "metadata": []},
    "text",
    None,
    {"image": base64.b64encode(b"GIF89a").decode()},
    {"image": png()[:60]},
    {"image": png((5000, 4000))},
]


@pytest.mark.parametrize("bad", ITEMS, ids=range(len(ITEMS)))
def test_a_bad_item_is_one_missing_score(bad):
    with serving() as port:
        status, reply = post(port, [{"image": png()}, bad, {"image": png()}])
    assert (
        status == 200
        and [score is None for score in reply["scores"]] == [False, True, False]
        and reply["errors"][1]
    )


def test_an_item_on_which_the_scorer_fails_costs_no_other():
    with serving(scorer=Fragile()) as port:
        status, reply = post(
            port, [{"image": png(), "prompt": p} for p in ("a", "bad", "c", "bad")]
        )
    assert status == 200 and [score is None for score in reply["scores"]] == [
        False,
        True,
        False,
        True,
    ]
    assert "see the log of the server" in reply["errors"][1]


def test_thin_pictures_are_scored():
    with serving() as port:
        assert post(port, [{"image": png((1, 60_000))}])[1]["scores"][0] is not None


@pytest.mark.parametrize(
    "raw",
    [
        b'{"items": [' + b"[]," * 400_000 + b"[]]}",
        b"[" * 500_000,
        b'{"items": [' + b"0," * 400_000 + b"0]}",
    ],
)
def test_bodies_of_many_values_are_refused_before_they_are_parsed(raw, monkeypatch):
    with serving() as port:
        monkeypatch.setattr(
            scoring_service.json, "loads", lambda data: pytest.fail("the body was parsed")
        )
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/score", raw)
        assert connection.getresponse().status == 413


def test_a_request_as_large_as_the_limits_allow_is_served():
    prompt = ", ".join(["a red circle"] * 1500)[:20_000]
    with serving() as port:
        assert (
            post(
                port,
                [{"image": png(), "prompt": prompt, "metadata": {"a": [1, 2]}}]
                * Limits().max_items,
            )[0]
            == 200
        )


def test_the_body_of_a_get_is_no_request():
    with serving() as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request(
            "GET", "/health", "GET /info HTTP/1.1\r\nHost: x\r\n\r\n", {"Content-Length": "30"}
        )
        assert connection.getresponse().read() == b'{"status": "ok"}'
        assert connection.sock is None or connection.sock.recv(100) == b""


def test_a_request_that_drips_is_cut_off(monkeypatch):
    monkeypatch.setattr(scorer_server, "_REQUEST_SECONDS", 0.5)
    with serving() as port, socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(b"POST /score HTTP/1.1\r\nContent-Length: 100000\r\n\r\n")
        started = time.monotonic()
        cut_off = False
        while not cut_off and time.monotonic() - started < 15:
            try:
                client.sendall(b"x")
                time.sleep(0.1)
            except OSError:
                cut_off = True
        assert cut_off


@pytest.mark.parametrize("parts", [[], [b"POST /sc"], [b"X"] * 100])
def test_a_request_that_never_begins_is_cut_off(parts, monkeypatch):
    monkeypatch.setattr(scorer_server, "_READ_SECONDS", 0.5)
    monkeypatch.setattr(scorer_server, "_REQUEST_SECONDS", 1.0)
    with serving() as port, socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        started = time.monotonic()
        with suppress(ConnectionError):
            for part in parts:
                client.sendall(part)
                time.sleep(0.05)
            assert client.recv(10) == b""
        assert time.monotonic() - started < 15


def test_scoring_takes_as_long_as_it_takes(monkeypatch):
    monkeypatch.setattr(scorer_server, "_READ_SECONDS", 0.3)
    monkeypatch.setattr(scorer_server, "_REQUEST_SECONDS", 0.3)
    slow = Slow(1.0)
    with serving(scorer=slow) as port:
        assert post(port, [{"image": png()}])[0] == 200


def test_a_server_that_is_stopped_says_so_and_does_not_wait_for_the_scorer(monkeypatch):
    monkeypatch.setattr(scorer_server, "_GRACE_SECONDS", 1)
    slow, statuses = Slow(60.0), []
    with serving(scorer=slow) as port:
        client = threading.Thread(target=lambda: statuses.append(post(port, [{"image": png()}])))
        client.start()
        assert slow.begun.wait(10)
        started = time.monotonic()
    client.join()
    assert statuses == [(503, {"error": "the server is stopping"})]
    assert time.monotonic() - started < 30


def test_a_token_is_asked_for(monkeypatch):
    with serving(token="s3cret") as port:
        assert post(port, [{"image": png()}])[0] == 401
        assert post(port, [{"image": png()}], {"Authorization": "Bearer wrong"})[0] == 401
        assert post(port, [{"image": png()}], {"Authorization": "Bearer s3cret"})[0] == 200
        with pytest.raises(ServerFailure, match="asks for a token"):
            load_scorer("remote", url=f"http://127.0.0.1:{port}", retries=0)
        assert (
            load_scorer("remote", url=f"http://127.0.0.1:{port}", token="s3cret")(
                [Image.new("RGB", (8, 8))]
            )
            .isfinite()
            .all()
        )
        monkeypatch.setenv("DIFFALIGN_SCORER_TOKEN", "s3cret")
        assert load_scorer("remote", url=f"http://127.0.0.1:{port}").remote_fingerprint


@contextmanager
def answering(*replies, first_bytes=65536):
    """A server with one reply per connection, the last one for ever.

    A reply gets the socket, from which `first_bytes` were read.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    count, stop = [0], threading.Event()

    def serve() -> None:
        while not stop.is_set():
            try:
                client, _ = listener.accept()
            except OSError:
                return
            reply = replies[min(count[0], len(replies) - 1)]
            count[0] += 1
            threading.Thread(target=answer, args=(client, reply), daemon=True).start()

    def answer(client, reply) -> None:
        try:
            if first_bytes:
                client.recv(first_bytes)
            reply(client)
        except OSError:
            pass
        finally:
            client.close()

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", count
    stop.set()
    listener.close()


def whole(client) -> None:
    client.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"a": 12}')


def cut(client) -> None:
    client.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"a"')


def dripping(head: bytes, part: bytes) -> Any:
    """A reply that begins with `head` and drips parts for 90 seconds."""

    def reply(client: socket.socket) -> None:
        client.sendall(head)
        for _ in range(900):
            client.sendall(part)
            time.sleep(0.1)

    return reply


drip = dripping(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n", b" ")
drip_headers = dripping(b"HTTP/1.1 200 OK\r\n", b"X-1: 1\r\n")
drip_status = dripping(b"", b"H")
drip_refusal = dripping(b"HTTP/1.1 503 Busy\r\nContent-Length: 900\r\n\r\n", b" ")


def closed(client) -> None:
    pass


@pytest.mark.parametrize(
    "failures", [[cut], [cut, cut], [closed], [drip], [drip_headers], [drip_status], [drip_refusal]]
)
def test_replies_that_are_cut_or_drip_are_tried_again(failures):
    with answering(*failures, whole) as (url, count):
        assert request_json(url, timeout=0.6, retries=3, backoff=0.01) == {"a": 12}
        assert count[0] == len(failures) + 1


@pytest.mark.parametrize("reply", [cut, drip, drip_headers, drip_status, closed])
def test_what_never_gets_better_ends_in_time(reply):
    with answering(reply) as (url, _):
        started = time.monotonic()
        with pytest.raises(ServerFailure, match="cannot be reached"):
            request_json(url, timeout=0.5, retries=1, backoff=0.01)
        assert time.monotonic() - started < 30  # 90 seconds of dripping otherwise


def test_passwords_stay_out_of_messages():
    assert without_password("http://ann:secret@host:1/x") == "http://...@host:1/x"
    with pytest.raises(UserError) as caught:
        request_json("http://ann:secret@127.0.0.1:9/x", timeout=0.3, retries=0)
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        check_url("ftp://ann:secret@host")
    assert "secret" not in str(caught.value)


def test_a_user_and_a_password_in_an_address_are_sent(caplog):
    requests = []

    def listen(client) -> None:
        requests.append(client.recv(65536))
        whole(client)

    caplog.set_level("INFO")
    with answering(listen, first_bytes=0) as (url, _):
        address = url.replace("//", "//ann:secret@") + "/x"
        assert request_json(address, retries=0) == {"a": 12}
    assert b"Authorization: Basic YW5uOnNlY3JldA==" in requests[0]
    assert "secret" not in caplog.text


def test_a_header_that_http_does_not_allow_is_not_shown():
    with answering(whole) as (url, count), pytest.raises(ServerFailure) as caught:
        request_json(url, headers={"Authorization": "Bearer sec\nret"})
    assert "ret" not in str(caught.value).replace("characters", "") and count[0] <= 1


def test_proxies_are_those_that_urllib_would_take(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:9")
    with answering(whole) as (url, count):
        assert request_json(url, retries=0) == {"a": 12}
        monkeypatch.setenv("http_proxy", url.removeprefix("http://"))
        assert request_json("http://nowhere.invalid/info", retries=0) == {"a": 12}
        monkeypatch.setenv("no_proxy", "nowhere.invalid")
        with pytest.raises(ServerFailure, match="cannot be reached"):
            request_json("http://nowhere.invalid/info", retries=0)
        monkeypatch.setenv("http_proxy", "socks4://127.0.0.1:9")
        with pytest.raises(ServerFailure, match="cannot be reached"):
            request_json("http://other.invalid/info", retries=0)
        assert count[0] == 2


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate of 127.0.0.1 and its key, in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1"
    command += f" -addext subjectAltName=IP:127.0.0.1 -keyout {file} -out {file}.crt"
    subprocess.run(command.split(), check=True, capture_output=True)
    file.write_bytes(file.read_bytes() + Path(f"{file}.crt").read_bytes())
    return file


@pytest.mark.parametrize("reply", [whole, drip, drip_headers])
def test_https_has_the_same_deadline_and_the_certificates_of_the_system(
    reply, certificate, monkeypatch
):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    def encrypted(client) -> None:
        with context.wrap_socket(client, server_side=True) as safe:
            safe.recv(65536)
            reply(safe)

    with answering(encrypted, first_bytes=0) as (url, _):
        url = url.replace("http:", "https:")
        with pytest.raises(ServerFailure, match="cannot be reached .*certificate"):
            request_json(url, timeout=20, retries=0)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        started = time.monotonic()
        if reply is whole:
            assert request_json(url, timeout=20, retries=0) == {"a": 12}
        else:
            with pytest.raises(ServerFailure, match="no complete reply within 0.6 seconds"):
                request_json(url, timeout=0.6, retries=0)
        assert time.monotonic() - started < 30


def test_a_reply_without_a_length_is_not_taken_for_whole_when_its_time_is_over():
    with (
        answering(dripping(b'HTTP/1.1 200 OK\r\n\r\n{"a": 12}', b" ")) as (url, _),
        pytest.raises(ServerFailure, match="no complete reply within"),
    ):
        request_json(url, timeout=0.5, retries=0)


@pytest.mark.parametrize("direction", ["no", 0, 1, None, []])
def test_a_direction_that_is_no_boolean_is_refused(direction):
    card = {"key": "x", "summary": "s", "higher_is_better": direction}
    body = json.dumps({"fingerprint": "f", "spec": card}).encode()

    def info(client) -> None:
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    with answering(info) as (url, _), pytest.raises(ServerFailure, match="higher_is_better"):
        load_scorer("remote", url=url, retries=0)


@pytest.mark.parametrize(
    "values",
    [
        (1e10, 3, 4),
        (float("nan"), 3, 4),
        (10**400, 3, 4),
        (1, 2**70, 4),
        (1, 3, 10**6),
        (True, 3, 4),
    ],
)
def test_numbers_that_would_wait_for_ever(values):
    with pytest.raises(ConfigError):
        check_calls(*values, "raise")


def asked(headers, chunks):
    """(status, body lengths seen behind the limit)."""
    sent, seen = [], []

    async def app(scope, receive, send):
        while True:
            message = await receive()
            seen.append(message)
            if message["type"] == "http.disconnect" or not message.get("more_body"):
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})

    messages = iter(
        [
            {"type": "http.request", "body": c, "more_body": i + 1 < len(chunks)}
            for i, c in enumerate(chunks)
        ]
    )

    async def receive():
        return next(messages)

    async def send(message):
        sent.append(message)

    from diffalign.demo.app import BodyLimit  # with gradio, which takes seconds

    asyncio.run(BodyLimit(app, most=100)({"type": "http", "headers": headers}, receive, send))
    return sent[0]["status"], seen


def test_the_demo_refuses_large_bodies():
    assert asked([(b"content-length", b"101")], [b"x" * 101])[0] == 413
    assert asked([(b"content-length", b"-5")], [])[0] == 413
    assert asked([(b"content-length", b"10")], [b"x" * 10])[0] == 200
    assert asked([], [b"x" * 60, b"x" * 60, b"x" * 60])[1][-1]["type"] == "http.disconnect"


@pytest.mark.nightly
def test_mutated_requests():
    """500 mutated requests: an answer in JSON, never a failure of the server."""
    generator = random.Random(0)
    body = json.dumps(
        {"items": [{"image": png(), "prompt": "a", "metadata": {"x": 1}}] * 2}
    ).encode()
    with serving() as port:
        for number in range(500):
            assert post(port, None, raw=damaged(body, generator, 30))[0] in (200, 400, 413), number
