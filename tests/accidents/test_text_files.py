"""Prompts, captions and tables in the encodings and shapes that people have."""

from __future__ import annotations

import json
import random

import pytest
from commands import run
from tiers import by_default
from tiny import picture

from diffalign import load_preferences
from diffalign.annotation.score_source import open_images
from diffalign.data.prompt_sets import load_prompts, read_prompts
from diffalign.errors import UserError
from diffalign.runtime import text_files

TEXT = "a red fox\u2028in the snow\x85, caf\u00e9\x0c end"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(encoding, end, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(f"{TEXT}{end}two{end}".encode(encoding))
    assert text_files.read_lines(path) == [TEXT, "two"]
    assert load_prompts(str(path)).prompts == [TEXT.strip(), "two"]
    assert [group.prompts[0] for group in load_preferences(path, verbose=False)] == [
        TEXT.strip(),
        "two",
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("caf\u00e9".encode("cp1252"), "byte 0xe9 in line 1 is not UTF-8"),
        (b"one\ntwo\n\x92", "byte 0x92 in line 3 is not UTF-8"),
        ("ab".encode("utf-16") + b"x", "cut off or damaged UTF-16"),
        ("ab".encode("utf-16-le"), "NUL"),
        (b"PAR1\0\0", "NUL"),
    ],
)
def test_other_bytes_are_named(content, reason, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    for read in (text_files.read_text, load_prompts, lambda p: load_preferences(p, verbose=False)):
        with pytest.raises(UserError, match=reason):
            read(str(tmp_path / "a.txt"))


@pytest.mark.parametrize("name", ["missing.txt", ".", "x" * 300, "a\0b"])
def test_files_that_cannot_be_read(name, tmp_path):
    with pytest.raises(UserError):
        text_files.read_text(tmp_path / name)


JSON = {
    "[" * 5000: "nested too deeply",
    '{"a": ' * 200 + "1" + "}" * 200: "nested too deeply",
    '{"a": 1, "a": 2}': "the key 'a' occurs twice",
    '{"a": "\\ud800"}': "half a character",
    "9" * 5000: "4300 digits",
    "{": "not valid JSON",
    '{"a": NaN,}': "not valid JSON",
    '{"a": "x': "not valid JSON",
}


@pytest.mark.parametrize("text", JSON, ids=range(len(JSON)))
def test_json_that_is_none_is_one_short_reason(text):
    with pytest.raises(ValueError, match=JSON[text]) as caught:
        text_files.parse_json(text)
    assert len(str(caught.value)) < 200


def test_brackets_within_texts_are_no_nesting():
    assert text_files.parse_json(json.dumps({"a": "[{" * 500 + '\\"'}))["a"].startswith("[{")


@pytest.mark.parametrize(
    "line",
    [
        "5",
        "null",
        "[1]",
        '"x"',
        "{",
        '{"prompt": null}',
        '{"prompt": 7}',
        '{"prompt": ["a"]}',
        '{"other": "a"}',
    ],
)
def test_a_bad_line_of_prompts_is_named(line, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n\n' + line + "\n")
    if line == '"x"':
        assert load_prompts(str(tmp_path / "p.jsonl")).prompts == ["a", "x"]
        return
    with pytest.raises(UserError, match="line 3"):
        load_prompts(str(tmp_path / "p.jsonl"))


def table(tmp_path, text, name="t.csv"):
    (tmp_path / name).write_bytes(text.encode())
    return text_files.read_table(tmp_path / name)


def test_tables_keep_line_breaks_quotes_and_words(tmp_path):
    found = table(
        tmp_path,
        'prompt,category\n"a red fox\nin the snow",x\n"5"" cake",y\n a "red" fox ,\n1984,None\n',
    )
    assert [row.cells["prompt"] for row in found.rows] == [
        "a red fox\nin the snow",
        '5" cake',
        ' a "red" fox ',
        "1984",
    ]
    assert [row.cells["category"] for row in found.rows] == ["x", "y", None, "None"]
    assert [(row.number, row.line) for row in found.rows] == [(1, 2), (2, 4), (3, 5), (4, 6)]


@pytest.mark.parametrize(
    "text",
    [
        "prompt;category\na, b;c\n",
        "prompt\tcategory\na, b\tc\n",
        "sep=;\nprompt;category\na, b;c\n",
        'sep=|\nprompt|category\n"a, b"|c\n',
    ],
)
def test_other_separators(text, tmp_path):
    assert table(tmp_path, text).rows[0].cells == {"prompt": "a, b", "category": "c"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("prompt,category\na red fox,x,zzz\n", "row 1 .line 2. has 3 cells for 2 columns"),
        ('prompt\nok\n"never closed\nmore\nmore\n', "row that begins in line 3 is never closed"),
        ("prompt,prompt\na,b\n", "the column 'prompt' occurs twice"),
        ("", "empty"),
        ("\n\n", "empty"),
    ],
)
def test_tables_that_would_be_read_wrongly_are_refused(text, reason, tmp_path):
    with pytest.raises(UserError, match=reason):
        table(tmp_path, text)
    with pytest.raises(UserError):
        load_preferences(tmp_path / "t.csv", verbose=False)


def test_a_long_cell_is_read(tmp_path):
    assert (
        len(table(tmp_path, "prompt\n" + "x" * 300_000 + "\n").rows[0].cells["prompt"]) == 300_000
    )
    assert (
        len(
            table(tmp_path, "prompt\tb\n" + "x" * 300_000 + "\ty\n", "t.tsv")
            .rows[0]
            .cells["prompt"]
        )
        == 300_000
    )


def test_tab_separated_prompts_have_no_quoting(tmp_path):
    (tmp_path / "p.tsv").write_text(
        'Prompt\tCategory\n"a quoted" start\tArts\nplain\u2028still plain\tFood\n'
    )
    found = load_prompts(str(tmp_path / "p.tsv"))
    assert found.prompts == ['"a quoted" start', "plain\u2028still plain"] and found.categories == [
        "Arts",
        "Food",
    ]


def dataset(tmp_path, content, name):
    (tmp_path / name).write_text(content)
    return load_preferences(tmp_path / name, verbose=False, max_broken_fraction=1.0)


def test_one_odd_prompt_changes_no_other(tmp_path):
    for name, odd in (
        ("a.jsonl", "5"),
        ("b.jsonl", "true"),
        ("c.jsonl", '["x"]'),
        ("d.jsonl", '{"y": 1}'),
    ):
        data = dataset(
            tmp_path, '{"prompt": "one"}\n{"prompt": ' + odd + '}\n{"prompt": "two"}\n', name
        )
        assert [group.prompts[0] for group in data] == [
            "one",
            "two",
        ] and data.report.broken_count == 1


def test_words_numbers_and_dates_of_a_table_are_prompts(tmp_path):
    data = dataset(tmp_path, "prompt\nNone\nnull\nNA\n1984\n2026-11-25\n", "p.csv")
    assert [group.prompts[0] for group in data] == ["None", "null", "NA", "1984", "2026-11-25"]
    dates = dataset(tmp_path, '{"prompt": "2026-11-25"}\n{"prompt": "2026-11-26"}\n', "p.jsonl")
    assert dates[0].prompts[0] == "2026-11-25"


@pytest.mark.nightly
@by_default(values=1)
@pytest.mark.parametrize(
    "content", ["null\n", 'null\n{"prompt": "a"}\n', "[null]", "{}\n", '[{"prompt": "a"}, null]']
)
def test_rows_that_are_null_do_not_end_the_process(content, tmp_path):
    for name in ("a.json", "a.jsonl"):
        if name == "a.jsonl" and content.startswith("["):
            continue
        (tmp_path / name).write_text(content)
        done = run("diffalign", "data", "inspect", tmp_path / name, cwd=tmp_path)
        assert done.returncode in (0, 2) and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "content",
    [
        "[" * 30_000,
        '{"a": ' * 3000,
        '{"prompt": "a"}\n{"prompt": "b',
        '{"prompt": "a"} x',
        "x",
        "7",
    ],
)
def test_json_datasets_that_are_none(content, tmp_path):
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError) as caught:
            load_preferences(tmp_path / name, verbose=False)
        assert "\n" not in str(caught.value)


