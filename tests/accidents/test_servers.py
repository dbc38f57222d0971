"""Servers and clients: crowds, bad items, bodies that would fill the memory, replies that are cut or drip."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import random
import socket
import threading
import time
from contextlib import contextmanager
from typing import Any

import pytest
from mutations import damaged
from PIL import Image

from diffalign import load_scorer
from diffalign.demo.app import BodyLimit
from diffalign.errors import ConfigError, UserError
from diffalign.rewards.serving import server as scorer_server
from diffalign.rewards.serving.http_client import (
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
    assert "its own output says why" in reply["errors"][1]


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
            scorer_server.json, "loads", lambda data: pytest.fail("the body was parsed")
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
def answering(*replies):
    """A server that answers connections in turn, the last one for ever; each reply gets the socket."""
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
            client.recv(65536)
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
    """A reply that begins with `head` and goes on for 90 seconds, a `part` at a time."""

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
