"""Sections of a run file: pydantic dataclasses that read plain values strictly.

A section is a class under `@config_section`. Its fields carry what is allowed in their
annotations and their documentation in the docstring below each:

    @config_section
    class Options:
        beta: Positive[float] = 2000.0
        \"\"\"Strength of the pull to the reference. Source: paper, 2000.\"\"\"

It is used like any dataclass. A value that does not fit raises `ConfigError`.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import math
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from ..errors import ConfigError, UserError
from .ranges import Range, as_float, finite, not_a_choice
from .ranges import suggestion as suggestion
from .yaml_text import shown

if TYPE_CHECKING:
    from dataclasses import dataclass as config_section

    from pydantic import ConfigDict, ValidationError

S = TypeVar("S")

# Reading a value ----------------------------------------------------------------------

_GROUPED = re.compile(r"[-+]?[1-9][0-9]{0,2}(?:_[0-9]{3})+")  # 1_000
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_SWITCHES = {"yes": True, "on": True, "no": False, "off": False}  # YAML 1.1's


def _read_number(kind: type, value: object) -> object:
    """The number that a value or text is, without loss; else the value as it is."""
    if isinstance(value, bool):
        return value
    text = value.strip() if isinstance(value, str) else value
    if isinstance(text, str) and _GROUPED.fullmatch(text):
        text = text.replace("_", "")
    if kind is int and isinstance(text, str) and len(text) <= 20 and _INTEGER.fullmatch(text):
        return int(text)
    if kind is int and isinstance(text, int):
        return text
    number = as_float(text)
    if number is None or kind is float:
        return value if number is None else number
    is_whole = math.isfinite(number) and number.is_integer() and abs(number) < 2**53
    return int(number) if is_whole else value


_READERS: dict[Any, Callable[[Any], Any]] = {
    int: functools.partial(_read_number, int),
    float: functools.partial(_read_number, float),
    bool: lambda value: _SWITCHES.get(value.lower(), value) if isinstance(value, str) else value,
    str: lambda value: os.fspath(value) if isinstance(value, os.PathLike) else value,
    list: lambda value: list(value) if isinstance(value, tuple) else value,
}


class _Lossless:
    """In an annotation: pydantic reads the type from values that fit without loss."""

    def __repr__(self) -> str:
        return "lossless"

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        schema = handler(source)
        if schema["type"] == "union":  # the first type that fits, and one message for all
            schema.update(mode="left_to_right")
            schema.update(custom_error_type="type", custom_error_message="type")
            return schema
        schema.update(strict=True)
        if schema["type"] == "list":
            schema.update(fail_fast=True)
        reader = _READERS[typing.get_origin(source) or source]
        return core_schema.no_info_before_validator_function(reader, schema)


_LOSSLESS = _Lossless()


def _lossless(annotation: Any, has_range: bool = False) -> Any:
    """The annotation as pydantic shall read it.

    Numbers without a range of their own must be finite and of a sane size.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (int, float) and not has_range:
        return Annotated[annotation, _LOSSLESS, finite]
    if annotation in (int, float, bool, str):
        return Annotated[annotation, _LOSSLESS]
    if origin is Annotated and _LOSSLESS in arguments:
        return annotation
    if origin is Annotated:
        has_range = any(isinstance(extra, Range) for extra in arguments[1:])
        return Annotated[(_lossless(arguments[0], has_range), *arguments[1:])]  # type: ignore[return-value]
    if origin is list:
        return Annotated[list[_lossless(arguments[0])], _LOSSLESS]  # type: ignore[misc]
    if origin is dict:
        return dict[_lossless(arguments[0]), _lossless(arguments[1])]  # type: ignore[misc]
    if origin in (typing.Union, types.UnionType):
        choices = [_lossless(a, has_range) for a in arguments if a is not type(None)]
        union: Any = typing.Union[tuple(choices)]  # noqa: UP007  # made of a list
        if len(choices) > 1:
            union = Annotated[union, _LOSSLESS]
        return typing.Optional[union] if type(None) in arguments else union  # noqa: UP045
    return annotation


def coerce(value: Any, annotation: Any, path: str) -> Any:
    """`value` as the annotated type; only lossless readings are allowed.

    '1e-5' and 5 are floats, 2.0 is an int, 'five' is neither.

    Raises:
        ConfigError: naming `path`, the type and the value.
    """
    from pydantic import TypeAdapter, ValidationError

    config = None if dataclasses.is_dataclass(annotation) else _CONFIG
    try:
        return TypeAdapter(_lossless(annotation), config=config).validate_python(value)
    except ValidationError as error:
        raise _as_config_error(annotation, error, path) from None


