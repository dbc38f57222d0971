"""Whole columns are judged as their rows are, and large data are read by columns."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from diffalign.data import columns as column_rules
from diffalign.data import load_preferences
from diffalign.data.columns import ASK, judge_columns, update_digest
from diffalign.data.judgements import classify_row
from diffalign.data.schema import recognise

SIDES = ("chosen", "rejected")
NUMBERS = [0.0, 1.0, 0.5, -1.0, 2.0, math.nan, math.inf, None]
LISTS = [[1.0, 2.0], [2.0, 2.0], [1.0], [], None, [None, 1.0], [math.nan, 3.0], [math.inf, 0.0]]
CASES: dict[str, dict[str, list[Any]]] = {
    "trl": {"prompt": ["a", "", None], "weight": [1.0, 0.0, -1.0, None, math.inf]},
    "canonical_two_prompts": {"chosen_prompt": ["a", None], "rejected_prompt": ["b", None]},
    "pickapic": {
        "caption": ["a", None],
        "label_0": NUMBERS,
        "label_1": NUMBERS,
        "has_label": [True, False, None],
    },
    "dcpo": {"caption_0": ["a", None], "caption_1": ["b", None], "label_0": NUMBERS},
    "genai_bench": {"prompt": ["a"], "vote_type": ["leftvote", "tievote", "odd", None]},
    "rapidata": {
        "prompt": ["a", None],
        "votes_image1": NUMBERS,
        "votes_image2": NUMBERS,
    },
    "ranked": {"prompt": ["a", None], "scores": LISTS, "weight": [1.0, -2.0]},
    "imagereward": {"prompt": ["a", None], "ranking": [[1, 2], [1, 1], [2], None, [None, 1]]},
    "labelled": {"prompt": ["a", None], "label": [1, 0, -1, 2, None]},
    "liked": {"prompt": ["a"], "liked": [True, False, None]},
    "rated": {"prompt": ["a", None], "rating": [1.0, 3.0, 5.0, None, math.inf]},
    "words": {"prompt": ["a"], "jpg_0": ["x"], "jpg_1": ["y"], "label_0": ["1", "0", "no", None]},
    "prompt": {"prompt": ["a", None, ""]},
}
IMAGES = {
    "trl": ["chosen", "rejected"],
    "canonical_two_prompts": ["chosen", "rejected"],
    "pickapic": ["jpg_0", "jpg_1"],
    "dcpo": ["jpg_0", "jpg_1"],
    "genai_bench": ["left_image", "right_image"],
    "rapidata": ["image1", "image2"],
    "ranked": ["images"],
    "imagereward": ["generations"],
    "labelled": ["image"],
    "liked": ["image"],
    "rated": ["image"],
}


@pytest.mark.parametrize("name", CASES)
def test_columns_and_rows_agree(name: str) -> None:
    chance, reads_words = random.Random(name), name in ("genai_bench", "words")
    cells = {c: [chance.choice(values) for _ in range(300)] for c, values in CASES[name].items()}
    lists = {c: name in ("ranked", "imagereward") and c != "prompt" for c in CASES[name]}
    images = IMAGES.get(name, [])
    if name == "words":
        name = "pickapic"
        cells = {c: v for c, v in cells.items() if not c.startswith("jpg")}
        images = ["jpg_0", "jpg_1"]
    lists |= {image: image in ("images", "generations") for image in images}
    layout = recognise([*cells, *images], {}, lists, like_threshold=3.0, wanted=None)
    table = pa.table({column: pa.array(values) for column, values in cells.items()})
    columns = {role: table[column] for role, column in layout.light_columns.items()}
    judged = judge_columns(layout, columns)
    names = {0: "keep", 1: "tie", 2: "unlabelled"}
    for row in range(300):
        verdict = classify_row(layout, {r: c[row].as_py() for r, c in columns.items()})
        if judged.status[row] == ASK:
            continue
        assert names[int(judged.status[row])] == verdict.status, (row, verdict)
        wins = {-1: None, 0: False, 1: True}[int(judged.second_wins[row])]
        assert wins == verdict.second_wins
        if layout.kind == "labelled" and verdict.status == "keep":
            assert (float(judged.liked[row]),) == verdict.scores
    if not reads_words:
        assert (judged.status != ASK).any()


def test_a_digest_does_not_depend_on_how_arrow_cuts_a_column() -> None:
    import hashlib

    def digest(column: Any) -> str:
        state = hashlib.sha256()
        update_digest(state, column)
        return state.hexdigest()

    for values in (
        ["a", None, "bc", "", "d" * 50],
        [[1.0, 2.0], None, [], [3.0]],
        [{"bytes": b"123", "path": None}, None, {"bytes": None, "path": "x"}],
        [1, 2, None, 4],
        [True, False, None],
    ):
        whole = pa.chunked_array([pa.array(values)])
        cut = pa.chunked_array(
            [pa.array(values, whole.type).slice(0, 2), pa.array(values, whole.type).slice(2)]
        )
        assert digest(whole) == digest(cut)
        assert digest(whole) != digest(pa.chunked_array([pa.array(values[::-1], whole.type)]))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data are large from 10 rows on."""
    monkeypatch.setattr(column_rules, "MANY_ROWS", 10)


