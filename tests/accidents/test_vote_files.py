"""A torn or foreign line, or a lost picture, costs that vote alone and is counted."""

from __future__ import annotations

import json
import random

import pytest
import torch
from mutations import damaged
from PIL import Image

from diffalign.demo.votes import Pair, RoundVotes, VoteStore
from diffalign.errors import UserError
from diffalign.training.online.feedback import MANIFEST, read_votes

BAD_LINES = [
    b"5",
    b"null",
    b"[]",
    b"{}",
    b'{"id": "q"}',
    b'{"id": ["x"], "vote": "left"}',
    b'{"id": "x", "prompt": "p", "left": "a", "right": "b", "vote": "up", '
    b'"left_image": "", "right_image": ""}',
    b'{"id": "y", "prompt": "p", "left": "a", "right": "b", "vote": "left", '
    b'"left_image": "/etc/passwd", "right_image": "../x"}',
    b"\xff\xfe broken",
    b'{"id": "z", "prompt": "caf\xc3',
    b"[" * 3000,
    b'{"id": "v", "prompt": "\\ud800"}',
]


def image(value: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (value, value, value))


def voted(folder, count=3):
    store = VoteStore(folder)
    for i in range(count):
        store.add(
            Pair(
                f"id{i}",
                f"p{i}\u2028q",
                (image(10 + i), image(200 + i)),
                ("base", "tuned"),
                {"seed": i},
            ),
            "right",
            "ann",
        )
    return store


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_costs_that_line(line, tmp_path, capsys):
    voted(tmp_path)
    with open(tmp_path / "votes.jsonl", "ab") as file:
        file.write(line + b"\n")
    store = VoteStore(tmp_path)
    assert (
        len(store.votes) == 3
        and len(store.left_out) == 1
        and "1 lines left out (line 4" in capsys.readouterr().out
    )
    assert (
        store.rate("base", "tuned")[0] == 3
        and "1 lines of the file are left out" in store.remarks()
    )
    assert store.export(tmp_path / "out.parquet") == 3
    assert (
        store.add(Pair("new", "p", (image(1), image(2)), ("base", "tuned"), {}), "left", "")
        and len(VoteStore(tmp_path).votes) == 4
    )


def test_a_line_torn_by_a_crash_and_a_byte_order_mark(tmp_path):
    voted(tmp_path)
    data = (tmp_path / "votes.jsonl").read_bytes()
    (tmp_path / "votes.jsonl").write_bytes(b"\xef\xbb\xbf" + data[: len(data) - 20])
    store = VoteStore(tmp_path)
    assert [vote["id"] for vote in store.votes] == ["id0", "id1"]
    store.add(Pair("id3", "p", (image(1), image(2)), ("base", "tuned"), {}), "left", "")
    assert [vote["id"] for vote in VoteStore(tmp_path).votes] == ["id0", "id1", "id3"]


def test_a_vote_counts_once(tmp_path):
    voted(tmp_path)
    lines = (tmp_path / "votes.jsonl").read_bytes()
    (tmp_path / "votes.jsonl").write_bytes(lines + lines)
    assert len(VoteStore(tmp_path).votes) == 3


@pytest.mark.parametrize("damage", ["gone", "torn", "other"])
def test_a_lost_picture_costs_its_votes(damage, tmp_path):
    store = voted(tmp_path)
    file = tmp_path / store.votes[1]["left_image"]
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:30] if damage == "torn" else b"other")
    assert store.export(tmp_path / "o.parquet") == 2 and store.lost == ["id1"]


def test_all_pictures_lost_is_a_sentence(tmp_path):
    store = voted(tmp_path)
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="pictures of all 3 votes are lost"):
        store.export(tmp_path / "o.parquet")
    assert not (tmp_path / "o.parquet").exists()


@pytest.fixture
def round_folder(tmp_path):
    (tmp_path / "images").mkdir()
    groups = []
    for g in range(2):
        entries = []
        for i in range(2):
            image(50 * g + i).save(tmp_path / f"images/g{g}-{i}.png")
            entries.append({"id": f"g{g}-{i}", "file": f"images/g{g}-{i}.png"})
        groups.append({"id": f"g{g}", "prompt": "a cat", "images": entries})
    (tmp_path / MANIFEST).write_text(json.dumps({"groups": groups}))
    return tmp_path


