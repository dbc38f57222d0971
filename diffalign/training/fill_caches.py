"""Encode images and prompts into the caches before training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from ..backbones import Backbone
from ..data.cache import TensorCache
from ..errors import UserError
from .group_reader import Example, GroupReader, group_key, prompt_key


def fill_latent_cache(
    cache: TensorCache,
    reader: GroupReader,
    backbone: Backbone,
    rank: int,
    world: int,
    batch_groups: int = 8,
) -> int:
    """Encodes the groups that the cache lacks, a share per process; returns how many this process found missing over all shares."""
    keys = [group_key(reader.dataset[i].image_hashes()) for i in range(len(reader.dataset))]
    missing = set(cache.missing(keys))
    first: dict[str, int] = {}
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    # Shares of all groups: a late process may see what another one has encoded already, and shares of what is missing would shift.
    mine = [i for i in list(first.values())[rank::world] if keys[i] in missing]
    for start in tqdm(
        range(0, len(mine), batch_groups),
        desc="encoding images",
        unit="batch",
        disable=not mine or rank > 0,
    ):
        indices = mine[start : start + batch_groups]
        indices, examples = _readable(reader, indices)
        for shape in {
            e.pixels.shape for e in examples if e.pixels is not None
        }:  # one, except under buckets
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
    """The rows that can be decoded; the others are counted and stay out of the cache."""
    kept, examples = [], []
    for index in indices:
        try:
            examples.append(reader.read(reader.dataset[index], 0))
            kept.append(index)
        except UserError as error:
            reader.skip(index, str(error))
    return kept, examples


def fill_prompt_cache(
    cache: TensorCache, prompts: Sequence[str], backbone: Backbone, rank: int, world: int
) -> int:
    """Encodes the prompts that the cache lacks, a share per process; returns how many this process found missing over all shares."""
    by_key = {prompt_key(p): p for p in prompts}
    missing = set(cache.missing(by_key))
    mine = [
        key for key in list(by_key)[rank::world] if key in missing
    ]  # shares of all prompts, as in `fill_latent_cache`
    for start in tqdm(
        range(0, len(mine), 32), desc="encoding prompts", unit="batch", disable=not mine or rank > 0
    ):
        chunk = mine[start : start + 32]
        encoded = backbone.encode_prompts([by_key[key] for key in chunk])
        for i, key in enumerate(chunk):
            cache.add(key, {name: values[i] for name, values in encoded.items()})
    cache.flush()
    return len(missing)
