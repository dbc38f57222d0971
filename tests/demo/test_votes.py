"""Votes on disk: durable, once per pair, readable as training data; and those of a
round that waits for people."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from diffalign import load_preferences
from diffalign.cli.entry import run
from diffalign.data.images import decode
from diffalign.demo.votes import VOTES, Pair, RoundVotes, VoteStore, read_annotator
from diffalign.errors import UserError
from diffalign.training.online.feedback import read_votes


def pair(number: int, prompt: str = "a cat", sides: tuple[str, str] = ("base", "tuned")) -> Pair:
    images = tuple(Image.new("RGB", (16, 16), (number, shade, 0)) for shade in (0, 200))
    return Pair(f"id{number}", prompt, images, sides, {"seed": number})  # type: ignore[arg-type]


def test_votes_are_there_after_a_restart(tmp_path: Path) -> None:
    store = VoteStore(tmp_path / "votes")
    assert store.add(pair(1), "left", "ann") and store.add(
        pair(2, sides=("tuned", "base")), "tie", ""
    )
    assert not store.add(pair(1), "right", "ann")  # one vote per pair
    again = VoteStore(tmp_path / "votes")
    assert [vote["vote"] for vote in again.votes] == ["left", "tie"] and again.votes[0][
        "annotator"
    ] == "ann"
    assert not again.add(pair(2), "left", "")
    assert all((tmp_path / "votes" / vote["left_image"]).is_file() for vote in again.votes)


def test_a_line_torn_by_a_crash_costs_that_vote_alone(tmp_path: Path) -> None:
    store = VoteStore(tmp_path)
    store.add(pair(1), "left", "")
    with (tmp_path / VOTES).open("a") as file:
        file.write('{"id": "id2", "vo')
    again = VoteStore(tmp_path)
    assert len(again.votes) == 1 and again.add(pair(3), "right", "")
    assert [vote["id"] for vote in VoteStore(tmp_path).votes] == ["id1", "id3"]


def test_the_rate_counts_the_tuned_model_whatever_its_side(tmp_path: Path) -> None:
    store = VoteStore(tmp_path)
    store.add(pair(1, "a"), "right", "")
    store.add(pair(2, "b", ("tuned", "base")), "left", "")
    store.add(pair(3, "b"), "left", "")
    store.add(pair(4, "c"), "tie", "")
    store.add(pair(5, "c", ("base", "other")), "right", "")  # another pair of models
    count, found = store.rate("base", "tuned")
    assert count == 4  # of three prompts, which count the same: a win, a win and a loss, a tie
    assert (found.rate, found.wins, found.ties, found.losses) == pytest.approx(
        (2 / 3, 0.5, 1 / 3, 1 / 6)
    )
    assert found.low <= found.rate <= found.high
    assert store.rate("base", "nobody")[0] == 0


def test_the_export_is_a_preference_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = VoteStore(tmp_path / "votes")
    store.add(pair(1, "a cat"), "right", "ann")
    store.add(pair(2, "a dog"), "tie", "ann")
    store.add(pair(3, "a bird"), "left", "bob")
    out = tmp_path / "votes.parquet"
    assert run(["demo", "--votes_dir", str(tmp_path / "votes"), "--export", str(out)]) == 0
    assert "wrote 2 preferences" in capsys.readouterr().out
    data = load_preferences(str(out), verbose=False)
    assert data.kind == "pair" and [group.prompts[0] for group in data] == ["a cat", "a bird"]
    colours = [[decode(image).getpixel((0, 0))[1] for image in group.images] for group in data]
    assert colours == [[200, 0], [0, 200]]  # chosen first


def test_nothing_to_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    VoteStore(tmp_path / "v").add(pair(1), "tie", "")
    assert (
        run(["demo", "--votes_dir", str(tmp_path / "v"), "--export", str(tmp_path / "o.parquet")])
        == 2
    )
    assert "there is no decided vote yet" in capsys.readouterr().err
    assert not (tmp_path / "o.parquet").exists()


def test_strange_names_and_choices(tmp_path: Path) -> None:
    assert read_annotator("<b>Ann</b>\n../../x" + "y" * 100) == "bAnnb....x" + "y" * 30
    assert read_annotator(None) == "" and read_annotator("Zoë 2") == "Zoë 2"
    with pytest.raises(UserError, match="expected left, right, tie"):
        VoteStore(tmp_path).add(pair(1), "both", "")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thing.txt").write_text("x")
    with pytest.raises(UserError, match="holds something else"):
        VoteStore(tmp_path / "other")


# A round that waits for people


@pytest.fixture
def waiting(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "feedback" / "round-0000"
    (folder / "images").mkdir(parents=True)
    groups = []
    for g in range(2):
        entries = []
        for i in range(3):
            Image.new("RGB", (8, 8), (g, i, 0)).save(folder / "images" / f"g{g}-{i}.png")
            entries.append({"id": f"g{g}-{i}", "file": f"images/g{g}-{i}.png"})
        groups.append({"id": f"g{g}", "prompt": f"prompt {g}", "images": entries})
    (folder / "manifest.json").write_text(json.dumps({"groups": groups}))
    return folder


def test_votes_on_a_round_are_what_training_reads(waiting: Path) -> None:
    store, rng = RoundVotes(waiting), random.Random(0)
    seen = set()
    while (shown := store.next("ann", rng)) is not None:
        assert shown.sides[0][:2] == shown.sides[1][:2]  # images of one prompt
        # ann likes the image of higher number
        store.add(shown, "left" if shown.sides[0] > shown.sides[1] else "right", "ann")
        seen.add(frozenset(shown.sides))
    assert len(seen) == 6  # every pair of both prompts, once
    votes = read_votes(waiting)
    assert votes.count == 6 and votes.annotators == 1 and votes.preference["g1-2", "g1-0"] == 1.0
    assert RoundVotes(waiting).next("bob", rng) is not None  # others judge for themselves


def test_pairs_with_the_fewest_votes_come_first(waiting: Path) -> None:
    store, rng = RoundVotes(waiting), random.Random(1)
    for name in ("ann", "bob", "cyd", "dan", "eve", "fay"):
        store.add(store.next(name, rng), "tie", name)  # type: ignore[arg-type]
    assert len({frozenset((v["image_a"], v["image_b"])) for v in store.votes}) == 6


def test_a_reward_is_offered_distinct_pairs_with_the_fewest_votes(waiting: Path) -> None:
    store, rng = RoundVotes(waiting), random.Random(2)
    for name in ("ann", "bob"):
        store.add(store.next(name, rng), "tie", name)  # type: ignore[arg-type]
    offered = [frozenset(pair.sides) for pair in store.candidates("cyd", rng, 100)]
    voted = {frozenset((vote["image_a"], vote["image_b"])) for vote in store.votes}
    assert len(set(offered)) == len(offered) == 4 and not voted & set(offered)
    assert len(store.candidates("cyd", rng, 3)) == 3
    for number in range(3):  # a damaged image leaves its pairs out
        (waiting / "images" / f"g0-{number}.png").write_bytes(b"no picture")
    pairs = store.candidates("cyd", rng, 100)
    assert pairs and all(side.startswith("g1") for pair in pairs for side in pair.sides)


def test_no_round_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--feedback", str(tmp_path)]) == 2
    assert "holds no round of images" in capsys.readouterr().err


def test_votes_on_other_weights_of_a_name_are_not_counted(tmp_path: Path) -> None:
    from dataclasses import replace

    store = VoteStore(tmp_path)
    for number, weights in enumerate(({"base": "1", "tuned": "2"}, {"base": "1", "tuned": "3"})):
        one = pair(number, f"p{number}")
        store.add(replace(one, facts={**one.facts, "models": weights}), "right", "")
    store.add(pair(7, "p7"), "left", "")  # of an earlier version, which kept no weights
    assert store.rate("base", "tuned")[0] == 3
    count, rate = store.rate("base", "tuned", weights={"base": "1", "tuned": "2"})
    assert count == 2 and rate.rate == 0.5
