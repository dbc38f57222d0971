"""`diffalign data inspect`: what is in a dataset, and what is wrong with it."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..runtime.files import check_output_file
from .data_source import add_source_arguments, source_arguments
from .results import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command.

    Args:
        parser (`argparse.ArgumentParser`): Parser of the command.
    """
    add_source_arguments(parser)
    parser.add_argument(
        "--verify_images",
        default="full",
        choices=("full", "header"),
        help="default: full, which decodes",
    )
    parser.add_argument(
        "--picture",
        type=Path,
        help="write the first group as a PNG, the preferred image on the left",
    )


def run(options: argparse.Namespace) -> Result:
    """Print what is in a dataset, and write a picture of its first group.

    Args:
        options (`argparse.Namespace`): Options of the command.

    Returns:
        `Result` with what `diffalign.data.inspect` found.

    Raises:
        UserError: The source cannot be read.
    """
    from ..data import format_inspection, load_preferences
    from ..data.inspect import first_group_picture, inspect

    if options.picture is not None:
        check_output_file(options.picture.expanduser(), "--picture")

    # Inspecting shows what is broken, so any share of broken rows is accepted. Images
    # are decoded by `inspect`.
    dataset = load_preferences(
        **source_arguments(options),
        max_broken_fraction=1.0,
        verify_images="header",
        verbose=False,
    )
    facts = inspect(dataset, decode=options.verify_images == "full")
    text = format_inspection(facts)
    if options.picture is not None:
        facts["picture"] = first_group_picture(dataset, options.picture)
        text += f"\nwrote {facts['picture']}"
    return Result(text, facts)