GOOD = {"image_a": "g0-0", "image_b": "g0-1", "preference": "a"}
FOREIGN = [
    {"image_a": "x", "image_b": "g0-1", "preference": "a"},
    {"image_a": "g0-0", "image_b": "g1-0", "preference": "a"},
    {"image_a": "g0-0", "image_b": "g0-1", "preference": "z"},
    {"a": 1},
    5,
    None,
]


@pytest.mark.parametrize("bad", FOREIGN, ids=range(len(FOREIGN)))
@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_a_foreign_vote_costs_that_vote(bad, form, round_folder):
    votes = [GOOD, bad, {**GOOD, "image_a": "g1-0", "image_b": "g1-1"}]
    text = (
        json.dumps(votes) if form == "json" else "".join(json.dumps(vote) + "\n" for vote in votes)
    )
    (round_folder / f"votes.{form}").write_text(text)
    found = read_votes(round_folder)
    assert (found.count, found.left_out) == (2, 1) and "1 votes left out (votes." in found.summary()


def test_votes_of_tables_are_text(round_folder):
    (round_folder / "votes.csv").write_text(
        "image_a,image_b,preference,annotator\ng0-0,g0-1,a,007\ng1-0,g1-1,-1,007\n"
        "g1-0,g1-1,true,x\n"
    )
    found = read_votes(round_folder)
    assert found.preference[("g1-0", "g1-1")] == -1.0 and (
        found.count,
        found.annotators,
        found.left_out,
    ) == (2, 1, 1)


def test_a_torn_line_costs_that_line_for_the_run_as_for_the_demo(round_folder):
    (round_folder / "votes-demo.jsonl").write_bytes(
        json.dumps({**GOOD, "id": "1", "annotator": "ann"}).encode()
        + b'\n{"id": "2", "image_a": "g\xc3'
    )
    assert read_votes(round_folder).left_out == 1
    assert len(RoundVotes(round_folder).votes) == 1


def test_no_vote_that_can_be_used_is_a_sentence(round_folder):
    (round_folder / "votes.jsonl").write_text("5\n")
    with pytest.raises(UserError, match="hold no vote that can be used .votes.jsonl, line 1"):
        read_votes(round_folder)


@pytest.mark.parametrize(
    "content", ["{", "[]", "5", "null", "{}", '{"groups": 3}', '{"groups": [1]}']
)
def test_a_damaged_manifest_is_a_sentence(content, round_folder):
    (round_folder / MANIFEST).write_text(content)
    (round_folder / "votes.jsonl").write_text(json.dumps(GOOD) + "\n")
    for read in (read_votes, RoundVotes):
        with pytest.raises(UserError):
            read(round_folder)


def test_a_lost_image_of_a_round_is_not_shown(round_folder):
    (round_folder / "images/g0-1.png").write_bytes(b"broken")
    store = RoundVotes(round_folder)
    rng = random.Random(0)
    shown = [store.next("ann", rng) for _ in range(5)]
    assert all(pair is not None and set(pair.sides) == {"g1-0", "g1-1"} for pair in shown)
    assert "1 images cannot be opened" in store.remarks()
    assert store.add(shown[0], "left", "ann") and store.next("ann", rng) is None


@pytest.mark.nightly
def test_mutated_vote_files(tmp_path):
    """500 mutated vote files: the store opens, and only votes that are whole count."""
    voted(tmp_path)
    data = (tmp_path / "votes.jsonl").read_bytes()
    generator = random.Random(0)
    for number in range(500):
        (tmp_path / "votes.jsonl").write_bytes(damaged(data, generator, 40))
        store = VoteStore(tmp_path)
        assert len(store.votes) <= 3, number
        assert all(
            vote["vote"] in ("left", "right", "tie") and vote["prompt"] for vote in store.votes
        )
        store.rate("base", "tuned")


def test_votes_leave_the_random_state_alone(tmp_path):
    before = torch.random.get_rng_state()
    voted(tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())
