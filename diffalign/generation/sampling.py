"""Sample images in batches with one seed per image.

An image's noise depends on its seed alone, whatever the batch size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..backbones import backbone_class
from ..config.ranges import count
from ..errors import ConfigError, UserError
from ..runtime.distributed import sharded_modules
from ..runtime.files import save_image, write_atomically
from ..runtime.missing import ABSENT, FAILED, MaybeImage, Missing, present, read_output, watched
from ..runtime.progress import progress_bar

if TYPE_CHECKING:
    from ..runtime.distributed import DistributedContext
    from ..runtime.protocols import Pipeline, Scheduler


def generate(
    pipe: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch_size: int = 8,
    description: str = "sampling",
    progress: bool = True,
    **pipe_kwargs: Any,
) -> list[Any]:
    """Draw one image per (prompt, seed) with an unmodified diffusers pipeline.

    Every image has a CPU generator of its own. So initial and step noise depend on its
    seed alone, and not on the batch size, the device or other images. The same (prompt,
    seed) under two models is therefore a paired sample.

    Args:
        pipe (`DiffusionPipeline`): A text-to-image pipeline.
        prompts (`Sequence[str]`): N prompts.
        seeds (`Sequence[int]`): N seeds.
        batch_size (`int`, *optional*, defaults to `8`): Images per forward pass.
        description (`str`, *optional*, defaults to `"sampling"`): Label of the progress
            bar.
        progress (`bool`, *optional*, defaults to `True`): Show a progress bar.
        **pipe_kwargs: Arguments of the pipeline's call (`num_inference_steps`,
            `guidance_scale`, ...).

    Returns:
        `list[PIL.Image.Image]` in the order of `prompts`. A
        `diffalign.runtime.missing.Missing` replaces an image that is not finite, was
        blocked by a safety checker, or could not be drawn.

    Raises:
        ConfigError: The pipeline's scheduler has no timesteps for
            `num_inference_steps`.
        ValueError: There are not as many seeds as prompts.

    Example:
        >>> from diffalign.generation.pipelines import load_pipeline
        >>> from diffalign.generation.sampling import generate
        >>> pipe = load_pipeline("shapes", device="cpu")
        >>> prompt = "a large yellow star on the right of a black background"
        >>> images = generate(
        ...     pipe, [prompt] * 2, seeds=[0, 1], num_inference_steps=2, progress=False
        ... )
        >>> [image.size for image in images]
        [(64, 64), (64, 64)]
    """
    if len(prompts) != len(seeds):
        raise ValueError(
            f"seeds: expected one per prompt, got {len(seeds)} seeds for {len(prompts)} prompts"
        )
    check_steps(pipe, pipe_kwargs.get("num_inference_steps"))
    pipe.set_progress_bar_config(disable=True)
    images: list[Any] = []
    with (
        progress_bar(
            total=len(prompts), desc=description, unit="image", disable=not progress
        ) as bar,
        # Not inference mode: what a network that trains keeps of it (tables of
        # positions, gathered weights) could not be used in a backward pass.
        torch.no_grad(),
    ):
        for start in range(0, len(prompts), batch_size):
            chunk = list(prompts[start : start + batch_size])
            generators = [
                torch.Generator("cpu").manual_seed(int(seed))
                for seed in seeds[start : start + batch_size]
            ]
            images.extend(_draw_batch(pipe, chunk, generators, pipe_kwargs))
            bar.update(len(chunk))
    return images


def _is_sharded(pipe: Pipeline) -> bool:
    parts = getattr(pipe, "components", {}).values()
    networks = [part for part in parts if isinstance(part, torch.nn.Module)]
    return any(sharded_modules(network) for network in networks)


def _draw_batch(
    pipe: Pipeline,
    prompts: list[str],
    generators: list[torch.Generator],
    settings: Mapping[str, Any],
) -> list[Any]:
    """Draw the images of a batch.

    Where the pipeline refuses a batch, its prompts are drawn one by one, so that one
    prompt costs one image.
    """
    seeds = [generator.initial_seed() for generator in generators]
    try:
        with watched(pipe) as finite:
            output = pipe(generator=generators, **call_arguments(pipe, prompts, settings))
        return read_output(output, len(prompts), finite)
    except ValueError as error:
        # Processes that share weights must run them equally often.
        if isinstance(error, UserError) or len(prompts) == 1 or _is_sharded(pipe):
            raise
        images: list[Any] = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            try:
                images += _draw_batch(
                    pipe, [prompt], [torch.Generator("cpu").manual_seed(seed)], settings
                )
            except ValueError as failure:
                images.append(Missing(f"{FAILED}: {' '.join(str(failure).split())[:150]}"))
        if not present(images):
            raise  # the call is wrong, not one prompt
        return images


def call_arguments(
    pipe: Pipeline, prompts: list[str], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Name the settings of a call as the pipeline of the model's family does.

    Args:
        pipe (`DiffusionPipeline`): The pipeline.
        prompts (`list[str]`): Its prompts.
        settings (`Mapping[str, Any]`): The settings, by this package's names.
    """
    # Some pipelines want a negative prompt of the type of the prompt.
    arguments = {"prompt": prompts} | {
        name: [value] * len(prompts)
        if name.startswith("negative_prompt") and isinstance(value, str)
        else value
        for name, value in settings.items()
    }
    family = backbone_class(type(pipe).__name__)
    return arguments if family is None else family.call_arguments(arguments)


