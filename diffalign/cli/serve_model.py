"""`diffalign serve-model`: offer a pipeline to other processes over HTTP."""

from __future__ import annotations

import argparse
import sys

from ..config.ranges import count, port
from ..errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command.

    Args:
        parser (`argparse.ArgumentParser`): Parser of the command.
    """
    parser.add_argument("model", help="Hub id, folder, shapes or shapes-flow")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default 127.0.0.1: this machine only)",
    )
    parser.add_argument(
        "--port", type=port, default=8001, help="port; 0 picks a free one (default 8001)"
    )
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:1 (default auto)")
    parser.add_argument("--dtype", help="float32, bfloat16, float16 (default by device)")
    parser.add_argument(
        "--batch_size", type=count(), default=8, help="images per forward pass (default 8)"
    )


def run(options: argparse.Namespace) -> int:
    """Load the pipeline and serve until SIGINT or SIGTERM.

    Args:
        options (`argparse.Namespace`): What `add_arguments` named.

    Returns:
        `int`: 0 after SIGTERM, 130 after SIGINT.

    Raises:
        UserError: The model cannot be loaded, the port is taken, or FastAPI and uvicorn
            are not installed.
    """
    try:
        from ..generation.serving import ModelService, create_model_app
        from ..rewards.serving.server import run_until_told
    except ImportError as error:
        raise UserError(
            f"serve-model needs FastAPI and uvicorn: pip install 'diffalign[serve]' ({error})"
        ) from None
    from ..generation.pipelines import load_for_scoring
    from ..runtime.devices import read_dtype

    dtype = read_dtype(options.dtype) if options.dtype else None
    pipe = load_for_scoring(options.model, dtype=dtype, device=options.device)
    app = create_model_app(ModelService(pipe, options.model, options.batch_size))
    try:
        run_until_told(app, options.host, options.port, options.model)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0
