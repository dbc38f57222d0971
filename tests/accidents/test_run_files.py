"""Run files, options, numbers: read, or refused in one sentence before any work."""

from __future__ import annotations

import dataclasses
import random
import time
from typing import Any

import pytest

from diffalign import cli
from diffalign.cli import exit_codes
from diffalign.config.ranges import Range, count, finite, positive, share
from diffalign.config.yaml_text import NotYaml, dump_yaml, read_yaml_file, read_yaml_text, shown
from diffalign.errors import ConfigError, UserError
from diffalign.methods import METHODS, config_class
from diffalign.recipe import load_run, run_from_dict

BASE = "method: diffusion_dpo\nmodel: shapes\n"


def one_sentence(error: BaseException) -> bool:
    return "\n" not in str(error) and len(str(error)) < 2000


TEXTS = {
    "a date that is none": "run_name: 2026-25-11",
    "a number of 5000 digits": "seed: " + "9" * 5000,
    "tagged int": "seed: !!int abc",
    "empty int": "seed: !!int ''",
    "tagged bool": "use_ema: !!bool maybe",
    "tagged time": "run_name: !!timestamp x",
    "foreign tag": "run_name: !me x",
    "python tag": "run_name: !!python/object/apply:os.system [true]",
    "binary": "run_name: !!binary '***'",
    "set": "run_name: !!set {a, b}",
    "deep": "run_name: " + "[" * 4000,
    "cyclic": "run_name: &a [*a]",
    "unknown alias": "run_name: *nobody",
    "key of a list": "? [a]\n: 1",
    "key of a mapping": "? {a: 1}\n: 1",
    "the same key twice": "seed: 1\nseed: 2",
    "the same key in quotes": "seed: 1\n'seed': 2",
    "tab": "\tseed: 1",
    "NUL": 'run_name: "\\0"\nseed: [',
    "merge of nothing": "<<: 5",
}


@pytest.mark.parametrize("name", TEXTS)
def test_values_that_yaml_cannot_turn_into_anything(name, tmp_path, capsys):
    text = BASE + "train:\n" + "".join(f"  {line}\n" for line in TEXTS[name].splitlines())
    (tmp_path / "run.yaml").write_text(text)
    assert (
        cli.run(["train", "--config", str(tmp_path / "run.yaml")]) == 2
    )  # a date that is none is text, and then the data are missing
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "content",
    [
        b"model: \xff\xfe",
        "method: d\u00fcse".encode("latin-1"),
        "method: x".encode("utf-16"),
        "m: 1".encode("utf-32"),
        b"\0\0\0",
        b"%PDF-1.4 \x80",
    ],
)
def test_files_of_another_encoding(content, tmp_path):
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_run(tmp_path / "run.yaml")
    assert one_sentence(caught.value) and str(caught.value).startswith("--config")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xef\xbb\xbf" + BASE.encode())
    assert load_run(tmp_path / "run.yaml").method == "diffusion_dpo"


@pytest.mark.parametrize("path", ["x" * 300, "a\0b", "/", "nowhere.yaml", ""])
def test_paths_that_are_no_file(path):
    with pytest.raises(UserError):
        read_yaml_file(path, "--config")


def test_huge_values_are_answered_at_once(tmp_path):
    lol = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
    )
    started = time.monotonic()
    for text in (lol, "x: [" + "1, " * 300_000 + "1]", "{" * 100_000, "x: " + "a" * 900_000):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(UserError) as caught:
            load_run(tmp_path / "run.yaml")
        assert one_sentence(caught.value)
    with pytest.raises(ConfigError) as caught:
        run_from_dict(
            {"method": "diffusion_dpo", "model": "shapes", "train": {"seed": list(range(300_000))}}
        )
    assert one_sentence(caught.value)
    assert time.monotonic() - started < 120  # minutes and gigabytes before


