"""Likes and dislikes: recognised, read from pairs, turned into single images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from tiny import labelled_rows, pair_rows, ranked_rows

from diffalign.data import convert, load_preferences
from diffalign.data.inspect import first_group_picture, format_inspection, inspect
from diffalign.errors import UserError


def images(labels: list[Any], column: str = "label") -> list[dict[str, Any]]:
    return [
        {"prompt": f"p{i}", "image": Image.new("RGB", (8, 8), (i, 0, 0)), column: label}
        for i, label in enumerate(labels)
    ]


def scores(rows: Any, **options: Any) -> list[float]:
    data = load_preferences(rows, verbose=False, **options)
    assert data.kind == "labelled"
    return [group.scores[0] for group in data]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([True, False], [1, -1]),
        ([1, 0], [1, -1]),
        ([1, -1], [1, -1]),
        ([1.0, -1.0, 0.0], [1, -1, -1]),
        (["yes", "no", "True", "0"], [1, -1, 1, -1]),
    ],
)
@pytest.mark.parametrize("column", ["label", "liked", "thumbs_up"])
def test_labels(labels: list[Any], expected: list[int], column: str) -> None:
    assert scores(images(labels, column)) == expected


@pytest.mark.parametrize("column", ["rating", "stars"])
def test_ratings_need_a_threshold(column: str) -> None:
    rows = images([5, 3, 4, 1], column)
    assert scores(rows, like_threshold=4) == [1, -1, 1, -1]
    assert scores(rows, like_threshold=0.5) == [1] * 4
    with pytest.warns(UserWarning, match=column if column == "rating" else "stars"):
        assert load_preferences(rows, verbose=False).kind == "single"
    data = load_preferences(rows, like_threshold=4, verbose=False)
    assert data.report.direction == f"'{column}': liked from 4 on"


def test_other_columns_are_mapped() -> None:
    rows = images([4, 2], "votes")
    data = {"columns": {"rating": "votes"}, "like_threshold": 3}
    assert scores(rows, **data) == [1, -1]
    assert scores(images([True, False], "ok"), columns={"label": "ok"}) == [1, -1]


def test_rows_without_a_label_are_counted() -> None:
    data = load_preferences(images([True, None, False]), verbose=False)
    assert len(data) == 2 and data.report.unlabelled == 1
    assert data.report.direction == "'label': true or 1 is liked; false, 0 or -1 is not"


def test_labels_that_are_none() -> None:
    words = r"label is 7, expected true or false, 1 or 0, or 1 or -1; for ratings map the column"
    with pytest.raises(UserError, match=words):
        load_preferences(images([7, 1]), verbose=False)
    with pytest.raises(UserError, match=r"rating is 'good', expected a number"):
        load_preferences(images(["good", "3"], "rating"), like_threshold=2, verbose=False)


def test_classes_of_images_are_no_judgements() -> None:
    features = datasets.Features(
        prompt=datasets.Value("string"), image=datasets.Image(),
        label=datasets.ClassLabel(names=["cat", "dog"]),
    )  # fmt: skip
    data = datasets.Dataset.from_list(images([0, 1]), features=features)
    assert load_preferences(data, verbose=False).kind == "single"
    assert load_preferences(data, columns={"label": "label"}, verbose=False).kind == "labelled"


def test_pairs_are_two_labelled_images() -> None:
    pairs = load_preferences(pair_rows(3), verbose=False)
    data = pairs.as_kind("labelled")
    assert len(data) == 6 and [group.scores for group in data] == [(1.0,), (-1.0,)] * 3
    for index, group in enumerate(data):
        pair = pairs[index // 2]
        assert group.image_hashes() == [pair.image_hashes()[index % 2]]
        assert group.row_id == pair.row_id and group.prompts == pair.prompts[:1]
    assert len({group.key for group in data}) == 6
    some = data.select([1, 4])
    assert [group.scores for group in some] == [(-1.0,), (1.0,)]
    assert len({data.fingerprint, some.fingerprint, data.select([0, 5]).fingerprint}) == 3
    inverted = pairs.with_inverted_preferences().as_kind("labelled")
    assert inverted[0].image_hashes() == data[1].image_hashes()
    assert [g.image_hashes() for g in data.as_kind("single")] == [
        g.image_hashes() for g in pairs.as_kind("single")
    ]
    assert [g.prompts for g in data.as_kind("prompt")] == [g.prompts[:1] for g in pairs]


def test_lists_give_their_best_and_worst() -> None:
    lists = load_preferences(ranked_rows(2), verbose=False)
    data = lists.as_kind("labelled")
    pair = lists.as_kind("pair")[1]
    assert len(data) == 4 and [data[2].image_hashes() + data[3].image_hashes()] == [
        pair.image_hashes()
    ]


def test_single_images_are_the_liked_ones() -> None:
    data = load_preferences(labelled_rows(6), verbose=False)
    single = data.as_kind("single")
    assert [group.row_id for group in single] == [0, 2, 4] and single.kind == "single"
    assert "3 disliked images left out" in single.report.summary()
    assert [g.row_id for g in data.with_inverted_preferences().as_kind("single")] == [1, 3, 5]
    assert data.report.kept == 6 and not data.report.notes
    assert len(data.as_kind("prompt")) == 6
    with pytest.raises(UserError, match="none of its images is liked"):
        load_preferences(images([False, False]), verbose=False).as_kind("single")


def test_what_has_no_labels() -> None:
    single = load_preferences([{"prompt": "a", "image": images([1])[0]["image"]}], verbose=False)
    with pytest.raises(UserError, match=r"needs labelled data.*add a column label \(true or false"):
        single.as_kind("labelled")
    with pytest.raises(UserError, match="needs pair data"):
        load_preferences(labelled_rows(2), verbose=False).as_kind("pair")


def test_streams(tmp_path: Path) -> None:
    folder = convert(load_preferences(labelled_rows(4), verbose=False), tmp_path / "likes")
    stream = load_preferences(str(folder), streaming=True, verbose=False)
    assert [group.scores for group in stream] == [(1.0,), (-1.0,)] * 2
    assert [group.row_id for group in stream.as_kind("single")] == [0, 2]
    pairs = convert(load_preferences(pair_rows(2), verbose=False), tmp_path / "pairs")
    unrolled = load_preferences(str(pairs), streaming=True, verbose=False).as_kind("labelled")
    assert [(g.row_id, g.place, g.scores) for g in unrolled] == [
        (0, 0, (1.0,)), (0, 1, (-1.0,)), (1, 0, (1.0,)), (1, 1, (-1.0,)),
    ]  # fmt: skip


def test_converted_and_inspected(tmp_path: Path) -> None:
    folder = convert(
        load_preferences(pair_rows(3), verbose=False), tmp_path / "likes", kind="labelled"
    )
    data = load_preferences(str(folder), verbose=False)
    assert [group.scores for group in data] == [(1.0,), (-1.0,)] * 3
    result = inspect(data)
    assert result["liked"] == 0.5 and result["kind"] == "labelled"
    lines = format_inspection(result)
    assert (
        "liked                    50.0%" in lines and "kind                     labelled" in lines
    )
    assert first_group_picture(data, tmp_path / "first.png").is_file()
