"""`diffalign score`: score a folder of images or a dataset."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.ranges import count
from ..errors import ConfigError, UserError
from ..rewards.panel_file import _mapping, panel_config
from ..runtime.distributed import DistributedContext
from ..runtime.files import unfinished_names
from .results import Result, read_json_file

if TYPE_CHECKING:
    from ..rewards.panel_config import RewardEntry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command.

    Args:
        parser (`argparse.ArgumentParser`): Parser of the command.
    """
    parser.add_argument(
        "--images", required=True, help="folder of images, or a dataset: Hub id, folder or file"
    )
    parser.add_argument("--scorers", help="comma-separated names, e.g. imagereward,pickscore")
    parser.add_argument(
        "--config", type=Path, help="YAML with rewards: and combine: instead of --scorers"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        help="prompts of a folder: a text file with a line per image, or .json, .jsonl",
    )
    parser.add_argument("--prompt", help="one prompt for all images of a folder")
    parser.add_argument("--split", default="train", help="split of a dataset (default: train)")
    parser.add_argument(
        "--columns",
        help="canonical names to your columns, e.g. '{prompt: text, chosen: good, rejected: bad}'",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("diffalign-scores"),
        help="default: diffalign-scores",
    )
    parser.add_argument(
        "--best",
        type=count(),
        metavar="N",
        help="also write the N best images of all prompts together, as single images with prompts "
        "(for Diffusion-DRO and SFT)",
    )
    parser.add_argument("--cache", type=Path, help="file that keeps scores across output folders")
    parser.add_argument(
        "--batch_size", type=count(), help="images per forward pass (default: the scorer's)"
    )
    parser.add_argument(
        "--chunk_size",
        type=count(),
        default=256,
        help="images scored between two saves (default: 256)",
    )
    parser.add_argument("--device", help="auto (default), cpu, cuda, cuda:1")
    parser.add_argument(
        "--dtype", help="precision of the scorers (default: float32, the reference)"
    )
    parser.add_argument(
        "--combine", help="how scorers are combined, e.g. winrate, zscore, weighted_sum"
    )
    parser.add_argument(
        "--placement",
        help="resident (default), offload, or exclusive: one scorer in memory at a time",
    )
    parser.add_argument(
        "--on_error",
        choices=("raise", "nan"),
        help="unreadable images: stop (raise, default) or give a missing score (nan)",
    )
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="allow scorers of ./file.py:Class, which runs that file",
    )
    parser.add_argument(
        "--scorer_args",
        help="options by scorer, e.g. '{pickscore: {model: FOLDER}, mps: {threshold: 0.01}}'",
    )


_WRITTEN = ("parts", "scores.parquet", "errors.jsonl", "summary.json", "best")


def _check_folder(folder: Path) -> None:
    """Refuse a folder with other files than those of this command.

    Raises:
        UserError: it holds something else.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    names -= unfinished_names(*_WRITTEN)
    others = sorted(names - set(_WRITTEN))
    if others or (names and "parts" not in names):
        shown = others or sorted(names)
        raise UserError(
            f"--output_dir: {str(folder)!r} holds something else ({', '.join(shown[:3])}); name "
            "another folder"
        )


def run(options: argparse.Namespace) -> int | Result:
    """Score the images and write `scores.parquet`, `errors.jsonl` and `summary.json`.

    Finished chunks are in the folder `parts` of the output. Their names are made of the
    scorer's fingerprint and the content. So an interrupted run goes on, another scorer
    can be added, and a changed image, prompt, weight or setting is scored again.

    Args:
        options (`argparse.Namespace`): Options of the command.

    Returns:
        `Result` with the summary. Other processes than the first return 0.

    Raises:
        UserError: Options, images, prompts or scorers do not fit, or an image cannot be
            read under `on_error=raise`.
    """
    for name in ("chunk_size", "batch_size", "best"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name}", f"expected int >= 1, got {value}")
    config = panel_config(
        scorers=options.scorers,
        file=options.config,
        scorer_args=options.scorer_args,
        combine=options.combine,
        trust_remote_code=options.trust_remote_code,
        overrides={name: getattr(options, name) for name in ("batch_size", "dtype", "on_error")},
    )
    config |= {
        name: getattr(options, name)
        for name in ("placement", "cache")
        if getattr(options, name) is not None
    }
    processes = DistributedContext.start(options.device)
    from ..annotation.score_parts import ScoreWork, score_all
    from ..annotation.score_report import write_report
    from ..annotation.score_source import open_images
    from ..rewards.panel import Panel
    from ..rewards.registry import get_spec

    source = open_images(
        options.images,
        prompt=options.prompt,
        prompts=options.prompts,
        split=options.split,
        columns=_mapping(options.columns, "--columns", "{prompt: text}"),
        skip_broken=options.on_error == "nan",
    )
    entries: list[RewardEntry] = config["rewards"]
    specs = [
        get_spec(entry.scorer, trust_remote_code=options.trust_remote_code) for entry in entries
    ]
    need_prompts = [spec.key for spec in specs if "prompt" in spec.requires]
    need_metadata = [spec.key for spec in specs if "metadata" in spec.requires]
    if options.best is not None:
        need_prompts.append("--best")
        if all(entry.role == "eval" for entry in entries):
            raise UserError(
                "--best: all scorers have the role eval, so none says which images are the best; "
                "give one the role train"
            )
    source.check(need_prompts, need_metadata)
    if options.output_dir.resolve().is_relative_to(Path(options.images).expanduser().resolve()):
        raise UserError(
            f"--output_dir: {str(options.output_dir)!r} lies inside --images; name a folder "
            "elsewhere"
        )
    parts = options.output_dir / "parts"
    _check_folder(options.output_dir)
    parts.mkdir(parents=True, exist_ok=True)
    try:
        panel = Panel.from_config(
            config, device=processes.device, trust_remote_code=options.trust_remote_code
        )
    except Exception:
        with contextlib.suppress(OSError):  # there are scores, or another process was faster
            parts.rmdir()
            options.output_dir.rmdir()
        raise
    work = ScoreWork(panel, source, source.chunks(options.chunk_size), parts)
    table = score_all(work, processes)
    processes.stop()
    if processes.rank > 0:
        return 0
    text = write_report(table, panel, source, options.output_dir, combine_asked="combine" in config)
    facts = read_json_file(options.output_dir / "summary.json")
    if options.best is not None:
        from ..annotation.best import write_best_of_source

        best = options.output_dir / "best"
        line = write_best_of_source(best, source, work.chunks, table, panel, options.best)
        text, facts = f"{text}\n{line}", {**facts, "best": best}
    return Result(text, facts)