@pytest.mark.parametrize(
    "text",
    [
        "1:30",
        "190:20:30",
        "010",
        "0x1F",
        "0b11",
        "1_000",
        "2026-11-25",
        "no",
        "yes",
        "off",
        "=",
        "08",
    ],
)
def test_values_that_yaml_1_1_reads_as_something_else_are_text(text):
    assert read_yaml_text(text, "x") == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("-3", -3),
        ("1.5", 1.5),
        (".5", 0.5),
        ("1.0e-5", 1e-5),
        ("true", True),
        ("~", None),
        ("", None),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_numbers_and_words_are_what_they_look_like(text, value):
    assert read_yaml_text(text, "x") == value and type(read_yaml_text(text, "x")) is type(value)


def test_large_integers_are_never_rounded():
    values = {
        "method": "diffusion_dpo",
        "model": "shapes",
        "train": {"data_seed": 9007199254740993},
    }
    assert run_from_dict(values).train.data_seed == 9007199254740993
    values["train"]["data_seed"] = "9007199254740993"
    assert run_from_dict(values).train.data_seed == 9007199254740993
    with pytest.raises(ConfigError):
        run_from_dict({**values, "train": {"data_seed": 1e300}})


def test_home_folders_and_scorers_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    values = {
        "method": "grpo",
        "model": "~/models/mine",
        "data": {"dataset_name": "~/prompts.parquet"},
        "train": {"output_dir": "~/runs/a"},
        "rewards": ["shapes"],
    }
    run = run_from_dict(values)
    assert run.model == "/home/ann/models/mine" and run.train.output_dir == "/home/ann/runs/a"
    assert run.data.dataset_name == "/home/ann/prompts.parquet"
    values["train"] = {"scorers": ["pickscore"]}
    with pytest.raises(ConfigError, match="train.scorers: .*would be replaced by the rewards sec"):
        run_from_dict(values)


def test_the_documented_default_of_mixed_precision_can_be_written_down():
    assert (
        load_run(
            None, ["--method", "sft", "--model", "shapes", "--train.mixed_precision", "no"]
        ).train.mixed_precision
        == "no"
    )


@pytest.mark.parametrize("value", [[], False, 0, "", "text", [1]])
@pytest.mark.parametrize("section", ["train", "data", "lora", "validation", "hub"])
def test_sections_that_are_none(section, value):
    with pytest.raises(ConfigError) as caught:
        run_from_dict({"method": "sft", "model": "shapes", section: value})
    assert str(caught.value).startswith(section) and one_sentence(caught.value)


def test_a_run_file_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('ran', 'w').close()\nX = 1\n")
    for allowed in (True, "no"):
        with pytest.raises(UserError):
            run_from_dict(
                {
                    "method": "sft",
                    "model": "shapes",
                    "rewards": {"rewards": ["./evil.py:X"], "trust_remote_code": allowed},
                }
            )
    assert not (tmp_path / "ran").exists()


WORDS = [
    "1e5",
    "no",
    "010",
    "1:30",
    "2026-01-01",
    "null",
    "true",
    "0x1F",
    "=",
    "<<",
    "~",
    ".5",
    "a: b",
    "# c",
    "\u2028",
    "'",
    '"',
    "\\",
    "- x",
    "1_000",
    "ja\u00df",
]


def test_what_is_written_is_read_back():
    values = {
        "a": WORDS,
        "b": {word: word for word in WORDS},
        "c": [1, 1.5, 1e-30, True, None, 2**60],
    }
    values["d"] = values["a"]
    assert read_yaml_text(dump_yaml(values), "x") == values
    assert "&" not in dump_yaml({"a": [1], "b": [1]})


NUMBERS = [
    float("nan"),
    float("inf"),
    -float("inf"),
    -1,
    -1.5,
    0,
    2**31,
    2**32,
    2**63,
    2**70,
    1e308,
    1e39,
    10**400,
    "",
    "nan",
    "inf",
    "1_0",
    True,
    [],
    {},
    None,
]
FIELDS = [
    (method, field.name)
    for method in METHODS
    for field in dataclasses.fields(config_class(method))
    if "int" in str(field.type) or "float" in str(field.type)
]


