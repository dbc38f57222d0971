"""`diffalign reward add-user`: a new user of a reward with users, from a few pairs."""

from __future__ import annotations

import argparse
from pathlib import Path

from .results import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command.

    Args:
        parser (`argparse.ArgumentParser`): Parser of the command.
    """
    parser.add_argument("folder", type=Path, help="a reward with users (train.head: pal)")
    parser.add_argument("--name", required=True, help="name of the new user")
    parser.add_argument("--data", required=True, help="their pairs, or a folder of votes")
    parser.add_argument(
        "--columns",
        help="canonical names to your columns (default: those that the reward was trained with)",
    )


def run(options: argparse.Namespace) -> Result:
    """Add the user.

    Args:
        options (`argparse.Namespace`): Options of the command.

    Returns:
        `Result` with folder and user.

    Raises:
        UserError: The folder holds no reward with users, or the name is taken.
    """
    from ..data.config import read_columns
    from ..reward_training.trainer import add_user

    columns = read_columns(options.columns)
    add_user(options.folder, options.name, options.data, columns=columns)
    text = f"{options.folder} knows {options.name} now: load_scorer(folder, user={options.name!r})"
    return Result(text, {"folder": options.folder, "user": options.name})
