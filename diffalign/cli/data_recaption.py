"""`diffalign data recaption`: write pairs with two captions, for DCPO."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..annotation.recaption import STRATEGIES, TEXTS, read_pairs, recaption
from ..config.ranges import count, seed, share
from ..data.config import read_columns
from ..errors import ConfigError
from ..runtime.files import check_output_dir
from ..runtime.hashing import place_hash
from .results import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command.

    Args:
        parser (`argparse.ArgumentParser`): Parser of the command.
    """
    parser.add_argument("source", help="pairs or ranked lists: Hub id, folder or file")
    parser.add_argument(
        "--output_dir",
        type=Path,
        required=True,
        help="output folder; run the command again to continue",
    )
    parser.add_argument(
        "--strategy",
        choices=STRATEGIES,
        required=True,
        help="c: captions, p: perturbed prompt, h: both",
    )
    parser.add_argument(
        "--captioner",
        help="shapes, an image-to-text model of transformers, module:object, ./file.py:object",
    )
    parser.add_argument(
        "--perturber",
        default="rules",
        help="rules (default), shapes, a paraphrase model, module:object",
    )
    parser.add_argument(
        "--level",
        default="medium",
        choices=("weak", "medium", "strong"),
        help="strength of the perturbation (default medium)",
    )
    parser.add_argument(
        "--perturb",
        default="rejected",
        choices=("rejected", "chosen"),
        help="strategy h: caption to perturb (default rejected)",
    )
    parser.add_argument(
        "--instruction", help="what a chat model is asked; {prompt} stands for the prompt"
    )
    parser.add_argument(
        "--perturber_template", help="what a paraphrase model reads; {text} stands for the caption"
    )
    parser.add_argument("--split", default="train", help="default: train")
    parser.add_argument(
        "--columns", help="canonical names to your columns, as in diffalign data inspect"
    )
    parser.add_argument(
        "--seed", type=seed, default=0, help="seed of the perturbations (default 0)"
    )
    parser.add_argument(
        "--batch_size", type=count(), default=8, help="texts or images at once (default 8)"
    )
    parser.add_argument("--device", help="auto (default), cpu, cuda, cuda:1")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="precision of the models (default: bfloat16 on a GPU, else float32)",
    )
    parser.add_argument(
        "--max_empty_fraction",
        type=share,
        default=0.05,
        help="largest share of pairs without a caption; more is an error (default 0.05)",
    )
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="allow ./file.py:object, which runs that file",
    )


def run(options: argparse.Namespace) -> Result:
    """Write the recaptioned pairs.

    Args:
        options (`argparse.Namespace`): Options of the command.

    Returns:
        `Result` with the folder.

    Raises:
        UserError: The options or the data do not fit.
    """
    columns = read_columns(options.columns)
    if options.strategy != "p" and not options.captioner:
        raise ConfigError(
            "--captioner",
            f"strategy {options.strategy} needs one: shapes, a model of transformers, or "
            "module:object",
        )
    if options.batch_size < 1:
        raise ConfigError("--batch_size", f"expected int >= 1, got {options.batch_size}")
    # The data come first, because a captioner may be large and the path may be wrong.
    dataset = read_pairs(options.source, split=options.split, columns=columns)
    check_output_dir(options.output_dir, TEXTS)
    captioner, perturber = _tools(options)
    text = recaption(
        dataset,
        options.output_dir,
        options.strategy,
        captioner=captioner,
        perturber=perturber,
        perturb=options.perturb,
        names=(
            f"{options.captioner}|{options.instruction or ''}{_content(options.captioner)}",
            f"{options.perturber}{_content(options.perturber)}|{options.level}|{options.seed}|"
            f"{options.perturber_template or ''}",
        ),
        batch_size=options.batch_size,
        max_empty_fraction=options.max_empty_fraction,
    )
    return Result(text, {"output": options.output_dir / "data", "summary": text.splitlines()})


def _content(name: str | None) -> str:
    """Hash a tool of this machine. One that was changed in its place is another one."""
    content = place_hash(name)
    return f"|{content}" if content else ""


def _tools(options: argparse.Namespace) -> tuple[Any, Any]:
    """Build captioner and perturber, None where the strategy needs none."""
    from ..annotation.captioners import make_captioner
    from ..annotation.perturbers import make_perturber

    placed = {
        "device": options.device,
        "dtype": options.dtype,
        "trust_remote_code": options.trust_remote_code,
    }
    instruction = {"instruction": options.instruction} if options.instruction else {}
    template = {"template": options.perturber_template} if options.perturber_template else {}
    captioner = (
        None
        if options.strategy == "p"
        else make_captioner(options.captioner, **placed, **instruction)
    )
    if options.strategy == "c":
        return captioner, None
    return captioner, make_perturber(
        options.perturber, options.level, options.seed, **placed, **template
    )
