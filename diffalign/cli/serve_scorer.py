"""`diffalign serve-scorer`: offer a scorer to other processes and environments over HTTP."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path

from ..config.ranges import count, port
from ..config.yaml_text import NotYaml, read_yaml_text, shown
from ..errors import UserError
from ..rewards.serving.server import TOKEN, Limits, _is_loopback, make_server


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="scorer, as for load_scorer")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default 127.0.0.1: this machine only)",
    )
    parser.add_argument(
        "--port", type=port, default=8000, help="0 takes a free one and says which (default 8000)"
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
    parser.add_argument("--dtype", help="of the towers (default float32)")
    parser.add_argument("--batch_size", type=count(), help="images per forward pass")
    parser.add_argument("--cache", type=Path, help="file in which scores are kept")
    for name, value in asdict(Limits()).items():
        parser.add_argument(
            f"--{name}", type=int, default=value, help=f"per request (default {value})"
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
    """Loads the scorer and serves until SIGINT or SIGTERM.

    Raises:
        UserError: what `load_scorer` raises, options that are no mapping, a port that is taken.
    """
    from ..rewards.registry import load_scorer

    limits = Limits(**{name: getattr(options, name) for name in Limits.__dataclass_fields__})
    try:
        extra = read_yaml_text(options.args, "--args")
    except NotYaml:
        extra = ()
    extra = {} if extra is None else extra
    reserved = (
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
    if not isinstance(extra, dict) or not all(
        isinstance(key, str) and key not in reserved for key in extra
    ):
        raise UserError(
            f"--args: expected a mapping of the scorer's own options such as '{{antialias: false}}', got {shown(options.args)}"
        )
    scorer = load_scorer(
        options.name,
        options.model,
        options.config,
        options.tokenizer,
        options.device,
        options.dtype,
        trust_remote_code=options.trust_remote_code,
        **extra,
        **{
            name: getattr(options, name)
            for name in ("batch_size", "cache")
            if getattr(options, name) is not None
        },
    )
    try:
        server = make_server(
            scorer, options.host, options.port, limits, token=options.token or os.environ.get(TOKEN)
        )
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--port: {options.host}:{options.port} cannot be listened on ({error}); choose another"
        ) from error
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    host, port = server.server_address[:2]
    place = f"[{host!s}]" if ":" in str(host) else str(host)
    print(f"{scorer.name} ({scorer.fingerprint()}) at http://{place}:{port}", flush=True)
    if not _is_loopback(str(host)):
        who = (
            "who knows the token"
            if options.token or os.environ.get(TOKEN)
            else "who reaches it (--token asks for a secret)"
        )
        print(
            f"listening beyond this machine, without encryption: everybody {who} can use it",
            file=sys.stderr,
            flush=True,
        )
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    finally:
        server.server_close()
    return 0
