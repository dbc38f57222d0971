"""The options of a command that makes embedded weights: a folder, and its settings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def read_options(
    kind: type[Settings], description: str | None, arguments: Sequence[str] | None = None
) -> tuple[Path, Settings]:
    """Read ``--output_dir`` and one option for each field of a dataclass.

    Args:
        kind (`type`): The dataclass. Every field has a default.
        description (`str`, *optional*): Text of ``--help``.
        arguments (`Sequence[str]`, *optional*): Defaults to those of the process.

    Returns:
        `tuple`: The folder and the settings.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    defaults: Any = kind()
    for name, value in asdict(defaults).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    options = vars(parser.parse_args(arguments))
    return options.pop("output_dir"), kind(**options)
