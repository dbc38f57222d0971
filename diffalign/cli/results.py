"""What a command found out: text for people, or one JSON value for programs."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..runtime.distributed import process_rank
from ..runtime.json_values import plain
from ..runtime.progress import QUIET


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command returns, so that it is printed once and in one place.

    Attributes:
        text (`str`): For people.
        data: For programs: mappings, lists, texts, numbers and paths.
        code (`int`): Exit code.
        next (`str`, *optional*): The command that most people type now.
    """

    text: str
    data: Any
    code: int = 0
    next: str | None = None


def add_result_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--json` and `--quiet` to a command that prints a result.

    Args:
        parser (`argparse.ArgumentParser`): Parser of the command.
    """
    if "--json" not in parser._option_string_actions:
        parser.add_argument(
            "--json",
            action="store_true",
            help="print the result as JSON on stdout, and everything else on stderr",
        )
    parser.add_argument(
        "--quiet", action="store_true", help="print the result and errors, but no progress or notes"
    )


def run_and_print(
    run: Callable[[argparse.Namespace], int | Result], options: argparse.Namespace
) -> int:
    """Run a command and print its result as the options say.

    Args:
        run (`Callable`): The command.
        options (`argparse.Namespace`): Its options, with `json` and `quiet`.

    Returns:
        `int`: Exit code.
    """
    with _notes_elsewhere(options.json, options.quiet):
        outcome = run(options)
    if isinstance(outcome, int):
        return outcome
    if process_rank() == 0:
        if options.json:
            print(json.dumps(plain(outcome.data), indent=1, ensure_ascii=False, allow_nan=False))
        else:
            if outcome.text:
                print(outcome.text)
            if outcome.next and not options.quiet:
                print(f"next: {outcome.next}")
    return outcome.code


@contextlib.contextmanager
def _notes_elsewhere(as_json: bool, quiet: bool) -> Iterator[None]:
    """Keep stdout free for the result."""
    before = os.environ.get(QUIET)
    with contextlib.ExitStack() as stack:
        if quiet:
            os.environ[QUIET] = "1"
            sink = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(sink))
        elif as_json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        try:
            yield
        finally:
            if quiet and before is None:
                os.environ.pop(QUIET, None)


def result_arguments(options: argparse.Namespace) -> list[str]:
    """Return these options as arguments, for processes that do the same command.

    Args:
        options (`argparse.Namespace`): Options of the command.
    """
    return [f"--{name}" for name in ("json", "quiet") if getattr(options, name)]


def read_json_file(path: Path) -> Any:
    """Return the content of a JSON file that this run wrote.

    Args:
        path (`Path`): The file.
    """
    return json.loads(path.read_text("utf-8"))
