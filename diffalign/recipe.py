"""Run files: strict loading of YAML into sections, dotted overrides, saving.

The YAML is the Python call written down. Unknown keys are errors with a suggestion.
Messages about wrong values start with the YAML path. ``1e-5``, which YAML reads as
text, is the number that it looks like.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from .config.section import (
    build_section,
    coerce,
    config_section,
    is_text,
    short_key,
    suggestion,
)
from .config.yaml_text import (
    NotYaml,
    dump_yaml,
    expand_home,
    read_yaml_file,
    read_yaml_text,
    shown,
)
from .data.config import DataConfig
from .errors import ConfigError, UserError
from .methods import METHODS, config_class, trainer_class
from .training.config import TrainingConfig
from .training.sections import HubConfig, LoraSection, ValidationConfig

__all__ = [
    "HubConfig",
    "LoraSection",
    "RunConfig",
    "ValidationConfig",
    "build_section",
    "coerce",
    "dump_yaml",
    "load_run",
    "read_yaml",
]


@config_section
class RunConfig:
    """A whole run file."""

    method: str
    """One of diffalign's methods, e.g. `diffusion_dpo`."""
    model: str
    """Hub id or local folder of a diffusers pipeline, or `shapes` for the embedded
    one."""
    train: TrainingConfig
    data: DataConfig = field(default_factory=DataConfig)
    revision: str | None = None
    """Git revision of the model on the Hub."""
    variant: str | None = None
    """Weights variant, e.g. `fp16`."""
    vae: str | None = None
    """A different autoencoder (Hub id or folder), e.g. the fp16-safe one of SDXL."""
    model_base: str | None = None
    """For a model in one safetensors file: pipeline (Hub id or folder) of its family,
    for configs and the parts that the file lacks. Defaults to the family's own on the
    Hub."""
    ref_model: str | None = None
    """Model to stay close to (Hub id or folder), of the same family, prediction type
    and schedule. Defaults to the starting weights."""
    lora: LoraSection | None = None
    validation: ValidationConfig | None = None
    hub: HubConfig | None = None
    rewards: dict[str, Any] | None = None
    """Scorers of methods that sample while they learn: a list of rewards, or a panel
    `{rewards: ..., combine: ...}`."""