# Sections -----------------------------------------------------------------------------

_CONFIG: ConfigDict = {
    "arbitrary_types_allowed": True,
    "extra": "forbid",
    "validate_default": True,
}

if not TYPE_CHECKING:

    def config_section(cls: type[S]) -> type[S]:
        """Makes a class a section: a dataclass that checks its fields when it is built.

        Wrong values and unknown names raise `ConfigError`. Rules between fields go into
        `__post_init__`, which runs after the fields are checked.
        """
        from pydantic import ValidationError
        from pydantic.dataclasses import dataclass

        caller = sys._getframe(1)
        own = type(cls.__name__, (), {"__annotations__": inspect.get_annotations(cls)})
        hints = typing.get_type_hints(own, caller.f_globals, caller.f_locals, include_extras=True)
        cls.__annotations__ = {name: _field(hint) for name, hint in hints.items()}
        section = dataclass(config=_CONFIG)(cls)
        build = section.__init__

        @functools.wraps(build)
        def __init__(self: Any, *positional: Any, **values: Any) -> None:
            try:
                build(self, *positional, **values)
            except ValidationError as error:
                raise _as_config_error(cls, error) from None

        section.__init__ = __init__
        return section


def _field(annotation: Any) -> Any:
    return annotation if typing.get_origin(annotation) is ClassVar else _lossless(annotation)


def check_fields(section: Any) -> None:
    """Reads the fields of a section whose class is under `@dataclass` alone.

    Under `@config_section` they are checked already, and this does nothing.

    Raises:
        ConfigError: as when a section is built.
    """
    cls = type(section)
    if "__pydantic_validator__" not in vars(cls):
        hints = typing.get_type_hints(cls, include_extras=True)
        for field in dataclasses.fields(cls):
            value = coerce(getattr(section, field.name), hints[field.name], field.name)
            setattr(section, field.name, value)


def build_section(cls: type[S], values: Any, path: str) -> S:
    """A section from a mapping; sections inside it are built in turn.

    Raises:
        ConfigError: on unknown keys, wrong types or ranges, with the path in front.
    """
    if not isinstance(values, dict):
        raise ConfigError(path, f"expected a section with keys, got {shown(values)}")
    for key in values:
        if key not in _names(cls):
            raise _unknown_key(cls, key, path)
    try:
        return cls(**values)
    except ConfigError as error:
        raise error.within(path) from None


def is_text(cls: Any, path: Sequence[str]) -> bool:
    """Whether a field of a section, or of a section inside it, takes text alone.

    Args:
        cls: the outer section.
        path: names from the outermost to the field.
    """
    for name in path:
        cls = _plain(cls)
        if not dataclasses.is_dataclass(cls):
            return False
        cls = next((field.type for field in dataclasses.fields(cls) if field.name == name), None)
    return _plain(cls) is str


def _names(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls) if field.init]


# Messages -----------------------------------------------------------------------------

_UNKNOWN = ("unexpected_keyword_argument", "invalid_key")
_CALLS = ("unexpected_positional_argument", "multiple_argument_values")


def _as_config_error(annotation: Any, error: ValidationError, path: str = "") -> Exception:
    """The first of pydantic's errors as one sentence; an unknown key goes first.

    Args:
        annotation: of the value that was read, a section for instance.
        error: pydantic's.
        path: of that value.
    """
    lines = error.errors(include_url=False)
    line = next((line for line in lines if line["type"] in _CALLS + _UNKNOWN), lines[0])
    if line["type"] in _CALLS:
        return TypeError(f"{annotation.__name__}: {line['msg']}")
    location = list(line["loc"])
    unknown = location.pop() if line["type"] in _UNKNOWN else None
    path, annotation = _place(annotation, location, path)
    cause = line.get("ctx", {}).get("error")
    if unknown is not None:
        return _unknown_key(annotation, unknown, path)
    if isinstance(cause, ConfigError):
        return cause.within(path) if path else cause
    if isinstance(cause, UserError):
        return ConfigError(path, str(cause))
    if cause is not None:
        return cause
    if line["type"].startswith("missing"):
        return ConfigError(path, "expected a value, for it has no default")
    return ConfigError(path, _wrong_type(annotation, line["input"]))


