"""`diffalign sample`: draw images of a model, with and without a LoRA."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from ..config.ranges import count, finite, seed, steps
from ..errors import ConfigError, UserError
from ..runtime.files import claim_output_dir, holds_run, save_image
from ..runtime.folder_lock import FolderLock
from ..runtime.missing import check_any, left_out, present
from .results import Result


class _Renamed(argparse.Action):
    """An old name of an option. It works until version 0.3, and says its new name."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        print(
            f"diffalign: {option_string} is now called --{self.dest}; the old name goes in "
            "version 0.3",
            file=sys.stderr,
        )
        setattr(namespace, self.dest, values)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command.

    Args:
        parser (`argparse.ArgumentParser`): Parser of the command.
    """
    parser.add_argument(
        "--model",
        default="shapes",
        help="Hub id, folder or single file of a pipeline, shapes (default) or shapes-flow",
    )
    parser.add_argument(
        "--lora", help="folder, file or Hub id of LoRA weights; base images are drawn beside"
    )
    parser.add_argument(
        "--lora_scale", type=finite, default=1.0, help="strength of the LoRA (default 1.0)"
    )
    parser.add_argument(
        "--negative_lora",
        help="negative model (Diffusion-NPO, Self-NPO) for the unconditional branch: LoRA, "
        "or pipeline folder of full weights",
    )
    parser.add_argument(
        "--positive_share",
        type=finite,
        default=1.0,
        help="share of --lora in the negative branch (default 1.0)",
    )
    parser.add_argument(
        "--negative_share",
        type=finite,
        default=1.0,
        help="share of --negative_lora in the negative branch (default 1.0)",
    )
    parser.add_argument(
        "--user_adapter", help="folder of a PPD run; images of a user are drawn beside the base"
    )
    parser.add_argument(
        "--user", help="with --user_adapter: a user, or a mixture such as ann=0.3,bob=0.7"
    )
    parser.add_argument(
        "--user_pairs",
        help="with --user_adapter: preference pairs of a new user, who is approximated by a "
        "mixture of known users",
    )
    for old, new in (("--alpha", "positive_share"), ("--beta", "negative_share")):
        # The default would overwrite that of the new name.
        parser.add_argument(
            old,
            dest=new,
            type=finite,
            action=_Renamed,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )
    parser.add_argument(
        "--prompt", action="append", required=True, help="prompt; may be given several times"
    )
    parser.add_argument(
        "--num_images", type=count(), default=4, help="images per prompt (default 4)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the first image (default 0)")
    parser.add_argument(
        "--num_inference_steps", type=steps, help="sampler steps (default: the pipeline's)"
    )
    parser.add_argument("--guidance_scale", type=finite, help="guidance (default: the pipeline's)")
    parser.add_argument(
        "--batch_size", type=count(), default=4, help="images per forward pass (default 4)"
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        help=f"default: {_DEFAULT_DIR}, with a number if that holds other images",
    )


_DEFAULT_DIR = "diffalign-samples"
_DECIDING = (
    "model",
    "prompt",
    "num_images",
    "seed",
    "num_inference_steps",
    "guidance_scale",
    "lora",
    "lora_scale",
    "negative_lora",
    "positive_share",
    "negative_share",
    "user_adapter",
    "user",
    "user_pairs",
)
"""Options that decide the images."""


_SETTINGS, _LONG = "settings.json", ("prompt", "files of the models")


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what decides the images, with the content of local files."""
    from ..runtime.hashing import place_hash

    places = ("model", "lora", "negative_lora", "user_adapter", "user_pairs")
    hashes = {name: place_hash(getattr(options, name)) for name in places}
    asked = {name: value for name, value in vars(options).items() if name in _DECIDING}
    return asked | {_LONG[1]: {name: content for name, content in hashes.items() if content}}


def _take_folder(options: argparse.Namespace, settings: dict[str, Any]) -> FolderLock:
    """Hold the folder that the user named, or the first free one.

    Raises:
        UserError: the user's folder holds other images, or another command draws there.
    """
    names = [_DEFAULT_DIR, *(f"{_DEFAULT_DIR}-{number}" for number in range(2, 1000))]
    for folder in [options.output_dir] if options.output_dir else map(Path, names):
        lock = FolderLock(folder)
        try:
            holds_run(folder, _SETTINGS, settings, _LONG)
            lock.take()
            holds_run(folder, _SETTINGS, settings, _LONG)  # another one may just have ended
        except UserError:
            lock.release()
            if options.output_dir is None:
                continue
            raise
        return lock
    raise UserError(f"--output_dir: {_DEFAULT_DIR} and 998 others are taken; name a folder")


def _check_lora_options(options: argparse.Namespace) -> None:
    """Refuse options of LoRAs that would have no effect.

    Raises:
        ConfigError: A scale or share without its model, or a negative model without
            guidance.
    """
    for name, model in (
        ("lora_scale", "lora"),
        ("positive_share", "negative_lora"),
        ("negative_share", "negative_lora"),
    ):
        if getattr(options, name) != 1 and not getattr(options, model):
            raise ConfigError(f"--{name}", f"has no effect without --{model}; leave it out")
    scale = options.guidance_scale
    if options.negative_lora and scale is not None and scale <= 1:
        raise ConfigError(
            "--guidance_scale",
            f"at {scale:g} the negative model has no effect; give a scale above 1",
        )


