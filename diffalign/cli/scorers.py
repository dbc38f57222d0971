"""`diffalign scorers`: list the scorers, or show the card of one."""

from __future__ import annotations

import argparse
from typing import Any

from .results import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command.

    Args:
        parser (`argparse.ArgumentParser`): Parser of the command.
    """
    parser.add_argument("name", nargs="?", help="show everything about this one")


def run(options: argparse.Namespace) -> Result:
    """Print the list of scorers, or the card of one.

    Args:
        options (`argparse.Namespace`): Options of the command.

    Returns:
        `Result` with the card, or with the cards of all.
    """
    from ..rewards.registry import get_spec, list_scorers

    if options.name:
        facts = get_spec(options.name).as_dict()
        return Result(card(facts), facts)
    names = list_scorers()
    return Result(table(names), [_facts(name) for name in names] if options.json else None)


def _facts(name: str) -> dict[str, Any]:
    """Return a scorer's card, or the error of a broken plug-in."""
    from ..errors import UserError
    from ..rewards.registry import get_spec

    try:
        return get_spec(name).as_dict()
    except UserError as error:
        return {"key": name, "error": str(error)}


def table(names: list[str]) -> str:
    """Format a table of scorers: name, inputs, whether it has a gradient, summary.

    A broken plug-in shows its error.

    Args:
        names (`list[str]`): Names of the scorers.
    """
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
    """Format the fields of a `ScorerSpec`, one per line.

    Args:
        values (`dict[str, Any]`): The fields.
    """
    from ..runtime.decoding import RULE

    lines = [f"{field}: {_shown(value)}" for field, value in values.items()]
    place = 1 + next(
        (i for i, line in enumerate(lines) if line.startswith("preprocess:")), len(lines) - 1
    )
    # The published code does not rotate images or put them on white.
    lines.insert(place, f"pixels: {RULE}; the same as in training")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None or value == ():
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
