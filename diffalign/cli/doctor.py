"""`diffalign doctor`: check the scorers on this machine against known numbers."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..runtime.files import check_output_file, write_atomically
from .results import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command.

    Args:
        parser (`argparse.ArgumentParser`): Parser of the command.
    """
    parser.add_argument("--scorers", help="comma-separated names (default: all)")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="published weights to check; may be given several times",
    )
    parser.add_argument(
        "--tokenizer",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="tokenizer of one of these models, if it is in another folder",
    )
    parser.add_argument(
        "--assets",
        type=Path,
        help="folder with the authors' example images (1.webp ... 4.webp, demo_image.jpg)",
    )
    parser.add_argument("--device", help="auto, cpu, cuda (default auto)")
    parser.add_argument("--report", type=Path, help="also write the findings to this JSON file")
    parser.add_argument(
        "--json",
        nargs="?",
        const=True,
        default=False,
        help="print the findings as JSON (with a file: the old form of --report)",
    )


def run(options: argparse.Namespace) -> Result:
    """Check the scorers and print the report.

    Args:
        options (`argparse.Namespace`): Options of the command.

    Returns:
        `Result`, whose exit code is 1 if a check failed.
    """
    from ..rewards.testing.doctor import examine

    if isinstance(options.json, str):
        print("--json FILE is now --report FILE", file=sys.stderr)
        options.report, options.json = Path(options.json), False
    if options.report:
        check_output_file(options.report, "--report")
    findings = list(
        examine(
            options.scorers,
            models=options.model,
            tokenizers=options.tokenizer,
            assets=options.assets,
            device=options.device,
        )
    )
    width = max(len(finding.scorer) for finding in findings)
    text = []
    for finding in findings:
        mark = {True: "ok     ", False: "WRONG  ", None: "-      "}[finding.ok]
        text.append(f"{mark}{finding.scorer:{width}}  {finding.check}: {finding.detail}")
    wrong = [finding for finding in findings if finding.ok is False]
    text.append(f"{len(findings)} checks, {len(wrong)} wrong")
    facts = [vars(finding) for finding in findings]
    if options.report:
        write_atomically(options.report, (json.dumps(facts, indent=1) + "\n").encode())
    return Result("\n".join(text), facts, 1 if wrong else 0)
