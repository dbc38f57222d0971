"""Find the examples in docstrings and run them.

An example is a Python block, or lines after `>>>` with what they print.
"""

from __future__ import annotations

import doctest
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

_BLOCK = re.compile(r"^ *```python\n(.*?)^ *```$", flags=re.M | re.S)


def blocks(thing: Any) -> list[str]:
    """The Python blocks of a docstring. One that was inherited does not count."""
    text = inspect.cleandoc(thing.__doc__ or "")
    return [textwrap.dedent(block) for block in _BLOCK.findall(text)]


def dialogue(thing: Any, names: Mapping[str, Any] | None = None) -> doctest.DocTest:
    """The lines of a docstring after `>>>`, with the names that they may use."""
    text = inspect.cleandoc(thing.__doc__ or "")
    name = getattr(thing, "__qualname__", str(thing))
    return doctest.DocTestParser().get_doctest(text, dict(names or {}), name, None, 0)


def has_example(thing: Any) -> bool:
    return bool(blocks(thing) or dialogue(thing).examples)


def run_examples(thing: Any, names: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run all examples of a docstring, each alone.

    Args:
        thing: A function, class or module. It must have an example.
        names: What the examples use without importing it.

    Returns:
        The names that the last block has made.
    """
    assert has_example(thing), f"{thing} has no example"
    scope: dict[str, Any] = {}
    for block in blocks(thing):
        scope = dict(names or {})
        exec(block, scope)
    report: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(dialogue(thing, names), out=report.append)
    assert result.failed == 0, "".join(report)
    return scope


def run_module_examples(module: ModuleType) -> None:
    """Run the examples of all that a module defines, which must have some."""
    things = [thing for thing in _documented(module) if has_example(thing)]
    assert things, f"{module.__name__} has no example"
    for thing in things:
        run_examples(thing, vars(module))


def _documented(module: ModuleType) -> Iterator[Any]:
    """The module, and its functions, classes, methods and properties."""
    yield module
    for thing in list(vars(module).values()):
        if getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(thing) or inspect.isclass(thing):
            yield thing
        if inspect.isclass(thing):
            members = (inspect.unwrap(getattr(m, "__func__", m)) for m in vars(thing).values())
            yield from (m for m in members if inspect.isfunction(m) or isinstance(m, property))
