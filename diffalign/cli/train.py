"""`diffalign train`: from a run file to a finished run."""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

from ..config.ranges import count
from ..config.section import section_help
from ..config.yaml_text import dump_yaml
from ..data.config import DataConfig
from ..errors import UserError
from ..methods import METHODS, config_class
from ..recipe import RunConfig, build_trainer, load_run, run_to_dict
from ..runtime.distributed import end_training
from ..training.sections import HubConfig, LoraSection, ValidationConfig
from .launch import launch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command.

    `-h` is one of them, since the help depends on `--method`.

    Args:
        parser (`argparse.ArgumentParser`): Parser of the command.
    """
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--print_config", action="store_true")
    parser.add_argument("--accelerate_config")
    parser.add_argument("--num_processes", type=count())


def run(options: argparse.Namespace) -> int:
    """Train as the run file and the options say, or print the help.

    Args:
        options (`argparse.Namespace`): Options of the command. `overrides` are the
            arguments that `add_arguments` does not know: fields of the run file.

    Returns:
        `int`: Exit code.

    Raises:
        UserError: A field or an option cannot be used.
    """
    if options.help:
        print(_help(options.overrides))
        return 0
    if options.config is None and not options.overrides:
        raise UserError(
            "--config: name a run file, e.g. diffalign train --config "
            "configs/diffusion_dpo/shapes.yaml"
        )
    run_config = load_run(options.config, options.overrides)
    if options.print_config:
        print(dump_yaml(run_to_dict(run_config)), end="")
        return 0
    if options.accelerate_config or (options.num_processes or 1) > 1:
        return _launch(options)
    return train_run(run_config, dry_run=options.dry_run)


def train_run(run: RunConfig, dry_run: bool = False) -> int:
    """Train, or try one batch; return the exit code."""
    trainer = build_trainer(run)
    if dry_run:
        trainer.dry_run()
        return 0
    output = trainer.train()
    end_training(trainer.accelerator)
    if output.interrupted_by is not None:
        trainer.accelerator.print(
            f"interrupted at step {output.global_step}: saved checkpoint-{output.global_step}; "
            "continue with --train.resume_from_checkpoint latest"
        )
        return 128 + output.interrupted_by
    if output.waiting_for is not None:
        trainer.accelerator.print(
            f"votes wanted: {output.waiting_for} (open index.html; write votes.json beside it), "
            "then go on with --train.resume_from_checkpoint latest"
        )
        return 0
    trainer.accelerator.print(f"done: {trainer.output_dir}")
    return 0


def _launch(options: argparse.Namespace) -> int:
    """Run the same command in several processes."""
    program = ["train"]
    if options.config:
        program += ["--config", str(options.config)]
    program += (["--dry_run"] if options.dry_run else []) + options.overrides
    return launch(program, options.accelerate_config, options.num_processes)


def _help(overrides: list[str]) -> str:
    """All options of a run file, or with `--method NAME` those of one method."""
    method = dict(pairwise(overrides)).get("--method")
    text = [
        "usage: diffalign train --config FILE [--dry_run] [--print_config]",
        "                       [--accelerate_config NAME] [--num_processes N]",
        "                       [--SECTION.FIELD VALUE ...]",
        "",
        "Any field of a run file can be given on the command line, e.g. --model FOLDER",
        "--train.beta 2000 --lora.r 8.",
        "--dry_run does one batch forward and backward and says what the run would be.",
        "--print_config writes the whole run file, with options and defaults, and ends.",
        "--method NAME --help shows the options of one method.",
        f"methods: {', '.join(METHODS)}",
    ]
    sections = {
        "lora": LoraSection,
        "data": DataConfig,
        "validation": ValidationConfig,
        "hub": HubConfig,
    }
    for name, cls in sections.items():
        text += ["", f"{name}:", section_help(cls, name)]
    for name in [method] if method in METHODS else METHODS:
        text += ["", f"train (method: {name}):", section_help(config_class(name), "train")]
    return "\n".join(text)
