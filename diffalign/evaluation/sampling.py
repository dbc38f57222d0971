"""Batched sampling with one seed per image, reproducible whatever the batch size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm


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
