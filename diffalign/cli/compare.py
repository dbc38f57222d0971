"""`diffalign compare`: compare tuned models with their base, image by image."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..config.ranges import count, finite, not_negative, read_scales, seed, side, steps
from ..config.yaml_text import read_yaml_text
from ..errors import ConfigError, UserError
from ..rewards.registry import trust_files
from ..runtime.distributed import process_rank
from .results import Result, read_json_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command.

    Args:
        parser (`argparse.ArgumentParser`): Parser of the command.
    """
    what = (
        "[NAME=]Hub id, folder, LoRA[@SCALE], or a YAML mapping such as "
        "'{lora: runs/a, lora_scale: 0.5}'"
    )
    parser.add_argument(
        "--base",
        default="shapes",
        help="the model to compare with: Hub id, folder, shapes (default) or shapes-flow",
    )
    parser.add_argument(
        "--tuned", action="append", default=[], help=f"{what}; may be given several times"
    )
    parser.add_argument(
        "--lora_scales", help="LoRA scales such as 0,0.5,1: one model per LoRA of --tuned and scale"
    )
    parser.add_argument(
        "--steer",
        help="also compare the base steered by this scorer (best particle) with the base as it is",
    )
    parser.add_argument(
        "--num_particles", type=count(), default=4, help="particles of --steer (default 4)"
    )
    parser.add_argument("--lmbda", type=not_negative, help="strength of --steer, in 1/reward")
    parser.add_argument(
        "--prompts",
        default="shapes",
        help="shapes (default), partiprompts, drawbench, hpdv2, geneval, pickapic-test, or a file",
    )
    parser.add_argument(
        "--prompts_path",
        type=Path,
        help="file or folder of a named set (default: the folder in DIFFALIGN_PROMPTS)",
    )
    parser.add_argument(
        "--max_prompts", type=count(), help="use so many prompts, evenly over the set"
    )
    parser.add_argument(
        "--scorers",
        help="comma-separated names; the first decides (default for shapes: shapes)",
    )
    parser.add_argument(
        "--rewards_config", type=Path, help="YAML with rewards: instead of --scorers"
    )
    parser.add_argument(
        "--scorer_args", help="options by scorer, e.g. '{pickscore: {model: FOLDER}}'"
    )
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="allow scorers of ./file.py:Class, which runs that file",
    )
    parser.add_argument(
        "--diversity",
        default="pixel",
        help="pixel (default), or a scorer with an image embedding, e.g. clip-l14",
    )
    parser.add_argument(
        "--num_images", type=count(), default=4, help="images per prompt (default 4)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="default 0")
    parser.add_argument(
        "--num_inference_steps", type=steps, help="sampler steps (default: the pipeline's)"
    )
    parser.add_argument("--guidance_scale", type=finite, help="guidance (default: the pipeline's)")
    parser.add_argument(
        "--guidance_scales",
        help="guidance scales such as 1,2,3,5,7; models are compared at their best ones",
    )
    parser.add_argument(
        "--height", type=side, help="image height in pixels (default: the pipeline's)"
    )
    parser.add_argument(
        "--width", type=side, help="image width in pixels (default: the pipeline's)"
    )
    parser.add_argument(
        "--batch_size", type=count(), default=8, help="images per forward pass (default 8)"
    )
    parser.add_argument("--device", help="auto (default), cpu, cuda, cuda:1")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="precision of the models (default: bfloat16 on a GPU, else float32)",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("diffalign-comparison"),
        help="default: diffalign-comparison",
    )


