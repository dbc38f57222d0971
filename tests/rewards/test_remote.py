"""serve-scorer and the remote scorer over real HTTP on the loopback.

Equal scores, limits, hostile requests, servers that fail.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from models import load_tiny
from PIL import Image

from diffalign import UserError, load_scorer, register_scorer
from diffalign.rewards.base import Item, Scorer
from diffalign.rewards.serving.server import Limits, make_server
from diffalign.rewards.spec import ScorerSpec
from diffalign.rewards.testing import reference
from diffalign.rewards.testing.check import check_scorer


class Bright(Scorer):
    """Mean of the pixels; NaN for prompts that say so; breaks on others."""

    spec = ScorerSpec(key="bright", summary="mean", requires=("image", "prompt"))

    def score_batch(self, items: list[Item]):
        if any(item.prompt == "break" for item in items):
            raise RuntimeError("secret place /srv/key")
        return [
            float("nan") if i.prompt == "nan" else float(np.asarray(i.image.convert("RGB")).mean())
            for i in items
        ], {k: "asked for" for k, i in enumerate(items) if i.prompt == "nan"}


@contextlib.contextmanager
def serving(scorer, limits=None):
    server = make_server(scorer, limits=limits)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def gray(value: int, size=(12, 8)) -> Image.Image:
    return Image.new("RGB", size, (value,) * 3)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def post(url, body, path="/score", headers=None):
    """(status, JSON) of a raw request."""
    host, port = url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, headers or {})
    reply = connection.getresponse()
    return reply.status, json.loads(reply.read())


def test_remote_scores_are_the_local_ones_to_the_bit(tmp_path):
    images = reference.sample_images()
    prompts = reference.PROMPTS[: len(images)]
    for local in (load_scorer("jpeg_compressibility"), load_tiny("pickscore", tmp_path)):
        with serving(local) as url:
            remote = load_scorer("remote", url=url, max_items=4)
            assert remote.spec.requires == local.spec.requires and remote.spec.summary.startswith(
                local.name
            )
            # Other batches are other sums inside a network.
            tolerance = (
                {"rtol": 0, "atol": 0}
                if local.name.startswith("jpeg")
                else {"rtol": 1e-6, "atol": 1e-5}
            )
            np.testing.assert_allclose(remote(images, prompts), local(images, prompts), **tolerance)
            assert not remote.differentiable
            report = check_scorer(remote)
            report.raise_if_failed()
    with serving(load_scorer("shapes")) as url:
        remote = load_scorer("remote", url=url)
        drawn = reference.drawn_images(reference.SCENES)
        assert (
            remote(drawn, reference.SCENES).tolist()
            == load_scorer("shapes")(drawn, reference.SCENES).tolist()
        )


def test_missing_scores_cross_as_null_with_their_reason():
    with serving(Bright()) as url:
        result = load_scorer("remote", url=url).score([gray(1), gray(2)], ["a", "nan"])
    assert result.values[0] == 1 and result.values[1].isnan() and result.errors == {1: "asked for"}


def test_fingerprints_are_checked_on_loading_and_on_every_call():
    scorer = Bright()
    with serving(scorer) as url:
        good = load_scorer(
            "remote", url=url, expect_fingerprint=scorer.fingerprint(), scorer="bright"
        )
        assert good([gray(3)], ["a"])[0] == 3
        with pytest.raises(
            UserError, match=f"has the fingerprint {scorer.fingerprint()}, not 0123"
        ):
            load_scorer("remote", url=url, expect_fingerprint="0123")
        with pytest.raises(UserError, match="offers 'bright', not 'pickscore'"):
            load_scorer("remote", url=url, scorer="pickscore")
        assert load_scorer("remote", url=url).fingerprint() == good.fingerprint()
        good.remote_fingerprint = "0123"  # as if the server had been restarted with other weights
        with pytest.raises(UserError, match="409: this scorer has the fingerprint"):
            good([gray(4)], ["a"])


def test_a_server_that_is_down_is_one_sentence():
    with pytest.raises(
        UserError,
        match=r"http://127.0.0.1:9/info cannot be reached .*start the server.* after 2 tries",
    ):
        load_scorer("remote", url="http://127.0.0.1:9", retries=1, backoff=0.001)
    with serving(Bright()) as url:
        strict = load_scorer("remote", url=url, retries=1, backoff=0.001)
        lenient = load_scorer("remote", url=url, retries=0, on_error="nan")
    with pytest.raises(UserError, match="cannot be reached"):
        strict([gray(1)], ["a"])
    result = lenient.score([gray(1)], ["a"])
    assert result.values.isnan().all() and "cannot be reached" in result.errors[0]
    for url in ("ftp://example.org", "127.0.0.1:80", "file:///etc/passwd", ""):
        with pytest.raises(UserError, match="url: expected an address such as"):
            load_scorer("remote", url=url)


class Flaky(BaseHTTPRequestHandler):
    """Answers what the test says, in order; the last answer repeats."""

    answers: list
    asked: list

    def do_GET(self):
        self.respond()

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.respond()

    def respond(self):
        kind = type(self)
        kind.asked.append(self.path)
        status, body = kind.answers.pop(0) if len(kind.answers) > 1 else kind.answers[0]
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "file:///etc/passwd")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def answering(*answers):
    handler = type("Own", (Flaky,), {"answers": list(answers), "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler.asked
    finally:
        server.shutdown()
        server.server_close()


INFO = {"spec": Bright.spec.as_dict(), "fingerprint": "ff", "limits": {"max_items": 8}}


def test_busy_servers_are_asked_again_and_refusals_are_final():
    with answering((503, {}), (429, {}), (200, INFO)) as (url, asked):
        load_scorer("remote", url=url, retries=2, backoff=0.001)
        assert asked == ["/info"] * 3
    with answering((503, {"error": "warming up"})) as (url, asked):
        with pytest.raises(UserError, match="answered 503: warming up after 4 tries"):
            load_scorer("remote", url=url, retries=3, backoff=0.001)
        assert len(asked) == 4
    with answering((404, {})) as (url, asked):
        with pytest.raises(UserError, match="answered 404"):
            load_scorer("remote", url=url, retries=3, backoff=0.001)
        assert len(asked) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, b"<html>"), "no JSON object"),
        ((200, [1]), "no JSON object"),
        ((200, b"\x80\x04."), "no JSON object"),
        ((302, {}), "answered 302"),
        ((200, {"scores": [1.0, 2.0], "fingerprint": "ff"}), "no list of 1 scores"),
        ((200, {"scores": ["high"], "fingerprint": "ff"}), "no list of 1 scores"),
        ((200, {"scores": [1.0], "fingerprint": "00"}), "restarted with another scorer"),
        ((200, {"fingerprint": "ff"}), "no list of 1 scores"),
    ],
)
def test_replies_that_cannot_be_read_are_missing_and_never_zero(answer, message):
    with answering((200, INFO), answer) as (url, _):
        scorer = load_scorer("remote", url=url, retries=0, on_error="nan")
        result = scorer.score([gray(1)], ["a"])
        assert result.values.isnan().all() and message in result.errors[0]
        with pytest.raises(UserError, match=message):
            load_scorer_unchecked(scorer)([gray(2)], ["a"])


def load_scorer_unchecked(scorer):
    scorer.on_error = "raise"
    return scorer


def test_information_that_is_no_scorer():
    for info in (
        {},
        {"fingerprint": "ff"},
        {"fingerprint": 3, "spec": {"key": "x"}},
        {"fingerprint": "ff", "spec": {"key": "x"}},
    ):
        with (
            answering((200, info)) as (url, _),
            pytest.raises(UserError, match="no scorer|cannot be read"),
        ):
            load_scorer("remote", url=url, retries=0)


def bomb(width: int, height: int) -> bytes:
    """A PNG header that claims gigapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        )

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def test_hostile_items_are_null_with_a_sentence_and_spare_the_others():
    good = {"image": b64(png(gray(5))), "prompt": "a"}
    gif = io.BytesIO()
    gray(5).save(gif, format="GIF")
    bad = [
        {"image": b64(bomb(60_000, 60_000))},
        {"image": b64(bomb(3000, 3000))},
        {"image": b64(b"no image")},
        {"image": "%%%"},
        {"image": "/etc/passwd"},
        {"image": None},
        {"image": b64(pickle.dumps(gray(5)))},
        {"image": b64(gif.getvalue())},
        {"image": good["image"], "prompt": "x" * 300},
        {"image": good["image"], "prompt": 7},
        {"image": good["image"], "metadata": []} | {"metadata": [1]},
        "text",
        {"image": b64(png(gray(5))[:40])},
    ]
    with serving(Bright(), Limits(max_pixels=1_000_000, max_prompt=200)) as url:
        status, reply = post(url, {"items": [good, *bad, good]})
    assert status == 200
    assert reply["scores"] == [5.0, *[None] * len(bad), 5.0]
    assert all(reply["errors"][1:-1]) and reply["errors"][0] is None
    assert "more than 1000000 pixels" in reply["errors"][2]
    assert "/srv" not in json.dumps(reply) and "Traceback" not in json.dumps(reply)


