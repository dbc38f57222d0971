"""Comparisons on disk: restored as they were, the oldest make room."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffalign.demo.comparisons import MARKER, ComparisonStore, Settings
from diffalign.errors import UserError

SETTINGS = Settings(
    prompt="a cat | a dog",
    seed=3,
    steps=20,
    guidance=2.0,
    side=64,
    left="base",
    right="tuned",
    lora_scale=1.0,
)
SCORES = {"clip": [0.25, None]}


def images(shade: int) -> tuple[Image.Image, Image.Image]:
    left, right = (Image.new("RGB", (16, 16), (shade, 0, blue)) for blue in (0, 255))
    return left, right


def test_a_comparison_comes_back_after_a_restart(tmp_path: Path) -> None:
    folder = tmp_path / "gallery"
    id = ComparisonStore(folder).add(SETTINGS, images(7), SCORES)
    store = ComparisonStore(folder)
    record, pictures = store.get(id), store.images(id)
    assert record is not None and record.settings == SETTINGS and record.scores == SCORES
    assert pictures is not None
    for picture, image in zip(pictures, images(7), strict=True):
        assert np.array_equal(np.asarray(picture), np.asarray(image))
    thumbnail = store.thumbnail(id)
    assert thumbnail is not None and thumbnail.width > 2 * 192
    assert [found for found, _ in store.newest(10)] == [id]


def test_the_same_settings_have_one_place_and_others_another(tmp_path: Path) -> None:
    store = ComparisonStore(tmp_path / "gallery")
    first = store.add(SETTINGS, images(1), SCORES)
    assert store.add(SETTINGS, images(2), SCORES) == first
    pictures = store.images(first)
    assert pictures is not None and pictures[0].getpixel((0, 0)) == (2, 0, 0)
    changed = [replace(SETTINGS, seed=4), replace(SETTINGS, lora_scale=0.5)]
    assert len({first, *(store.add(one, images(3), SCORES) for one in changed)}) == 3


def test_the_oldest_make_room(tmp_path: Path) -> None:
    folder = tmp_path / "gallery"
    store = ComparisonStore(folder, most=3)
    ids = []
    for seed in range(5):
        ids.append(store.add(replace(SETTINGS, seed=seed), images(seed), SCORES))
        for place, id in enumerate(ids):  # a file system's clock may be coarse
            path = folder / f"comparison-{id}.json"
            if path.is_file():
                os.utime(path, (1000 + place, 1000 + place))
    assert [id for id, _ in store.newest(10)] == ids[:1:-1]
    assert len(list(folder.iterdir())) == 3 * 4 + 1
    assert store.get(ids[0]) is None and store.images(ids[0]) is None


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {}},
        {"settings": {**vars(SETTINGS), "seed": "3"}},
        {"settings": {**vars(SETTINGS), "more": 1}},
        {"scores": None},
        {"time": "now"},
    ],
)
def test_a_damaged_record_is_left_out(tmp_path: Path, change: dict[str, object]) -> None:
    folder = tmp_path / "gallery"
    store = ComparisonStore(folder)
    id = store.add(SETTINGS, images(1), SCORES)
    path = folder / f"comparison-{id}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert store.get(id) is None and store.newest(5) == []


@pytest.mark.parametrize("id", ["", "../../etc/passwd", "0" * 15, "G" * 16, "0" * 16])
def test_an_id_of_nothing_finds_nothing(tmp_path: Path, id: str) -> None:
    assert ComparisonStore(tmp_path / "gallery").get(id) is None


def test_another_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--gallery_dir: .* holds something else"):
        ComparisonStore(tmp_path)
    assert not (tmp_path / MARKER).exists()
