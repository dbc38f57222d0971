"""Make preference data from prompts: draw images, score them, write the result.

This is `diffalign data build`, after the recipe of RankDPO's Syn-Pic (arXiv 2410.18013,
section 3.1). Several images per prompt, from one or several models, are ranked by how
often they win under several reward models. Image i of a prompt has the same seed under
every model. What was drawn and scored is kept, so an interrupted command goes on, and
more prompts, images, models or scorers can be added to a finished one.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.prompt_sets import read_prompts
from ..errors import ConfigError, UserError
from ..runtime.distributed import process_rank
from ..runtime.files import check_output_dir
from .drawn import BuildOptions, Drawn, Generator

if TYPE_CHECKING:
    from ..rewards.panel import Panel
    from ..runtime.distributed import DistributedContext
    from ..runtime.missing import MaybeImage
    from ..runtime.protocols import DeviceLike

# Prompts scored at once. They do not depend on the number of processes, and so neither
# does the rounding of the scores.
_SCORE_PROMPTS = 32


def build(options: BuildOptions) -> str | None:
    """Draw, score and write preference data.

    Args:
        options (`BuildOptions`): As of `diffalign data build`.

    Returns:
        `str`: What came out, in words. None in other processes than the first.

    Raises:
        ConfigError: An option has an unknown value. Nothing has been drawn yet.
        UserError: Prompts, models or scorers do not fit, or the folder holds another
            build.
    """
    _check_numbers(options)
    from ..rewards.panel import Panel
    from ..rewards.panel_file import panel_config
    from ..runtime.distributed import DistributedContext

    config = panel_config(
        scorers=options.scorers,
        file=options.rewards_config,
        file_option="--rewards_config",
        scorer_args=options.scorer_args,
        combine=options.combine,
        trust_remote_code=options.trust_remote_code,
    )
    config["placement"] = options.placement
    config["cache"] = options.cache or options.output_dir / "scores.sqlite"
    prompts, notes = read_prompts(options.prompts, options.max_prompts)
    generators = find_generators(options)
    if len(generators) * options.num_images < 2:
        raise ConfigError(
            "--num_images",
            "one image per prompt leaves nothing to compare; draw at least 2, or name a second "
            "model",
        )
    processes = DistributedContext.start(options.device)
    panel = Panel.from_config(
        config, device=processes.device, trust_remote_code=options.trust_remote_code
    )
    _check_panel(panel, processes)
    claim(options, generators)
    processes.wait()
    images = [
        Drawn(p, prompt, generator.name, i, options)
        for p, prompt in enumerate(prompts)
        for generator in generators
        for i in range(options.num_images)
    ]
    for generator in generators:
        draw(
            generator,
            [image for image in images if image.model == generator.name],
            options,
            processes,
        )
    processes.wait()
    notes = notes + missing_notes(images)
    columns = score(panel, images, processes)
    processes.stop()
    if processes.rank > 0:
        return None
    from .build_output import write

    return write(options, prompts, notes, generators, images, columns, panel)


def _check_numbers(options: BuildOptions) -> None:
    for name, least in (
        ("num_images", 1),
        ("batch_size", 1),
        ("seed", 0),
        ("max_prompts", 1),
        ("best", 1),
        ("num_inference_steps", 1),
        ("resolution", 8),
    ):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name}", f"expected int >= {least}, got {value}")
    if not 0 <= options.min_margin < float("inf"):
        raise ConfigError(
            "--min_margin", f"expected a number of at least 0, got {options.min_margin}"
        )


def _check_panel(panel: Panel, processes: DistributedContext) -> None:
    """Load each scorer once, so that faults show before hours of drawing."""
    if not panel.train_names:
        raise UserError(
            "rewards: all scorers have the role eval, so nothing would be labelled; give one "
            "the role train"
        )
    for name in panel.names:
        if "metadata" in panel.specs[name].requires:
            raise UserError(
                f"rewards.{name}: it needs metadata for every prompt, which prompts alone do "
                "not have; score with diffalign score"
            )
    if processes.rank == 0:
        for name in panel.names:
            with panel.using(name):
                pass
    processes.wait()


def find_generators(options: BuildOptions) -> list[Generator]:
    """Find the models and LoRAs that draw, and give each a name of its own.

    Args:
        options (`BuildOptions`): Names the models and LoRAs.

    Returns:
        `list[Generator]`: The models first, then the first model with each LoRA.

    Raises:
        ConfigError: A model or LoRA is not there.
    """
    from ..backbones.loading import ModelSource
    from ..runtime.hashing import content_hash

    generators: list[Generator] = []
    for model, lora in [
        *((model, None) for model in options.models),
        *((options.models[0], lora) for lora in options.lora),
    ]:
        source = ModelSource(model)
        fingerprint = source.fingerprint(*source.component_names())
        if lora is not None:
            place = Path(lora)
            if not place.exists() or (place.is_dir() and not list(place.glob("*.safetensors"))):
                raise ConfigError("--lora", f"there is no file or folder with safetensors {lora!r}")
            fingerprint = f"{fingerprint}+{content_hash(place)[:16]}"
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(lora or model).name).strip("-.") or "model"
        name = _free_name(slug, [generator.name for generator in generators])
        generators.append(Generator(name, model, lora, fingerprint))
    return generators


def _free_name(name: str, taken: Sequence[str]) -> str:
    """Number a name that is taken already."""
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return name if name not in taken else next(n for n in numbered if n not in taken)


def claim(options: BuildOptions, generators: Sequence[Generator]) -> None:
    """Check that a folder's images are all drawn in one way, and write `manifest.json`.

    Args:
        options (`BuildOptions`): Names the folder and the settings.
        generators (`Sequence[Generator]`): The models that draw.

    Raises:
        UserError: The folder holds something else, or images drawn with other settings
            or weights.
    """
    folder: Path = options.output_dir
    names = ("seed", "num_inference_steps", "guidance_scale", "resolution", "dtype")
    settings = {name: getattr(options, name) for name in names}
    models = {generator.name: generator.fingerprint for generator in generators}
    file = folder / "manifest.json"
    check_output_dir(folder, file.name)
    if file.is_file():
        manifest = json.loads(file.read_text("utf-8"))
        for name, value in settings.items():
            if manifest["settings"].get(name) != value:
                raise UserError(
                    f"--output_dir: {str(folder)!r} holds images drawn with --{name} "
                    f"{manifest['settings'].get(name)}, not {value}; use that, or another folder"
                )
        for name, fingerprint in models.items():
            if manifest["models"].get(name, fingerprint) != fingerprint:
                raise UserError(
                    f"--output_dir: {str(folder)!r} holds images of other weights under the "
                    f"name {name!r}; use another folder"
                )
        models = {**manifest["models"], **models}
    if process_rank() == 0:
        from ..runtime.files import write_atomically

        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(
            file, (json.dumps({"settings": settings, "models": models}, indent=1) + "\n").encode()
        )


def draw(
    generator: Generator,
    images: Sequence[Drawn],
    options: BuildOptions,
    processes: DistributedContext,
) -> None:
    """Draw the images that are not there yet.

    Args:
        generator (`Generator`): The model that draws.
        images (`Sequence[Drawn]`): Its images.
        options (`BuildOptions`): Settings of the pipeline's call.
        processes (`DistributedContext`): The processes that share the work.
    """
    from ..generation.sampling import draw_files, generate

    loaded: list[Any] = []  # the pipeline, and arguments of its call

    def pictures(prompts: list[str], seeds: list[int]) -> list[MaybeImage]:
        if not loaded:
            loaded.extend(_pipeline(generator, options, processes.device))
        return generate(
            loaded[0], prompts, seeds, batch_size=len(prompts), progress=False, **loaded[1]
        )

    files = [(image.prompt, image.seed, image.path) for image in images]
    draw_files(pictures, files, options.batch_size, processes, f"drawing, {generator.name}")


def missing_notes(images: Sequence[Drawn]) -> list[str]:
    """Say in words which of each model's images are missing.

    Args:
        images (`Sequence[Drawn]`): The images of all models.

    Raises:
        NoImages: A model drew none that can be used.
    """
    from ..generation.sampling import drawn_file
    from ..runtime.missing import check_any, left_out

    notes = []
    for model in dict.fromkeys(image.model for image in images):
        files = [drawn_file(image.path) for image in images if image.model == model]
        check_any(files, model)
        notes.append(left_out(files, len(files), model))
    return [note for note in notes if note]


def _pipeline(
    generator: Generator, options: BuildOptions, device: DeviceLike
) -> tuple[Any, dict[str, Any]]:
    """Return (pipeline, arguments of its call)."""
    import torch

    from ..backbones.lora import load_lora
    from ..generation.pipelines import default_settings, load_for_scoring

    dtype = getattr(torch, options.dtype) if options.dtype else None
    pipe = load_for_scoring(generator.model, dtype=dtype, device=device)
    if generator.lora is not None:
        load_lora(pipe, generator.lora, "drawing", "--lora")
    settings = default_settings(generator.model)
    for name in ("num_inference_steps", "guidance_scale"):
        if getattr(options, name) is not None:
            settings[name] = getattr(options, name)
    if options.resolution is not None:
        settings |= {"height": options.resolution, "width": options.resolution}
    return pipe, settings


def score(
    panel: Panel, images: Sequence[Drawn], processes: DistributedContext
) -> dict[str, list[float]]:
    """Score all images, one scorer after the other.

    Args:
        panel (`Panel`): The scorers.
        images (`Sequence[Drawn]`): N images.
        processes (`DistributedContext`): The processes that share the work.

    Returns:
        `dict[str, list[float]]`: Column -> N scores, NaN where one is missing.
    """
    from ..runtime.progress import progress_bar

    parts = list(_prompt_parts(images))
    mine = parts[processes.rank :: processes.world]
    scored_parts: list[tuple[str, list[int], list[float]]] = []
    for name in panel.names:
        total = sum(map(len, mine))
        with (
            panel.using(name) as scorer,
            progress_bar(
                total=total, desc=f"scoring, {name}", unit="image", disable=processes.rank > 0
            ) as bar,
        ):
            for part in mine:
                scorer.forget_prompts()  # rounding must not depend on earlier parts
                chosen = [images[i] for i in part]
                result = scorer.score(
                    [image.path for image in chosen],
                    [image.prompt for image in chosen],
                    on_error="nan",
                )
                scored_parts.append((name, part, result.values.tolist()))
                bar.update(len(part))
    columns = {name: [float("nan")] * len(images) for name in panel.names}
    for name, part, values in processes.gather(scored_parts):
        for i, value in zip(part, values, strict=True):
            columns[name][i] = value
    return columns


def _prompt_parts(images: Sequence[Drawn]) -> Iterator[list[int]]:
    """Yield the indices of the images of `_SCORE_PROMPTS` prompts at a time."""
    part: list[int] = []
    for i, image in enumerate(images):
        if part and image.group % _SCORE_PROMPTS == 0 and image.group != images[i - 1].group:
            yield part
            part = []
        part.append(i)
    yield part
