"""From rows to micro-batches: the order of the data, its latents and its conditions.

The order is a function of (seed, position), so a run is resumed by its position alone, and the groups of an optimizer step are the
same whether one process, several processes or several accumulated passes consume them.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..backbones import Backbone
from ..data.cache import TensorCache
from ..data.transforms import Geometry, GroupTransform
from ..exceptions import UserError
from ..likelihood import group_noise, sample_times
from .batch import Batch
from .config import TrainingConfig
from .rng import row_generator


class RowOrder:
    """Position -> (epoch, index): one shuffle after another without end.

    Args:
        count: rows.
        seed: of the shuffles.
        buckets: (count,) bucket of each row; then every run of `chunk` positions lies in one bucket, and a bucket's last chunk
            is filled up from its own beginning.
        chunk: groups per device and forward pass.
    """

    def __init__(self, count: int, seed: int, buckets: Sequence[int] | None = None, chunk: int = 1) -> None:
        self.count, self.seed, self.chunk = count, seed, chunk
        self.buckets = None if buckets is None or len(set(buckets)) < 2 else torch.tensor(buckets)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)
        self.length = len(self._shuffled(0))

    def _shuffled(self, epoch: int) -> Tensor:
        generator = row_generator(self.seed, 0, epoch, "order")
        order = torch.randperm(self.count, generator=generator)
        if self.buckets is None:
            return order
        chunks = []
        for bucket in self.buckets.unique():
            rows = order[self.buckets[order] == bucket]
            short = -len(rows) % self.chunk
            chunks += list(torch.cat([rows, rows.repeat(short // len(rows) + 1)[:short]]).split(self.chunk))
        return torch.cat([chunks[i] for i in torch.randperm(len(chunks), generator=generator)])

    def __getitem__(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, self.length)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return epoch, int(self._order[offset])


class PositionSampler:
    """Batches of (epoch, index) for one process, starting anywhere.

    In optimizer step s, pass a, process r reads positions ``start + ((s A + a) W + r) b + j`` for j < b.
    """

    def __init__(self, order: RowOrder, start: int, batch_size: int, rank: int, world: int) -> None:
        self.order, self.start, self.batch_size, self.rank, self.world = order, start, batch_size, rank, world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        base = self.start + self.rank * self.batch_size
        while True:
            yield [self.order[base + j] for j in range(self.batch_size)]
            base += self.world * self.batch_size


@dataclass
class Example:
    """One group as the data loader delivers it; latents where they were cached, pixels otherwise."""

    row_id: int
    epoch: int
    prompts: tuple[str, ...]
    geometry: Geometry
    weight: float
    scores: tuple[float, ...] | None
    pixels: Tensor | None = None  # (k, 3, H, W)
    mean: Tensor | None = None  # (k, C, h, w)
    std: Tensor | None = None


class GroupReader(torch.utils.data.Dataset):
    """Map-style access by (epoch, index), in a worker or not.

    A row whose image turns out to be undecodable (headers were checked on loading, pixels were not) is replaced by the next row,
    named in a warning and counted; above `max_broken_fraction` of all rows it is an error.
    """

    def __init__(self, dataset: Any, transform: GroupTransform, seed: int, max_broken_fraction: float = 0.05) -> None:
        self.dataset, self.transform, self.seed, self.max_broken_fraction = dataset, transform, seed, max_broken_fraction
        self.latents: TensorCache | None = None
        self.broken: dict[int, str] = {}

    def __getitem__(self, key: tuple[int, int]) -> Example:
        epoch, index = key
        try:
            return self.read(self.dataset[index], epoch)
        except UserError as error:
            self.skip(index, str(error))
            return self[(epoch, (index + 1) % len(self.dataset))]

    def skip(self, index: int, reason: str) -> None:
        """Counts a broken row.

        Raises:
            UserError: when there are too many.
        """
        if index not in self.broken:
            warnings.warn(f"{reason}; the next row takes its place", stacklevel=2)
        self.broken[index] = reason
        if len(self.broken) > self.max_broken_fraction * len(self.dataset):
            raise UserError(
                f"{len(self.broken)} of {len(self.dataset)} rows cannot be used, more than data.max_broken_fraction: {reason}"
            )

    def read(self, group: Any, epoch: int) -> Example:
        example = Example(group.row_id, epoch, tuple(group.prompts), Geometry((0, 0), (0, 0), (0, 0)), group.weight, group.scores)
        if not group.images:
            example.geometry = Geometry(self.transform.sizes[0], (0, 0), self.transform.sizes[0])
        elif self.latents is not None:
            cached = group_key(group.image_hashes())
            if cached not in self.latents:
                raise UserError(f"dataset row {group.row_id}: its latents could not be cached")
            entry = self.latents[cached]
            example.mean, example.std = entry["mean"], entry["std"]
            values = entry["geometry"].tolist()
            example.geometry = Geometry((values[0], values[1]), (values[2], values[3]), (values[4], values[5]))
        else:
            generator = row_generator(self.seed, group.row_id, epoch, "transform")
            example.pixels, example.geometry = self.transform(group.open_images(), generator)
        return example


def group_key(hashes: Sequence[str]) -> str:
    """Key of a group's latents: the bucket and crop of an image depend on its whole group."""
    return hashlib.sha256("+".join(hashes).encode()).hexdigest()


