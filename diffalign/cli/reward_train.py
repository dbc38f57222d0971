"""`diffalign reward train`: a reward from votes, pairs, lists or thumbs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..config.section import build_section, section_help
from ..config.yaml_text import NotYaml, read_yaml_file, read_yaml_text, shown
from ..errors import ConfigError, UserError
from ..reward_training.config import RewardConfig

_KEYS = ("model", "model_path", "data", "eval_data", "columns", "reward")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command.

    Args:
        parser (`argparse.ArgumentParser`): Parser of the command.
    """
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", type=Path, help="run file; its fields may follow as options")
    parser.add_argument("--model", help="the base, a CLIP scorer such as clip-l14 or pickscore")
    parser.add_argument("--model_path", help="weights of the base (default: the published ones)")
    parser.add_argument("--data", help="pairs, lists, likes, or a folder of the demo's votes")
    parser.add_argument("--eval_data", help="judgements of other prompts, for the report")
    parser.epilog = "reward:\n" + section_help(RewardConfig, "reward")


def run(options: argparse.Namespace) -> int:
    """Train a reward and say how good it is.

    Args:
        options (`argparse.Namespace`): Options of the command. `overrides` are fields
            such as `--reward.members 4`.

    Returns:
        `int`: Exit code.

    Raises:
        UserError: A field or the data cannot be used.
    """
    values = _values(options)
    config = build_section(RewardConfig, values.get("reward") or {}, "reward")
    for key in ("model", "data"):
        if not isinstance(values.get(key), str):
            raise ConfigError(key, f"expected a name, got {shown(values.get(key))}")
    from ..reward_training.trainer import REPORT, RewardTrainer

    trainer = RewardTrainer(
        values["model"],
        config,
        values["data"],
        values.get("eval_data"),
        model_path=values.get("model_path"),
        columns=values.get("columns"),
    )
    for note in trainer.judgements.notes:
        print(note)
    sizes = ", ".join(f"{len(part)} {name}" for name, part in trainer.parts.items())
    print(
        f"{len(trainer.judgements)} pairs of {len(trainer.judgements.prompts)} prompts and "
        f"{len(trainer.judgements.images)} images: {sizes}"
    )
    folder = trainer.train()
    import json

    report = json.loads((folder / REPORT).read_text("utf-8"))
    for name in ("base", "reward"):
        row = report[name]
        print(
            f"{name:<7} {row['accuracy']:.1%} right ({row['low']:.1%} to {row['high']:.1%}) on "
            f"{row['pairs']} pairs of {row['prompts']} prompts that were not trained on"
        )
    print(f"calibration error {report['expected_calibration_error']:.3f}")
    print(f"wrote {folder}: use it wherever a scorer is named, e.g. --scorers {folder}")
    return 0


def _values(options: argparse.Namespace) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if options.config is not None:
        values = read_yaml_file(options.config, "--config")
        if not isinstance(values, dict):
            raise UserError(f"--config: {options.config} must hold keys such as model and data")
    for key in values:
        if key not in _KEYS:
            raise ConfigError(
                str(key), f"unknown key; a reward's run file takes {', '.join(_KEYS)}"
            )
    for key in ("model", "model_path", "data", "eval_data"):
        if getattr(options, key) is not None:
            values[key] = getattr(options, key)
    pending = list(options.overrides)
    while pending:
        name = pending.pop(0)
        section, _, field = name.removeprefix("--").partition(".")
        if not name.startswith("--") or section != "reward" or not field or not pending:
            raise UserError(f"{name}: expected an option such as --reward.members 4")
        text = pending.pop(0)
        try:
            value = read_yaml_text(text, name)
        except NotYaml:
            value = text
        values["reward"] = {**(values.get("reward") or {}), field: value}
    return values
