"""`diffalign serve-scorer`: offer a scorer to other environments over HTTP."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..config.ranges import count, port
from ..config.yaml_text import NotYaml, read_yaml_text, shown
from ..errors import UserError
from ..rewards.serving.service import TOKEN, Limits

_NOT_IN_ARGS = (
    "name",
    "model",
    "config",
    "tokenizer",
    "device",
    "dtype",
    "trust_remote_code",
    "batch_size",
    "cache",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command.

    Args:
        parser (`argparse.ArgumentParser`): Parser of the command.
    """
    parser.add_argument("name", help="scorer, as for load_scorer")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default 127.0.0.1: this machine only)",
    )
    parser.add_argument(
        "--port", type=port, default=8000, help="port; 0 picks a free one (default 8000)"
    )
    for name, text in (
        ("model", "weights: file, folder or Hub id"),
        ("config", "JSON file of the architecture"),
        ("tokenizer", "folder"),
    ):
        parser.add_argument(f"--{name}", help=text)
    parser.add_argument(
        "--args",
        default="{}",
        help="further options of the scorer as YAML, e.g. '{antialias: false}'",
    )
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:1 (default auto)")
    parser.add_argument("--dtype", help="precision of the scorer (default float32)")
    parser.add_argument("--batch_size", type=count(), help="images per forward pass")
    parser.add_argument("--cache", type=Path, help="file in which scores are kept")
    for name, value in asdict(Limits()).items():
        parser.add_argument(
            f"--{name}", type=int, default=value, help=f"limit per request (default {value})"
        )
    parser.add_argument(
        "--token",
        help=f"secret that clients must send (default: the environment's {TOKEN}, else none)",
    )
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="allow ./file.py:Class, which runs that file",
    )


def run(options: argparse.Namespace) -> int:
    """Load the scorer and serve until SIGINT or SIGTERM.

    Args:
        options (`argparse.Namespace`): What `add_arguments` named.

    Returns:
        `int`: 0 after SIGTERM, 130 after SIGINT.

    Raises:
        UserError: What `load_scorer` raises, options that are no mapping, a port that
            is taken, or FastAPI and uvicorn are not installed.
    """
    try:
        from ..rewards.serving.server import serve
    except ImportError as error:
        raise UserError(
            f"serve-scorer needs FastAPI and uvicorn: pip install 'diffalign[serve]' ({error})"
        ) from None
    limits = Limits(**{name: getattr(options, name) for name in Limits.__dataclass_fields__})
    scorer = _load(options, _further_options(options.args))
    token = options.token or os.environ.get(TOKEN)
    try:
        serve(scorer, options.host, options.port, limits, token=token)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def _further_options(text: str) -> dict[str, Any]:
    """Read --args.

    Raises:
        UserError: It is no mapping, or names what has an option of its own.
    """
    try:
        values = read_yaml_text(text, "--args")
    except NotYaml:
        values = ()
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(
        isinstance(key, str) and key not in _NOT_IN_ARGS for key in values
    ):
        raise UserError(
            "--args: expected a mapping of the scorer's own options such as "
            f"'{{antialias: false}}', got {shown(text)}"
        )
    return values


def _load(options: argparse.Namespace, further: dict[str, Any]) -> Any:
    """Load the scorer that the options name."""
    from ..rewards.registry import load_scorer

    for name in ("batch_size", "cache"):
        if getattr(options, name) is not None:
            further[name] = getattr(options, name)
    return load_scorer(
        options.name,
        options.model,
        options.config,
        options.tokenizer,
        options.device,
        options.dtype,
        trust_remote_code=options.trust_remote_code,
        **further,
    )