def test_hostile_requests_are_refused():
    item = {"image": b64(png(gray(5))), "prompt": "a"}
    with serving(Bright(), Limits(max_items=2, max_bytes=100_000)) as url:
        for body, status, message in (
            (b"{not json", 400, "not JSON"),
            (pickle.dumps({"items": []}), 400, "not JSON"),
            (b"[" * 50_000, 400, "not JSON"),
            ([1], 400, "expected a JSON object"),
            ({}, 400, "items: expected a list"),
            ({"items": []}, 400, "items: expected a list"),
            ({"items": [item] * 3}, 413, "more than the limit of 2"),
            ({"items": [item], "expect_fingerprint": "00"}, 409, "has the fingerprint"),
            ({"items": [item], "scorer": "pickscore"}, 409, "this is bright"),
        ):
            found, reply = post(url, body)
            assert (found, message in reply["error"]) == (status, True), reply
        assert post(url, {"items": [item]}, path="/../../etc/passwd")[0] == 404
        status, reply = post(url, {"items": [{**item, "prompt": "break"}]})
        assert status == 500 and "secret" not in reply["error"]
        host, port = url.removeprefix("http://").split(":")
        for headers, status in (
            ({"Content-Length": "999999999"}, 413),
            ({"Content-Length": "-5"}, 413),
            ({"Content-Length": "x"}, 411),
        ):
            connection = http.client.HTTPConnection(host, int(port), timeout=20)
            connection.putrequest("POST", "/score")
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            assert connection.getresponse().status == status
        assert post(url, {"items": [item]})[1]["scores"] == [5.0]  # still alive


