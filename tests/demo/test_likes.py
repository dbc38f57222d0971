"""Thumbs on disk: durable, once per image, readable as training data."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from diffalign import load_preferences
from diffalign.cli.entry import run
from diffalign.demo.likes import LikeStore, Shown
from diffalign.demo.votes import LIKES, VoteStore
from diffalign.errors import UserError


def shown(number: int, model: str = "base") -> Shown:
    image = Image.new("RGB", (16, 16), (number, 0, 0))
    return Shown(f"id{number}", "a cat", image, model, {"seed": number})


def test_thumbs_are_there_after_a_restart_beside_votes(tmp_path: Path) -> None:
    folder = tmp_path / "votes"
    store = LikeStore(folder)
    assert store.add(shown(1), "up", "ann<b>") and store.add(shown(2, "tuned"), "down", "")
    assert not store.add(shown(1), "down", "ann")  # one thumb per image
    with pytest.raises(UserError, match="vote: expected up, down, got 'left'"):
        store.add(shown(3), "left", "")
    again = LikeStore(folder)
    assert [(line["label"], line["annotator"]) for line in again.votes] == [
        (True, "annb"), (False, ""),
    ]  # fmt: skip
    assert again.shares() == {"base": (1, 1), "tuned": (0, 1)}
    assert VoteStore(folder).votes == []  # both kinds may lie in one folder
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        LikeStore(tmp_path / "other")


def test_lines_that_are_none_are_left_out(tmp_path: Path) -> None:
    store = LikeStore(tmp_path)
    store.add(shown(1), "up", "")
    line = (tmp_path / LIKES).read_text()
    bad = [
        line.replace("true", '"yes"').replace("id1", "id2"),
        line.replace("images/", "../").replace("id1", "id3"),
        line,
        '{"id": "id4", "pro',
    ]
    (tmp_path / LIKES).write_text(line + "".join(part.rstrip() + "\n" for part in bad))
    again = LikeStore(tmp_path)
    reasons = " ".join(str(part) for part in again.left_out)
    assert len(again.votes) == 1 and len(again.left_out) == 4
    for words in ("label is 'yes'", "is no picture of this folder", "stands twice"):
        assert words in reasons


def test_exported_thumbs_are_likes_and_dislikes(tmp_path: Path, capsys) -> None:
    with pytest.raises(UserError, match="likes: nobody has given a thumb yet"):
        LikeStore(tmp_path / "votes").export(tmp_path / "none.parquet")
    store = LikeStore(tmp_path / "votes")
    for number, thumb in enumerate(("up", "down", "up")):
        store.add(shown(number), thumb, "ann")
    (tmp_path / "votes" / store.votes[2]["image"]).unlink()
    command = ["demo", "--votes_dir", str(tmp_path / "votes")]
    assert run([*command, "--export_likes", str(tmp_path / "likes.parquet")]) == 0
    assert "wrote 2 likes and dislikes" in capsys.readouterr().out
    data = load_preferences(str(tmp_path / "likes.parquet"), verbose=False)
    assert data.kind == "labelled" and [group.scores for group in data] == [(1.0,), (-1.0,)]
    assert data[0].open_image(0).getpixel((0, 0)) == (0, 0, 0)
