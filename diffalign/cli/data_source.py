"""The options that say which preference data a command reads, and how."""

from __future__ import annotations

import argparse
from typing import Any

from ..config.ranges import finite


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the source.

    Args:
        parser (`argparse.ArgumentParser`): Parser of the command.
    """
    parser.add_argument("source", help="Hub id, folder or file")
    parser.add_argument("--split", default="train", help="default: train")
    parser.add_argument(
        "--columns",
        help="canonical names to your columns, e.g. '{prompt: text, chosen: good, rejected: bad}'",
    )
    parser.add_argument("--ties", default="drop", choices=("drop", "keep"), help="default: drop")
    parser.add_argument(
        "--like_threshold",
        type=finite,
        help="images with a column of ratings (rating, stars) are liked from here on",
    )
    parser.add_argument(
        "--allow_remote_images",
        action="store_true",
        help="fetch web addresses in image columns",
    )
    parser.add_argument(
        "--allow_outside_paths",
        action="store_true",
        help="open image files outside the dataset's folder",
    )


def source_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Turn the options of the source into arguments of `load_preferences`.

    Args:
        options (`argparse.Namespace`): Options of the command.

    Returns:
        `dict[str, Any]`: Keyword arguments, the source among them.

    Raises:
        UserError: `--columns` cannot be read.
    """
    from ..data.config import read_columns

    return {
        "source": options.source,
        "split": options.split,
        "columns": read_columns(options.columns),
        "ties": options.ties,
        "like_threshold": options.like_threshold,
        "allow_remote_images": options.allow_remote_images,
        "allow_outside_paths": options.allow_outside_paths,
    }