class StreamReader(torch.utils.data.IterableDataset):
    """Streaming rows: every process walks the stream and keeps its own positions. The order is the stream's."""

    def __init__(self, dataset: Any, reader: GroupReader, start: int, batch_size: int, rank: int, world: int) -> None:
        self.dataset, self.reader = dataset, reader
        self.start, self.batch_size, self.rank, self.world = start, batch_size, rank, world

    def __iter__(self) -> Iterator[list[Example]]:
        position, epoch, batch = 0, 0, []
        while True:
            before = position
            for group in self.dataset:
                owner = (position - self.start) // self.batch_size % self.world
                if position >= self.start and owner == self.rank:
                    batch.append(self.reader.read(group, epoch))
                    if len(batch) == self.batch_size:
                        yield batch
                        batch = []
                position += 1
            if position == before:
                raise UserError("data.dataset_name: the stream has no usable rows")
            epoch += 1


def fill_latent_cache(
    cache: TensorCache, reader: GroupReader, backbone: Backbone, rank: int, world: int, batch_groups: int = 8
) -> int:
    """Encodes the groups that the cache lacks, a share per process; returns how many this process found missing over all shares."""
    keys = [group_key(reader.dataset[i].image_hashes()) for i in range(len(reader.dataset))]
    missing = set(cache.missing(keys))
    first: dict[str, int] = {}
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    # Shares of all groups: a late process may see what another one has encoded already, and shares of what is missing would shift.
    mine = [i for i in list(first.values())[rank::world] if keys[i] in missing]
    for start in tqdm(range(0, len(mine), batch_groups), desc="encoding images", unit="batch", disable=not mine or rank > 0):
        indices = mine[start : start + batch_groups]
        indices, examples = _readable(reader, indices)
        for shape in {e.pixels.shape for e in examples if e.pixels is not None}:  # one, except under buckets
            alike = [(i, e) for i, e in zip(indices, examples, strict=True) if e.pixels is not None and e.pixels.shape == shape]
            mean, std = backbone.encode_images(torch.cat([e.pixels for _, e in alike if e.pixels is not None]))
            k = shape[0]
            for n, (index, example) in enumerate(alike):
                g = example.geometry
                geometry = torch.tensor([*g.original_size, *g.crop_top_left, *g.target_size])
                place = slice(n * k, (n + 1) * k)
                cache.add(keys[index], {"mean": mean[place], "std": std[place], "geometry": geometry})
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


