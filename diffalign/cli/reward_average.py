"""`diffalign reward average`: the mean of the weights of rewards (WARM)."""

from __future__ import annotations

import argparse
from pathlib import Path

from .results import Result, read_json_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command.

    Args:
        parser (`argparse.ArgumentParser`): Parser of the command.
    """
    parser.add_argument("folders", type=Path, nargs="+", help="rewards with trained towers")
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder")
    parser.add_argument("--data", required=True, help="what the rewards were trained on")
    parser.add_argument("--eval_data", help="evaluation data of the rewards, if they had any")
    parser.add_argument(
        "--force", action="store_true", help="write the average even if it is worse"
    )


def run(options: argparse.Namespace) -> Result:
    """Average rewards and say what it changed.

    Args:
        options (`argparse.Namespace`): Options of the command.

    Returns:
        `Result` with accuracies and barriers.

    Raises:
        UserError: The rewards cannot be averaged, or the average is worse.
    """
    from ..reward_training.average import average_rewards
    from ..rewards.scorers.trained import FILE

    folder = average_rewards(
        options.folders, options.output_dir, options.data, options.eval_data, force=options.force
    )
    facts = read_json_file(folder / FILE)["average"]
    own = ", ".join(f"{value:.1%}" for value in facts["validation_accuracies"])
    text = [f"right on validation pairs: {own}; their average {facts['validation_accuracy']:.1%}"]
    for pair, rise in facts["barriers"].items():
        text.append(f"loss between {pair}: {rise:+.4f} above its ends")
    if facts["warning"]:
        text.append(f"WARNING: {facts['warning']}")
    text.append(f"wrote {folder}: use it wherever a scorer is named, e.g. --scorers {folder}")
    return Result("\n".join(text), {"output": folder, **facts})
