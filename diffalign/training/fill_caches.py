"""Encode images and prompts into the caches before training."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..backbones import Backbone
from ..backbones.conditions import split_rows
from ..data.cache import TensorCache
from ..errors import UserError
from ..runtime.progress import track
from .group_reader import Example, GroupReader, group_key, prompt_key


def fill_latent_cache(
    cache: TensorCache,
    reader: GroupReader,
    backbone: Backbone,
    rank: int,
    world: int,
    batch_groups: int = 8,
) -> int:
    """Encode the groups that the latent cache lacks.

    All processes must call this. Each one encodes its share.

    Args:
        cache (`TensorCache`): Cache of latents.
        reader (`GroupReader`): Reads the images.
        backbone (`Backbone`): Encodes them.
        rank (`int`): Number of this process.
        world (`int`): Number of processes.
        batch_groups (`int`, *optional*, defaults to `8`): Groups per forward pass.

    Returns:
        `int`: Number of groups that were missing in this share.
    """
    # Shares of all groups, not of the missing ones: a process that starts late sees
    # what others have encoded already, and its share would shift. Each process hashes
    # the images of its own share.
    keys: dict[int, str] = {}
    for i in range(rank, len(reader.dataset), world):
        try:
            keys[i] = group_key(reader.dataset[i].image_hashes())
        except UserError as error:  # a file that is not there
            reader.skip(i, str(error))
    missing = set(cache.missing(keys.values()))
    first: dict[str, int] = {}
    for i, key in keys.items():
        first.setdefault(key, i)
    mine = [i for key, i in first.items() if key in missing]
    for start in track(
        range(0, len(mine), batch_groups),
        desc="encoding images",
        unit="batch",
        disable=not mine or rank > 0,
    ):
        indices = mine[start : start + batch_groups]
        indices, examples = _readable(reader, indices)
        pixels = [e.pixels for e in examples if e.pixels is not None]
        for shape in {p.shape for p in pixels}:  # one, except under buckets
            alike = [
                (i, e)
                for i, e in zip(indices, examples, strict=True)
                if e.pixels is not None and e.pixels.shape == shape
            ]
            mean, std = backbone.encode_images(
                torch.cat([e.pixels for _, e in alike if e.pixels is not None])
            )
            k = shape[0]
            for n, (index, example) in enumerate(alike):
                g = example.geometry
                geometry = torch.tensor([*g.original_size, *g.crop_top_left, *g.target_size])
                place = slice(n * k, (n + 1) * k)
                cache.add(
                    keys[index], {"mean": mean[place], "std": std[place], "geometry": geometry}
                )
    cache.flush()
    return len(missing)


def _readable(reader: GroupReader, indices: list[int]) -> tuple[list[int], list[Example]]:
    """Read the rows that can be decoded.

    The others are counted and stay out of the cache.
    """
    readable, examples = [], []
    for index in indices:
        try:
            examples.append(reader.read(reader.dataset[index], 0))
            readable.append(index)
        except UserError as error:
            reader.skip(index, str(error))
    return readable, examples


def fill_prompt_cache(
    cache: TensorCache, prompts: Sequence[str], backbone: Backbone, rank: int, world: int
) -> int:
    """Encode the prompts that the prompt cache lacks.

    All processes must call this. Each one encodes its share.

    Args:
        cache (`TensorCache`): Cache of encoded prompts.
        prompts (`Sequence[str]`): All prompts of the dataset.
        backbone (`Backbone`): Encodes them.
        rank (`int`): Number of this process.
        world (`int`): Number of processes.

    Returns:
        `int`: Number of prompts that were missing in all shares.
    """
    by_key = {prompt_key(p): p for p in prompts}
    missing = set(cache.missing(by_key))
    # Shares of all prompts, as in `fill_latent_cache`.
    mine = [key for key in list(by_key)[rank::world] if key in missing]
    for start in track(
        range(0, len(mine), 32), desc="encoding prompts", unit="batch", disable=not mine or rank > 0
    ):
        chunk = mine[start : start + 32]
        encoded = backbone.encode_prompts([by_key[key] for key in chunk])
        rows = split_rows(encoded, backbone.ragged)
        for i, key in enumerate(chunk):
            cache.add(key, rows[i])
    cache.flush()
    return len(missing)
