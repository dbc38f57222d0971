"""What happens to the data before the first step: transform, caches, loader, precomputed reference errors."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

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
from ..errors import ConfigError, UserError
from ..runtime.files import read_tensors, save_tensors
from .batch import Batch
from .batch_builder import BatchBuilder
from .config import TrainingConfig
from .fill_caches import fill_latent_cache, fill_prompt_cache
from .group_reader import Example, GroupReader, StreamReader
from .row_order import PositionSampler, RowOrder

REFERENCE_FILE = "reference_errors.safetensors"
REFERENCE_PARTS = ".reference_errors"
"""What a run has computed of them so far; removed when the file is whole."""
_BATCHES_PER_PART = 32


def as_preferences(
    data: Any, config: DataConfig, kind: str, split: str, *, invert: bool = False
) -> PreferenceDataset:
    """Whatever the user gave - a name, a `datasets.Dataset`, rows, a `PreferenceDataset` - as groups of the method's kind.

    Args:
        invert: prefer what was rejected; `data.invert_preferences` turns it round once more.
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
            allow_remote_images=config.allow_remote_images,
            allow_outside_paths=config.allow_outside_paths,
            verbose=False,
        )
    data = data.as_kind(kind)
    return data.with_inverted_preferences() if invert != config.invert_preferences else data


def build_transform(config: DataConfig, backbone: Backbone) -> GroupTransform:
    """The joint image transform, its sizes checked against the model.

    Raises:
        ConfigError: when a side is not a multiple of what the model's autoencoder and network need.
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

    Raises:
        ConfigError: caches of a stream, precomputed errors of changing pixels, buckets for prompts.
    """
    cached = config.cache_latents or config.cache_text_embeddings or args.precompute_ref_errors
    if config.dataset_streaming and cached:
        raise ConfigError(
            "data.dataset_streaming",
            "caches and precompute_ref_errors need a dataset of known size; set it to false",
        )
    if args.precompute_ref_errors and not (config.center_crop and not config.random_flip):
        raise ConfigError(
            "train.precompute_ref_errors",
            "needs the same pixels in every epoch; set data.center_crop: true and "
            "data.random_flip: false",
        )
    if config.aspect_ratio_buckets and dataset.kind == "prompt":
        raise ConfigError(
            "data.aspect_ratio_buckets",
            "prompts without images have no size; set data.resolution instead",
        )


