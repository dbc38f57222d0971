"""The command line: a table of commands, each in a module of its own.

`exit_codes.py` says what becomes of an error.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from .. import __version__
from ..errors import UserError
from ..runtime.progress import close_display
from . import exit_codes
from .results import Result, add_result_arguments, run_and_print

_NOISY_LOGGERS = ("torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
"""They warn whenever torchao is installed, of what no user of a command can change."""


class Command(NamedTuple):
    """A command and the module with its `add_arguments(parser)` and `run(options)`.

    Attributes:
        name: as it is typed.
        module: in this folder.
        help: one line.
        locks_output: whether its output folder belongs to one run at a time.
        own_help: whether it prints its help itself.
        takes_rest: whether it reads arguments that its parser does not know, from
            `options.overrides`.
        serves: whether it serves until it is stopped, and so has no result.
    """

    name: str
    module: str
    help: str
    locks_output: bool = False
    own_help: bool = False
    takes_rest: bool = False
    serves: bool = False


class Group(NamedTuple):
    """Commands under a common word.

    Attributes:
        name: the word.
        help: one line.
        commands: what may follow it.
    """

    name: str
    help: str
    commands: tuple[Command, ...]


DATA_COMMANDS = (
    Command("inspect", "data_inspect", "what is in a dataset, and what is wrong with it"),
    Command("convert", "data_convert", "write any layout as canonical parquet"),
    Command(
        "build",
        "data_build",
        "make preference data: draw images, score them, write pairs or ranked lists",
        locks_output=True,
    ),
    Command(
        "recaption",
        "data_recaption",
        "write pairs with two captions for DCPO: captioned, perturbed or both",
        locks_output=True,
    ),
)
REWARD_COMMANDS = (
    Command(
        "train", "reward_train", "train a reward on votes, pairs, lists or thumbs", takes_rest=True
    ),
    Command("add-user", "reward_add_user", "add a user to a per-user reward, from a few pairs"),
    Command("average", "reward_average", "average the weights of several rewards (WARM)"),
)
COMMANDS = (
    Command(
        "quickstart", "quickstart", "align the embedded model on a CPU in minutes and measure it"
    ),
    Command(
        "train", "train", "fine-tune a model as a run file says", own_help=True, takes_rest=True
    ),
    Command(
        "estimate",
        "estimate",
        "parameters, FLOPs and memory of a run, without weights, data or GPU",
        takes_rest=True,
    ),
    Command("sample", "sample", "draw images, with a LoRA beside the base"),
    Group("data", "inspect, convert, build or recaption preference data", DATA_COMMANDS),
    Group("reward", "train, extend or average reward models", REWARD_COMMANDS),
    Command(
        "compare",
        "compare",
        "compare models on the same prompts and noise: win-rates, tables, a page",
        locks_output=True,
    ),
    Command("score", "score", "score images with reward models", locks_output=True),
    Command(
        "serve-scorer",
        "serve_scorer",
        "offer a scorer to other processes and environments over HTTP",
        serves=True,
    ),
    Command(
        "serve-model", "serve_model", "offer a pipeline to other processes over HTTP", serves=True
    ),
    Command("doctor", "doctor", "check the scorers on this machine against known numbers"),
    Command("scorers", "scorers", "list the scorers, or show the card of one"),
    Command(
        "feedback",
        "feedback",
        "ask people which images are better, for runs that train on their votes",
    ),
    Command("merge", "merge", "add up LoRAs or full weights of several runs"),
    Command("export", "export", "write a LoRA for ComfyUI, kohya's scripts, peft or diffusers"),
    Command(
        "demo", "demo", "a page with models side by side, blind votes and steering", serves=True
    ),
    Command(
        "steer",
        "steer",
        "steer a model towards a reward while it samples (Feynman-Kac particles)",
        locks_output=True,
    ),
    Command("env", "env", "versions and devices, for a bug report"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its code."""
    _calm_progress_bars()
    try:
        code = run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)


def _calm_progress_bars() -> None:
    """In a file, our bars write a line now and then, and the libraries' bars none."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "30")
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    parser = build_parser()
    try:
        options, rest = parser.parse_known_args(arguments)
        if rest and not options.takes_rest:
            parser.error(f"unknown arguments: {' '.join(rest)}")
        options.overrides = rest
        return options.handler(options)
    except (Exception, KeyboardInterrupt) as error:
        close_display()
        code = exit_codes.report(error)
        if code is None:
            raise
        return code


class Parser(argparse.ArgumentParser):
    """Mistakes in arguments are `UserError`s, and read like all other mistakes.

    Attributes:
        fill: adds the arguments. It is called for the command that is run, so that
            no other command's modules are imported.
    """

    fill: Callable[[Parser], None] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.fill is not None:
            fill, self.fill = self.fill, None
            fill(self)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> Any:
        raise UserError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """All commands; no module of one is imported here."""
    parser = Parser(
        prog="diffalign",
        description="Align text-to-image diffusion models with human preferences.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=Parser
    )
    for command in COMMANDS:
        if isinstance(command, Command):
            _add_command(commands, command)
            continue
        group = commands.add_parser(command.name, help=command.help, allow_abbrev=False)
        actions = group.add_subparsers(
            dest="action", required=True, metavar="ACTION", parser_class=Parser
        )
        for action in command.commands:
            _add_command(actions, action)
    return parser


def _add_command(commands: Any, command: Command) -> None:
    parser = commands.add_parser(
        command.name, help=command.help, allow_abbrev=False, add_help=not command.own_help
    )
    parser.fill = functools.partial(_fill, command)


def _fill(command: Command, parser: Parser) -> None:
    module = import_module(f".{command.module}", __package__)
    module.add_arguments(parser)
    handler = functools.partial(_locked, module.run) if command.locks_output else module.run
    if not command.serves:
        add_result_arguments(parser)
        handler = functools.partial(run_and_print, handler)
    parser.set_defaults(handler=handler, takes_rest=command.takes_rest)


def _locked(
    run: Callable[[argparse.Namespace], int | Result], options: argparse.Namespace
) -> int | Result:
    from ..runtime.folder_lock import FolderLock

    with FolderLock(options.output_dir):
        return run(options)


if __name__ == "__main__":
    main()
