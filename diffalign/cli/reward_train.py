"""`diffalign reward train`: a reward from votes, pairs, lists or thumbs."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..config.ranges import count
from ..config.section import section_help
from ..recipe import apply_overrides, read_yaml
from ..reward_training.config import RewardConfig
from ..reward_training.run_file import RewardRun, reward_run_from_dict
from ..runtime.distributed import process_rank
from ..training.sections import LoraSection
from .launch import launch
from .results import Result, read_json_file, result_arguments

_NAMES = ("model", "model_path", "data", "eval_data")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command.

    Args:
        parser (`argparse.ArgumentParser`): Parser of the command.
    """
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", type=Path, help="run file; its fields may follow as options")
    parser.add_argument("--model", help="the base, a scorer such as clip-l14 or pickscore")
    parser.add_argument("--model_path", help="weights of the base (default: the published ones)")
    parser.add_argument("--data", help="pairs, lists, likes, or a folder of the demo's votes")
    parser.add_argument("--eval_data", help="judgements of other prompts, for the report")
    parser.add_argument("--accelerate_config", help="for trained towers: ddp or an accelerate file")
    parser.add_argument("--num_processes", type=count(), help="for trained towers: processes")
    parser.epilog = "\n".join(
        ["train:", section_help(RewardConfig, "train"), "lora:", section_help(LoraSection, "lora")]
    )


def run(options: argparse.Namespace) -> int | Result:
    """Train a reward and say how good it is.

    Args:
        options (`argparse.Namespace`): Options of the command. `overrides` are fields
            such as `--train.members 4`.

    Returns:
        `int` or `Result`: Exit code, or what was done.

    Raises:
        UserError: A field or the data cannot be used.
    """
    overrides = [*options.overrides]
    for name in _NAMES:
        if getattr(options, name) is not None:
            overrides += [f"--{name}", getattr(options, name)]
    values = read_yaml(options.config) if options.config is not None else {}
    reward = reward_run_from_dict(apply_overrides(values, overrides, RewardRun))
    if options.accelerate_config or (options.num_processes or 1) > 1:
        reward.train.check_processes()
        program = ["reward", "train", *overrides]
        program += ["--config", str(options.config)] if options.config is not None else []
        program += result_arguments(options)
        return launch(program, options.accelerate_config, options.num_processes)
    return _train(reward)


def _train(reward: RewardRun) -> int | Result:
    from ..reward_training.report import NO_GAIN, REPORT, gains, in_words
    from ..reward_training.trainer import RewardTrainer

    trainer = RewardTrainer(
        reward.model,
        reward.train,
        reward.data,
        reward.eval_data,
        model_path=reward.model_path,
        columns=reward.columns,
        peft_config=reward.lora.to_peft() if reward.lora is not None else None,
        like_threshold=reward.like_threshold,
    )
    if process_rank() > 0:
        trainer.train()
        return 128 + trainer.interrupted_by if trainer.interrupted_by else 0
    notes = trainer.judgements.notes
    printed = len(notes)
    for note in notes:
        print(note)
    sizes = ", ".join(f"{len(part)} {name}" for name, part in trainer.parts.items())
    print(
        f"{len(trainer.judgements)} pairs of {len(trainer.judgements.prompts)} prompts and "
        f"{len(trainer.judgements.images)} images: {sizes}"
    )
    folder = trainer.train()
    if trainer.interrupted_by is not None:
        text = (
            f"interrupted: {folder} holds a checkpoint; continue with "
            "--train.resume_from_checkpoint latest"
        )
        facts = {"output_dir": folder, "status": "interrupted"}
        return Result(text, facts, 128 + trainer.interrupted_by)
    report = read_json_file(folder / REPORT)
    lines = []
    for name in ("base", "reward"):
        row = report[name]
        lines.append(
            f"{name:<7} {row['accuracy']:.1%} right ({in_words(row)}) on {row['pairs']} pairs of "
            f"{row['prompts']} prompts that were not trained on"
        )
    lines.append(f"calibration error {report['expected_calibration_error']:.3f}")
    lines += notes[printed:]  # of the training
    if not gains(report):
        lines.append(NO_GAIN.replace("**", ""))
    lines.append(f"wrote {folder}: use it wherever a scorer is named, e.g. --scorers {folder}")
    facts = {"output_dir": folder, "status": "finished", **report}
    return Result("\n".join(lines), facts)
