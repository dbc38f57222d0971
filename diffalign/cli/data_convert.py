"""`diffalign data convert`: write any layout as canonical parquet."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..config.ranges import share
from .data_source import add_source_arguments, source_arguments
from .results import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command.

    Args:
        parser (`argparse.ArgumentParser`): Parser of the command.
    """
    add_source_arguments(parser)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--max_broken_fraction",
        type=share,
        default=0.05,
        help="largest share of broken rows that is left out (default 0.05)",
    )
    parser.add_argument(
        "--kind",
        choices=("pair", "ranked", "labelled", "conditioned", "single", "prompt"),
        help="default: the source's own",
    )


def run(options: argparse.Namespace) -> Result:
    """Read a dataset and write it as parquet.

    Args:
        options (`argparse.Namespace`): Options of the command.

    Returns:
        `Result` with the folder.

    Raises:
        UserError: The source cannot be read, or the output folder is not empty.
    """
    from ..data import convert, load_preferences

    # Broken pictures must not be in what is written.
    dataset = load_preferences(
        **source_arguments(options),
        verify_images="full",
        max_broken_fraction=options.max_broken_fraction,
    )
    written = convert(dataset, options.output_dir, kind=options.kind)
    return Result(f"wrote {written}", {"output": written, "rows": len(dataset)})
