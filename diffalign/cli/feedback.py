"""`diffalign feedback`: collect people's votes for a run with `train.feedback: people`.

`collect` trains until images need votes, and waits for them. `status` shows the rounds
and votes of a run. `diffalign train` with `resume_from_checkpoint` goes on from the
votes until the next round.
"""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path

from ..config.ranges import Range
from ..errors import UserError
from .results import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command.

    Args:
        parser (`argparse.ArgumentParser`): Parser of the command.
    """
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    collect = actions.add_parser(
        "collect", help="draw the next round's images and wait for votes", allow_abbrev=False
    )
    collect.add_argument(
        "--config", type=Path, required=True, help="run file with train.feedback: people"
    )
    collect.add_argument("--output_dir", help="in place of the run file's train.output_dir")
    collect.add_argument("--no_wait", action="store_true", help="write the images and return")
    collect.add_argument(
        "--poll",
        type=Range(0.0, 86_400.0, above=True),
        default=2.0,
        help="seconds between two looks for votes (default 2)",
    )
    status = actions.add_parser(
        "status", help="what a run waits for, and the votes that are there", allow_abbrev=False
    )
    status.add_argument("output_dir", type=Path, help="folder of the run")


def run(options: argparse.Namespace) -> int | Result:
    """Collect votes or show their status.

    Args:
        options (`argparse.Namespace`): Options of the command.

    Returns:
        `int` or `Result`: Exit code, or what was done.

    Raises:
        UserError: The run does not ask people, or the votes do not fit.
    """
    if options.action == "status":
        rounds = status(options.output_dir)
        text = "\n".join(f"{name}: {words}" for name, words in rounds.items())
        return Result(text, rounds)
    from ..recipe import build_trainer, load_run
    from ..runtime.distributed import end_training
    from ..training.checkpoint import list_checkpoints
    from ..training.online.feedback import find_votes, read_votes

    overrides = ["--train.output_dir", options.output_dir] if options.output_dir else []
    config = load_run(options.config, overrides)
    if getattr(config.train, "feedback", None) != "people":
        raise UserError(
            f"--config: {options.config} uses no human feedback; set method: d3po and "
            "train.feedback: people"
        )
    if list_checkpoints(Path(config.train.output_dir)):
        config.train.resume_from_checkpoint = "latest"
    trainer = build_trainer(config)
    output = trainer.train()
    end_training(trainer.accelerator)
    if output.waiting_for is None:
        return Result("done: no further votes are needed", {"status": "done"})
    print(f"votes wanted: {output.waiting_for} (open index.html; write votes.json beside it)")
    while not options.no_wait:
        if find_votes(output.waiting_for):
            text = read_votes(output.waiting_for).summary()
            facts = {"status": "votes are there", "folder": output.waiting_for}
            command = f"diffalign train --config {shlex.quote(str(options.config))}"
            return Result(text, facts, next=f"{command} --train.resume_from_checkpoint latest")
        time.sleep(options.poll)
    return Result("", {"status": "votes wanted", "folder": output.waiting_for})


def status(output_dir: Path) -> dict[str, str]:
    """Describe the rounds, images and votes of a run.

    Args:
        output_dir (`Path`): Folder of the run.

    Returns:
        `dict[str, str]`: Round -> what is known of it.

    Raises:
        UserError: There are no rounds, or the votes do not fit.
    """
    from ..training.online.feedback import MANIFEST, find_votes, read_manifest, read_votes

    rounds = sorted((output_dir / "feedback").glob("round-*"))
    if not rounds:
        raise UserError(f"{str(output_dir)!r} holds no feedback round")
    states = {}
    for folder in rounds:
        if not (folder / MANIFEST).is_file():
            states[folder.name] = "still being drawn"
            continue
        groups = read_manifest(folder)
        images = sum(len(group["images"]) for group in groups)
        votes = read_votes(folder).summary() if find_votes(folder) else "no votes yet"
        states[folder.name] = f"{len(groups)} prompts, {images} images; {votes}"
    return states