@pytest.mark.parametrize("method", METHODS)
def test_every_number_of_every_method_is_checked_where_it_is_read(method):
    """3,000 combinations of field and value: accepted finite and in range, or one
    sentence that names the field."""
    for name in (field for owner, field in FIELDS if owner == method):
        for value in NUMBERS:
            try:
                run = run_from_dict({"method": method, "model": "shapes", "train": {name: value}})
            except ConfigError as error:
                assert name in str(error) and one_sentence(error), (name, value)  # noqa: PT017
            else:
                got = getattr(run.train, name)
                for number in got if isinstance(got, list) else [got]:
                    assert number is None or (abs(number) <= 1e30 and number == number), name


def test_every_number_of_the_other_sections():
    sections = {
        "lora": ["r", "alpha", "dropout"],
        "validation": [
            "max_prompts",
            "num_validation_images",
            "validation_steps",
            "validation_seed",
            "num_inference_steps",
            "guidance_scale",
        ],
        "data": ["max_broken_fraction", "resolution", "num_workers"],
        "online": [
            "every",
            "k",
            "num_inference_steps",
            "guidance_scale",
            "eta",
            "rollout_batch_size",
        ],
    }
    for section, names in sections.items():
        for name in names:
            for value in NUMBERS:
                extra = {"prompts": "shapes"} if section == "validation" else {}
                place = (
                    {"data": {"online": {name: value}}}
                    if section == "online"
                    else {section: {name: value, **extra}}
                )
                try:
                    run_from_dict({"method": "diffusion_dpo", "model": "shapes", **place})
                except ConfigError as error:
                    assert name in str(error) and one_sentence(error), (section, name, value)  # noqa: PT017
                else:
                    assert value is None or (
                        not isinstance(value, (str, list, dict, bool)) and abs(value) <= 1e30
                    ), (
                        section,
                        name,
                        value,
                    )


@pytest.mark.parametrize("targets", [[], "", "(", "*", ["to_q", ""], [[]]])
def test_lora_targets_that_match_nothing(targets):
    with pytest.raises(ConfigError, match="target_modules"):
        run_from_dict({"method": "sft", "model": "shapes", "lora": {"target_modules": targets}})


OPTIONS = [
    ("sample", "--num_inference_steps", ["0", "-5", "5000", "1e3", "x"]),
    ("sample", "--seed", [str(2**70), "-1", "1.5"]),
    ("sample", "--guidance_scale", ["nan", "inf", "1e400", "x"]),
    ("sample", "--lora_scale", ["nan", "-inf"]),
    ("sample", "--num_images", ["0", "-1", str(2**40)]),
    ("demo", "--port", ["99999", "-1"]),
    ("serve-scorer", "--port", ["65536"]),
    ("compare", "--guidance_scale", ["nan"]),
    ("compare", "--height", ["0", "7", str(2**31)]),
    ("steer", "--num_inference_steps", ["0", "1001"]),
    ("train", "--num_processes", ["0", "-1"]),
    ("score", "--chunk_size", ["0"]),
]


@pytest.mark.parametrize(("command", "option", "values"), OPTIONS)
def test_numbers_of_options(command, option, values, capsys):
    for value in values:
        assert cli.run([command, f"{option}={value}"]) == 2
        said = capsys.readouterr().err
        assert option in said and said.count("\n") == 1 and "Traceback" not in said


def test_steps_that_a_scheduler_does_not_have():
    from tiny import build_pipeline

    from diffalign.evaluation import generate

    pipe = build_pipeline("sd")
    for number in (0, -5, 1000, 5000):
        with pytest.raises(ConfigError, match="num_inference_steps"):
            generate(pipe, ["a cat"], [0], num_inference_steps=number, progress=False)
    assert len(generate(pipe, ["a cat"], [0], num_inference_steps=2, progress=False)) == 1


