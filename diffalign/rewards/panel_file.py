"""Panels of scorers from a YAML file or from options of a command."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.yaml_text import NotYaml, read_yaml_file, read_yaml_text, shown
from ..errors import ConfigError, UserError

TABLE_COLUMNS = ("image", "row", "position", "role", "prompt", "combined")
"""Columns of a table of scores beside one per scorer."""


def panel_config(
    *,
    scorers: str | None,
    file: Path | None,
    file_option: str = "--config",
    scorer_args: str | None = None,
    combine: str | None = None,
    trust_remote_code: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Build what `Panel.from_config` takes from the options of a command.

    Its rewards are entries with the command line's options in them.

    Args:
        scorers (`str` or None): names with commas between. Either this or `file`.
        file (`Path` or None): YAML with `rewards` and `combine`.
        file_option (`str`, *optional*, defaults to "--config"): the option that gave
            `file`.
        scorer_args (`str`, *optional*): YAML, options by scorer.
        combine (`str`, *optional*): method.
        trust_remote_code (`bool`, *optional*, defaults to False): as for `Panel`.
        overrides (mapping, *optional*): `on_error`, and `batch_size` and `dtype` for
            entries without their own.

    Raises:
        UserError: both or neither are given, or anything in them does not fit.
    """
    from ..config.section import build_section
    from .panel_config import RewardEntry, parse_rewards

    if (scorers is None) == (file is None):
        raise UserError(
            f"--scorers, {file_option}: give one of them, e.g. --scorers imagereward,pickscore"
        )
    rewards = scorers if file is None else _read(file, file_option)
    overrides = overrides or {}
    config: dict[str, Any] = (
        dict(rewards)
        if isinstance(rewards, Mapping) and "rewards" in rewards
        else {"rewards": rewards}
    )
    entries = parse_rewards(config["rewards"], trust_remote_code=trust_remote_code)
    extra = _mapping(scorer_args, "--scorer_args", "{pickscore: {model: FOLDER}}") or {}
    for name in extra:
        if name not in [entry.name for entry in entries]:
            raise ConfigError(
                f"--scorer_args.{name}",
                f"no such scorer; there are {', '.join(entry.name for entry in entries)}",
            )
    fields = {f.name for f in dataclasses.fields(RewardEntry)} - {"name", "scorer"}
    for i, entry in enumerate(entries):
        if entry.name in TABLE_COLUMNS:
            raise ConfigError(
                f"rewards[{i}].name",
                f"{entry.name!r} is a column of the output; choose another name",
            )
        options = extra.get(entry.name) or {}
        if not isinstance(options, Mapping):
            raise ConfigError(
                f"--scorer_args.{entry.name}", f"expected a mapping of options, got {options!r}"
            )
        values = {f: getattr(entry, f) for f in ("name", "scorer", *fields)}
        values |= {key: value for key, value in options.items() if key in fields}
        values["args"] = {
            **entry.args,
            **{key: value for key, value in options.items() if key not in fields},
            **(options.get("args") or {}),
        }
        for key in ("batch_size", "dtype"):
            values[key] = overrides.get(key) if values[key] is None else values[key]
        values["on_error"] = overrides.get("on_error") or values["on_error"]
        entries[i] = build_section(RewardEntry, values, f"--scorer_args.{entry.name}")
    config["rewards"] = entries
    if combine is not None:
        rule = config.get("combine") or {}
        config["combine"] = {
            **({"method": rule} if isinstance(rule, str) else rule),
            "method": combine,
        }
    return config


def _read(path: Path, option: str) -> Any:
    values = read_yaml_file(path, option)
    if not values:
        raise UserError(
            f"{option}: {path} is empty; write for example rewards: [imagereward, pickscore]"
        )
    return values


def _mapping(text: str | None, option: str, example: str) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = read_yaml_text(text, option)
    except NotYaml:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{option}: expected a mapping such as '{example}', got {shown(text)}")
    return value