def test_slices_and_splits_of_files_work_as_before(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"prompt": "p{i}"}}\n' for i in range(10)))
    assert len(load_preferences(tmp_path / "a.jsonl", split="train[:3]", verbose=False)) == 3
    assert len(load_preferences(tmp_path / "a.jsonl", split="train[50%:]", verbose=False)) == 5
    with pytest.raises(UserError, match="does not exist"):
        load_preferences(tmp_path / "a.jsonl", split="test", verbose=False)
    assert [
        group.prompts[0]
        for group in load_preferences(tmp_path / "a.jsonl", streaming=True, verbose=False)
    ][:2] == [
        "p0",
        "p1",
    ]


@pytest.fixture
def pairs(tmp_path):
    for side in ("chosen", "rejected"):
        (tmp_path / "pairs" / side).mkdir(parents=True)
        for i, name in enumerate(("v1.2", "b")):
            picture(100 + i, i).save(tmp_path / "pairs" / side / f"{name}.png")
    return tmp_path / "pairs"


def test_captions_by_every_way(pairs):
    (pairs / "captions.json").write_text(json.dumps({"v1.2": "one", "b.png": "two"}))
    assert [group.prompts[0] for group in load_preferences(pairs, verbose=False)] == ["two", "one"]
    (pairs / "chosen/b.caption").write_text("kohya's")
    (pairs / "prompts.jsonl").write_text('{"file_name": "v1.2.png", "text": "three"}\n')
    assert [group.prompts[0] for group in load_preferences(pairs, verbose=False)] == [
        "kohya's",
        "three",
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.json", b'{"b": "caf\xe9"}'),
        ("captions.json", b"[1]"),
        ("prompts.jsonl", b"5\n"),
        ("prompts.jsonl", b'{"file_name": "b"'),
        ("chosen/b.txt", b"caf\xe9"),
    ],
)
def test_captions_that_cannot_be_read_name_their_file(name, content, pairs):
    (pairs / name).write_bytes(content)
    with pytest.raises(UserError, match=name.rsplit("/", 1)[-1]):
        load_preferences(pairs, verbose=False)