def prompt_key(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()


def fill_prompt_cache(cache: TensorCache, prompts: Sequence[str], backbone: Backbone, rank: int, world: int) -> int:
    """Encodes the prompts that the cache lacks, a share per process; returns how many this process found missing over all shares."""
    by_key = {prompt_key(p): p for p in prompts}
    missing = set(cache.missing(by_key))
    mine = [key for key in list(by_key)[rank::world] if key in missing]  # shares of all prompts, as in `fill_latent_cache`
    for start in tqdm(range(0, len(mine), 32), desc="encoding prompts", unit="batch", disable=not mine or rank > 0):
        chunk = mine[start : start + 32]
        encoded = backbone.encode_prompts([by_key[key] for key in chunk])
        for i, key in enumerate(chunk):
            cache.add(key, {name: values[i] for name, values in encoded.items()})
    cache.flush()
    return len(missing)


def _padded(values: Tensor, k: int) -> Tensor:
    """(g, n, ...) with the last image repeated up to k: shorter lists of a batch, whose missing scores leave them out of the loss."""
    missing = k - values.shape[1]
    return values if missing == 0 else torch.cat([values, values[:, -1:].expand(-1, missing, *values.shape[2:])], dim=1)


class BatchBuilder:
    """Examples -> `Batch`: encodes what is not cached and draws everything random from the rows' own generators."""

    def __init__(self, backbone: Backbone, args: TrainingConfig, device: torch.device, prompts: TensorCache | None) -> None:
        self.backbone, self.args, self.device, self.prompts = backbone, args, device, prompts
        self._empty: dict[str, Tensor] | None = None
        sampling = args.timestep_sampling
        flow = backbone.process.prediction_type == "flow_matching"
        self.sampling = ("logit_normal" if flow else "uniform") if sampling == "auto" else sampling

    def __call__(self, examples: Sequence[Example]) -> Batch:
        args = self.args
        counts = [len(e.prompts) for e in examples]
        k = max(counts)
        draws = [row_generator(args.seed, e.row_id, self.draw_epoch(e.epoch), "noise") for e in examples]
        # [timestep, prompt dropout] per row; always both, so that switching dropout on does not move the timesteps.
        uniforms = torch.stack([torch.rand(2, generator=g, dtype=torch.float64) for g in draws])
        times = sample_times(self.backbone.process, uniforms[:, 0], self.sampling, args.logit_mean, args.logit_std)
        mean, std = self._latents(examples)
        shape = mean.shape[1:]
        # What a row draws depends on its own length alone, not on the longest list of its batch.
        noise = torch.cat(
            [
                _padded(group_noise(shape, n, [g], shared=args.shared_noise, offset=args.noise_offset), k)
                for n, g in zip(counts, draws, strict=True)
            ]
        )
        posterior = torch.cat([torch.randn((n, *shape), generator=g) for n, g in zip(counts, draws, strict=True)])
        x0 = mean + std * posterior.to(self.device)
        if min(counts) < k:
            x0 = torch.cat([_padded(part[None], k)[0] for part in x0.split(counts)])
        dropped = uniforms[:, 1] < args.proportion_empty_prompts
        prompts = [
            "" if drop else prompt
            for e, drop in zip(examples, dropped, strict=True)
            for prompt in (*e.prompts, *(e.prompts[-1:] * (k - len(e.prompts))))
        ]
        condition = self.encode(prompts)
        geometries = [e.geometry for e in examples for _ in range(k)]
        condition |= {name: t.to(self.device) for name, t in self.backbone.geometry_condition(geometries).items()}
        scores = None
        if examples[0].scores is not None:
            padded = [(*(e.scores or ()), *[math.nan] * (k - len(e.prompts))) for e in examples]
            scores = torch.tensor(padded, dtype=torch.float32, device=self.device)
        return Batch(
            x0=x0.unflatten(0, (-1, k)),
            noise=noise.to(self.device),
            times=times,
            condition=condition,
            weights=torch.tensor([e.weight for e in examples], dtype=torch.float32, device=self.device),
            row_ids=[e.row_id for e in examples],
            scores=scores,
            prompts=[e.prompts[0] for e in examples],
            epochs=[self.draw_epoch(e.epoch) for e in examples],
            seed=args.seed,
        )

    def draw_epoch(self, epoch: int) -> int:
        """Which draw of (noise, timestep) an epoch uses: a new one each time, or one of the precomputed ones in turn."""
        return epoch % self.args.ref_error_draws if self.args.precompute_ref_errors else epoch

    def unconditional(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        """The empty prompt's condition, encoded once, for every row of `condition`, with that row's sizes."""
        if self._empty is None:
            self._empty = self.encode([""])
        rows = len(next(iter(condition.values())))
        return {**condition, **{name: value.expand(rows, *value.shape[1:]) for name, value in self._empty.items()}}

    def _latents(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        if examples[0].pixels is None and examples[0].mean is None:  # prompts alone: nothing but a shape
            height, width = examples[0].geometry.target_size
            zeros = torch.zeros((len(examples), *self.backbone.latent_shape(height, width)), device=self.device)
            return zeros, zeros
        if examples[0].mean is not None:
            mean = torch.cat([e.mean for e in examples if e.mean is not None])
            std = torch.cat([e.std for e in examples if e.std is not None])
            return mean.to(self.device), std.to(self.device)
        mean, std = self.backbone.encode_images(torch.cat([e.pixels for e in examples if e.pixels is not None]))
        return mean.to(self.device), std.to(self.device)

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Conditions of all prompts; each distinct prompt is encoded or read once."""
        distinct = list(dict.fromkeys(prompts))
        if self.prompts is not None:
            entries = [self.prompts[prompt_key(p)] for p in distinct]
            encoded = {name: torch.stack([e[name] for e in entries]).to(self.device) for name in entries[0]}
        else:
            encoded = self.backbone.encode_prompts(distinct)
        index = torch.tensor([distinct.index(p) for p in prompts], device=self.device)
        return {name: values.to(self.device)[index] for name, values in encoded.items()}