def _check_user_options(options: argparse.Namespace) -> None:
    """Refuse options of users that do not fit together."""
    if not options.user_adapter:
        for name in ("user", "user_pairs"):
            if getattr(options, name):
                raise ConfigError(f"--{name}", "name the folder of a PPD run with --user_adapter")
        return
    if bool(options.user) == bool(options.user_pairs):
        raise ConfigError("--user", "give either --user or --user_pairs with --user_adapter")
    for name in ("lora", "negative_lora"):
        if getattr(options, name):
            raise ConfigError(
                f"--{name}", "cannot be combined with --user_adapter; leave out one of them"
            )


def _read_user(pipe: Any, options: argparse.Namespace) -> tuple[Any, Any]:
    """Load the user adapter and resolve the user, before anything is drawn."""
    from ..data import load_preferences
    from ..generation.users import MOST_PAIRS, load_users, mixture_words, read_mixture

    users = load_users(pipe, options.user_adapter)
    if not options.user_pairs:
        user: Any = read_mixture(options.user)
        users.adapter.embedding(user)
        return users, user
    pairs = load_preferences(options.user_pairs, verbose=False).as_kind("pair")
    if len(pairs) > MOST_PAIRS:
        print(f"--user_pairs: the last {MOST_PAIRS} of {len(pairs)} pairs are read")
    some = [pairs[i] for i in range(max(0, len(pairs) - MOST_PAIRS), len(pairs))]
    user = users.from_pairs([(pair.prompts[0], *pair.open_images()) for pair in some])
    if isinstance(user, dict):
        print(f"new user: {mixture_words(user)}")
    return users, user


def run(options: argparse.Namespace) -> Result:
    """Draw images and write them as `<prompt>-<seed>-<model>.png`.

    With a LoRA or a negative model it also writes `comparison.png`.

    Args:
        options (`argparse.Namespace`): Options of the command.

    Returns:
        `int` or `Result`: Exit code, or what was done.

    Raises:
        UserError: A model or LoRA is missing, a number is out of range, or the folder
            holds other images.
    """
    for name, lowest in (("num_images", 1), ("batch_size", 1), ("seed", 0)):
        if getattr(options, name) < lowest:
            raise ConfigError(
                f"--{name}", f"expected int >= {lowest}, got {getattr(options, name)}"
            )
    _check_user_options(options)
    _check_lora_options(options)
    taken = _settings(options)
    lock = _take_folder(options, taken)
    try:
        return _draw(options, lock.folder, taken)
    finally:
        lock.release()


def _draw(options: argparse.Namespace, output_dir: Path, taken: dict[str, Any]) -> Result:
    """Draw the images and write them. Bad weights show before the first image."""
    from ..generation.grids import comparison_grid
    from ..generation.pipelines import default_settings, load_pipeline
    from ..generation.sampling import generate

    pipe = load_pipeline(options.model)
    settings: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("num_inference_steps", "guidance_scale")
        if getattr(options, name) is not None
    }
    settings = {**default_settings(options.model), **settings}
    prompts = [prompt for prompt in options.prompt for _ in range(options.num_images)]
    seeds = [options.seed + i for _ in options.prompt for i in range(options.num_images)]
    draw = partial(generate, pipe, prompts, seeds, batch_size=options.batch_size, **settings)
    users, user = _read_user(pipe, options) if options.user_adapter else (None, None)
    tuned = None
    if options.lora:
        from ..backbones.lora import load_lora

        load_lora(pipe, options.lora, "tuned", "--lora")
        pipe.set_adapters("tuned", options.lora_scale)
    if options.negative_lora:
        from ..generation.guidance import NegativeGuidance, load_negative

        negative = load_negative(pipe, options.negative_lora)
        guidance = NegativeGuidance(
            pipe,
            negative=negative,
            alpha=options.positive_share,
            beta=options.negative_share,
        )
        with guidance:
            tuned = draw(description="negative guidance")
    elif options.lora:
        tuned = draw(description="tuned")
    if options.lora:
        pipe.unload_lora_weights()
    if users is not None:
        with users.apply(user):
            tuned = draw(description="user")
    sides = {"base": draw(description="base")} | ({} if tuned is None else {"tuned": tuned})
    claim_output_dir(output_dir, _SETTINGS, taken, _LONG)
    files = []
    for name, images in sides.items():
        check_any(images, name)
        for i in present(images):
            number = i // options.num_images
            files.append(output_dir / f"{number:03d}-seed{seeds[i]}-{name}.png")
            save_image(images[i], files[-1])
    if "tuned" in sides:
        n = options.num_images
        rows = [
            (p, sides["base"][i * n : (i + 1) * n], sides["tuned"][i * n : (i + 1) * n])
            for i, p in enumerate(options.prompt)
        ]
        save_image(comparison_grid(rows), output_dir / "comparison.png")
    for name, images in sides.items():
        if len(present(images)) < len(images):
            print(left_out(images, len(images), name))
    missing = len(sides) * len(prompts) - len(files)
    text = f"wrote {len(files)} images to {output_dir}"
    return Result(text, {"images": files, "missing": missing})
