"""Prepare the data of a run: transform, caches, order, precomputed reference errors."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..backbones import Backbone
from ..data import (
    DataConfig,
    GroupTransform,
    PreferenceDataset,
    check_resolution,
    load_preferences,
    parse_buckets,
)
from ..data.cache import TensorCache
from ..data.streaming import StreamingPreferenceDataset
from ..errors import ConfigError, UserError
from ..runtime.files import read_tensors, save_tensors, write_atomically
from ..runtime.hashing import text_hash, value_hash
from ..runtime.progress import track
from .batch import Batch
from .batch_builder import BatchBuilder
from .config import TrainingConfig
from .fill_caches import fill_latent_cache, fill_prompt_cache
from .group_reader import Example, GroupReader, StreamPosition, StreamReader, check_broken
from .row_order import PositionSampler, RowOrder, endless_loader

REFERENCE_FILE = "reference_errors.safetensors"
REFERENCE_PARTS = ".reference_errors"
"""Errors computed so far, until the file is complete."""
_BATCHES_PER_PART = 32


def as_preferences(
    data: Any, config: DataConfig, kind: str, split: str, *, invert: bool = False
) -> PreferenceDataset:
    """Read the data as groups of the kind that a method needs.

    Args:
        data: A name, a `datasets.Dataset`, rows, or a `PreferenceDataset`.
        config (`DataConfig`): Settings of the data.
        kind (`str`): `pair`, `ranked`, `labelled`, `single` or `prompt`.
        split (`str`): Split of the dataset.
        invert (`bool`, *optional*, defaults to `False`): Prefer the rejected images.
            `data.invert_preferences` inverts once more.

    Returns:
        `PreferenceDataset`: The groups.
    """
    if not isinstance(data, PreferenceDataset):
        data = load_preferences(
            data,
            split=split,
            config=config.dataset_config,
            revision=config.dataset_revision,
            streaming=config.dataset_streaming,
            columns=config.columns or None,
            ties=config.ties,
            verify_images=config.verify_images,
            max_broken_fraction=config.max_broken_fraction,
            data_dir=config.train_data_dir,
            score_columns=config.score_columns,
            calibrate=config.calibrate,
            like_threshold=config.like_threshold,
            wanted=kind,
            allow_remote_images=config.allow_remote_images,
            allow_outside_paths=config.allow_outside_paths,
            verbose=False,
        )
    if invert == config.invert_preferences:
        return data.as_kind(kind)
    if data.kind == "labelled":  # only liked images become single ones
        return data.with_inverted_preferences().as_kind(kind)
    return data.as_kind(kind).with_inverted_preferences()


def build_transform(config: DataConfig, backbone: Backbone) -> GroupTransform:
    """Build the image transform and check its sizes against the model.

    Args:
        config (`DataConfig`): Settings of the data.
        backbone (`Backbone`): The model.

    Raises:
        ConfigError: A side is no multiple of what the model needs, or the cached
            latents would change between epochs.
    """
    if config.aspect_ratio_buckets:
        sizes: Any = parse_buckets(config.aspect_ratio_buckets)
        for size in sizes:
            check_resolution(size, backbone.size_factor, "data.aspect_ratio_buckets")
    else:
        side = config.resolution or backbone.default_resolution
        check_resolution(side, backbone.size_factor)
        sizes = (side, side)
    transform = GroupTransform(
        sizes,
        center_crop=config.center_crop,
        random_flip=config.random_flip,
        mismatch=config.mismatch,
    )
    if config.cache_latents and not (config.center_crop and not config.random_flip):
        raise ConfigError(
            "data.cache_latents",
            "cached latents cannot be cropped or flipped anew; set data.center_crop: true "
            "and data.random_flip: false",
        )
    return transform


def check_data(dataset: PreferenceDataset, config: DataConfig, args: TrainingConfig) -> None:
    """Refuse data settings that exclude each other.

    Args:
        dataset (`PreferenceDataset`): The training data.
        config (`DataConfig`): Settings of the data.
        args (`TrainingConfig`): Settings of the run.

    Raises:
        ConfigError: A stream has precomputed errors or no `max_steps`, precomputed
            errors have changing pixels, or prompts have buckets.
    """
    is_stream = isinstance(dataset, StreamingPreferenceDataset)
    if is_stream and args.max_steps is None:
        raise ConfigError("train.max_steps", "a streamed dataset has no length; set max_steps")
    if is_stream and args.precompute_ref_errors:
        raise ConfigError(
            "data.dataset_streaming",
            "precompute_ref_errors needs a dataset of known size; set it to false",
        )
    if args.precompute_ref_errors and not (config.center_crop and not config.random_flip):
        raise ConfigError(
            "train.precompute_ref_errors",
            "needs the same pixels in every epoch; set data.center_crop: true and "
            "data.random_flip: false",
        )
    if is_stream and config.aspect_ratio_buckets and args.per_device_train_batch_size > 1:
        raise ConfigError(
            "data.aspect_ratio_buckets",
            "a stream cannot be sorted into buckets; set train.per_device_train_batch_size: 1 "
            "(with gradient_accumulation_steps), or dataset_streaming: false",
        )
    if config.aspect_ratio_buckets and dataset.kind == "prompt":
        raise ConfigError(
            "data.aspect_ratio_buckets",
            "prompts without images have no size; set data.resolution instead",
        )


class DataPipeline:
    """A dataset with its caches, its order and its batch builder.

    Args:
        dataset (`PreferenceDataset`): Groups of the method's kind.
        config (`DataConfig`): Settings of the data.
        args (`TrainingConfig`): Settings of the run.
        backbone (`Backbone`): The model.
        accelerator (`Accelerator`): Processes of the run.
    """

    def __init__(
        self,
        dataset: PreferenceDataset,
        config: DataConfig,
        args: TrainingConfig,
        backbone: Backbone,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.args, self.backbone, self.accelerator = (
            config,
            args,
            backbone,
            accelerator,
        )
        self.transform = build_transform(config, backbone)
        self.streaming = isinstance(dataset, StreamingPreferenceDataset)
        self.dropped_sizes = 0
        self.buckets: list[int] | None = None
        if config.aspect_ratio_buckets and not self.streaming:
            dataset = self._assign_buckets(dataset)
        self.dataset = dataset
        self.latents = self._latent_cache()
        self.reader = GroupReader(
            dataset, self.transform, args.seed, config.max_broken_fraction, self.buckets
        )
        self.prompts = self._prompt_cache()
        on_the_way = self.latents if self.streaming else None
        self.builder = BatchBuilder(backbone, args, accelerator.device, self.prompts, on_the_way)
        self.stream: StreamingPreferenceDataset | None = None
        self.positions: list[StreamPosition] = []
        self.turn = self.streamed = 0
        if isinstance(dataset, StreamingPreferenceDataset):
            rank, world = accelerator.process_index, accelerator.num_processes
            self.stream = dataset.share(rank, world)
            workers = max(1, min(config.num_workers, self.stream.num_shards))
            self.positions = [StreamPosition()] * workers
            self.reader.latents = self.latents

    def _assign_buckets(self, dataset: PreferenceDataset) -> PreferenceDataset:
        broken: list[str] = []
        assigned = [self._bucket(dataset, row, broken) for row in range(len(dataset))]
        keep = [i for i, bucket in enumerate(assigned) if bucket is not None]
        if broken:
            most = self.config.max_broken_fraction
            check_broken(len(broken), len(dataset), most, broken[0])
        self.dropped_sizes = len(assigned) - len(keep) - len(broken)
        if not keep:
            raise UserError(
                "data.mismatch: the images of every group differ in aspect; set "
                "data.mismatch: letterbox"
            )
        self.buckets = [bucket for bucket in assigned if bucket is not None]
        return dataset if len(keep) == len(assigned) else dataset.select(keep)

    def _bucket(self, dataset: PreferenceDataset, row: int, broken: list[str]) -> int | None:
        """Choose the bucket of a group. None if it has none, or cannot be read."""
        try:
            return self.transform.bucket_of(dataset[row].image_sizes())
        except UserError as error:
            warnings.warn(f"{error}; the row is left out", stacklevel=2)
            broken.append(str(error))
            return None

    def _latent_cache(self) -> TensorCache | None:
        if not self.config.cache_latents or self.dataset.kind == "prompt":
            return None
        transform = text_hash(self.transform.fingerprint)[:16]
        precision = str(self.backbone.component_dtype("vae")).removeprefix("torch.")
        key = f"latents-{self.backbone.source.fingerprint('vae')}-{transform}-{precision}"
        return TensorCache(Path(self.config.cache_latents) / key)

    def _prompt_cache(self) -> TensorCache | None:
        if not self.config.cache_text_embeddings:
            return None
        backbone = self.backbone
        source = backbone.source
        rules = [source.pipeline_class_name, source.pipeline_options(), backbone.prompt_settings]
        fingerprint = text_hash(source.fingerprint(*backbone.encoders()), value_hash(rules))[:16]
        key = f"prompts-{fingerprint}-{str(backbone.dtype).removeprefix('torch.')}"
        return TensorCache(Path(self.config.cache_text_embeddings) / key)

    def fill_caches(self) -> list[str]:
        """Encode what the caches lack, then release the encoders.

        All processes must call this.

        Returns:
            `list[str]`: Messages for the user.
        """
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        messages: list[str] = []
        if self.streaming:  # filled on the way
            return messages
        if self.latents is not None:
            mine = fill_latent_cache(self.latents, self.reader, self.backbone, rank, world)
            added = int(self.accelerator.reduce(torch.tensor(mine, device=self.accelerator.device)))
            self.accelerator.wait_for_everyone()
            self.latents.reload()
            self.reader.latents = self.latents
            messages.append(
                f"latent cache {self.latents.folder}: {len(self.dataset)} groups, {added} "
                "encoded now"
            )
            self.backbone.release("vae")
        if self.prompts is not None:
            texts = sorted({*self.dataset.distinct_prompts(), ""})
            added = fill_prompt_cache(self.prompts, texts, self.backbone, rank, world)
            self.accelerator.wait_for_everyone()
            self.prompts.reload()
            messages.append(
                f"prompt cache {self.prompts.folder}: {len(texts)} prompts, {added} encoded now"
            )
            self.backbone.release(*self.backbone.text_encoder_names)
        return messages

    @property
    def global_batch(self) -> int:
        """Groups per optimizer step over all processes."""
        args = self.args
        return (
            args.per_device_train_batch_size
            * args.gradient_accumulation_steps
            * self.accelerator.num_processes
        )

    def batches(self, start: int) -> Iterator[list[Example]]:
        """Read this process's micro-batches without end.

        Args:
            start (`int`): Position in the data, in groups over all processes.

        Returns:
            `Iterator[list[Example]]`: The micro-batches.
        """
        args, accelerator = self.args, self.accelerator
        place = (
            start,
            args.per_device_train_batch_size,
            accelerator.process_index,
            accelerator.num_processes,
        )
        workers: dict[str, Any] = {
            "num_workers": self.config.num_workers,
            "persistent_workers": self.config.num_workers > 0,
        }
        if self.stream is not None:
            # A generator of its own for the same reason as in `endless_loader`.
            loading = {"collate_fn": _same, "generator": torch.Generator()}
            return self._streamed(self.stream, start, loading | workers)
        sampler = PositionSampler(self._order(), *place)
        return iter(endless_loader(self.reader, sampler, _same, **workers))

    def _order(self) -> RowOrder:
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        return RowOrder(len(self.dataset), seed, self.buckets, args.per_device_train_batch_size)

    @cached_property
    def epoch_rows(self) -> int:
        """Positions of one epoch: the rows, and what fills up batches of buckets."""
        return len(self.dataset) if self.buckets is None else self._order().length

    def _streamed(
        self, stream: StreamingPreferenceDataset, start: int, loading: dict[str, Any]
    ) -> Iterator[list[Example]]:
        """Read the stream from a position, and keep track of it."""
        count, skip = len(self.positions), 0
        if start != self.streamed:
            # Not where the last batch or checkpoint ended, so rows are read again. A
            # checkpoint of an earlier version knows no position either.
            self.positions, self.turn = [StreamPosition()] * count, 0
            skip = start // self.accelerator.num_processes // count
            self.streamed = start
        size = self.args.per_device_train_batch_size
        reader = StreamReader(stream, self.reader, size, self.positions, self.turn, skip)
        loading["num_workers"] = count if self.config.num_workers else 0
        for item in torch.utils.data.DataLoader(reader, batch_size=None, **loading):
            if item is None:
                continue
            batch, worker, position = item
            self.positions = [*self.positions]
            self.positions[worker], self.turn = position, (worker + 1) % count
            self.streamed += size * self.accelerator.num_processes
            yield batch

    def save(self, folder: Path, rank: int) -> None:
        """Write this process's position in the stream into a checkpoint.

        Args:
            folder (`Path`): Folder of the checkpoint.
            rank (`int`): Number of this process.
        """
        if self.stream is None:
            return
        for cache in (self.latents, self.prompts):
            if cache is not None:
                cache.flush()
        facts = {
            "processes": self.accelerator.num_processes,
            "groups": self.streamed,
            "turn": self.turn,
            "positions": [dataclasses.asdict(position) for position in self.positions],
        }
        write_atomically(folder / f"stream-{rank}.json", json.dumps(facts).encode())

    def load(self, folder: Path, rank: int, device: torch.device) -> None:
        """Read this process's position in the stream from a checkpoint.

        Args:
            folder (`Path`): Folder of the checkpoint.
            rank (`int`): Number of this process.
            device (`torch.device`): Not used.

        Raises:
            UserError: The checkpoint is of another number of processes or workers.
        """
        if self.stream is None or not (folder / "stream-0.json").is_file():
            return
        facts = json.loads((folder / "stream-0.json").read_text("utf-8"))
        if facts["processes"] != self.accelerator.num_processes:
            raise UserError(
                f"data.dataset_streaming: {folder} is of {facts['processes']} processes, each "
                "with its share of the stream; resume it with as many"
            )
        if len(facts["positions"]) != len(self.positions):
            raise UserError(
                f"data.num_workers: {folder} is of a stream read by {len(facts['positions'])} "
                "workers; resume it with as many"
            )
        facts = json.loads((folder / f"stream-{rank}.json").read_text("utf-8"))
        self.turn, self.streamed = facts["turn"], facts["groups"]
        self.positions = [StreamPosition(**values) for values in facts["positions"]]

    def passes(self, together: bool = False) -> Iterator[tuple[list[Example], bool]]:
        """Read this process's share of the data once, in order.

        Args:
            together (`bool`, *optional*, defaults to `False`): Give all processes
                equally many micro-batches, as a sharded network needs.

        Returns:
            `Iterator[tuple[list[Example], bool]]`: The micro-batches, and whether they
            count. One that only keeps up with other processes does not.
        """
        if self.stream is not None:
            yield from self._streamed_pass(self.stream, together)
            return
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        rows = [(0, i) for i in range(len(self.dataset))]
        mine = self.chunks(rows[rank::world])
        for chunk in mine:
            yield [self.reader[key] for key in chunk], True
        if together:
            for _ in range(self.most_chunks(rows) - len(mine)):
                yield [self.reader[rows[0]]], False

    def _streamed_pass(
        self, stream: StreamingPreferenceDataset, together: bool
    ) -> Iterator[tuple[list[Example], bool]]:
        """Read this process's share of a stream once. See `passes`."""
        stream.load_state_dict(None)
        chunks = self._streamed_chunks(stream)
        last: list[Example] | None = None
        while True:
            chunk = next(chunks, None)
            if not together and chunk is None:
                return
            if together and not self._any_process(chunk is not None):
                return
            last = chunk or last
            if last is None:
                raise UserError(
                    "data.dataset_streaming: the evaluation data have fewer rows than there are "
                    "processes; set it to false"
                )
            yield last, chunk is not None

    def _any_process(self, answer: bool) -> bool:
        flag = torch.tensor([float(answer)], device=self.accelerator.device)
        return float(self.accelerator.reduce(flag, reduction="sum")) > 0

    def _streamed_chunks(self, stream: StreamingPreferenceDataset) -> Iterator[list[Example]]:
        """Read the groups of a stream in micro-batches whose images have one size."""
        by_size: dict[tuple[int, int], list[Example]] = {}
        for group in stream:
            try:
                example = self.reader.read_streamed(group, 0)
            except UserError as error:
                warnings.warn(f"{error}; it is left out", stacklevel=2)
                continue
            batch = by_size.setdefault(example.geometry.target_size, [])
            batch.append(example)
            if len(batch) == self.args.per_device_train_batch_size:
                yield by_size.pop(example.geometry.target_size)
        yield from by_size.values()

    def most_chunks(self, keys: list[tuple[int, int]]) -> int:
        """Count the micro-batches of the process with the most of them.

        Args:
            keys (`list[tuple[int, int]]`): Rows that the processes take in turn.
        """
        world = self.accelerator.num_processes
        return max(len(self.chunks(keys[rank::world])) for rank in range(world))

    def chunks(self, keys: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """Split rows into micro-batches whose images have one size.

        Args:
            keys (`list[tuple[int, int]]`): Epoch and index of each row.
        """
        by_size: dict[int, list[tuple[int, int]]] = {}
        for key in keys:
            by_size.setdefault(self.buckets[key[1]] if self.buckets is not None else 0, []).append(
                key
            )
        size = self.args.per_device_train_batch_size
        return [
            each[start : start + size]
            for each in by_size.values()
            for start in range(0, len(each), size)
        ]


def _same(examples: list[Example]) -> list[Example]:
    return examples


class ReferenceErrors:
    """Reference errors of all rows, computed once and stored in the run's folder.

    Args:
        data (`DataPipeline`): Rows and draws of the run.
        output_dir (`Path`): Folder of the run.
        key (`str`): Identity of model, data and draws. A file with another key is not
            used.
    """

    def __init__(self, data: DataPipeline, output_dir: Path, key: str) -> None:
        self.data, self.path, self.key = data, output_dir / REFERENCE_FILE, key
        self.parts = output_dir / REFERENCE_PARTS
        self.table: dict[tuple[int, int], Tensor] = {}

    def fill(self, errors: Callable[[Batch], Tensor], together: bool = False) -> bool:
        """Read the errors from their file, or compute them for all rows and draws.

        Args:
            errors (`Callable`): Returns the errors (g, k) of the reference for a batch.
            together (`bool`, *optional*, defaults to `False`): Let all processes
                compute equally many batches.

        Returns:
            `bool`: Whether they were computed.
        """
        from accelerate.utils import broadcast_object_list

        stored: list[Any] = [self._read() if self.data.accelerator.is_main_process else None]
        broadcast_object_list(stored)
        if stored[0] is not None:
            self._index(*stored[0])
            return False
        self._index(*self._compute(errors, together))
        return True

    def _read(self) -> tuple[Tensor, Tensor] | None:
        if not self.path.is_file():
            return None
        try:
            tensors, facts = read_tensors(self.path)
            return (tensors["row_ids"], tensors["errors"]) if facts.get("key") == self.key else None
        except Exception:  # a damaged file is computed anew
            return None

    def _compute(self, errors: Callable[[Batch], Tensor], together: bool) -> tuple[Tensor, Tensor]:
        data, accelerator = self.data, self.data.accelerator
        count, draws = len(data.dataset), data.args.ref_error_draws
        k = max(len(data.dataset[i].prompts) for i in range(count))
        ids = torch.tensor([data.dataset[i].key for i in range(count)])
        table = torch.zeros(count, draws, k, dtype=torch.float64)
        size = data.args.per_device_train_batch_size
        rank, world = accelerator.process_index, accelerator.num_processes
        todo = [(d, i) for d in range(draws) for i in range(count)][rank::world]
        # With as many processes the batches are the same, so a killed run can go on.
        folder = self.parts / f"{self.key}-{size}-{rank}-of-{world}"
        try:
            parts = TensorCache(folder, shard_entries=_BATCHES_PER_PART)
        except UserError:  # a damaged file is computed anew
            shutil.rmtree(folder)
            parts = TensorCache(folder, shard_entries=_BATCHES_PER_PART)
        mine = data.chunks(todo)
        own = len(mine)
        if together:  # a reference spread over the processes runs on all of them
            order = [(d, i) for d in range(draws) for i in range(count)]
            mine += [order[:1]] * (data.most_chunks(order) - len(mine))
        chunks = track(mine, desc="reference errors", unit="batch", disable=rank > 0)
        for number, chunk in enumerate(chunks):
            if together or str(number) not in parts:
                batch = data.builder([data.reader[key] for key in chunk])
                computed = errors(batch).double()
                if str(number) not in parts:
                    parts.add(str(number), {"errors": computed})
            if number < own:
                for (draw, index), row in zip(chunk, parts[str(number)]["errors"], strict=True):
                    table[index, draw, : len(row)] = row
        parts.flush()
        table = accelerator.reduce(table.to(accelerator.device), reduction="sum").cpu()
        if accelerator.is_main_process:
            save_tensors({"row_ids": ids, "errors": table}, self.path, metadata={"key": self.key})
            shutil.rmtree(self.parts, ignore_errors=True)
        return ids, table

    def _index(self, ids: Tensor, table: Tensor) -> None:
        self.table = {
            (int(row), draw): table[i, draw]
            for i, row in enumerate(ids)
            for draw in range(table.shape[1])
        }

    def attach(self, batch: Batch, examples: list[Example]) -> None:
        """Set the reference errors of a batch.

        Args:
            batch (`Batch`): Changed in place.
            examples (`list[Example]`): The examples it was built from.
        """
        rows = [
            self.table[(e.key, self.data.builder.draw_epoch(e.epoch))][: batch.k] for e in examples
        ]
        batch.reference_errors = torch.stack(rows).to(batch.x0.device, torch.float32)
