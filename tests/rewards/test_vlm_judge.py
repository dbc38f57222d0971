"""Reading of replies, and a judge behind a real HTTP server."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from diffalign import UserError, load_scorer
from diffalign.rewards.scorers.vlm_judge import (
    UNIFIED_REWARD_1,
    UNIFIED_REWARD_2,
    parse_axes,
    parse_score,
    yes_no_probability,
)
from diffalign.rewards.testing.check import check_scorer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Final Score: 4", 4),
        ("**Final Score:** 4", 4),
        ("**Final Score: 4**", 4),
        ("final score: 3.5", 3.5),
        ("Final Score: **2**", 2),
        ("FINAL SCORE = 5", 5),
        ("Final Score: 4/5", 4),
        ("Final Score: [3]", 3),
        ("The score is 3 for content. Final Score: 4.", 4),
        ("Final Score: 4.\nThank you!", 4),
        ("Final Score:\n\n5", 5),
        ("4", 4),
        (" **3** ", 3),
        ("Alignment Score (1-5): 4", 4),
        ("**Alignment Score (1 to 5):** 2", 2),
        ("Final Score (4)", 4),
        ("Final Score: (4/5)", 4),
        ("Final Score: 4 out of 5", 4),
        ("The score is **4**.", 4),
        ('{"final_score": 4}', 4),
        ("Final Score: 4\n- 2 cats are missing", 4),
        ("Final Score: 10", None),
        ("Final Score: 4/10", None),
        ("4/10", None),
        ("Final Score: 4-5", None),
        ("Final Score: 1 to 5", None),
        ("Final Score: 4,5", None),
        ("Final Score: 4%", None),
        ("Alignment Score (1-5): four", None),
        ("Final Score: 0", None),
        ("Final Score: -3", None),
        ("Final Score: 2 ... no, Final Score: 7", None),
        ("I cannot judge this image.", None),
        ("Three cats and 2 dogs.", None),
        ("Final Score: four", None),
        ("", None),
    ],
)
def test_scores_are_read_from_replies(text, expected):
    found = parse_score(text)
    assert math.isnan(found) if expected is None else found == expected


def test_yes_no_probabilities():
    tokens = [
        {"token": " Yes", "logprob": math.log(0.5)},
        {"token": "yes", "logprob": math.log(0.1)},
        {"token": "No", "logprob": math.log(0.2)},
    ]
    assert yes_no_probability(tokens) == pytest.approx(0.75)
    assert (
        yes_no_probability([{"token": "no", "logprob": -0.1}, {"token": "maybe", "logprob": -3}])
        == 0
    )
    assert math.isnan(yes_no_probability([{"token": "maybe", "logprob": -0.1}]))
    assert math.isnan(yes_no_probability([]))


class Judge(BaseHTTPRequestHandler):
    """Answers from the image's mean, after some failures."""

    seen: ClassVar[list] = []
    failures = 0

    def do_POST(self):
        kind = type(self)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind.seen.append((self.path, self.headers.get("Authorization"), body))
        if kind.failures:
            kind.failures -= 1
            self.send_error(503)
            return
        data = json.dumps(kind.reply(body)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    @classmethod
    def reply(cls, body):
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        image = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
        value = round(np.asarray(image).mean() / 50)
        if body.get("logprobs"):
            top = [
                {"token": "Yes", "logprob": math.log(value / 5)},
                {"token": "No", "logprob": math.log(1 - value / 5)},
            ]
            return {
                "choices": [
                    {
                        "message": {"content": "Yes"},
                        "logprobs": {"content": [{"token": "Yes", "top_logprobs": top}]},
                    }
                ]
            }
        return {"choices": [{"message": {"content": f"It is fine.\n**Final Score:** {value}"}}]}

    def log_message(self, *_):
        pass


@pytest.fixture
def judge():
    handler = type("Own", (Judge,), {"seen": [], "failures": 0})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    server.server_close()


def gray(value: int) -> Image.Image:
    return Image.new("RGB", (20, 10), (value,) * 3)


def test_a_judge_scores_and_is_asked_the_same_way_every_time(judge, monkeypatch):
    url, handler = judge
    monkeypatch.setenv("JUDGE_KEY", "secret")
    scorer = load_scorer(
        "vlm_judge", url=url, judge_model="m", api_key_env="JUDGE_KEY", image_size=8
    )
    found = scorer([gray(50), gray(150), gray(250)], ["a {brace} cat"] * 3)
    assert found.tolist() == pytest.approx([0.2, 0.6, 1.0])
    path, key, body = handler.seen[0]
    assert path == "/v1/chat/completions" and key == "Bearer secret"
    assert body["temperature"] == 0 and body["seed"] == 0 and body["model"] == "m"
    picture, text = body["messages"][0]["content"]
    assert "a {brace} cat" in text["text"] and picture["image_url"]["url"].startswith(
        "data:image/png;base64,"
    )
    assert Image.open(
        io.BytesIO(base64.b64decode(picture["image_url"]["url"].split(",")[1]))
    ).size == (8, 8)
    yes = load_scorer("vlm_judge", url=url + "/v1", judge_model="m", kind="yes_no")
    assert yes([gray(150)], ["p"]).tolist() == pytest.approx([0.6])


def test_what_cannot_be_read_is_missing_and_never_zero(judge):
    url, handler = judge
    replies = iter(
        [
            {"choices": [{"message": {"content": "I will not judge."}}]},
            {"choices": []},
            {"error": "x"},
            {"choices": [{"message": {"content": "Final Score: 10"}}]},
        ]
    )
    handler.reply = classmethod(lambda cls, body: next(replies))
    scorer = load_scorer("vlm_judge", url=url, judge_model="m", concurrency=1)
    result = scorer.score([gray(i) for i in range(4)], ["p"] * 4)
    assert result.values.isnan().all() and set(result.errors) == {0, 1, 2, 3}
    assert (
        "holds no score from 1 to 5" in result.errors[0] and "without a message" in result.errors[1]
    )


def test_a_busy_server_is_asked_again_and_a_dead_one_is_a_sentence(judge):
    url, handler = judge
    handler.failures = 2
    scorer = load_scorer("vlm_judge", url=url, judge_model="m", retries=2, backoff=0.001)
    assert scorer([gray(100)], ["p"]).tolist() == pytest.approx([0.4]) and len(handler.seen) == 3
    dead = {"url": "http://127.0.0.1:9", "judge_model": "m", "retries": 1, "backoff": 0.001}
    result = load_scorer("vlm_judge", **dead).score([gray(0)], ["p"])
    assert (
        result.values.isnan().all()
        and "cannot be reached" in result.errors[0]
        and "after 2 tries" in result.errors[0]
    )
    with pytest.raises(UserError, match="cannot be reached"):
        load_scorer("vlm_judge", **dead, on_error="raise")([gray(0)], ["p"])


def test_options():
    for options, message in (
        ({}, "judge_model: expected the name"),
        ({"judge_model": "m", "url": "file:///etc/passwd"}, "url: expected an address"),
        (
            {"judge_model": "m", "kind": "stars"},
            "kind: expected one of unifiedreward, unifiedreward-1, unifiedreward-2, yes_no",
        ),
        ({"judge_model": "m", "template": "How good?"}, "template: expected a text with {prompt}"),
        ({"judge_model": "m", "api_key_env": "NOT_SET_ANYWHERE"}, "is not set"),
        ({"judge_model": "m", "retries": -1}, "retries: expected int >= 0"),
    ):
        with pytest.raises(UserError, match=message):
            load_scorer("vlm_judge", **options)
    one, two = (load_scorer("vlm_judge", judge_model=name) for name in ("a", "b"))
    assert one.fingerprint() != two.fingerprint()
    assert (
        load_scorer("vlm_judge", judge_model="a", template="Other {prompt}").fingerprint()
        != one.fingerprint()
    )


def test_the_common_checks(judge):
    url, _ = judge
    images = [gray(50 * i) for i in (1, 2, 3, 4, 5)]
    for kind in ("unifiedreward", "yes_no"):
        scorer = load_scorer("vlm_judge", url=url, judge_model="m", kind=kind)
        shown = images[:4] if kind == "yes_no" else images
        check_scorer(scorer, shown, [f"prompt {i}" for i in range(len(shown))]).raise_if_failed()


def test_a_key_never_shows_and_may_end_in_a_line_break(judge, monkeypatch):
    url, handler = judge
    monkeypatch.setenv("JUDGE_KEY", "secret\n")
    assert (
        load_scorer("vlm_judge", url=url, judge_model="m", api_key_env="JUDGE_KEY")(
            [gray(100)], ["p"]
        )[0]
        > 0
    )
    assert handler.seen[0][1] == "Bearer secret"
    monkeypatch.setenv("JUDGE_KEY", "secret\nX-Other: 1")
    with pytest.raises(UserError, match="api_key_env: JUDGE_KEY holds characters") as caught:
        load_scorer("vlm_judge", url=url, judge_model="m", api_key_env="JUDGE_KEY")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "choice",
    [
        {"logprobs": None, "message": {"content": "Yes"}},
        {"logprobs": {"content": []}},
        {"logprobs": {"content": [{"top_logprobs": [3]}]}},
        {"logprobs": {"content": [{"top_logprobs": [{"token": "yes", "logprob": 1e9}]}]}},
        {"logprobs": {"content": [{"top_logprobs": [{"token": "perhaps", "logprob": -0.1}]}]}},
    ],
)
def test_log_probabilities_that_cannot_be_read_are_missing(judge, choice):
    url, handler = judge
    handler.reply = classmethod(lambda cls, body: {"choices": [choice]})
    result = load_scorer("vlm_judge", url=url, judge_model="m", kind="yes_no").score(
        [gray(1)], ["p"]
    )
    assert result.values.isnan().all() and result.errors[0]