class DataPipeline:
    """One dataset, ready to be read: owns caches, order and batch building.

    Args:
        dataset: groups of the method's kind.
        config, args, backbone, accelerator: of the run.
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
        self.streaming = config.dataset_streaming
        self.dropped_sizes = 0
        self.buckets: list[int] | None = None
        if config.aspect_ratio_buckets and not self.streaming:
            dataset = self._assign_buckets(dataset)
        self.dataset = dataset
        self.latents = self._latent_cache()
        self.reader = GroupReader(dataset, self.transform, args.seed, config.max_broken_fraction)
        self.prompts = self._prompt_cache()
        self.builder = BatchBuilder(backbone, args, accelerator.device, self.prompts)

    def _assign_buckets(self, dataset: PreferenceDataset) -> PreferenceDataset:
        assigned = [self.transform.bucket_of(group.image_sizes()) for group in dataset]
        keep = [i for i, bucket in enumerate(assigned) if bucket is not None]
        self.dropped_sizes = len(assigned) - len(keep)
        if not keep:
            raise UserError(
                "data.mismatch: the images of every group differ in aspect; set "
                "data.mismatch: letterbox"
            )
        self.buckets = [bucket for bucket in assigned if bucket is not None]
        return dataset if not self.dropped_sizes else dataset.select(keep)

    def _latent_cache(self) -> TensorCache | None:
        if not self.config.cache_latents or self.dataset.kind == "prompt":
            return None
        transform = hashlib.sha256(self.transform.fingerprint.encode()).hexdigest()[:16]
        precision = str(self.backbone.component_dtype("vae")).removeprefix("torch.")
        key = f"latents-{self.backbone.source.fingerprint('vae')}-{transform}-{precision}"
        return TensorCache(Path(self.config.cache_latents) / key)

    def _prompt_cache(self) -> TensorCache | None:
        if not self.config.cache_text_embeddings:
            return None
        names = [
            n
            for n in self.backbone.source.component_names()
            if n.startswith(("text_encoder", "tokenizer"))
        ]
        encoders = [n for n in names if n.startswith("text_encoder")]
        key = f"prompts-{self.backbone.source.fingerprint(*encoders)}-{str(self.backbone.dtype).removeprefix('torch.')}"
        return TensorCache(Path(self.config.cache_text_embeddings) / key)

    def fill_caches(self) -> list[str]:
        """Encodes what the caches lack, on all processes; afterwards the encoders are let go. Returns what to tell the user."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        said = []
        if self.latents is not None:
            added = fill_latent_cache(self.latents, self.reader, self.backbone, rank, world)
            self.accelerator.wait_for_everyone()
            self.latents.reload()
            self.reader.latents = self.latents
            said.append(
                f"latent cache {self.latents.folder}: {len(self.dataset)} groups, {added} "
                "encoded now"
            )
            self.backbone.release("vae")
        if self.prompts is not None:
            texts = sorted(
                {p for i in range(len(self.dataset)) for p in self.dataset[i].prompts} | {""}
            )
            added = fill_prompt_cache(self.prompts, texts, self.backbone, rank, world)
            self.accelerator.wait_for_everyone()
            self.prompts.reload()
            said.append(
                f"prompt cache {self.prompts.folder}: {len(texts)} prompts, {added} encoded now"
            )
            self.backbone.release(*self.backbone.text_encoder_names)
        return said

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
        """Endless micro-batches of this process from position `start` (groups over all processes)."""
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
        # Of its own: a loader draws its workers' seeds when it starts, and a resumed run would have one draw more than the first.
        loading: dict[str, Any] = {"collate_fn": _same, "generator": torch.Generator()}
        if self.streaming:
            stream = StreamReader(self.dataset, self.reader, *place)
            return iter(torch.utils.data.DataLoader(stream, batch_size=None, **loading))
        seed = args.seed if args.data_seed is None else args.data_seed
        order = RowOrder(len(self.dataset), seed, self.buckets, args.per_device_train_batch_size)
        sampler = PositionSampler(order, *place)
        return iter(
            torch.utils.data.DataLoader(self.reader, batch_sampler=sampler, **loading, **workers)
        )  # type: ignore[arg-type]

    def passes(self) -> Iterator[list[Example]]:
        """Every group once, in order, micro-batch by micro-batch: this process's share (for evaluation)."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        for chunk in self.chunks([(0, i) for i in range(len(self.dataset))][rank::world]):
            yield [self.reader[key] for key in chunk]

    def chunks(self, keys: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """(epoch, index) in order, in micro-batches whose images have one size."""
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
    """Reference errors of every row and draw, computed once before training and kept beside the run.

    Args:
        data: the pipeline whose rows and draws they belong to.
        output_dir: where the file goes.
        key: identity of model, data and draw settings; a file of another key is not used.
    """

    def __init__(self, data: DataPipeline, output_dir: Path, key: str) -> None:
        self.data, self.path, self.key = data, output_dir / REFERENCE_FILE, key
        self.parts = output_dir / REFERENCE_PARTS
        self.table: dict[tuple[int, int], Tensor] = {}

    def fill(self, errors: Callable[[Batch], Tensor]) -> bool:
        """Reads the file or runs the reference over all rows and draws; True when it was computed now."""
        from accelerate.utils import broadcast_object_list

        found: list[Any] = [self._read() if self.data.accelerator.is_main_process else None]
        broadcast_object_list(found)
        if found[0] is not None:
            self._index(*found[0])
            return False
        self._index(*self._compute(errors))
        return True

    def _read(self) -> tuple[Tensor, Tensor] | None:
        if not self.path.is_file():
            return None
        try:
            tensors, facts = read_tensors(self.path)
            return (tensors["row_ids"], tensors["errors"]) if facts.get("key") == self.key else None
        except Exception:  # a damaged file is computed anew
            return None

    def _compute(self, errors: Callable[[Batch], Tensor]) -> tuple[Tensor, Tensor]:
        data, accelerator = self.data, self.data.accelerator
        count, draws = len(data.dataset), data.args.ref_error_draws
        k = max(len(data.dataset[i].prompts) for i in range(count))
        ids = torch.tensor([data.dataset[i].row_id for i in range(count)])
        table = torch.zeros(count, draws, k, dtype=torch.float64)
        size, rank, world = (
            data.args.per_device_train_batch_size,
            accelerator.process_index,
            accelerator.num_processes,
        )
        todo = [(d, i) for d in range(draws) for i in range(count)][rank::world]
        # Batches are the same in every run with as many processes, so a killed run goes on with what it has.
        folder = self.parts / f"{self.key}-{size}-{rank}-of-{world}"
        try:
            parts = TensorCache(folder, shard_entries=_BATCHES_PER_PART)
        except UserError:  # a damaged file is computed anew
            shutil.rmtree(folder)
            parts = TensorCache(folder, shard_entries=_BATCHES_PER_PART)
        for number, chunk in enumerate(
            tqdm(data.chunks(todo), desc="reference errors", unit="batch", disable=rank > 0)
        ):
            if str(number) not in parts:
                parts.add(
                    str(number),
                    {"errors": errors(data.builder([data.reader[key] for key in chunk])).double()},
                )
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
        rows = [
            self.table[(e.row_id, self.data.builder.draw_epoch(e.epoch))][: batch.k]
            for e in examples
        ]
        batch.reference_errors = torch.stack(rows).to(batch.x0.device, torch.float32)