def test_images_without_captions_say_what_was_looked_for(pairs):
    with pytest.raises(UserError, match=r"no image has a caption; write .*\.txt \(or \.caption\)"):
        load_preferences(pairs, verbose=False)


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(2):
        picture(100 + i, i).save(tmp_path / "images" / f"{i}.png")
    return tmp_path / "images"


def test_prompts_of_images_from_a_table(images, tmp_path):
    for name, text in (
        ("a.csv", 'file_name,prompt\n1.png,"two, with a comma"\n0.png,one\n'),
        ("b.tsv", "Image\tCaption\n0.png\tone\n1.png\ttwo, with a comma\n"),
    ):
        (tmp_path / name).write_text(text)
        source = open_images(str(images), prompts=tmp_path / name)
        assert [record.prompt for record in source.read(range(2)).records] == [
            "one",
            "two, with a comma",
        ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "0.png,a small red circle\n1.png,two\n"),
        ("a.csv", "file_name,prompt\n0.png,a\n0.png,b\n"),
        ("a.parquet", "PAR1\nPAR1\n"),
        ("a.jsonl", "5\n"),
    ],
)
def test_tables_that_name_no_images_are_refused(name, text, images, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError):
        open_images(str(images), prompts=tmp_path / name)


def test_blank_lines_at_the_end_of_a_list_are_no_prompts(images, tmp_path):
    (tmp_path / "p.txt").write_text("one\ntwo\n\n\n")
    assert [
        record.prompt
        for record in open_images(str(images), prompts=tmp_path / "p.txt").read(range(2)).records
    ] == [
        "one",
        "two",
    ]


def test_prompts_for_building_are_read_alike(tmp_path):
    (tmp_path / "P.TSV").write_text("Prompt\tCategory\na cat\tx\n")
    assert read_prompts(str(tmp_path / "P.TSV"))[0] == ["a cat"]


@pytest.mark.nightly
def test_mutated_text_files(tmp_path):
    """800 mutated prompt files, tables and captions: read, or one sentence."""
    generator, refused = random.Random(0), 0
    seeds = {
        ".txt": b"a red fox\na blue cat\n",
        ".csv": b'prompt,category\n"a, b",x\nc,"d\ne"\n',
        ".tsv": b"Prompt\tCategory\na\tb\n",
        ".jsonl": b'{"prompt": "a", "n": [1, 2]}\n{"prompt": "b"}\n',
        ".json": b'[{"prompt": "a"}, {"prompt": "b"}]',
    }
    parts = [
        b"\xff",
        b"\0",
        b'"',
        b"{",
        b"[",
        b"\r",
        b"\xe2\x80\xa8",
        b"null",
        b",",
        b"\t",
        b"\xef\xbb\xbf",
        b"9" * 50,
        b"\\ud800",
    ]
    for number in range(800):
        suffix = generator.choice(sorted(seeds))
        data = bytearray(seeds[suffix])
        for _ in range(generator.randint(1, 5)):
            place = generator.randrange(len(data) + 1)
            if generator.random() < 0.5:
                data[place:place] = generator.choice(parts)
            else:
                del data[place : place + generator.randint(1, 6)]
        path = tmp_path / f"{number}{suffix}"
        path.write_bytes(bytes(data))
        readers = [load_prompts] + (
            [lambda p: load_preferences(p, verbose=False)] if suffix != ".tsv" else []
        )
        for read in readers:
            try:
                read(str(path))
            except UserError as error:
                refused += 1
                assert "\n" not in str(error), number  # noqa: PT017
    assert refused > 100


def test_json_of_every_shape_under_either_name(tmp_path):
    rows = [
        {"prompt": "one", "meta": {"seed": 2**64}, "seeds": [2**70]},
        {"prompt": "two", "meta": {"seed": 1.5}, "seeds": [0.5]},
    ]
    for name in ("a.json", "a.jsonl"):
        for text in (
            json.dumps(rows),
            json.dumps(rows, indent=1),
            "".join(json.dumps(row) + "\n" for row in rows),
        ):
            (tmp_path / name).write_text(text)
            assert [
                group.prompts[0] for group in load_preferences(tmp_path / name, verbose=False)
            ] == ["one", "two"]
        (tmp_path / name).write_text(json.dumps(rows[0], indent=2))
        assert len(load_preferences(tmp_path / name, verbose=False)) == 1
    assert len(load_preferences(tmp_path / "a.json", split="all", verbose=False)) == 1
