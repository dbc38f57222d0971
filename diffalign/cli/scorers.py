"""``diffalign scorers``: what there is, and the card of one."""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="show everything about this one")


def run(options: argparse.Namespace) -> int:
    """Prints the list or one card."""
    from ..rewards.registry import get_spec, list_scorers

    if options.name:
        print(card(get_spec(options.name).as_dict()))
        return 0
    print(table(list_scorers()))
    return 0


def table(names: list[str]) -> str:
    """One line per scorer: name, what it needs, whether it has a gradient, what it is. A broken plug-in says so on its line."""
    from ..errors import UserError
    from ..rewards.registry import get_spec

    rows = [("scorer", "needs", "gradient", "")]
    for name in names:
        try:
            spec = get_spec(name)
        except UserError as error:
            rows.append((name, "", "", str(error)))
            continue
        rows.append(
            (name, "+".join(spec.requires), "yes" if spec.differentiable else "no", spec.summary)
        )
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join(
            [*(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)), row[3]]
        ).rstrip()
        for row in rows
    )


def card(values: dict[str, Any]) -> str:
    """Every field of a `ScorerSpec`, one per line."""
    from ..runtime.decoding import RULE

    lines = [f"{field}: {_shown(value)}" for field, value in values.items()]
    place = 1 + next(
        (i for i, line in enumerate(lines) if line.startswith("preprocess:")), len(lines) - 1
    )
    # Published scorers' code neither turns an image nor lays it on white.
    lines.insert(place, f"pixels: {RULE}; the same as in training")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None or value == ():
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
