"""Published datasets, read by their own columns: every layout is recognised the right
way round or refused with a sentence."""

from __future__ import annotations

import csv
import io
import json
import random
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from tiny import picture

from diffalign import load_preferences
from diffalign.cli.entry import run
from diffalign.data.inspect import first_group_picture, format_inspection, inspect
from diffalign.data.judgements import classify_row
from diffalign.data.schema import recognise
from diffalign.errors import ConfigError, UserError

datasets.disable_progress_bars()
GOOD, BAD = 210, 40


def png(value: int, seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    picture(value, seed).save(buffer, "PNG")
    return buffer.getvalue()


def brightness(data: Any, index: int = 0) -> list[int]:
    return [round(float(np.asarray(image).mean()), -1) for image in data[index].open_images()]


def load(rows: Any, **options: Any) -> Any:
    return load_preferences(rows, verbose=False, **options)


LAYOUTS = {
    "imagerewarddb_pair": {
        "prompt_id": "a",
        "prompt": "p",
        "classification": "x",
        "img_better": png(GOOD),
        "img_worse": png(BAD),
    },
    "hpdv3": {
        "prompt": "p",
        "choice_dist": [12, 7],
        "confidence": 0.99,
        "path1": png(GOOD),
        "path2": png(BAD),
        "model1": "flux",
        "model2": "infinity",
    },
    "genai_bench": {
        "prompt": "p",
        "left_model": "a",
        "left_image": png(BAD),
        "right_model": "b",
        "right_image": png(GOOD),
        "vote_type": "rightvote",
    },
    "rapidata": {
        "prompt": "p",
        "image1": png(BAD),
        "image2": png(GOOD),
        "weighted_results_image1_preference": 0.37,
        "weighted_results_image2_preference": 0.63,
    },
    "imagereward": {
        "id": "1",
        "prompt": "p",
        "generations": [png(BAD), png(GOOD), png(120)],
        "ranking": [5, 1, 3],
    },
    "imagerewarddb_group": {
        "prompt_id": "a",
        "prompt": "p",
        "image": [png(120), png(GOOD), png(BAD)],
        "rank": [2, 1, 3],
    },
    "hpdv2": {
        "prompt": "p",
        "file_path": [png(BAD), png(GOOD)],
        "human_preference": [0, 1],
        "user_hash": "x",
    },
    "pickapic": {
        "caption": "p",
        "jpg_0": png(BAD),
        "jpg_1": png(GOOD),
        "label_0": 0.0,
        "label_1": 1.0,
        "best_image_uid": "u",
        "ranking_id": 3,
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.filterwarnings("ignore:.*not read")
def test_published_layouts_train_on_the_better_image(name):
    data = load([LAYOUTS[name]] * 2)
    assert data.layout.name == name and data.report.kept == 2
    best, worst = brightness(data.as_kind("pair"))
    assert (best, worst) == (GOOD, BAD)


def test_votes_of_people_as_counts():
    rows = [
        {
            "prompt": "p",
            "image1": png(GOOD),
            "image2": png(BAD),
            "votes_image1": first,
            "votes_image2": second,
        }
        for first, second in ((9, 2), (3, 3))
    ]
    data = load(rows)
    assert (data.report.kept, data.report.ties) == (1, 1) and brightness(data) == [GOOD, BAD]


@pytest.mark.parametrize("vote", ["tievote", "bothbad_vote"])
def test_genai_bench_ties_contribute_no_pair(vote):
    layout = recognise(list(LAYOUTS["genai_bench"]), {})
    assert classify_row(layout, {"prompt": "p", "vote_type": vote}).status == "tie"
    assert (
        "expected one of leftvote"
        in classify_row(layout, {"prompt": "p", "vote_type": "left"}).reason
    )


def test_imagereward_ranks_may_tie_and_skip_values():
    layout = recognise(["prompt", "generations", "ranking"], {})
    assert classify_row(layout, {"prompt": "p", "rank": [1, 2, 1, 5]}).scores == (-1, -2, -1, -5)
    assert classify_row(layout, {"prompt": "p", "rank": [2, 2]}).status == "tie"


def test_rows_of_one_image_become_lists_by_their_prompt_id():
    rows = [
        {
            "image": png(value, 10 * i + j),
            "prompt_id": f"p{i}",
            "prompt": "same text",
            "rank": j + 1,
            "overall_rating": 7 - j,
        }
        for j, value in enumerate((GOOD, 120, BAD))
        for i in range(2)
    ]
    with pytest.warns(
        UserWarning, match="not read, although they look like judgements or images: overall_rating"
    ):
        data = load([*rows, {**rows[0], "prompt_id": "alone"}])
    assert (data.kind, len(data)) == ("ranked", 2)
    assert data.report.notes == [
        "7 rows of one image became 2 lists by 'prompt_id'; 1 rows have nothing to be compared with"
    ]
    assert [brightness(data.as_kind("pair"), i) for i in range(2)] == [[GOOD, BAD]] * 2
    assert brightness(data.as_kind("single")) == [GOOD]


def test_ratings_become_lists_when_they_are_mapped():
    rows = [
        {"image": png(value, j), "prompt": "p", "stars": j}
        for j, value in enumerate((BAD, 120, GOOD))
    ]
    with pytest.warns(UserWarning, match="look like judgements or images: stars"):
        assert load(rows).kind == "single"
    data = load(rows, columns={"scores": "stars"})
    assert brightness(data.as_kind("pair")) == [GOOD, BAD]


@pytest.mark.parametrize("column", ["ranking", "human_rank", "Rank"])
def test_ranks_are_never_read_as_scores(column):
    with pytest.raises(ConfigError, match=f"write rank: {column}"):
        recognise(["prompt", "images", column], {"scores": column})
    assert (
        recognise(["prompt", "images", column], {"rank": column}).direction
        == f"{column!r}: lower is better (1 is the best)"
    )


@pytest.mark.parametrize("value", [0, 0.0, "0", "False", "false", "no", False])
def test_rows_that_nobody_judged_are_left_out_however_a_table_writes_it(value):
    layout = recognise(["caption", "jpg_0", "jpg_1", "label_0", "has_label"], {})
    assert (
        classify_row(layout, {"prompt": "p", "label_0": 0, "has_label": value}).status
        == "unlabelled"
    )


@pytest.mark.parametrize(
    ("label", "first_wins"),
    [
        ("1", True),
        ("1.0", True),
        ("True", True),
        (True, True),
        ("0", False),
        ("False", False),
        (0, False),
    ],
)
def test_labels_as_tables_write_them(label, first_wins):
    layout = recognise(["caption", "jpg_0", "jpg_1", "label_0", "has_label"], {})
    for judged in ("True", "yes", 1, True, None, "", "nan"):
        verdict = classify_row(layout, {"prompt": "p", "label_0": label, "has_label": judged})
        assert (verdict.status, verdict.second_wins) == ("keep", not first_wins)


@pytest.mark.parametrize("value", [None, "", "None", "null", "nan", float("nan"), "N/A"])
def test_missing_labels_in_any_spelling(value):
    layout = recognise(["caption", "jpg_0", "jpg_1", "label_0"], {})
    assert classify_row(layout, {"prompt": "p", "label_0": value}).status == "unlabelled"


@pytest.mark.parametrize("value", ["left", 2, -1, [1], {"a": 1}, "1_0", 10**400, "9" * 5000])
def test_labels_that_are_none_are_broken_and_short(value):
    layout = recognise(["caption", "jpg_0", "jpg_1", "label_0", "has_label"], {})
    verdict = classify_row(layout, {"prompt": "p", "label_0": value})
    assert verdict.status == "broken" and len(verdict.reason) < 200
    assert classify_row(layout, {"prompt": "p", "label_0": 1, "has_label": value}).status in (
        "broken",
        "unlabelled",
    )


def test_a_votes_table_with_every_spelling(tmp_path):
    spellings = [
        ("1", "True"),
        ("0", "1"),
        ("0.5", "yes"),
        ("", "True"),
        ("None", "1"),
        ("0", "False"),
        ("1", "0"),
        ("1.0", ""),
    ]
    picture(GOOD, 0).save(tmp_path / "a.png")
    picture(BAD, 1).save(tmp_path / "b.png")
    with open(tmp_path / "votes.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["caption", "jpg_0", "jpg_1", "label_0", "has_label"])
        writer.writerows(["p", "a.png", "b.png", label, judged] for label, judged in spellings)
    report = load(tmp_path / "votes.csv", max_broken_fraction=0.0).report
    assert (report.kept, report.first_wins, report.second_wins, report.ties, report.unlabelled) == (
        3,
        2,
        1,
        1,
        4,
    )


UNREADABLE = {
    "open-image-preferences-v1": (
        ["quality_prompt", "image_quality_dev", "image_quality_sd", "prompt"],
        ["image_quality_dev", "data.columns"],
    ),
    "open-image-preferences-results": (
        ["images", "preference.responses", "prompt"],
        ["preference.responses", "images"],
    ),
    "PickaPic-rankings": (
        ["image_1_uid", "image_2_uid", "best_image_uid", "prompt"],
        ["best_image_uid", "rank:"],
    ),
    "imgsys": (["model_a", "model_b", "preference", "prompt"], ["preference"]),
    "own": (
        ["question", "winner_picture", "loser_picture"],
        ["winner_picture", "loser_picture", "jpg_0"],
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_other_layouts_are_refused_with_the_columns_and_the_mapping(name):
    columns, words = UNREADABLE[name]
    with pytest.raises(UserError) as caught:
        recognise(columns, {})
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_rich_human_feedback_says_that_its_ratings_are_not_read():
    rows = [
        {"image": png(GOOD), "prompt": "p", "artifact_score": 0.4, "overall_score": 0.6, "seed": 1}
    ]
    with pytest.warns(UserWarning, match="artifact_score, overall_score"):
        assert load(rows).kind == "single"


def test_the_direction_is_shown_with_a_picture(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for j, value in enumerate((BAD, GOOD)):
        picture(value, j).save(tmp_path / f"images/{j}.png")
    row = {
        "id": "1",
        "prompt": "a cat",
        "generations": ["images/0.png", "images/1.png"],
        "ranking": [4, 1],
    }
    (tmp_path / "test.json").write_text(json.dumps([row]))
    data = load(tmp_path / "test.json")
    assert "'ranking': lower is better (1 is the best)" in format_inspection(inspect(data))
    shown = np.asarray(
        Image.open(first_group_picture(data, tmp_path / "out" / "first.png")).convert("L")
    )
    assert shown[100, 20:240].mean() > 180 > 80 > shown[100, 290:500].mean()
    file, shown = str(tmp_path / "test.json"), tmp_path / "p.png"
    assert run(["data", "inspect", file, "--picture", str(shown)]) == 0
    assert shown.is_file() and "lower is better" in capsys.readouterr().out


def test_the_first_group_is_shown_with_its_own_scores(tmp_path):
    """Scores of ImageReward's kind are negative as often as not."""
    shown = []
    for low in (0.5, -0.5):
        rows = [
            {"prompt": "p", "images": [picture(GOOD, 0), picture(BAD, 0)], "scores": [1.0, low]}
        ]
        shown.append(
            first_group_picture(
                load_preferences(rows, verbose=False), tmp_path / f"{low}.png"
            ).read_bytes()
        )
    assert shown[0] != shown[1]


def test_every_layout_says_which_way_it_reads():
    for name, row in LAYOUTS.items():
        assert recognise(
            list(row), {}, {k: isinstance(v, list) for k, v in row.items()}
        ).direction, name


def test_single_image_methods_read_rows_with_a_rank_as_they_are():
    rows = [
        {"prompt": p, "image": png(100, i), "rank": rank}
        for i, (p, rank) in enumerate((("x", 1), ("y", 2)))
    ]
    assert load(rows, kind="single").report.kept == 2
    assert load([{**row, "rank": "gold"} for row in rows], kind="single").report.kept == 2
    with pytest.raises(UserError, match="no two rows of one 'prompt' can be compared"):
        load(rows)


def test_rows_of_one_id_with_other_prompts_or_without_a_rank_are_kept_apart():
    rows = [
        {"prompt": p, "prompt_id": "a", "image": png(v, i), "rank": r}
        for i, (p, v, r) in enumerate(
            (("x", GOOD, 1), ("x", BAD, 2), ("other", 90, 1), ("x", 100, None))
        )
    ]
    data = load(rows)
    assert (
        len(data) == 1
        and len(data[0].images) == 2
        and "1 rows have no rank" in data.report.notes[0]
    )


def test_streams_are_recognised_by_more_than_their_first_row():
    def rows():
        yield {"prompt": "p", "images": [png(GOOD), png(BAD)], "scores": None}
        yield {"prompt": "p", "images": [png(GOOD), png(BAD)], "scores": [1.0, 0.0]}

    stream = datasets.IterableDataset.from_generator(rows)
    data = load(stream)
    assert len(list(data)) == 1 and data.report.unlabelled == 1


def test_numbers_beside_words_in_a_column_stay_judgements(tmp_path):
    for i, value in enumerate((GOOD, BAD)):
        picture(value, i).save(tmp_path / f"{i}.png")
    row = {"caption": "p", "jpg_0": "0.png", "jpg_1": "1.png"}
    judged = [
        {"label_0": 1, "has_label": "yes"},
        {"label_0": 0, "has_label": False},
        {"label_0": "0", "has_label": True},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row | extra) + "\n" for extra in judged))
    report = load(tmp_path / "a.jsonl").report
    assert (report.first_wins, report.second_wins, report.unlabelled) == (1, 1, 1)
    layout = recognise(list(LAYOUTS["genai_bench"]), {})
    assert classify_row(layout, {"prompt": "p", "vote_type": ["leftvote"]}).status == "broken"


ODD_CELLS = [
    None,
    "",
    "x",
    "None",
    "nan",
    -1,
    0,
    1,
    7,
    0.5,
    float("nan"),
    1e30,
    True,
    False,
    [],
    {},
    [1],
    [0, 1],
    ["a", "b"],
    b"",
    b"x",
]


def mutated_rows(name: str, generator: random.Random) -> tuple[list[dict[str, Any]], set[int]]:
    """Eight rows of a layout with faults, and which rows still hold what it says."""
    rows = [dict(LAYOUTS[name]) for _ in range(8)]
    for i, row in enumerate(rows):
        row.update(
            {key: f"{row[key]}{i}" for key in ("prompt", "caption", "prompt_id") if key in row}
        )
    whole = set(range(8))
    kind = generator.choice(["cells", "cells", "column", "more"])
    if kind == "cells":
        for _ in range(generator.randint(1, 3)):
            place = generator.randrange(8)
            rows[place][generator.choice(sorted(rows[0]))] = (
                None if generator.random() < 0.5 else generator.choice(ODD_CELLS)
            )
            whole.discard(place)
    elif kind == "column":
        column = generator.choice(sorted(rows[0]))
        other = generator.choice(
            [None, f"my_{column}", column.upper(), "score", "label", "rank", "images"]
        )
        for row in rows:
            value = row.pop(column)
            if other is not None:
                row[other] = value
    else:
        extra = generator.choice(
            [
                "label_0",
                "ranking",
                "scores",
                "preference",
                "winner",
                "chosen",
                "image",
                "rank",
                "note",
            ]
        )
        for row in rows:
            row.setdefault(extra, generator.choice(ODD_CELLS))
    return rows, whole


@pytest.mark.nightly
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.filterwarnings("ignore")
def test_mutated_layouts_are_read_the_right_way_or_refused(name):
    """80 per layout, 640 in all: a sentence, or pairs, no untouched one reversed."""
    generator, refused, read = random.Random(name), 0, 0
    for number in range(80):
        rows, whole = mutated_rows(name, generator)
        try:
            data = load(rows, max_broken_fraction=1.0)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error), number  # noqa: PT017
            continue
        if data.kind not in ("pair", "ranked"):
            continue
        pairs = data.as_kind("pair")
        for index in range(len(pairs)):
            if pairs[index].row_id in whole:
                best, worst = brightness(pairs, index)
                assert best > worst, (number, rows[0].keys())
                read += 1
    assert refused >= 5 and read > 50
