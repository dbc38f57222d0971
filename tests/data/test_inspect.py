import json

import datasets
import pytest

from diffalign.data import convert, format_inspection, load_preferences
from diffalign.data.inspect import inspect
from diffalign.errors import UserError


def load(source, **kwargs):
    return load_preferences(source, **{"verbose": False} | kwargs)


@pytest.fixture
def rows(png):
    red, blue, wide = png("red", (8, 8)), png("blue", (8, 8)), png("green", (16, 9))
    return [
        {"caption": "a red cat", "jpg_0": red, "jpg_1": blue, "label_0": 1.0},
        {"caption": "a red cat", "jpg_0": red, "jpg_1": blue, "label_0": 1.0},  # the same again
        {"caption": "a dog", "jpg_0": red, "jpg_1": red, "label_0": 0.0},  # equal images
        {
            "caption": "a longer prompt, of six words",
            "jpg_0": wide,
            "jpg_1": blue,
            "label_0": 1.0,
        },  # unequal sizes
        {"caption": "tie", "jpg_0": wide, "jpg_1": blue, "label_0": 0.5},
        {"caption": "none", "jpg_0": wide, "jpg_1": blue, "label_0": None},
        {"caption": "broken", "jpg_0": b"?", "jpg_1": blue, "label_0": 1.0},
    ]


def test_findings(rows):
    result = inspect(load(rows, max_broken_fraction=0.5))
    assert (
        result["rows"],
        result["kept"],
        result["ties"],
        result["unlabelled"],
        result["broken_count"],
    ) == (7, 4, 1, 1, 1)
    assert result["broken"][0][0] == 6
    assert result["duplicate_groups"] == {"count": 1, "rows": [1]}
    assert result["duplicate_images"] == {"count": 3, "rows": [1, 2, 3]}
    assert result["identical_images"] == {"count": 1, "rows": [2]}
    assert result["size_mismatches"] == result["aspect_mismatches"] == {"count": 1, "rows": [3]}
    assert result["sizes"] == {"8x8": 7, "9x16": 1}
    assert result["aspects"] == {"1:1": 7, "16:9": 1}
    assert result["formats"] == {"PNG": 8}
    assert (result["images"], result["distinct_images"], result["distinct_prompts"]) == (8, 3, 3)
    assert result["prompt_words"] == {"min": 2, "median": 3, "max": 6}
    assert result["prompt_characters"] == {"min": 5, "median": 9, "max": 29}
    assert result["first_image_preferred"] == pytest.approx(
        0.8
    )  # four of five labels; the broken row has one too
    json.dumps(result)


def test_text(rows):
    text = format_inspection(inspect(load(rows, max_broken_fraction=0.5)))
    for part in (
        "pickapic",
        "8x8: 7, 9x16: 1",
        "1 (rows 2)",
        "7, of which used 4",
        "2 to 6, median 3",
        "row 6: image cannot be opened",
    ):
        assert part in text
    assert "the columns are ordered" in format_inspection(inspect(load([{"prompt": "p"}])))


def test_unreadable_images_are_findings(save):
    path = save("a.png", "red")
    data = load([{"prompt": "p", "image": str(path)}])
    path.write_bytes(b"?")
    assert inspect(data)["unreadable"] == {"count": 1, "rows": [0]}
    path.unlink()
    result = inspect(data)
    assert (result["unreadable"], result["fingerprint"]) == ({"count": 1, "rows": [0]}, None)
    assert "none while images are unreadable" in format_inspection(result)


def test_a_stream_can_be_inspected(rows):
    result = inspect(load(rows, streaming=True, max_broken_fraction=0.5))
    assert (result["kept"], result["duplicate_groups"]["count"]) == (4, 1)


def _content(data):
    return [(group.prompts, group.image_hashes(), group.weight) for group in data]


def test_convert_round_trip(rows, tmp_path):
    data = load(rows, max_broken_fraction=0.5, ties="keep")
    folder = convert(data, tmp_path / "out", shard_rows=2)
    assert [path.name for path in sorted(folder.iterdir())] == [
        f"train-0000{i}-of-00003.parquet" for i in range(3)
    ]
    again = load(folder, ties="keep")
    assert (again.layout.name, again.kind) == ("trl", "pair")
    assert _content(again) == _content(data)
    plain = datasets.load_dataset(str(folder), split="train")
    assert isinstance(plain.features["chosen"], datasets.Image)
    assert plain[0]["chosen"].size == (8, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_convert_keeps_two_prompts(png, tmp_path):
    row = {
        "caption_0": "zero",
        "caption_1": "one",
        "jpg_0": png("red"),
        "jpg_1": png("blue"),
        "label_0": 0.0,
    }
    data = load([row])
    again = load(convert(data, tmp_path / "out"))
    assert again[0].prompts == ("one", "zero") and _content(again) == _content(data)


def test_convert_other_kinds(png, save, tmp_path):
    save("a.png", "red")
    save("b.png", "blue")
    rows = [
        {
            "prompt": "p",
            "images": [str(tmp_path / "a.png"), str(tmp_path / "b.png")],
            "scores": [0.1, 0.9],
        }
    ]
    data = load(rows)
    ranked = load(convert(data, tmp_path / "ranked"))
    assert (ranked.kind, ranked[0].scores, _content(ranked)) == (
        "ranked",
        (0.1, 0.9),
        _content(data),
    )
    for kind in ("pair", "single", "prompt"):
        again = load(convert(data, tmp_path / kind, kind=kind))
        assert again.kind == kind and _content(again) == _content(data.as_kind(kind))


def test_convert_does_not_touch_what_is_there(rows, tmp_path):
    (tmp_path / "out").mkdir()
    data = load(rows[:1])
    convert(data, tmp_path / "out")  # empty: fine
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        convert(data, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_conversion_leaves_nothing(save, tmp_path):
    path = save("images/a.png", "red")
    data = load([{"prompt": "p", "image": str(path)}])
    path.unlink()
    with pytest.raises(UserError, match="row 0"):
        convert(data, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