ACS = "Alignment Score (1-5): 2.694700002670288\nCoherence Score (1-5): 2.37\nStyle Score (1-5): 4"


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        (ACS, {"alignment": 2.694700002670288, "coherence": 2.37, "style": 4.0}),
        ("**Alignment Score (1-5):** 3\n**Style Score:** 4/5", {"alignment": 3.0, "style": 4.0}),
        ("Alignment Score (1-5): 2\nfinally, Alignment Score (1-5): 4", {"alignment": 4.0}),
        ("Alignment Score (1-5): X\nCoherence Score (1-5): Y", {}),  # the question's own words
        ("Alignment Score (1-5): 10", {}),
        ("Alignment Score (1-5): 0.4\nStyle Score (1-5): 5.1", {}),
        ("Alignment Score (1-5): 4-5", {}),
        ("the alignment is good", {}),
    ],
)
def test_scores_of_axes(text, scores):
    assert parse_axes(text) == scores


def test_unified_reward_is_asked_in_its_own_words(judge):
    url, handler = judge
    handler.reply = classmethod(
        lambda cls, body: {"choices": [{"message": {"content": ACS + "\nFinal Score: 3.5"}}]}
    )
    both = {"url": url, "judge_model": "m"}
    first = load_scorer("vlm_judge", **both, kind="unifiedreward-1")
    assert first([gray(1)], ["a {red} cat"]).item() == pytest.approx(0.7)
    picture, text = handler.seen[-1][2]["messages"][0]["content"]
    data = base64.b64decode(picture["image_url"]["url"].split(",")[1])
    assert Image.open(io.BytesIO(data)).size == (512, 512)
    assert text["text"].endswith("Text Caption: [a {red} cat]")
    digests = (UNIFIED_REWARD_1, UNIFIED_REWARD_2)
    # Of the published templates; the first one without its mark of the image.
    assert [hashlib.sha256(t.encode()).hexdigest()[:12] for t in digests][1] == "75d52d3ae771"
    marked = "<image>\n" + UNIFIED_REWARD_1
    assert hashlib.sha256(marked.encode()).hexdigest()[:12] == "d68ab1dcf4dc"
    second = load_scorer("vlm_judge", **both, kind="unifiedreward-2")
    assert second([gray(1)], ["a cat"]).item() == pytest.approx((2.6947 + 2.37 + 4) / 15)
    weighted = load_scorer(
        "vlm_judge", **both, kind="unifiedreward-2", axes={"alignment": 1.4, "style": 0.7}
    )
    expected = (1.4 * 2.6947 + 0.7 * 4) / 2.1 / 5
    assert weighted([gray(1)], ["a cat"]).item() == pytest.approx(expected)
    assert len({s.fingerprint() for s in (first, second, weighted)}) == 3


def test_a_reply_without_an_axis_has_no_score(judge):
    url, handler = judge
    reply = {"choices": [{"message": {"content": "Alignment Score (1-5): 3"}}]}
    handler.reply = classmethod(lambda cls, body: reply)
    options = {"url": url, "judge_model": "m", "kind": "unifiedreward-2"}
    result = load_scorer("vlm_judge", **options).score([gray(1)], ["a"])
    assert result.values.isnan().all() and "holds no score from 1 to 5" in result.errors[0]
    only = load_scorer("vlm_judge", **options, axes={"alignment": 1.0})
    assert only([gray(1)], ["a"]).item() == pytest.approx(0.6)
    for axes in ({}, {"beauty": 1.0}, {"style": -1.0}, {"style": 0}, {"style": math.nan}):
        with pytest.raises(UserError, match="axes: expected weights of alignment, coherence"):
            load_scorer("vlm_judge", **options, axes=axes)
    with pytest.raises(UserError, match="axes: are for kind: unifiedreward-2, not yes_no"):
        load_scorer("vlm_judge", **{**options, "kind": "yes_no"}, axes={"style": 1.0})
