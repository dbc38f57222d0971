"""Build a dataclass from plain values, strictly, and document its fields."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

from ..errors import ConfigError
from .ranges import as_float
from .yaml_text import shown

S = TypeVar("S")


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
        return {
            coerce(k, arguments[0], path): coerce(v, arguments[1], f"{path}.{_key(k)}")
            for k, v in value.items()
        }
    if (
        annotation is bool and isinstance(value, str) and value.lower() in _SWITCHES
    ):  # YAML 1.1's words for true and false
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
        return (
            int(number)
            if math.isfinite(number) and number.is_integer() and abs(number) < 2**53
            else None
        )
    return number


def _wrong_type(value: Any, annotation: Any, path: str) -> ConfigError:
    # A name such as 2026 or true is a number or a boolean to YAML.
    quotes = (
        "; write it in quotes"
        if annotation is str and isinstance(value, (bool, int, float))
        else ""
    )
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
                f"{path}.{_key(key)}",
                f"unknown key{suggestion(_key(key), known)}; {path} takes {', '.join(known)}",
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
            documented = isinstance(following, ast.Expr) and isinstance(
                following.value, ast.Constant
            )
            if (
                documented
                and isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
            ):
                docs[statement.target.id] = " ".join(str(following.value.value).split())  # type: ignore[union-attr]
    return docs


def section_help(cls: type, path: str) -> str:
    """One line per field: option, default and its docstring."""
    docs, lines = field_docs(cls), []
    for f in dataclasses.fields(cls):
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()  # type: ignore[misc,operator]
        lines.append(f"  --{path}.{f.name} (default {default!r})\n      {docs.get(f.name, '')}")
    return "\n".join(lines)