def run(options: argparse.Namespace) -> int | Result:
    """Compare the models and print the tables.

    Args:
        options (`argparse.Namespace`): Options of the command.

    Returns:
        `int` or `Result`: Exit code, or what was done.

    Raises:
        UserError: The options do not fit. Raised before anything is drawn.
    """
    for name, least in (
        ("max_prompts", 1),
        ("num_inference_steps", 1),
        ("height", 8),
        ("width", 8),
        ("num_particles", 1),
    ):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name}", f"expected int >= {least}, got {value}")
    if options.trust_remote_code:
        trust_files()
    scales = _numbers(options.guidance_scales, "--guidance_scales", "1,2,3,5,7")
    if options.guidance_scales is not None:
        if options.guidance_scale is not None:
            raise ConfigError("--guidance_scale", "it cannot be combined with --guidance_scales")
        scales = read_scales(scales, "--guidance_scales")
    tuned = _tuned(options)
    call = {
        name: getattr(options, name)
        for name in ("num_inference_steps", "guidance_scale", "height", "width")
    }
    names = (
        "output_dir",
        "num_images",
        "seed",
        "max_prompts",
        "prompts_path",
        "batch_size",
        "diversity",
        "device",
    )
    dtype = None
    if options.dtype is not None:
        from ..runtime.devices import read_dtype

        dtype = read_dtype(options.dtype)
    arguments: dict[str, Any] = {
        "dtype": dtype,
        **{name: getattr(options, name) for name in names},
        **{name: value for name, value in call.items() if value is not None},
    }
    models = (options.base, tuned, options.prompts, _scorers(options))
    if scales:
        from ..evaluation.guidance_sweep import compare_guidance

        table = compare_guidance(*models, guidance_scales=scales, **arguments).table()
    else:
        from ..evaluation.compare import compare

        table = compare(*models, **arguments).table()
    if process_rank() > 0:
        return 0
    folder = options.output_dir
    files = {"page": "report.html", "picture": "grid.png"}
    files |= {"curves": "guidance.svg"} if scales else {}
    files |= {"numbers": "results.json", "per image": "scores.parquet"}
    places = [f"{name:<10} {folder / file}" for name, file in files.items()]
    return Result("\n".join([table, "", *places]), read_json_file(folder / "results.json"))


def _tuned(options: argparse.Namespace) -> list[Any]:
    """List the models to compare with the base, one per LoRA scale, steering last."""
    from ..evaluation.models import parse_model

    base = parse_model(options.base, "--base")
    models: list[Any] = []
    scales = _numbers(options.lora_scales, "--lora_scales", "0,0.5,1")
    for value in options.tuned:
        spec = parse_model(value, "--tuned", base=base)
        if scales and spec.lora is not None:
            plain = spec.name.split("@")[0]
            models += [
                {**vars(spec), "name": f"{plain}@{scale:g}", "lora_scale": scale}
                for scale in scales
            ]
        else:
            models.append(value)
    if scales and not any(isinstance(value, dict) for value in models):
        raise ConfigError("--lora_scales", "there is no LoRA among --tuned")
    if options.steer is not None:
        steer: dict[str, Any] = {"scorer": options.steer, "num_particles": options.num_particles}
        if options.lmbda is None:
            raise ConfigError(
                "--lmbda", "--steer needs one: the tilt in units of 1/reward, e.g. 10"
            )
        if options.num_particles < 2:
            raise ConfigError(
                "--num_particles", f"steering needs at least 2, got {options.num_particles}"
            )
        scorer_options = _scorer_options(options).get(options.steer)
        models.append(
            {
                "name": "steered",
                "steer": {
                    **steer,
                    "lmbda": options.lmbda,
                    **({"scorer_args": scorer_options} if scorer_options else {}),
                },
            }
        )
    if not models:
        raise UserError(
            "--tuned: name at least one model to compare with the base (or --steer SCORER)"
        )
    return models


def _numbers(text: str | None, option: str, example: str) -> list[float]:
    """Read numbers with commas between.

    Raises:
        ConfigError: Something else is there. The message names the option.
    """
    try:
        return [float(part) for part in (text or "").split(",") if part.strip()]
    except ValueError:
        raise ConfigError(
            option, f"expected comma-separated numbers, e.g. {example}, got {text!r}"
        ) from None


def _scorer_options(options: argparse.Namespace) -> dict[str, Any]:
    """Read the options by scorer. `panel_config` refuses what is no mapping."""
    text = options.scorer_args
    values = read_yaml_text(text, "--scorer_args") if text else None
    return values if isinstance(values, dict) else {}


def _scorers(options: argparse.Namespace) -> Any:
    if options.scorers is None and options.rewards_config is None:
        return None
    from ..rewards.panel_file import panel_config

    arguments, values = options.scorer_args, _scorer_options(options)
    if options.steer in values and options.steer not in (options.scorers or "").split(","):
        del values[options.steer]  # of the steering scorer alone
        arguments = json.dumps(values) if values else None
    config = panel_config(
        scorers=options.scorers,
        file=options.rewards_config,
        file_option="--rewards_config",
        scorer_args=arguments,
        trust_remote_code=options.trust_remote_code,
        overrides={"on_error": "nan"},
    )
    return {"rewards": config["rewards"]}
