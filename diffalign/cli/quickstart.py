"""`diffalign quickstart`: align the embedded model on a CPU and measure it."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from ..config.section import field_docs
from ..errors import ConfigError
from .quickstart_config import QuickstartConfig
from .results import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command.

    Args:
        parser (`argparse.ArgumentParser`): Parser of the command.
    """
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("diffalign-quickstart"),
        help="default: diffalign-quickstart",
    )
    docs = field_docs(QuickstartConfig)
    for field in dataclasses.fields(QuickstartConfig):
        text = f"{docs[field.name]} Default {field.default}."
        parser.add_argument(f"--{field.name}", default=field.default, help=text.replace("%", "%%"))


def run(options: argparse.Namespace) -> Result:
    """Run the quickstart, or go on with it.

    Args:
        options (`argparse.Namespace`): Options of the command.

    Returns:
        `Result` with the content of `results.json`.

    Raises:
        UserError: An option is out of range, or the folder holds something else, or a
            quickstart with other settings.
    """
    from .quickstart_stages import run as run_stages
    from .quickstart_stages import summary

    values = vars(options)
    try:
        config = QuickstartConfig(
            **{field.name: values[field.name] for field in dataclasses.fields(QuickstartConfig)}
        )
    except ConfigError as error:
        raise ConfigError(f"--{error.field}", error.problem) from None
    results = run_stages(options.output_dir, config)
    return Result(summary(results, options.output_dir), results)
