"""docs/papers.md, made from the classes: ``python -m tools.papers [FILE]``."""

from __future__ import annotations

import dataclasses
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from diffalign.config.section import default_of, field_docs, split_source
from diffalign.methods import METHODS, config_class, trainer_class
from diffalign.training.config import TrainingConfig

HEAD = """# The papers behind the methods

Made by `python -m tools.papers` from the classes; every method lives in one file of
`diffalign/methods`. A method's own options are listed with our default and where it comes from;
the options that all methods share are in [training.md](training.md). The values that papers and
official scripts train with are in `configs/<method>/*.yaml`, each with its source.
"""


def own_fields(method: str) -> list[tuple[str, Any]]:
    """(name, default) of options that the method adds or gives another default."""
    common = {field.name: default_of(field) for field in dataclasses.fields(TrainingConfig)}
    found = [(field.name, default_of(field)) for field in dataclasses.fields(config_class(method))]
    return [
        (name, default) for name, default in found if name not in common or common[name] != default
    ]


def section(method: str) -> str:
    """One method as Markdown."""
    trainer = trainer_class(method)
    module = import_module(f"diffalign.methods.{METHODS[method].split(':')[0]}")
    _, _, body = (module.__doc__ or "").strip().partition("\n\n")
    lines = [f"## {trainer._name}", ""]
    if trainer._paper:
        lines += [f"[{trainer._paper['title']}](https://arxiv.org/abs/{trainer._paper['id']})", ""]
    lines += [f"`method: {method}`, `{trainer.__name__}`, `{trainer.config_class.__name__}`", ""]
    text = [line.rstrip() for line in body.split("\n")]
    # Indented lines are equations: a code block of their own.
    lines += ["```text", *[line[4:] for line in text if line.startswith("    ")], "```", ""]
    lines += "\n".join(line for line in text if not line.startswith("    ")).strip().split("\n")
    while lines[-1] == "":
        lines.pop()
    fields, docs = own_fields(method), field_docs(config_class(method))
    if fields:
        lines += ["", "| option | default | meaning | source of the default |", "|---|---|---|---|"]
        for name, default in fields:
            cells = [f"`{name}`", f"`{default}`", *split_source(docs[name])]
            lines.append(f"| {' | '.join(cell.replace('|', 'or') for cell in cells)} |")
    if trainer._not_public:
        lines += ["", f"Not public: {trainer._not_public[0].lower()}{trainer._not_public[1:]}"]
    return "\n".join(lines)


def page() -> str:
    """The whole page; methods with a paper first, by name."""
    order = sorted(
        METHODS, key=lambda m: (not trainer_class(m)._paper, trainer_class(m)._name.lower())
    )
    sections = "\n\n".join(section(method) for method in order)
    return f"{HEAD}\n{sections}\n"


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else "docs/papers.md").write_text(page(), "utf-8")