def check_steps(pipe: object, steps: int | None, field: str = "num_inference_steps") -> None:
    """Check that the pipeline's scheduler has timesteps for a number of steps.

    Args:
        pipe (`DiffusionPipeline`): The pipeline.
        steps (`int`, *optional*): The number. None is not checked.
        field (`str`, *optional*, defaults to `"num_inference_steps"`): The option that
            the message names.

    Raises:
        ConfigError: It has none.
    """
    scheduler: Scheduler | None = getattr(pipe, "scheduler", None)
    if steps is None:
        return
    count().check(field, steps)
    if scheduler is None:
        return
    limit = (
        None if "Flow" in type(scheduler).__name__ else scheduler.config.get("num_train_timesteps")
    )
    limit = limit if isinstance(limit, int) else None
    good = limit is None or steps <= limit
    if good and not scheduler.config.get("use_dynamic_shifting"):
        scheduler = copy.deepcopy(scheduler)
        try:
            scheduler.set_timesteps(steps)
            times = torch.as_tensor(scheduler.timesteps)
            good = len(times) > 0 and (limit is None or float(times.max()) < limit)
        except Exception:  # it needs arguments that only its pipeline has
            return
    if not good:
        most = f", at most {limit}" if limit is not None and steps >= limit else ""
        raise ConfigError(
            field, f"{type(scheduler).__name__} has no {steps} steps{most}; give fewer"
        )


def draw_files(
    draw: Callable[[list[str], list[int]], list[MaybeImage]],
    images: Sequence[tuple[str, int, Path]],
    batch_size: int,
    processes: DistributedContext,
    description: str,
) -> None:
    """Draw the images whose files are not there yet, shared among processes.

    No file is ever half-written. A batch always holds the same images, also when some
    of them are there already, because the last bit of an image may depend on its batch.

    Args:
        draw (`Callable`): (prompts, seeds) of a batch -> images. It is not called when
            nothing is missing.
        images (`Sequence[tuple[str, int, Path]]`): (prompt, seed, PNG file) of every
            image.
        batch_size (`int`): Images per batch.
        processes (`DistributedContext`): The processes that share the work.
        description (`str`): Label of the progress bar.
    """
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    mine = [batch for batch in batches[processes.rank :: processes.world] if not _all_drawn(batch)]
    total = sum(map(len, mine))
    with progress_bar(
        total=total, desc=description, unit="image", disable=processes.rank > 0 or not mine
    ) as bar:
        for batch in mine:
            pictures = draw([prompt for prompt, _, _ in batch], [seed for _, seed, _ in batch])
            for (_, _, path), picture in zip(batch, pictures, strict=True):
                if not is_drawn(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    save_drawn(picture, path)
            bar.update(len(batch))


def _all_drawn(images: Sequence[tuple[str, int, Path]]) -> bool:
    return all(is_drawn(path) for _, _, path in images)


def save_drawn(picture: MaybeImage, path: Path) -> None:
    """Save an image, or a marker that says why it is missing.

    Args:
        picture (`PIL.Image.Image` or `Missing`): The image.
        path (`Path`): The PNG file.
    """
    if isinstance(picture, Missing):
        write_atomically(_marker(path), picture.reason.encode())
    else:
        save_image(picture, path)


def _marker(path: Path) -> Path:
    """Return the file beside an image's that says why the image is missing."""
    return path.with_suffix(".missing")


def is_drawn(path: Path) -> bool:
    """Whether an image is there, or known to be missing.

    An image that failed is tried again.

    Args:
        path (`Path`): The PNG file.
    """
    marker = _marker(path)
    return path.is_file() or (marker.is_file() and not marker.read_text("utf-8").startswith(FAILED))


def drawn_file(path: Path) -> Path | Missing:
    """Return a drawn file's path, or the `Missing` that replaces it.

    Args:
        path (`Path`): The PNG file.
    """
    if path.is_file():
        return path
    marker = _marker(path)
    return Missing(marker.read_text("utf-8") if marker.is_file() else ABSENT)
