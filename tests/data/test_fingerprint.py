import json
import subprocess
import sys

import pytest

from diffalign.data import load_preferences


@pytest.fixture
def rows(save, tmp_path):
    for name, color in (("a", "red"), ("b", "blue"), ("c", "green")):
        save(f"{name}.png", color)
    rows = [{"prompt": f"p{i}", "chosen": "a.png", "rejected": "b.png"} for i in range(3)]

    def write(change=None, folder="."):
        for i, values in (change or {}).items():
            rows[i] |= values
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / "rows.jsonl"

    return write


def fingerprint(path, **kwargs):
    return load_preferences(path, verbose=False, **kwargs).fingerprint


@pytest.mark.nightly
def test_equal_in_another_process(rows):
    path = rows()
    code = (
        f"from diffalign.data import load_preferences as l; print(l({str(path)!r}, "
        "verbose=False).fingerprint)"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert other == fingerprint(path)
    assert len(other) == 64


def test_equal_in_another_place(rows, tmp_path):
    before = fingerprint(rows())
    (tmp_path / "moved").mkdir()
    for file in ("rows.jsonl", "a.png", "b.png"):
        (tmp_path / file).rename(tmp_path / "moved" / file)
    assert fingerprint(tmp_path / "moved/rows.jsonl") == before


@pytest.mark.parametrize(
    "change",
    [
        {1: {"prompt": "other"}},
        {2: {"rejected": "c.png"}},
        {0: {"chosen": "b.png", "rejected": "a.png"}},
    ],
)
def test_changed_rows_change_it(rows, change):
    before = fingerprint(rows())
    assert fingerprint(rows(change)) != before


def test_a_changed_image_file_changes_it(rows, save):
    before = fingerprint(rows())
    save("b.png", "green")
    assert fingerprint(rows()) != before


def test_kind_and_selection_enter(rows):
    data = load_preferences(rows(), verbose=False)
    prints = {
        data.fingerprint,
        data.as_kind("single").fingerprint,
        data.as_kind("prompt").fingerprint,
        data.select([0]).fingerprint,
    }
    assert len(prints) == 4
    assert data.select([0, 1, 2]).fingerprint == data.fingerprint
