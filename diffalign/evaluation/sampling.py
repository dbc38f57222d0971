"""Batched sampling with one seed per image, reproducible whatever the batch size."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from ..exceptions import ConfigError
from ..folders import replacing
from ..ranges import count

if TYPE_CHECKING:
    from ..processes import Processes


def generate(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch_size: int = 8,
    description: str = "sampling",
    progress: bool = True,
    **pipe_kwargs: Any,
) -> list[Image.Image]:
    """One image per (prompt, seed) from an unmodified diffusers pipeline.

    Every image has a CPU generator of its own, so initial and step noise depend on its seed alone: not on the batch size, the
    device or its neighbours. The same (prompt, seed) under two models is therefore a paired sample.

    Args:
        pipe: a text-to-image `DiffusionPipeline`.
        prompts (`Sequence[str]`): one per image.
        seeds (`Sequence[int]`): one per image.
        batch_size (`int`): images per forward pass.
        pipe_kwargs: handed to the pipeline's call (`num_inference_steps`, `guidance_scale`, ...).

    Returns:
        `list[PIL.Image.Image]` in the order of `prompts`.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"seeds: expected one per prompt, got {len(seeds)} seeds for {len(prompts)} prompts")
    check_steps(pipe, pipe_kwargs.get("num_inference_steps"))
    pipe.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    with tqdm(total=len(prompts), desc=description, unit="image", disable=not progress) as bar, torch.inference_mode():
        for start in range(0, len(prompts), batch_size):
            chunk = list(prompts[start : start + batch_size])
            generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds[start : start + batch_size]]
            # Not `+=`: with output_type="np" that would be an addition of arrays.
            images.extend(pipe(prompt=chunk, generator=generators, **pipe_kwargs).images)
            bar.update(len(chunk))
    return images


def check_steps(pipe: Any, steps: int | None, field: str = "num_inference_steps") -> None:
    """Raises `ConfigError` for a number of steps for which the pipeline's scheduler has no timesteps."""
    if steps is None:
        return
    count().check(field, steps)
    scheduler = copy.deepcopy(pipe.scheduler)
    limit = scheduler.config.get("num_train_timesteps")
    flow = hasattr(scheduler, "sigmas") and "Flow" in type(scheduler).__name__
    try:
        scheduler.set_timesteps(steps)
        times = torch.as_tensor(scheduler.timesteps)
        good = len(times) > 0 and (flow or limit is None or float(times.max()) < limit)
    except TypeError:  # one that needs more than a number, which its pipeline gives it
        return
    except Exception:
        good = False
    if not good:
        most = f", at most {limit}" if isinstance(limit, int) and steps >= limit else ""
        raise ConfigError(field, f"{type(scheduler).__name__} has no {steps} steps{most}; give fewer")


def image_seed(seed: int, prompt: str, number: int) -> int:
    """Seed of image `number` of a prompt: the same under every model, whatever the order or number of prompts."""
    text = f"{seed}:{number}:".encode() + prompt.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:6], "big")


def draw_files(
    draw: Callable[[list[str], list[int]], list[Any]],
    wanted: Sequence[tuple[str, int, Path]],
    batch_size: int,
    processes: Processes,
    description: str,
) -> None:
    """Draws the (prompt, seed, PNG file) that are not there yet, batches shared among processes; no file is ever half-written.

    A batch is always the same images, also when some of them are there already, because the last bit of an image may depend on its batch.

    Args:
        draw: (prompts, seeds) of a batch -> images; not called when nothing is missing.
    """
    batches = [wanted[start : start + batch_size] for start in range(0, len(wanted), batch_size)]
    mine = [batch for batch in batches[processes.rank :: processes.world] if not all(path.is_file() for _, _, path in batch)]
    total = sum(map(len, mine))
    with tqdm(total=total, desc=description, unit="image", disable=processes.rank > 0 or not mine) as bar:
        for batch in mine:
            pictures = draw([prompt for prompt, _, _ in batch], [seed for _, seed, _ in batch])
            for (_, _, path), picture in zip(batch, pictures, strict=True):
                if not path.is_file():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with replacing(path) as temporary:
                        picture.save(temporary, format="PNG")
            bar.update(len(batch))