def test_ranges():
    assert [positive.holds(x) for x in (1e-9, 0.0, float("nan"), 1e31, True, "1")] == [
        True,
        False,
        False,
        False,
        False,
        False,
    ]
    assert (
        finite.holds(-5)
        and not finite.holds(float("inf"))
        and share.holds(1)
        and not share.holds(1.01)
    )
    with pytest.raises(ConfigError, match=r"x: expected int >= 2, got 1"):
        count(2).check("x", 1)
    with pytest.raises(ConfigError, match=r"x: expected int >= 1 and <= 1000, got 5000"):
        count(1, 1000).check("x", 5000)
    with pytest.raises(ConfigError, match=r"x: expected float in \[0, 1\)"):
        Range(0.0, 1.0, below=True).check("x", 1.0)


def test_values_in_messages_are_short():
    values = [
        "a" * 10_000,
        list(range(10_000)),
        {str(i): i for i in range(10_000)},
        10**5000,
        [[[[[1]]]]],
        "a\nb",
        b"\0" * 9000,
    ]
    assert all(len(shown(value)) <= 200 and "\n" not in shown(value) for value in values)


def test_messages_are_one_printable_line(capsys):
    assert exit_codes.say("a\nb\x1b[31m" + "x" * 10_000, 2) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "\x1b" not in said and len(said) < 2000


def test_a_full_gpu_is_told_with_its_remedy(capsys):
    import torch

    assert exit_codes.report(torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB")) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "out of memory" in said and "diffalign estimate" in said


@pytest.mark.nightly
def test_mutated_run_files(tmp_path):
    """600 random edits of the recipes: a run or one sentence."""
    from pathlib import Path

    recipes = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
    generator, refused = random.Random(0), 0
    for number in range(600):
        data = bytearray(generator.choice(recipes).read_bytes())
        for _ in range(generator.randint(1, 6)):
            place, kind = generator.randrange(len(data)), generator.random()
            if kind < 0.4:
                data[place] = generator.randrange(256)
            elif kind < 0.6:
                del data[place : place + generator.randint(1, 20)]
            elif kind < 0.8:
                data[place:place] = generator.choice(
                    [
                        b"[",
                        b"{",
                        b": ",
                        b"!!int ",
                        b"&a ",
                        b"*a",
                        b"\t",
                        b"9" * 400,
                        b"\n",
                        b"'",
                        b"- ",
                    ]
                )
            else:
                data[place:place] = data[:40]
        (tmp_path / "run.yaml").write_bytes(bytes(data))
        try:
            load_run(tmp_path / "run.yaml")
        except UserError as error:
            refused += 1
            assert one_sentence(error), number  # noqa: PT017
    assert refused > 100


def test_not_yaml_is_told_apart_from_bad_values():
    values: list[Any] = []
    for text in ("[", "a: b: c", "{"):
        with pytest.raises(NotYaml) as caught:
            read_yaml_text(text, "x")
        values.append(str(caught.value))
    assert all("is not valid YAML" in value for value in values)


def test_older_spellings_still_work():
    run = load_run(
        None,
        [
            "--method",
            "sft",
            "--model",
            "shapes",
            "--train.gradient_checkpointing",
            "yes",
            "--train.max_steps",
            "1_000",
        ],
    )
    assert run.train.gradient_checkpointing is True and run.train.max_steps == 1000
    assert read_yaml_text("base: &b {a: 1}\nmore: {<<: *b, c: 2}", "x")["more"] == {"a": 1, "c": 2}


def test_schedulers_that_need_more_than_a_number_are_left_to_their_pipeline():
    import types

    import diffusers

    from diffalign.generation.sampling import check_steps

    shifting = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    check_steps(types.SimpleNamespace(scheduler=shifting), 28)
    check_steps(types.SimpleNamespace(), 28)