def test_many_clients_at_once_get_their_own_scores():
    with serving(Bright()) as url:
        clients = [load_scorer("remote", url=url, max_items=2) for _ in range(4)]

        def work(client_and_start):
            client, start = client_and_start
            return client([gray(start + i) for i in range(6)], ["a"] * 6).tolist()

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(work, zip(clients, (0, 50, 100, 150), strict=True)))
    assert found == [[float(start + i) for i in range(6)] for start in (0, 50, 100, 150)]


@pytest.mark.nightly
def test_the_command_serves_until_it_is_told_to_stop():
    code = "from diffalign.cli.entry import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "serve-scorer",
        "jpeg_compressibility",
        "--port",
        "0",
        "--args",
        "{scale: 500000}",
    ]
    server = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith("jpeg_compressibility ("), (
            server.stderr.read() if server.stderr else line
        )
        remote = load_scorer("remote", url=line.split()[-1])
        assert remote([gray(9)]) == load_scorer("jpeg_compressibility", scale=500000)([gray(9)])
        port = line.strip().rsplit(":", 1)[1]
        second = subprocess.run(
            [*command[:-4], "--port", port], capture_output=True, text=True, check=False
        )
        assert (
            second.returncode == 2
            and "cannot listen on" in second.stderr
            and "Traceback" not in second.stderr
        )
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) == 0
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pickscoer"], "did you mean pickscore"),
        (["shapes", "--args", "[1]"], "--args: expected a mapping"),
        (["shapes", "--max_items", "0"], "--max_items: expected int >= 1"),
        (["shapes", "--model", "x"], "model: shapes has no option"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, capsys):
    from diffalign.cli.entry import run

    try:
        code = run(["serve-scorer", *arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2 and message in capsys.readouterr().err


@register_scorer("test-remote-mean", requires=("image", "prompt", "metadata"), override=True)
def mean_of_all(images, prompts, metadata):
    """Mean of the RGB pixels, of the prompt's characters and of a number."""
    return [
        float(np.asarray(image.convert("RGB"), dtype=np.float64).mean())
        + len(prompt) / 7
        + extra["x"] / 3
        for image, prompt, extra in zip(images, prompts, metadata, strict=True)
    ]


def modes() -> list[Image.Image]:
    """One image of every mode, with transparency where it has that."""
    values = np.random.default_rng(0).integers(0, 256, (9, 14, 4), dtype=np.uint8)
    image = Image.fromarray(values)
    palette = image.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE, colors=7)
    palette.info["transparency"] = 3
    deep = Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    return [
        image,
        palette,
        deep,
        *(
            image.convert("RGB").convert(m)
            for m in ("1", "L", "LA", "RGB", "CMYK", "YCbCr", "HSV", "I", "F")
        ),
    ]


def test_images_of_every_mode_prompts_and_metadata_arrive_unchanged():
    images = modes()
    prompts = [f"{i} Äpfel {{x}} \u202e\n" for i in range(len(images))]
    metadata = [{"x": i, "nested": {"α": [None, 1.5, "\u0000"]}} for i in range(len(images))]
    local = load_scorer("test-remote-mean")
    sizes = load_scorer("jpeg_incompressibility")
    with serving(local) as url, serving(sizes) as other:
        remote = load_scorer("remote", url=url, max_items=5)
        assert remote.spec.requires == ("image", "prompt", "metadata")
        assert (
            remote(images, prompts, metadata).tolist() == local(images, prompts, metadata).tolist()
        )
        assert load_scorer("remote", url=other)(images).tolist() == sizes(images).tolist()
        with pytest.raises(UserError, match="metadata: cannot be sent as JSON .*ndarray"):
            remote(images[:1], ["a"], [{"x": 1, "array": np.ones(2)}])


def test_large_requests_are_divided_and_what_is_too_large_alone_is_a_sentence():
    noise = np.random.default_rng(1).integers(0, 256, (6, 20, 20, 3), dtype=np.uint8)
    images, prompts = (
        [Image.fromarray(array) for array in noise],
        ["a", "nan", "a", "a", "nan", "a"],
    )
    local = Bright().score(images, prompts)
    with serving(Bright(), Limits(max_bytes=4000)) as url:
        remote = load_scorer("remote", url=url, retries=0, on_error="nan")
        result = remote.score(images, prompts)
        np.testing.assert_array_equal(result.values, local.values)
        assert result.errors == local.errors == {1: "asked for", 4: "asked for"}
        large = Image.fromarray(
            np.random.default_rng(2).integers(0, 256, (60, 60, 3), dtype=np.uint8)
        )
        result = remote.score([images[0], large], ["a", "a"])
        assert (
            result.values[0] == local.values[0]
            and "one image has" in result.errors[1]
            and "--max_bytes" in result.errors[1]
        )


@pytest.mark.parametrize(
    "limits", [5, {"max_items": 0}, {"max_items": None}, {"max_items": "x"}, {"max_bytes": -3}]
)
def test_limits_that_make_no_sense_are_a_sentence(limits):
    with (
        answering((200, {**INFO, "limits": limits})) as (url, _),
        pytest.raises(UserError, match="limits that cannot be read"),
    ):
        load_scorer("remote", url=url, retries=0)


def test_servers_that_name_no_limits_will_do():
    with answering(
        (200, {**INFO, "limits": None}), (200, {"scores": [2.5], "fingerprint": "ff"})
    ) as (url, _):
        assert load_scorer("remote", url=url)([gray(1)], ["a"])[0] == 2.5


def test_a_request_that_fails_twice_is_sent_three_times_and_scored_once():
    reply = {"scores": [2.5], "errors": [None], "fingerprint": "ff"}
    with answering((200, INFO), (503, {}), (503, {}), (200, reply)) as (url, asked):
        assert load_scorer("remote", url=url, retries=3, backoff=0.001)([gray(1)], ["a"])[0] == 2.5
        assert asked == ["/info", *["/score"] * 3]


@pytest.mark.parametrize("score", [b"true", b'"1"', b"[1]", b"1" + b"0" * 400])
def test_scores_that_are_no_numbers_are_missing(score):
    with answering((200, INFO), (200, b'{"scores": [' + score + b'], "fingerprint": "ff"}')) as (
        url,
        _,
    ):
        result = load_scorer("remote", url=url, retries=0, on_error="nan").score([gray(1)], ["a"])
    assert result.values.isnan().all() and "that is no scorer" in result.errors[0]


def scores_of(count: int) -> dict:
    return {"scores": [1.0] * count, "errors": [None] * count, "fingerprint": "ff"}


def test_several_servers_share_the_requests():
    with serving(Bright()) as one, serving(Bright()) as two:
        scorer = load_scorer("remote", url=[one, two], max_items=2, concurrency=1)
        assert scorer.concurrency == 2
        images = [gray(i) for i in range(16)]
        assert scorer(images, ["a"] * 16).tolist() == [float(i) for i in range(16)]
    first, second = (200, INFO), (200, scores_of(1))
    with answering(first, second) as (one, asked), answering(first, second) as (two, also):
        scorer = load_scorer("remote", url=[one, two], max_items=1)
        scorer([gray(i) for i in range(12)], ["a"] * 12)
        assert asked.count("/score") + also.count("/score") == 12
        assert min(asked.count("/score"), also.count("/score")) >= 3


def test_another_server_takes_over_and_the_failed_one_is_left_alone():
    good, bad = (200, scores_of(1)), (503, {"error": "out of memory"})
    with (
        answering((200, INFO), bad) as (one, asked),
        answering((200, INFO), good) as (two, also),
    ):
        scorer = load_scorer("remote", url=[one, two], max_items=1, concurrency=1, backoff=0.001)
        values = scorer([gray(i) for i in range(10)], ["a"] * 10)
        assert values.tolist() == [1.0] * 10
        # Each of the two threads may have met it once before it was known to fail.
        assert 1 <= asked.count("/score") <= 2 and also.count("/score") == 10
    with (
        answering((200, INFO), bad) as (one, asked),
        answering((200, INFO), bad) as (two, also),
    ):
        scorer = load_scorer("remote", url=[one, two], retries=3, backoff=0.001)
        with pytest.raises(UserError, match="none of 2 servers answered; .*: out of memory"):
            scorer([gray(1)], ["a"])
        assert asked.count("/score") == also.count("/score") == 2


def test_a_refusal_is_final_with_several_servers():
    with (
        answering((200, INFO), (404, {})) as (one, asked),
        answering((200, INFO), (404, {})) as (two, also),
    ):
        scorer = load_scorer("remote", url=[one, two], backoff=0.001)
        with pytest.raises(UserError, match="answered 404"):
            scorer([gray(1)], ["a"])
        assert asked.count("/score") + also.count("/score") == 1


def test_servers_must_offer_one_scorer_at_distinct_addresses():
    other = {**INFO, "fingerprint": "00"}
    with answering((200, INFO)) as (one, _), answering((200, other)) as (two, _):
        with pytest.raises(UserError, match="expect_fingerprint: .* has the fingerprint 00, not"):
            load_scorer("remote", url=[one, two])
        with pytest.raises(UserError, match=r"url: http://127.0.0.1:\d+ is listed twice"):
            load_scorer("remote", url=[one, one + "/"])
    with pytest.raises(UserError, match="url: expected the address of a server, or several"):
        load_scorer("remote", url=[])


def test_steering_by_another_scorer_at_the_same_address_is_another_run(tmp_path, capsys):
    from diffalign import cli

    class Dark(Bright):
        spec = ScorerSpec(key="dark", summary="mean", requires=("image", "prompt"))

    scorer = Bright(device="cpu")
    with serving(scorer) as url:
        port = int(url.rpartition(":")[2])
        command = ["steer", "--scorer", "remote", "--scorer_args", f"{{remote: {{url: '{url}'}}}}"]
        command += ["--prompt", "a small red circle", "--num_particles", "2", "--lmbda", "0.1"]
        command += ["--num_inference_steps", "4", "--output_dir", str(tmp_path / "out")]
        assert cli.run(command) == 0, capsys.readouterr()
        assert cli.run(command) == 0
        assert "nothing was run again" in capsys.readouterr().out
    server = make_server(Dark(device="cpu"), port=port)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        assert cli.run(command) == 2
        assert "holds a run with other scorers" in capsys.readouterr().err
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