def _place(annotation: Any, location: list[Any], path: str) -> tuple[str, Any]:
    """The path of pydantic's location as messages print it, and its annotation."""
    for part, following in zip(location, [*location[1:], None], strict=False):
        annotation = _plain(annotation)
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if dataclasses.is_dataclass(annotation):
            fields = dataclasses.fields(annotation)
            field = fields[part] if isinstance(part, int) else _named(fields, part)
            annotation, part = field.type, field.name
        elif origin is dict and following == "[key]":
            return path, arguments[0]
        elif origin is dict:
            annotation = arguments[1]
        elif origin is list:
            annotation = arguments[0]
        if origin is list:
            path += f"[{part}]"
        else:
            path += f".{short_key(part)}" if path else short_key(part)
    return path, annotation


def _named(fields: tuple[dataclasses.Field[Any], ...], name: str) -> dataclasses.Field[Any]:
    return next(field for field in fields if field.name == name)


def _plain(annotation: Any) -> Any:
    """The annotation without its extras, and without None."""
    while typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        choices = [a for a in typing.get_args(annotation) if a is not type(None)]
        return _plain(choices[0]) if len(choices) == 1 else annotation
    return annotation


def _unknown_key(cls: Any, key: object, path: str) -> ConfigError:
    cls = _plain(cls)
    names, key = _names(cls), short_key(key)
    problem = (
        f"unknown key{suggestion(key, names)}; {path or cls.__name__} takes {', '.join(names)}"
    )
    return ConfigError(f"{path}.{key}" if path else key, problem)


def _wrong_type(annotation: Any, value: object) -> str:
    expected = _plain(annotation)
    if typing.get_origin(expected) is Literal:
        return not_a_choice(value, typing.get_args(expected))
    if dataclasses.is_dataclass(expected):
        return f"expected a section with keys, got {shown(value)}"
    # A name such as 2026 or true is a number or a boolean to YAML.
    is_scalar = expected is str and isinstance(value, (bool, int, float))
    quotes = "; write it in quotes" if is_scalar else ""
    return f"expected {_type_name(annotation)}, got {shown(value)}{quotes}"


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        # Beside words, a number out of range has the right type and the wrong value.
        ranged = any(typing.get_origin(a) is Literal for a in arguments)
        return " or ".join(_in_range(a) if ranged else _type_name(a) for a in arguments)
    if origin in (list, dict):
        return f"{origin.__name__}[{', '.join(_type_name(a) for a in arguments)}]"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _in_range(annotation: Any) -> str:
    extras = typing.get_args(annotation) if typing.get_origin(annotation) is Annotated else ()
    ranges = [extra.expected() for extra in extras if isinstance(extra, Range)]
    return ranges[0] if ranges else _type_name(annotation)


def short_key(key: object) -> str:
    """A key of a run file in a message: one line, cut where it is long."""
    text = " ".join(str(key).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


# Documentation ------------------------------------------------------------------------


def field_docs(cls: type) -> dict[str, str]:
    """The text under each field of a section, base classes first.

    `--help` and the docs are made of it. A subclass that writes only "Source: ..."
    under a field keeps the rest of the base class's text.
    """
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(inspect.cleandoc("\n" + inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, [*body.body[1:], None], strict=True):
            if not isinstance(statement, ast.AnnAssign):
                continue
            if not isinstance(following, ast.Expr) or not isinstance(following.value, ast.Constant):
                continue
            name, text = ast.unparse(statement.target), " ".join(str(following.value.value).split())
            if text.startswith("Source: "):
                text = f"{split_source(docs.get(name, ''))[0]} {text}"
            docs[name] = text
    return docs


def split_source(text: str) -> tuple[str, str]:
    """The meaning of a field and the source of its default, from its docstring."""
    meaning, _, source = text.partition(" Source: ")
    return meaning, source.removesuffix(".")


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def section_help(cls: type, path: str) -> str:
    """For each field: option, default and its docstring."""
    docs, lines = field_docs(cls), []
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        lines.append(f"  --{path}.{field.name} (default {default_of(field)!r})")
        text = textwrap.fill(docs.get(field.name, ""), 82, break_on_hyphens=False)
        lines.append(textwrap.indent(text, " " * 6))
    return "\n".join(lines)
