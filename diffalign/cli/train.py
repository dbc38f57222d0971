"""`diffalign train`: from a run file to a finished run."""

from __future__ import annotations

import argparse
import shlex
from itertools import pairwise
from pathlib import Path

from ..config.ranges import count
from ..config.section import section_help
from ..config.yaml_text import dump_yaml
from ..data.config import DataConfig
from ..errors import UserError
from ..methods import METHODS, config_class
from ..recipe import RunConfig, build_trainer, load_run, run_to_dict
from ..rewards.registry import trust_files
from ..runtime.distributed import end_training
from ..shapes.models import embedded_name
from ..training.sections import HubConfig, LoraSection, ValidationConfig
from ..training.trained_weights import LORA_FILE
from .launch import launch
from .results import Result, result_arguments

_NEGATIVE = ("self_npo", "diffusion_npo")  # `compare` needs a mapping with `negative:`


_FLAGS = (
    "--config",
    "--dry_run",
    "--print_config",
    "--accelerate_config",
    "--num_processes",
    "--trust_remote_code",
)


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
    parser.add_argument("--trust_remote_code", action="store_true")


def run(options: argparse.Namespace) -> int | Result:
    """Train as the run file and the options say, or print the help.

    Args:
        options (`argparse.Namespace`): Options of the command. `overrides` are the
            arguments that `add_arguments` does not know: fields of the run file.

    Returns:
        `int` or `Result`: Exit code, or what was done.

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
    for text in options.overrides:
        name = text.partition("=")[0].replace("-", "_").replace("__", "--", 1)
        if name in _FLAGS:
            raise UserError(f"{text}: unknown option (did you mean {name}?)")
    if options.trust_remote_code:
        trust_files()
    run_config = load_run(options.config, options.overrides)
    if options.print_config:
        values = run_to_dict(run_config)
        return Result(dump_yaml(values).rstrip("\n"), values)
    if options.accelerate_config or (options.num_processes or 1) > 1:
        return _launch(options)
    return train_run(run_config, dry_run=options.dry_run)


def train_run(run: RunConfig, dry_run: bool = False) -> int | Result:
    """Train, or try one batch.

    Args:
        run (`RunConfig`): The run.
        dry_run (`bool`, *optional*, defaults to `False`): Try one batch.

    Returns:
        `Result` with step, status and last metrics.
    """
    trainer = build_trainer(run)
    if dry_run:
        trainer.dry_run()
        return Result("", {"output_dir": trainer.output_dir, "status": "tried one batch"})
    output = trainer.train()
    end_training(trainer.accelerator)
    facts = {
        "output_dir": trainer.output_dir,
        "status": "finished",
        "global_step": output.global_step,
        "metrics": output.metrics,
    }
    if output.interrupted_by is not None:
        text = (
            f"interrupted at step {output.global_step}: saved checkpoint-{output.global_step}; "
            "continue with --train.resume_from_checkpoint latest"
        )
        return Result(text, facts | {"status": "interrupted"}, 128 + output.interrupted_by)
    if output.waiting_for is not None:
        text = (
            f"votes wanted: {output.waiting_for} (open index.html; write votes.json beside it), "
            "then go on with --train.resume_from_checkpoint latest"
        )
        waiting = {"status": "waiting for votes", "waiting_for": output.waiting_for}
        return Result(text, facts | waiting)
    if output.hacked_at is not None:
        facts |= {"status": "stopped, the reward is hacked", "hacked_at": output.hacked_at}
    return Result(f"done: {trainer.output_dir}", facts, next=_next_command(run, trainer.output_dir))


def _next_command(run: RunConfig, folder: Path) -> str | None:
    """Return how to compare the result with its base, where `compare` reads it."""
    if run.method in _NEGATIVE or not isinstance(run.model, str):
        return None
    is_adapter = (folder / LORA_FILE).is_file()
    if not is_adapter and not (folder / "model_index.json").is_file():
        return None
    base, tuned = shlex.quote(run.model), shlex.quote(str(folder))
    command = f"diffalign compare --base {base} --tuned {tuned}"
    if embedded_name(run.model) is None:
        scorers = ["pickscore"]
        prompts = "partiprompts"
        if run.validation is not None:
            scorers = run.validation.scorers or scorers
            prompts = run.validation.prompts or prompts
        command += f" --prompts {shlex.quote(prompts)} --scorers {shlex.quote(','.join(scorers))}"
    return f"{command} --output_dir {shlex.quote(f'{folder}-compared')}"


def _launch(options: argparse.Namespace) -> int:
    """Run the same command in several processes."""
    program = ["train"]
    if options.config:
        program += ["--config", str(options.config)]
    program += (["--dry_run"] if options.dry_run else []) + options.overrides
    program += ["--trust_remote_code"] if options.trust_remote_code else []
    program += result_arguments(options)
    return launch(program, options.accelerate_config, options.num_processes)


def _help(overrides: list[str]) -> str:
    """All options of a run file, or with `--method NAME` those of one method."""
    method = dict(pairwise(overrides)).get("--method")
    text = [
        "usage: diffalign train --config FILE [--dry_run] [--print_config]",
        "                       [--accelerate_config NAME] [--num_processes N]",
        "                       [--trust_remote_code] [--json] [--quiet]",
        "                       [--SECTION.FIELD VALUE ...]",
        "",
        "Any field of a run file can be given on the command line, e.g. --model FOLDER",
        "--train.beta 2000 --lora.r 8.",
        "--dry_run runs one batch forward and backward and prints a summary of the run.",
        "--print_config prints the whole run file, with options and defaults, and exits.",
        "--trust_remote_code allows scorers of ./FILE.py:NAME, which runs that file.",
        "--json prints the result as JSON, --quiet no progress and no notes.",
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
