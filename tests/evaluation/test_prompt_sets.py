"""Named prompt sets and files: what is read, what is refused, checksums."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.data.prompt_sets import NAMED
from diffalign.errors import UserError
from diffalign.evaluation import load_prompts
from diffalign.shapes import held_out_prompts


def test_the_embedded_set_is_the_held_out_one() -> None:
    prompt_set = load_prompts("shapes")
    assert prompt_set.prompts == held_out_prompts() and prompt_set.published
    assert set(prompt_set.categories) == {"circle", "square", "triangle", "star", "cross"}


def test_a_limit_thins_evenly() -> None:
    prompt_set = load_prompts("shapes", limit=7)
    assert len(prompt_set.prompts) == len(prompt_set.categories) == len(prompt_set.metadata) == 7
    assert (
        prompt_set.prompts[1] == held_out_prompts()[120 // 7] and "7 of 120" in prompt_set.notes[-1]
    )
    assert load_prompts("shapes", limit=1000).prompts == held_out_prompts()


TABLE = [
    {"Prompts": "a cat", "Category": "animals"},
    {"Prompts": 'a "quoted" dog, twice', "Category": "animals"},
]


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mine{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(TABLE), path)
    else:
        text = {
            ".txt": "a cat\n\na cat\n" + TABLE[1]["Prompts"],
            ".csv": 'Prompts,Category\na cat,animals\n"a ""quoted"" dog, twice",animals\n',
            ".tsv": 'Prompts\tCategory\na cat\tanimals\na "quoted" dog, twice\tanimals\n',
            ".json": json.dumps(TABLE),
            ".jsonl": "\n".join(json.dumps(row) for row in TABLE),
        }[suffix]
        path.write_text(text, "utf-8")
    prompt_set = load_prompts(path)
    assert prompt_set.prompts == ["a cat", 'a "quoted" dog, twice'] and len(prompt_set.sha256) == 64
    assert prompt_set.categories == ([None, None] if suffix == ".txt" else ["animals", "animals"])
    assert prompt_set.notes == (
        ["1 empty prompts left out", "1 repeated prompts taken once"] if suffix == ".txt" else []
    )


def test_a_json_list_of_texts(tmp_path: Path) -> None:
    (tmp_path / "photo.json").write_text('["a cat", "a dog"]')
    assert load_prompts(tmp_path / "photo.json").prompts == ["a cat", "a dog"]


def test_a_named_set_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMED["hpdv2"].files:
        (tmp_path / "benchmark").mkdir(exist_ok=True)
        (tmp_path / "benchmark" / name).write_text(json.dumps([f"{name} one", f"{name} two"]))
    prompt_set = load_prompts("hpdv2", path=tmp_path)
    assert (
        len(prompt_set.prompts) == 8
        and prompt_set.categories[2] == "concept-art"
        and prompt_set.licence == "Apache-2.0"
    )
    assert prompt_set.published is None  # nobody gave us the published checksum
    monkeypatch.setenv("DIFFALIGN_PROMPTS", str(tmp_path))
    assert load_prompts("hpdv2").sha256 == prompt_set.sha256


def test_another_file_under_a_published_name_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "PartiPrompts.tsv").write_text(
        "Prompt\tCategory\tChallenge\tNote\na cat\tAnimals\tBasic\t\n"
    )
    prompt_set = load_prompts("partiprompts", path=tmp_path / "PartiPrompts.tsv")
    assert prompt_set.published is False and "not the published file" in prompt_set.notes[-1]
    assert prompt_set.categories == ["Animals"]


def test_metadata_stays_for_scorers_that_read_it(tmp_path: Path) -> None:
    row = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two cats"}
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(row) + "\n")
    prompt_set = load_prompts("geneval", path=tmp_path)
    assert prompt_set.categories == ["counting"] and prompt_set.metadata == [
        {k: v for k, v in row.items() if k != "prompt"}
    ]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", "", "holds no prompt"),
        ("a.csv", "title,score\nx,1\n", "no column prompt .* it has title, score"),
        ("a.json", "{", "cannot be read"),
        ("a.json", "3", "holds no list"),
        ("a.jsonl", "3\n", "no column"),
        ("a.parquet", "no parquet", "cannot be read"),
        ("a.doc", "x", "has the ending '.doc'"),
    ],
)
def test_files_that_hold_none(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=says):
        load_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "path", "says"),
    [
        ("partiprompt", None, "did you mean.*partiprompts"),
        ("drawbench", None, "not part of this package .not stated by its authors.*--prompts_path"),
        ("drawbench", "nowhere", "no file or folder 'nowhere'"),
        ("geneval", ".", "holds no evaluation_metadata.jsonl"),
    ],
)
def test_sets_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, path: str | None, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIFFALIGN_PROMPTS", raising=False)
    with pytest.raises(UserError, match=says):
        load_prompts(source, path=path)
