"""Run files: shipped ones parse, `shapes.yaml` trains, configs survive round trips."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from tiers import by_default
from tiny import WEIGHTS, method_rows

from diffalign import cli
from diffalign.cli.results import Result
from diffalign.cli.train import train_run
from diffalign.config.section import build_section, coerce, field_docs
from diffalign.data import DataConfig, convert, load_preferences
from diffalign.errors import ConfigError, UserError
from diffalign.methods import METHODS, config_class, trainer_class
from diffalign.recipe import apply_overrides, dump_yaml, load_run, run_from_dict, run_to_dict
from diffalign.training.sections import LoraSection

ROOT = Path(__file__).parents[1]
OTHERS = ("reward", "rewards")
FILES = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name not in OTHERS)
REWARD_FILES = sorted((ROOT / "configs" / "rewards").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_run_file_parses_and_round_trips(path: Path) -> None:
    run = load_run(path)
    assert run.method == path.parent.name
    assert run_from_dict(yaml.safe_load(dump_yaml(run_to_dict(run)))) == run
    assert "#" in path.read_text(), "recipes are commented"


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if load_run(path).rewards is not None],
    ids=lambda p: f"{p.parent.name}/{p.stem}",
)
def test_the_rewards_of_every_run_file_fit_its_method(path: Path) -> None:
    from diffalign.rewards.panel import Panel

    run = load_run(path)
    panel = Panel.from_config({**(run.rewards or {}), "placement": "exclusive", "cache": None})
    assert panel.train_names
    if run.method == "reward_backprop":
        panel.placement = "resident"  # built so, it would load the weights
        panel.check_differentiable()


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "reward").glob("*.yaml")))
def test_every_run_file_of_a_reward_parses(path: Path) -> None:
    from diffalign.reward_training.run_file import reward_run_from_dict
    from diffalign.rewards.registry import get_spec

    run = reward_run_from_dict(yaml.safe_load(path.read_text()))
    assert get_spec(run.model).differentiable and run.train.output_dir.startswith("rewards/")
    assert "#" in path.read_text(), "recipes are commented"


@pytest.mark.parametrize("path", REWARD_FILES, ids=lambda p: p.stem)
def test_every_reward_file_parses_without_loading_weights(path: Path) -> None:
    from diffalign.rewards.panel import Panel

    panel = Panel.from_config(
        {**yaml.safe_load(path.read_text()), "placement": "exclusive", "cache": None}
    )
    assert panel.train_names and set(panel.names) > set(panel.train_names)
    assert path.read_text().startswith("#"), "recipes are commented"


# methods/test_method_examples.py trains the others on the shapes world.
@by_default(lambda method: method not in ("d3po", "seppo", "spo"))
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_the_shapes_world(method: str, tmp_path: Path) -> None:
    data = convert(load_preferences(method_rows(method, 4, 64), verbose=False), tmp_path / "data")
    options = {
        "data.dataset_name": data,
        "data.cache_latents": tmp_path / "cache",
        "data.cache_text_embeddings": tmp_path / "cache",
        "train.output_dir": tmp_path / "out",
        "train.max_steps": 2,
        "train.per_device_train_batch_size": 2,
    }
    if method == "ctrl_u":  # condition images are not cached
        del options["data.cache_latents"]
    run = load_run(
        ROOT / "configs" / method / "shapes.yaml",
        [str(x) for k, v in options.items() for x in (f"--{k}", v)],
    )
    run.validation = None
    result = train_run(run)
    assert isinstance(result, Result) and result.data["status"] == "finished"
    weights = WEIGHTS.get(method, "pytorch_lora_weights")
    assert (tmp_path / "out" / f"{weights}.safetensors").is_file()
    again = load_run(tmp_path / "out" / "config.yaml")
    assert again.train == run.train and again.data == run.data


@pytest.mark.parametrize("method", METHODS)
def test_every_field_is_documented(method: str) -> None:
    for cls in (config_class(method), DataConfig, LoraSection):
        docs = field_docs(cls)
        assert {f.name for f in dataclasses.fields(cls)} == set(docs)
    assert trainer_class(method).__doc__


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        ("1e-5", float, 1e-5),  # YAML reads 1e-5 as text
        (5, float, 5.0),
        ("2.048e-5", float, 2.048e-5),
        (2.0, int, 2),
        ("yes", bool, True),
        ("Off", bool, False),
        (None, "int | None", None),
        ([1, 2], list[float], [1.0, 2.0]),
    ],
)
def test_lossless_readings(value: object, annotation: object, expected: object) -> None:
    annotation = (int | None) if annotation == "int | None" else annotation
    result = coerce(value, annotation, "x")
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        ("five", float),
        (True, int),
        (True, float),
        (1.5, int),
        ("maybe", bool),
        ("1", bool),
        (3, str),
        ("a", list[int]),
    ],
)
def test_lossy_readings_are_refused_with_the_path(value: object, annotation: object) -> None:
    with pytest.raises(ConfigError, match=r"^train\.x: expected"):
        coerce(value, annotation, "train.x")


def test_yaml_numbers_of_either_spelling_are_equal() -> None:
    text = "{method: sft, model: shapes, train: {learning_rate: %s}}"
    assert run_from_dict(yaml.safe_load(text % "1e-5")) == run_from_dict(
        yaml.safe_load(text % "1.0e-5")
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2026", "2026"),
        ("1.50", "1.50"),
        ("true", "true"),
        ("runs/take #2", "runs/take #2"),
        ("'quoted # text'", "quoted # text"),
        ("a: b", "a: b"),
    ],
)
def test_text_options_are_taken_as_they_are_typed(text: str, value: str) -> None:
    run = load_run(None, ["--method", "sft", "--model", "shapes", "--train.output_dir", text])
    assert run.train.output_dir == value


def test_numbers_and_null_stay_what_they_are() -> None:
    options = ["--method=sft", "--model=shapes", "--train.max_steps=20", "--data.columns={a: b}"]
    run = load_run(None, [*options, "--train.run_name", "null", "--hub.hub_model_id", "7"])
    assert (run.train.max_steps, run.train.run_name) == (20, None)
    assert run.hub is not None and run.hub.hub_model_id == "7"


def test_overrides_reach_and_create_sections() -> None:
    values = apply_overrides(
        {"train": {"seed": 1}},
        ["--train.seed=2", "--lora.r", "8", "--lora.target_modules", "[to_k, to_q]"],
    )
    assert values == {"train": {"seed": 2}, "lora": {"r": 8, "target_modules": ["to_k", "to_q"]}}
    with pytest.raises(UserError, match="not a section"):
        apply_overrides({"model": "x"}, ["--model.name", "y"])


def test_print_config_writes_a_run_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--config", str(FILES[0]), "--train.seed", "7"]
    assert cli.run(["train", *options, "--print_config"]) == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert load_run(tmp_path / "run.yaml") == load_run(FILES[0], ["--train.seed", "7"])


def test_unknown_keys_suggest_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"lora\.dropuot: unknown key \(did you mean 'dropout'\?\)"
    ):
        build_section(LoraSection, {"dropuot": 0.1}, "lora")
    with pytest.raises(ConfigError, match="modell: unknown key"):
        run_from_dict({"method": "sft", "modell": "x"})


@pytest.mark.parametrize("text", ["- a\n- b", "a: [", "just words"])
def test_files_that_are_no_run_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match="--config"):
        load_run(tmp_path / "x.yaml")