def rows(png: Any, count: int = 40) -> list[dict[str, Any]]:
    return [
        {"prompt": f"p{i}", "chosen": png("red"), "rejected": png("blue")} for i in range(count)
    ]


def test_large_data_are_checked_by_a_sample(few: None, png: Any) -> None:
    data = rows(png)
    data[7]["chosen"] = None
    loaded = load_preferences(data, verbose=False)
    assert loaded.report.broken_count == 1 and loaded.report.broken[0][0] == 7
    assert "images of 40 rows opened" in loaded.report.summary()
    assert len(loaded) == 39 and loaded.distinct_prompts()[0] == "p0"


def test_headers_of_large_data_are_read_by_workers_and_remembered(
    few: None, png: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = rows(png)
    data[5]["rejected"] = b"no image"
    datasets.Dataset.from_list(data).to_parquet(tmp_path / "pairs.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    place = str(tmp_path / "pairs.parquet")
    first = load_preferences(place, verbose=False, verify_images="header")
    assert first.report.broken[0][0] == 5 and len(first) == 39
    remembered = list((tmp_path / "cache").rglob("cache-*.arrow"))
    assert remembered
    second = load_preferences(place, verbose=False, verify_images="header")
    assert second.report.as_dict() == first.report.as_dict()
    assert list((tmp_path / "cache").rglob("cache-*.arrow")) == remembered


def test_the_fingerprint_of_large_data(few: None, png: Any) -> None:
    def fingerprint(change: Any = None, kind: str | None = None) -> str:
        data = rows(png)
        if change is not None:
            change(data)
        return load_preferences(data, verbose=False, kind=kind).fingerprint

    plain = fingerprint()
    assert plain == fingerprint() != fingerprint(kind="single")
    assert plain != fingerprint(lambda data: data[3].update(prompt="other"))
    assert plain != fingerprint(lambda data: data[3].update(chosen=data[3]["rejected"]))
    assert plain != fingerprint(lambda data: data.pop())


def test_ranges_and_users_of_columns(png: Any) -> None:
    data = [
        row | {"chosen_score": float(i), "rejected_score": -float(i), "user_id": name}
        for i, (row, name) in enumerate(zip(rows(png, 4), ["ann", "bob", None, "ann"], strict=True))
    ]
    loaded = load_preferences(data, verbose=False)
    assert loaded.score_range() == (-3.0, 3.0)
    assert loaded.user_of_groups() == ["ann", "bob", None, "ann"]
    assert loaded.users() == ["ann", "bob"]
    inverted = loaded.with_inverted_preferences()
    assert inverted.score_range() == (-3.0, 3.0)


def test_left_out_rows_with_images_are_not_copied(few: None) -> None:
    """The digest of chosen rows is that of a column without the others."""
    import hashlib

    import numpy as np

    from diffalign.data.columns import digest_columns

    cells = [{"bytes": b"x" * n, "path": None} for n in range(12)]
    lists = [[cell, cells[0]] for cell in cells]
    data = datasets.Dataset.from_dict({"image": cells, "images": lists})

    def digest(dataset: datasets.Dataset, rows: Any) -> str:
        state = hashlib.sha256()
        digest_columns(state, dataset, ["image", "images"], np.array(rows, np.int64))
        return state.hexdigest()

    kept = [0, 1, 4, 5, 6, 11]
    short = data.select(kept).flatten_indices()
    assert digest(data, kept) == digest(short, range(6)) != digest(data, range(12))
    assert digest(data, []) == digest(data, np.empty(0))


def test_a_changed_image_file_is_checked_again(
    few: None, png: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for i, row in enumerate(rows(png, 12)):
        for side in SIDES:
            (folder / f"{side}{i}.png").write_bytes(row[side])
        lines.append({"prompt": f"p{i}"} | {side: f"{side}{i}.png" for side in SIDES})
    (folder / "chosen3.png").write_bytes(b"not yet")
    datasets.Dataset.from_list(lines).to_parquet(folder / "pairs.parquet")
    place = str(folder / "pairs.parquet")

    def broken() -> list[int]:
        loaded = load_preferences(
            place, verbose=False, verify_images="header", max_broken_fraction=0.5
        )
        return [row for row, _ in loaded.report.broken]

    assert broken() == [3]
    (folder / "chosen3.png").write_bytes((folder / "chosen4.png").read_bytes())
    assert broken() == []
    (folder / "rejected7.png").write_bytes(b"cut")
    assert broken() == [7]
