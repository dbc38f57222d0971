"""Run files: strict loading of YAML into dataclass sections, dotted overrides, saving.

The YAML is the Python call written down. Unknown keys are errors with a suggestion, wrong types and ranges carry the YAML path, and
``1e-5`` - which YAML reads as text - is the number it looks like.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .data.config import DataConfig
from .exceptions import ConfigError, UserError
from .ranges import Range, as_float, count, finite, seed, steps
from .yaml_text import NotYaml, dump_yaml, read_yaml_file, read_yaml_text, shown

if TYPE_CHECKING:
    from peft import LoraConfig

    from .training.config import TrainingConfig

S = TypeVar("S")
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


def suggestion(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'beta'?)`` when a known name is close, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _type_name(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(_type_name(a) for a in typing.get_args(annotation))
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def coerce(value: Any, annotation: Any, path: str) -> Any:
    """`value` as the annotated type; only lossless readings are allowed ('1e-5' and 5 are floats, 2.0 is an int, 'five' is neither).

    Raises:
        ConfigError: naming `path`, the type and the value.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        for choice in (a for a in arguments if a is not type(None)):
            if dataclasses.is_dataclass(choice) and isinstance(value, dict):
                return build_section(choice, value, path)  # type: ignore[arg-type]  # its own errors are the better ones
            try:
                return coerce(value, choice, path)
            except ConfigError:
                continue
        raise _wrong_type(value, annotation, path)
    if origin is list and isinstance(value, (list, tuple)):
        return [coerce(item, arguments[0], f"{path}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {coerce(k, arguments[0], path): coerce(v, arguments[1], f"{path}.{_key(k)}") for k, v in value.items()}
    if annotation is bool and isinstance(value, str) and value.lower() in _SWITCHES:  # YAML 1.1's words for true and false
        return _SWITCHES[value.lower()]
    if annotation in (int, float):
        number = None if isinstance(value, bool) else _number(value, annotation)
        if number is not None:
            return number
    elif isinstance(annotation, type) and isinstance(value, annotation):
        return value
    raise _wrong_type(value, annotation, path)


_GROUPED = re.compile(r"[-+]?[1-9][0-9]{0,2}(?:_[0-9]{3})+")  # 1_000
_SWITCHES = {"yes": True, "on": True, "no": False, "off": False}
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")


def _number(value: Any, kind: type) -> int | float | None:
    """The number that a value or text is, without loss; None where there is none."""
    if isinstance(value, str):
        value = value.strip()
        value = value.replace("_", "") if _GROUPED.fullmatch(value) else value
        if kind is int and len(value) <= 20 and _INTEGER.fullmatch(value):
            return int(value)
    if kind is int and isinstance(value, int):
        return value
    number = as_float(value)
    if kind is int and number is not None:
        return int(number) if math.isfinite(number) and number.is_integer() and abs(number) < 2**53 else None
    return number


def _wrong_type(value: Any, annotation: Any, path: str) -> ConfigError:
    # A name such as 2026 or true is a number or a boolean to YAML.
    quotes = "; write it in quotes" if annotation is str and isinstance(value, (bool, int, float)) else ""
    return ConfigError(path, f"expected {_type_name(annotation)}, got {shown(value)}{quotes}")


def _key(key: Any) -> str:
    text = " ".join(str(key).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def build_section(cls: type[S], values: Any, path: str) -> S:
    """A dataclass from a mapping, strictly; nested dataclass fields are built in turn.

    Raises:
        ConfigError: on unknown keys, wrong types or ranges, with the path in front.
    """
    if not isinstance(values, dict):
        raise ConfigError(path, f"expected a section with keys, got {shown(values)}")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ConfigError(
                f"{path}.{_key(key)}", f"unknown key{suggestion(_key(key), known)}; {path} takes {', '.join(known)}"
            )
    converted = {key: coerce(value, hints[key], f"{path}.{key}") for key, value in values.items()}
    try:
        return cls(**converted)
    except ConfigError as error:
        raise error.within(path) from None


def field_docs(cls: type) -> dict[str, str]:
    """The sentence under each field of a dataclass, base classes first: the one source of `--help` and of the docs."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(inspect.cleandoc("\n" + inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, [*body.body[1:], None], strict=True):
            documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            if documented and isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                docs[statement.target.id] = " ".join(str(following.value.value).split())  # type: ignore[union-attr]
    return docs


def section_help(cls: type, path: str) -> str:
    """One line per field: option, default and its docstring."""
    docs, lines = field_docs(cls), []
    for f in dataclasses.fields(cls):
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()  # type: ignore[misc,operator]
        lines.append(f"  --{path}.{f.name} (default {default!r})\n      {docs.get(f.name, '')}")
    return "\n".join(lines)


@dataclass
class LoraSection:
    """`lora:` of a run file; the names are peft's. An absent section means full fine-tuning."""

    r: int = 16
    """Rank."""
    alpha: int | float | None = None
    """Scale numerator; the update is multiplied by alpha / r. None takes r."""
    dropout: float = 0.0
    """Dropout on the input of the adapters while training."""
    target_modules: list[str] | str | None = None
    """Names (or one regular expression) of the layers that get adapters. None takes the model family's attention projections."""
    init: str = "gaussian"
    """How A is drawn: `gaussian` (diffusers' choice) or `default` (peft's Kaiming-uniform); B starts at zero in both."""
    use_dora: bool = False
    """Weight-decomposed LoRA."""
    use_rslora: bool = False
    """Rank-stabilised scaling alpha / sqrt(r)."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for layers whose names match, e.g. `{to_q: 8}`."""
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    """Other alphas for layers whose names match."""

    def __post_init__(self) -> None:
        count(1, 65_536).check("r", self.r)
        if self.alpha is not None and not 0 < self.alpha < 1e9:
            raise ConfigError("alpha", f"expected a number above 0, got {shown(self.alpha)}")
        for name, rank in self.rank_pattern.items():
            count(1, 65_536).check(f"rank_pattern.{name}", rank)
        for name, alpha in self.alpha_pattern.items():
            if not 0 < alpha < 1e9:
                raise ConfigError(f"alpha_pattern.{name}", f"expected a number above 0, got {shown(alpha)}")
        _check_targets(self.target_modules)
        if not 0 <= self.dropout < 1:
            raise ConfigError("dropout", f"expected float in [0, 1), got {self.dropout}")
        if self.init not in ("gaussian", "default"):
            raise ConfigError("init", f"expected gaussian or default, got {self.init!r}")

    def to_peft(self) -> LoraConfig:
        from peft import LoraConfig

        return LoraConfig(
            r=self.r,
            lora_alpha=self.r if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            init_lora_weights="gaussian" if self.init == "gaussian" else True,
            use_dora=self.use_dora,
            use_rslora=self.use_rslora,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
        )


def _check_targets(targets: Any) -> None:
    """Raises `ConfigError` for names or an expression that can match no layer."""
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ConfigError("target_modules", f"{shown(targets)} is no regular expression ({error})") from None
    if targets is not None and (not targets or not all(targets)):
        raise ConfigError(
            "target_modules", f"expected names of layers, got {shown(targets)}; leave it out for the attention layers"
        )


_VALIDATION_RANGES: dict[str, Range] = {
    "max_prompts": count(),
    "num_validation_images": count(1, 65_536),
    "validation_steps": count(),
    "validation_seed": seed,
    "num_inference_steps": steps,
    "guidance_scale": finite,
}


@dataclass
class ValidationConfig:
    """`validation:` of a run file: base against tuned on the same seeds while training, as a picture and, with `scorers`, as numbers. An
    absent section means none."""

    validation_prompts: list[str] = field(default_factory=list)
    """Prompts to draw."""
    prompts: str | None = None
    """In place of `validation_prompts`: a prompt set or file as for `diffalign compare`, e.g. `shapes` or `partiprompts`."""
    max_prompts: int | None = None
    """Use so many of `prompts`, evenly over the set."""
    scorers: list[str] = field(default_factory=list)
    """Scorers of the drawn images; logged with the win-rate against the base and its interval. Take others than those that train."""
    keep_best: str | None = None
    """One of `scorers`: the weights with its highest mean are kept in `best/`."""
    num_validation_images: int = 2
    """Images per prompt."""
    validation_steps: int = 200
    """Draw every so many optimizer steps, and at the end."""
    validation_seed: int = 0
    """Seed of the first image; image i of a prompt has seed + i under both models."""
    num_inference_steps: int | None = None
    """Sampler steps; None takes the pipeline's default."""
    guidance_scale: float | None = None
    """Guidance; None takes the pipeline's default."""

    def __post_init__(self) -> None:
        if self.prompts is not None and self.validation_prompts:
            raise ConfigError("prompts", "give validation_prompts or prompts, not both")
        if not self.validation_prompts and self.prompts is None:
            raise ConfigError("validation_prompts", "expected at least one prompt; leave the whole section out for no validation")
        for name, allowed in _VALIDATION_RANGES.items():
            value = getattr(self, name)
            if value is not None:
                allowed.check(name, value)
        if self.keep_best is not None and self.keep_best not in self.scorers:
            raise ConfigError(
                "keep_best", f"expected one of scorers ({', '.join(self.scorers) or 'none'}), got {self.keep_best!r}"
            )

    def pipe_kwargs(self) -> dict[str, Any]:
        named = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
        return {name: value for name, value in named.items() if value is not None}


@dataclass
class HubConfig:
    """`hub:` of a run file."""

    push_to_hub: bool = False
    """Upload the result when training ends."""
    hub_model_id: str | None = None
    """Repository, `user/name`; None takes the output folder's name."""
    hub_private_repo: bool = False
    """Create the repository as private."""


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
        raise UserError(f"--config: {path} must hold keys such as method, model, data and train, not {type(values).__name__}")
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
            raise UserError(f"{option}: unknown option{suggestion(name, _TOP_LEVEL)}; sections are {', '.join(_TOP_LEVEL)}")
        try:
            value = read_yaml_text(text, option.partition("=")[0])
        except NotYaml:  # a path or a sentence that YAML would have to be told about
            value = text
        *sections, last = name.split(".")
        if not all((*sections, last)):
            raise UserError(f"{option.partition('=')[0]}: expected a name between the dots, such as --train.beta")
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
                _key(key), f"unknown key{suggestion(_key(key), _TOP_LEVEL)}; a run file takes {', '.join(_TOP_LEVEL)}"
            )
    for key in ("method", "model"):
        if not isinstance(values.get(key), str):
            raise ConfigError(key, f"expected a name, got {shown(values.get(key))}")
    method = values["method"]
    if method not in METHODS:
        raise ConfigError(
            "method", f"unknown method {shown(method)}{suggestion(method, METHODS)}; there are {', '.join(METHODS)}"
        )
    optional: dict[str, Callable[[Any], Any]] = {
        "lora": lambda v: build_section(LoraSection, v, "lora"),
        "validation": lambda v: build_section(ValidationConfig, v, "validation"),
        "hub": lambda v: build_section(HubConfig, v, "hub"),
        "rewards": panel_section,
        **{name: lambda v, name=name: coerce(v, str, name) for name in ("revision", "variant", "vae", "ref_model")},  # type: ignore[misc]
    }
    return RunConfig(
        method=method,
        model=values["model"],
        train=build_section(config_class(method), _section(values, "train"), "train"),
        data=build_section(DataConfig, _section(values, "data"), "data"),
        **{name: build(values[name]) for name, build in optional.items() if values.get(name) is not None},
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
            "rewards.trust_remote_code", "a run file cannot allow foreign code; import the scorer in Python instead"
        )
    parse_rewards(config["rewards"])
    return config


def load_run(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """A run file with overrides applied. Errors as `read_yaml`, `apply_overrides` and `run_from_dict`."""
    return run_from_dict(apply_overrides(read_yaml(path) if path else {}, overrides))


def run_to_dict(run: RunConfig) -> dict[str, Any]:
    """Plain nested values; absent sections are left out. `run_from_dict` reads them back to an equal `RunConfig`."""
    return {key: value for key, value in dataclasses.asdict(run).items() if value is not None}
