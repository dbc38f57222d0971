"""Run files: strict loading of YAML into dataclass sections, dotted overrides, saving.

The YAML is the Python call written down. Unknown keys are errors with a suggestion, wrong types and ranges carry the YAML path, and
``1e-5`` - which YAML reads as text - is the number it looks like.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config.section import _key, build_section, coerce, suggestion
from .config.yaml_text import NotYaml, dump_yaml, read_yaml_file, read_yaml_text, shown
from .data.config import DataConfig
from .errors import ConfigError, UserError
from .methods import trainer_class
from .training.sections import HubConfig, LoraSection, ValidationConfig

if TYPE_CHECKING:
    from .training.config import TrainingConfig

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


@dataclass
class RunConfig:
    """A whole run file."""

    method: str
    """One of diffalign's methods, e.g. `diffusion_dpo`."""
    model: str
    """Hub id or local folder of a diffusers pipeline, or `shapes` for the embedded one."""
    train: TrainingConfig
    data: DataConfig
    revision: str | None = None
    """Git revision of the model on the Hub."""
    variant: str | None = None
    """Weights variant, e.g. `fp16`."""
    vae: str | None = None
    """A different autoencoder (Hub id or folder), e.g. the fp16-safe one of SDXL."""
    ref_model: str | None = None
    """Another reference model than the starting weights (Hub id or folder), of the same family, prediction type and schedule."""
    lora: LoraSection | None = None
    validation: ValidationConfig | None = None
    hub: HubConfig | None = None
    rewards: dict[str, Any] | None = None
    """Who judges, for methods that sample while they learn: a panel, `{rewards: ..., combine: ...}`, or its rewards alone."""


_TOP_LEVEL = (
    "method",
    "model",
    "revision",
    "variant",
    "vae",
    "ref_model",
    "lora",
    "data",
    "train",
    "validation",
    "hub",
    "rewards",
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: when the file is missing, is not YAML or holds no mapping.
    """
    values = read_yaml_file(path, "--config")
    if not isinstance(values, dict):
        raise UserError(
            f"--config: {path} must hold keys such as method, model, data and train, not {type(values).__name__}"
        )
    return values


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Dotted command-line options over a mapping: ``["--train.beta", "2000", "--data.resolution=512"]``.

    Raises:
        UserError: on an option without a value, or one that goes through a value that is no section.
    """
    values = dict(values)
    pending = list(overrides)
    while pending:
        option = pending.pop(0)
        if not option.startswith("--"):
            raise UserError(f"{option!r}: expected an option such as --train.beta 2000")
        name, equals, text = option[2:].partition("=")
        if not equals:
            if not pending:
                raise UserError(f"{option}: expected a value after it")
            text = pending.pop(0)
        if name.split(".")[0] not in _TOP_LEVEL:
            raise UserError(
                f"{option}: unknown option{suggestion(name, _TOP_LEVEL)}; sections are {', '.join(_TOP_LEVEL)}"
            )
        try:
            value = read_yaml_text(text, option.partition("=")[0])
        except NotYaml:  # a path or a sentence that YAML would have to be told about
            value = text
        *sections, last = name.split(".")
        if not all((*sections, last)):
            raise UserError(
                f"{option.partition('=')[0]}: expected a name between the dots, such as --train.beta"
            )
        target = values
        for section in sections:
            inner = target.get(section)
            if inner is not None and not isinstance(inner, dict):
                raise UserError(f"{option}: {section} is the value {shown(inner)}, not a section")
            target[section] = dict(inner or {})
            target = target[section]
        target[last] = value
    return values


def run_from_dict(values: dict[str, Any]) -> RunConfig:
    """A `RunConfig` from nested plain values.

    Raises:
        ConfigError: on anything unknown, missing, of the wrong type or out of range.
    """
    from .methods import METHODS, config_class

    for key in values:
        if key not in _TOP_LEVEL:
            raise ConfigError(
                _key(key),
                f"unknown key{suggestion(_key(key), _TOP_LEVEL)}; a run file takes {', '.join(_TOP_LEVEL)}",
            )
    for key in ("method", "model"):
        if not isinstance(values.get(key), str):
            raise ConfigError(key, f"expected a name, got {shown(values.get(key))}")
    method = values["method"]
    if method not in METHODS:
        raise ConfigError(
            "method",
            f"unknown method {shown(method)}{suggestion(method, METHODS)}; there are {', '.join(METHODS)}",
        )
    optional: dict[str, Callable[[Any], Any]] = {
        "lora": lambda v: build_section(LoraSection, v, "lora"),
        "validation": lambda v: build_section(ValidationConfig, v, "validation"),
        "hub": lambda v: build_section(HubConfig, v, "hub"),
        "rewards": panel_section,
        **{
            name: functools.partial(coerce, annotation=str, path=name)
            for name in ("revision", "variant", "vae", "ref_model")
        },
    }
    return RunConfig(
        method=method,
        model=values["model"],
        train=build_section(config_class(method), _section(values, "train"), "train"),
        data=build_section(DataConfig, _section(values, "data"), "data"),
        **{
            name: build(values[name])
            for name, build in optional.items()
            if values.get(name) is not None
        },
    )


def _section(values: dict[str, Any], name: str) -> Any:
    """An absent section and one without keys (`train:`) take the defaults."""
    return {} if values.get(name) is None else values[name]


def panel_section(value: Any) -> dict[str, Any]:
    """The `rewards:` of a run file as the mapping that `diffalign.rewards.Panel.from_config` takes.

    Raises:
        ConfigError: entries that are none.
    """
    from .rewards.panel_config import parse_rewards

    config = dict(value) if isinstance(value, dict) and "rewards" in value else {"rewards": value}
    if "trust_remote_code" in config:
        raise ConfigError(
            "rewards.trust_remote_code",
            "a run file cannot allow foreign code; import the scorer in Python instead",
        )
    parse_rewards(config["rewards"])
    return config


def load_run(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """A run file with overrides applied. Errors as `read_yaml`, `apply_overrides` and `run_from_dict`."""
    return run_from_dict(apply_overrides(read_yaml(path) if path else {}, overrides))


def run_to_dict(run: RunConfig) -> dict[str, Any]:
    """Plain nested values; absent sections are left out. `run_from_dict` reads them back to an equal `RunConfig`."""
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
        ref_model=run.ref_model,
        scorers=run.rewards,
    )