_TOP_LEVEL = tuple(f.name for f in dataclasses.fields(RunConfig))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: when the file is missing, is not YAML or holds no mapping.
    """
    values = read_yaml_file(path, "--config")
    if not isinstance(values, dict):
        raise UserError(
            f"--config: {path} must hold keys such as method, model, data and train, "
            f"not {type(values).__name__}"
        )
    return values


def apply_overrides(
    values: dict[str, Any],
    overrides: Sequence[str],
    run_class: Any = RunConfig,
) -> dict[str, Any]:
    """Dotted command-line options over a mapping.

    Args:
        values: of a run file.
        overrides: such as ``["--train.beta", "2000", "--data.resolution=512"]``.
        run_class: its fields are the first parts of names, and say which options are
            text, whatever YAML would read.

    Raises:
        UserError: on an option without a value, or one that goes through a value that
            is no section.
    """
    values = dict(values)
    pending, texts = list(overrides), {}
    sections = [each.name for each in dataclasses.fields(run_class)]
    while pending:
        option = pending.pop(0)
        if not option.startswith("--"):
            raise UserError(f"{option!r}: expected an option such as --train.beta 2000")
        name, equals, text = option[2:].partition("=")
        if not equals:
            if not pending:
                raise UserError(f"{option}: expected a value after it")
            text = pending.pop(0)
        if name.split(".")[0] not in sections:
            hint = suggestion(name, sections)
            raise UserError(f"{option}: unknown option{hint}; sections are {', '.join(sections)}")
        value = _read_option(text, option.partition("=")[0])
        *path, last = name.split(".")
        if not all((*path, last)):
            raise UserError(
                f"{option.partition('=')[0]}: expected a name between the dots, "
                "such as --train.beta"
            )
        target = values
        for section in path:
            inner = target.get(section)
            if inner is not None and not isinstance(inner, dict):
                raise UserError(f"{option}: {section} is the value {shown(inner)}, not a section")
            target[section] = dict(inner or {})
            target = target[section]
        target[last] = value
        texts[name] = text
    for name, text in texts.items():
        *path, last = name.split(".")
        target = values
        for section in path:
            target = target.get(section, {})
        is_text_already = target.get(last) is None or isinstance(target[last], str)
        if not is_text_already and _takes_text([*path, last], values, run_class):
            target[last] = text
    return values


def _read_option(text: str, option: str) -> Any:
    """The value of an option, as YAML. Plain text has no comments and no escapes."""
    try:
        value = read_yaml_text(text, option)
    except NotYaml:  # a path or a sentence that YAML would have to be told about
        return text
    is_plain = isinstance(value, str) and not text.lstrip().startswith(("'", '"', "|", ">"))
    return text if is_plain else value


def _takes_text(path: list[str], values: dict[str, Any], run_class: Any) -> bool:
    if run_class is RunConfig and path[0] == "train":  # its class depends on the method
        method = values.get("method")
        known = isinstance(method, str) and method in METHODS
        return known and is_text(config_class(str(method)), path[1:])
    return is_text(run_class, path)


def run_from_dict(values: dict[str, Any]) -> RunConfig:
    """A `RunConfig` from nested plain values.

    Raises:
        ConfigError: on anything unknown, missing, of the wrong type or out of range.
    """
    for key in values:
        if key not in _TOP_LEVEL:
            name = short_key(key)
            hint = suggestion(name, _TOP_LEVEL)
            raise ConfigError(name, f"unknown key{hint}; a run file takes {', '.join(_TOP_LEVEL)}")
    for key in ("method", "model"):
        if not isinstance(values.get(key), str):
            raise ConfigError(key, f"expected a name, got {shown(values.get(key))}")
    method = values["method"]
    if method not in METHODS:
        family = next((name for name in METHODS if name.endswith(f"_{method}")), None)
        hint = f" (did you mean {family!r}?)" if family else suggestion(method, METHODS)
        raise ConfigError(
            "method", f"unknown method {shown(method)}{hint}; there are {', '.join(METHODS)}"
        )
    # An absent section and one without keys (`train:`) take the defaults.
    values = {key: expand_home(value) for key, value in values.items() if value is not None}
    values["train"] = build_section(config_class(method), values.get("train", {}), "train")
    if "rewards" in values:
        values["rewards"] = panel_section(values["rewards"])
    run = RunConfig(**values)
    _check_scorers(run)
    return run


def _check_scorers(run: RunConfig) -> None:
    """Refuse scorers that the rewards section would replace."""
    online = run.data.online
    options = {
        "train.scorers": getattr(run.train, "scorers", []),
        "data.online.scorers": [] if online is None else online.scorers,
    }
    for path, scorers in options.items():
        if scorers and run.rewards is not None:
            raise ConfigError(
                path,
                f"{shown(scorers)} would be replaced by the rewards section; leave one of the two "
                "out (--rewards sets the section)",
            )


def panel_section(value: Any) -> dict[str, Any]:
    """The `rewards:` of a run file as the mapping that `Panel.from_config` takes.

    Raises:
        ConfigError: entries that are none.
    """
    from .rewards.panel_config import parse_rewards

    config = dict(value) if isinstance(value, dict) and "rewards" in value else {"rewards": value}
    if "trust_remote_code" in config:
        raise ConfigError(
            "rewards.trust_remote_code",
            "a run file cannot allow foreign code; pass --trust_remote_code on the command line",
        )
    parse_rewards(config["rewards"])
    return config


def load_run(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """A run file with overrides applied.

    Raises:
        UserError: as `read_yaml`, `apply_overrides` and `run_from_dict`.
    """
    values = read_yaml(path) if path else {}
    return run_from_dict(apply_overrides(values, overrides))


def run_to_dict(run: RunConfig) -> dict[str, Any]:
    """Plain nested values, which `run_from_dict` reads back to an equal `RunConfig`.

    Absent sections are left out.
    """
    return {key: value for key, value in dataclasses.asdict(run).items() if value is not None}


def build_trainer(run: RunConfig):  # type: ignore[no-untyped-def]  # the class depends on the method
    """The trainer that a run file describes; errors as its constructor."""
    return trainer_class(run.method)(
        model=run.model,
        args=run.train,
        peft_config=run.lora.to_peft() if run.lora is not None else None,
        data=run.data,
        validation=run.validation,
        hub=run.hub,
        revision=run.revision,
        variant=run.variant,
        vae=run.vae,
        model_base=run.model_base,
        ref_model=run.ref_model,
        scorers=run.rewards,
        start_lora=run.lora.start_from if run.lora is not None else None,
    )
