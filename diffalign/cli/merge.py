"""`diffalign merge`: add up the LoRAs or the full weights of several runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import ConfigError, UserError
from ..generation.merge import is_pipeline, merge_loras, merge_pipelines
from ..runtime.files import check_replaceable
from .results import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command.

    Args:
        parser (`argparse.ArgumentParser`): Parser of the command.
    """
    parser.add_argument(
        "--inputs",
        nargs="+",
        required=True,
        help="LoRAs, or pipelines of full weights (folders or Hub ids)",
    )
    parser.add_argument(
        "--weights", type=float, nargs="+", help="one weight per input (default: equal shares)"
    )
    parser.add_argument(
        "--model",
        required=True,
        help="the base: Hub id or folder of a pipeline, shapes or shapes-flow",
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="where the merged weights go"
    )


def run(options: argparse.Namespace) -> Result:
    """Merge the weights and write them.

    Args:
        options (`argparse.Namespace`): Options of the command.

    Returns:
        `int` or `Result`: Exit code, or what was done.

    Raises:
        UserError: The inputs or the number of weights do not fit, or the output folder
            is not empty.
    """
    weights = options.weights or [1 / len(options.inputs)] * len(options.inputs)
    if len(weights) != len(options.inputs):
        raise ConfigError(
            "--weights", f"expected one per input ({len(options.inputs)}), got {len(weights)}"
        )
    if not all(-1e6 < weight < 1e6 for weight in weights):
        raise ConfigError("--weights", f"expected numbers, got {weights}")
    out: Path = options.output_dir
    check_replaceable(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--output_dir: {str(out)!r} exists and is not empty; name another folder")
    full = [is_pipeline(name) for name in options.inputs]
    if any(full) and not all(full):
        lora = options.inputs[full.index(False)]
        raise UserError(
            f"--inputs: {lora!r} is a LoRA and others are pipelines; merge one kind at a time"
        )
    notes: list[str] = []
    if all(full):
        notes = merge_pipelines(options.model, options.inputs, weights, out)
    else:
        merge_loras(options.model, options.inputs, weights, out)
    parts = list(zip(map(str, options.inputs), weights, strict=True))
    text = ", ".join(f"{weight:g} x {name}" for name, weight in parts)
    facts = {"output": out, "parts": [{"input": name, "weight": w} for name, w in parts]}
    facts["notes"] = notes
    return Result("\n".join([*notes, f"wrote {out}: {text}"]), facts)
