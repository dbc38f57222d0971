"""What serve-scorer answers to incomplete requests, and what it never tells."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys

import pytest
from test_remote import Bright, b64, gray, png, post, serving

from diffalign import UserError, load_scorer
from diffalign.rewards.base import Item, Scorer
from diffalign.rewards.spec import ScorerSpec


def test_what_a_scorer_needs_is_never_made_up():
    image = b64(png(gray(5)))
    with serving(Bright()) as url:
        reply = post(url, {"items": [{"image": image}, {"image": image, "prompt": ""}]})[1]
        assert reply["scores"] == [None, 5.0] and "prompt: bright needs it" in reply["errors"][0]
    with serving(load_scorer("geneval")) as url:
        reply = post(url, {"items": [{"image": image, "prompt": "a"}]})[1]
        assert reply["scores"] == [None] and "metadata: geneval needs it" in reply["errors"][0]
    with serving(load_scorer("jpeg_incompressibility")) as url:
        assert post(url, {"items": [{"image": image}]})[1]["scores"][0] > 0


class Telling(Scorer):
    """Says where its files are, as an unusable cache does."""

    spec = ScorerSpec(key="telling", summary="tells", requires=("image", "prompt"))

    def score_batch(self, items: list[Item]):
        if items[0].prompt == "raise":
            raise UserError(
                "cache: '/srv/secret place/c.sqlite' is damaged; "
                "http://host/v1 and 3/4 and and/or stay"
            )
        return [float("nan")] * len(items), dict.fromkeys(
            range(len(items)), "model: /srv/secret/model.pt is gone; mend it"
        )


def test_no_place_on_the_server_is_told():
    image = b64(png(gray(5)))
    with serving(Telling()) as url:
        status, reply = post(url, {"items": [{"image": image, "prompt": "raise"}]})
        expected = (
            "cache: (a file of the server) is damaged; http://host/v1 and 3/4 and and/or stay"
        )
        assert (status, reply["error"]) == (400, expected)
        status, reply = post(url, {"items": [{"image": image, "prompt": "x"}]})
        assert reply["errors"] == ["model: (a file of the server) is gone; mend it"]


def test_other_methods_and_paths_are_answered_in_json():
    with serving(Bright()) as url:
        for method, path, status in (
            ("PUT", "/score", 501),
            ("GET", "/../../etc/passwd", 404),
            ("GET", "/score", 404),
            ("GET", "/health", 200),
        ):
            connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
            connection.request(method, path)
            reply = connection.getresponse()
            assert (reply.status, reply.headers["Content-Type"]) == (status, "application/json")
            assert json.loads(reply.read())


def test_large_images_of_one_request_are_decoded_and_scored_part_by_part(monkeypatch):
    from diffalign.rewards.serving import service

    monkeypatch.setattr(service, "_PIXELS_AT_ONCE", 2 * 12 * 8)  # two of the images below
    sizes = []

    class Counting(Bright):
        def score_batch(self, items: list[Item]):
            sizes.append(len(items))
            return super().score_batch(items)

    with serving(Counting()) as url:
        items = [{"image": b64(png(gray(5 * i))), "prompt": "a"} for i in range(5)]
        items.insert(2, {"image": "broken"})
        reply = post(url, {"items": items})[1]
    assert sizes == [2, 2, 1] and reply["scores"] == [0.0, 5.0, None, 10.0, 15.0, 20.0]


def test_without_the_extra_the_command_names_it(monkeypatch, capsys):
    from diffalign.cli.entry import run

    for name in ("app", "server"):
        monkeypatch.delitem(sys.modules, f"diffalign.rewards.serving.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run(["serve-scorer", "shapes"]) == 2
    message = capsys.readouterr().err
    assert "pip install 'diffalign[serve]'" in message and message.count("\n") == 1


def test_the_web_libraries_are_loaded_only_when_they_are_used():
    code = (
        "import sys, diffalign, diffalign.cli.entry; diffalign.cli.entry.build_parser()\n"
        "names = ('fastapi', 'starlette', 'uvicorn', 'httpx', 'torch')\n"
        "sys.exit(', '.join(name for name in names if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_old_paths_lead_to_the_server_and_the_client():
    import importlib

    for old, name in (
        ("server", "make_server"),
        ("server", "Limits"),
        ("http_client", "check_url"),
    ):
        module = importlib.import_module(f"diffalign.rewards.{old}")
        with pytest.warns(DeprecationWarning, match="has moved"):
            assert callable(getattr(module, name))
