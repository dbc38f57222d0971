"""`diffalign data build`: draw images, score them, and write preference data."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path
from typing import Any

from ..annotation.drawn import FORMATS, SELECTIONS, BuildOptions
from ..config.ranges import count, finite, not_negative, seed, side, steps
from .results import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command.

    Args:
        parser (`argparse.ArgumentParser`): Parser of the command.
    """
    parser.add_argument(
        "--prompts",
        required=True,
        help="text file with a prompt per line, a dataset with prompts, shapes, shapes-held-out or "
        "a named set as in compare",
    )
    parser.add_argument("--max_prompts", type=count(), help="use only the first N prompts")
    parser.add_argument(
        "--models",
        nargs="+",
        default=["shapes"],
        help="Hub ids, folders, shapes (default) or shapes-flow",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        help="LoRA on the first model, as another model; may be given several times",
    )
    parser.add_argument("--scorers", help="comma-separated names, e.g. imagereward,pickscore")
    parser.add_argument(
        "--rewards_config", type=Path, help="YAML with rewards: and combine: instead of --scorers"
    )
    parser.add_argument(
        "--scorer_args", help="options by scorer, e.g. '{pickscore: {model: FOLDER}}'"
    )
    parser.add_argument(
        "--num_images", type=count(), default=4, help="images per prompt and model (default 4)"
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--format", default="both", choices=FORMATS, help="what to write (default both)"
    )
    parser.add_argument(
        "--pair_selection",
        default="best_worst",
        choices=SELECTIONS,
        help="best_worst (default): one pair per prompt; best_vs_rest; all; unanimous: the widest "
        "on which all scorers agree",
    )
    parser.add_argument(
        "--min_margin",
        type=not_negative,
        default=0.0,
        help="smallest difference of combined scores within a pair (default 0: any)",
    )
    parser.add_argument(
        "--best",
        type=count(),
        metavar="N",
        help="also write the N best images of all prompts together, as single images with prompts "
        "(for Diffusion-DRO and SFT)",
    )
    parser.add_argument("--combine", help="how scorers are combined (default winrate)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the images (default 0)")
    parser.add_argument(
        "--num_inference_steps", type=steps, help="sampler steps (default: the pipeline's)"
    )
    parser.add_argument("--guidance_scale", type=finite, help="guidance (default: the pipeline's)")
    parser.add_argument(
        "--resolution", type=side, help="side of the images (default: the pipeline's)"
    )
    parser.add_argument(
        "--batch_size",
        type=count(),
        default=8,
        help="images per forward pass of a model (default 8)",
    )
    parser.add_argument("--device", help="auto (default), cpu, cuda, cuda:1")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="precision of the models (default: bfloat16 on a GPU, else float32)",
    )
    parser.add_argument(
        "--placement",
        default="exclusive",
        help="where scorers are kept: exclusive (default: one in memory), offload or resident",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        help="file that keeps scores (default: scores.sqlite in the output folder)",
    )
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="allow scorers of ./file.py:Class, which runs that file",
    )


def run(options: argparse.Namespace) -> int | Result:
    """Build the data.

    Args:
        options (`argparse.Namespace`): Options of the command.

    Returns:
        `Result` with folders and counts. Other processes than the first return 0.

    Raises:
        UserError: See `diffalign.annotation.build.build`.
    """
    from ..annotation.build import build
    from ..shapes.models import embedded_name

    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(BuildOptions)}
    text = build(BuildOptions(**values))
    if text is None:
        return 0
    folder: Path = options.output_dir
    facts: dict[str, Any] = {"output": folder}
    for kind in ("pairs", "ranked", "best"):
        files = sorted((folder / kind).glob("*.parquet"))
        if files:
            facts[kind] = {"folder": folder / kind, "rows": sum(map(_rows, files))}
    method, kind = "rankdpo", "ranked"
    if options.best is not None:
        method, kind = "diffusion_dro", "best"
    elif "pairs" in facts:
        method, kind = "diffusion_dpo", "pairs"
    embedded = all(embedded_name(model) is not None for model in options.models)
    recipe = "shapes" if embedded else "sdxl_lora"
    command = f"diffalign train --config configs/{method}/{recipe}.yaml"
    command += f" --data.dataset_name {shlex.quote(str(folder / kind))}"
    return Result(text, facts, next=command if len(facts) > 1 else None)


def _rows(file: Path) -> int:
    from pyarrow.parquet import read_metadata

    return int(read_metadata(file).num_rows)
