"""The one YAML reader, for run files, options and mappings on the command line.

It reads YAML 1.2's plain values: `no`, `1:30`, `010`, `0x1F` and `2026-11-25` are text.
Tags, repeated keys, deep nesting and aliases that multiply are refused. Every error is
one sentence.
"""

from __future__ import annotations

import math
import os
import re
import reprlib
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError

_DEEPEST = 40  # levels of nesting
_MOST_NODES = 50_000
_LARGEST_FILE = 1 << 20  # bytes


class NotYaml(UserError):
    """The text is no YAML at all. On the command line it may be meant as plain text."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's plain values and limits."""

    # Filled below, with fewer kinds than the base class's.
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        self._nodes += 1
        if self._depth > _DEEPEST:
            raise UserError(f"is nested more than {_DEEPEST} levels deep")
        if self._nodes > _MOST_NODES:
            raise UserError(f"has more than {_MOST_NODES:,} values")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys: set[str] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"line {line}: a key must be text, not a list or a mapping")
            if key.value in keys:
                raise UserError(f"line {line}: the key {shown(key.value)} stands twice")
            keys.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^(?:<<)$"), ["<"])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def read_yaml_text(text: str, where: str) -> Any:
    """The value of a YAML text.

    Args:
        text: the text.
        where: the option or file, for messages.

    Raises:
        NotYaml: it cannot be parsed.
        UserError: it uses tags, repeats a key, or is too deep or too large.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_nodes(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except NotYaml:
        raise
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply") from None
    except yaml.YAMLError as error:
        raise NotYaml(f"{where}: is not valid YAML: {' '.join(str(error).split())[:300]}") from None
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError) as error:
        raise UserError(
            f"{where}: a value cannot be read ({' '.join(str(error).split())[:100]}); "
            "write it in quotes"
        ) from None


def _check_nodes(root: yaml.Node) -> None:
    """Refuses tags, aliases that contain themselves, and aliases that multiply."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in open_nodes:
            raise UserError("a value contains itself")
        if id(node) in sizes:
            return sizes[id(node)]
        if not node.tag.startswith("tag:yaml.org,2002:"):
            raise UserError(f"the tag {shown(node.tag)} is not read; write the value without it")
        open_nodes.add(id(node))
        total = 1
        if isinstance(node, yaml.SequenceNode):
            total += sum(size(item) for item in node.value)
        elif isinstance(node, yaml.MappingNode):
            total += sum(size(key) + size(value) for key, value in node.value)
        elif len(node.value) > 4000 and node.tag.endswith(":int"):
            raise UserError("a number has more than 4,000 digits")
        elif node.tag.split(":")[-1] not in ("str", "int", "float", "bool", "null", "merge"):
            raise UserError(f"the tag {shown(node.tag)} is not read; write the value without it")
        if total > _MOST_NODES:
            raise UserError(f"has more than {_MOST_NODES:,} values")
        open_nodes.discard(id(node))
        sizes[id(node)] = total
        return total

    size(root)


def expand_home(value: Any) -> Any:
    """Replace `~/` at the beginning of all texts of a plain value by the home folder.

    A shell does that on a command line only.

    Args:
        value: Nested mappings, lists and plain values.
    """
    if isinstance(value, dict):
        return {key: expand_home(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [expand_home(inner) for inner in value]
    if isinstance(value, str) and value.startswith("~/"):
        return os.path.expanduser(value)
    return value


def read_yaml_file(path: str | Path, option: str) -> Any:
    """The value of a YAML file.

    Raises:
        UserError: the file is missing, too large or not UTF-8, or as for
            `read_yaml_text`.
    """
    name = shown(str(path), 200)
    try:
        if not Path(path).is_file():
            raise UserError(f"{option}: there is no file {name}")
        if os.path.getsize(path) > _LARGEST_FILE:
            raise UserError(
                f"{option}: {name} is larger than {_LARGEST_FILE >> 20} MiB; that is no run file"
            )
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{option}: {name} is not UTF-8 text; save it as UTF-8") from None
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{option}: {name} cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from None
    return read_yaml_text(text, f"{option}: {path}")


class _Dumper(yaml.SafeDumper):
    """Writes every value out, with quotes where YAML 1.1 reads something else."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def dump_yaml(values: object) -> str:
    """YAML text that `read_yaml_text` and other readers read back unchanged."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxtuple, _SHORT.maxset = 3, 6, 6, 6, 6
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlong = 40


def shown(value: object, limit: int = 80) -> str:
    """A value in a message: its repr on one line, cut where it is long.

    It does not walk through all of a large value.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 400:
        return f"a number of about {int(value.bit_length() * math.log10(2)):,} digits"
    if isinstance(value, str):
        return repr(value if len(value) <= limit else f"{value[: limit - 3]}...")
    try:
        text = _SHORT.repr(value)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 2 * limit else f"{text[: 2 * limit - 3]}..."
