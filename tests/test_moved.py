"""Old paths work with a warning, and nothing in the repository uses them."""

from __future__ import annotations

import ast
import importlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffalign._moved import MODULES, NAMES

ROOT = Path(__file__).parents[1]
FOLDERS = ("diffalign", "tests", "tools", "benchmarks", "scripts", "demo")


@pytest.mark.parametrize("old", MODULES)
def test_an_old_module_hands_on_every_name(old: str) -> None:
    new = importlib.import_module(f"diffalign.{MODULES[old]}")
    name = next(n for n in vars(new) if not n.startswith("_") and n != "annotations")
    with pytest.warns(DeprecationWarning, match=f"diffalign.{old}.{name} has moved to diffalign."):
        assert getattr(importlib.import_module(f"diffalign.{old}"), name) is getattr(new, name)


@pytest.mark.parametrize(("old", "name"), [(old, name) for old in NAMES for name in NAMES[old]])
def test_an_old_name_is_the_new_object(old: str, name: str) -> None:
    module, _, other = NAMES[old][name].partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        value = getattr(importlib.import_module(f"diffalign.{old}"), name)
    assert value is getattr(importlib.import_module(f"diffalign.{module}"), other or name)


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Each imported module of ours without `diffalign.`; each name with its module."""
    package, text = path.relative_to(ROOT).parent.parts, path.read_text("utf-8")
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((a.name.removeprefix("diffalign."), "") for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module.split(".")[0] == "diffalign":
                module = module.removeprefix("diffalign").removeprefix(".")
                yield from ((module, a.name) for a in node.names)


def test_the_repository_uses_new_paths() -> None:
    files = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")]
    for path in [*files, *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for module, name in imports(path):
            where = f"{path.relative_to(ROOT)}: {module} {name}"
            assert module not in MODULES, where
            assert f"{module}.{name}".lstrip(".") not in MODULES, where
            assert name not in NAMES.get(module, {}), where


def test_the_old_attribute_is_the_new_one() -> None:
    from diffalign.backbones import load_backbone
    from diffalign.likelihood import RectifiedFlow

    backbone = load_backbone("shapes")
    with pytest.warns(DeprecationWarning, match="process is now called schedule"):
        assert backbone.process is backbone.schedule
    backbone.process = flow = RectifiedFlow()  # type: ignore[assignment]
    assert backbone.schedule is flow
