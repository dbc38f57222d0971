"""Pairs of one prompt as groups, and their batches for trained towers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..training.loop_config import LoopConfig
from ..training.row_order import PositionSampler, RowOrder, endless_loader
from .judgements import Judgements
from .pair_tensors import Labels

MOST_IMAGES = 8


@dataclass(frozen=True)
class PairGroup:
    """Some pairs of one prompt, whose images go through the towers once.

    Attributes:
        prompt (`int`): Index of the prompt.
        images (`tuple[int, ...]`): Indices of the distinct images.
        pairs (`tuple[tuple[int, int, int], ...]`): Places of both images in `images`,
            and the row of the judgements.
    """

    prompt: int
    images: tuple[int, ...]
    pairs: tuple[tuple[int, int, int], ...]


def make_groups(part: Judgements) -> list[PairGroup]:
    """Group the pairs of each prompt, with at most `MOST_IMAGES` images in a group.

    Args:
        part (`Judgements`): The pairs.
    """
    by_prompt: dict[int, list[int]] = {}
    for row, prompt in enumerate(part.prompt.tolist()):
        by_prompt.setdefault(prompt, []).append(row)
    groups = []
    for prompt, rows in by_prompt.items():
        images: dict[int, int] = {}
        pairs: list[tuple[int, int, int]] = []
        for row in rows:
            both = int(part.first[row]), int(part.second[row])
            if len({*images, *both}) > MOST_IMAGES:
                groups.append(PairGroup(prompt, tuple(images), tuple(pairs)))
                images, pairs = {}, []
            places = [images.setdefault(image, len(images)) for image in both]
            pairs.append((places[0], places[1], row))
        groups.append(PairGroup(prompt, tuple(images), tuple(pairs)))
    return groups


@dataclass
class PairBatch:
    """g groups of pairs, with m images and n pairs.

    Attributes:
        pixels (`Tensor`): What the towers read, (m, 3, size, size).
        prompts (`list[str]`): Prompt of each group.
        owner (`Tensor`): Group of each image, (m,).
        first (`Tensor`): Place of each pair's first image, (n,).
        second (`Tensor`): Place of the other one, (n,).
        group (`Tensor`): Group of each pair, (n,).
        labels (`Tensor`): Share of judges who prefer the first image, (n,).
        shares (`Tensor`): Weight of each pair in its group, (n,). Sums to 1 by group.
        weights (`Tensor`): Weight of each group, (g,), with mean 1 over all groups.
        winners (`Tensor`): Place of the image of each group that is preferred most,
            (g,).
        row_ids (`list[int]`): Index of each group, for messages.
        captioned (`tuple[Tensor, list[str]]`, *optional*): Captioned images.
    """

    pixels: Tensor
    prompts: list[str]
    owner: Tensor
    first: Tensor
    second: Tensor
    group: Tensor
    labels: Tensor
    shares: Tensor
    weights: Tensor
    winners: Tensor
    row_ids: list[int] = field(default_factory=list)
    captioned: tuple[Tensor, list[str]] | None = None

    def without_tensors(self) -> PairBatch:
        """Return a copy without its images. See `LoopBatch`."""
        return replace(self, pixels=torch.empty(0), captioned=None)

    def place(self, groups: list[int]) -> str:
        """Name the prompts of some groups. See `LoopBatch`."""
        return f"the pairs of {', '.join(repr(self.prompts[i][:60]) for i in groups)}"


class PairData(torch.utils.data.Dataset[Any]):
    """Groups of pairs, with their images prepared for a scorer's towers.

    Args:
        part (`Judgements`): The pairs.
        labels (`Labels`): Of the same pairs.
        scorer: Prepares the images.
    """

    def __init__(self, part: Judgements, labels: Labels, scorer: Any) -> None:
        self.part, self.labels, self.scorer = part, labels, scorer
        self.groups = make_groups(part)
        self.winners = [self._winner(group) for group in self.groups]
        weight = labels.weight
        self.totals = torch.stack([weight[self._rows(group)].sum() for group in self.groups])
        self.mean = self.totals.mean().clamp(min=1e-12)

    def __len__(self) -> int:
        return len(self.groups)

    def _winner(self, group: PairGroup) -> int:
        """Place of the image with the most wins over the others."""
        wins = [0.0] * len(group.images)
        for a, b, row in group.pairs:
            lead = float(self.labels.label[row]) - 0.5
            wins[a] += lead
            wins[b] -= lead
        return wins.index(max(wins))

    @staticmethod
    def _rows(group: PairGroup) -> list[int]:
        return [row for _, _, row in group.pairs]

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Tensor]:
        """Read one group: its index, and its prepared images (k, 3, size, size)."""
        _, index = key
        opened = [self.part.open(image) for image in self.groups[index].images]
        prepare = self.scorer.preprocess
        return index, prepare.stack([prepare.exact(image) for image in opened])

    def collate(self, items: list[tuple[int, Tensor]]) -> PairBatch:
        """Build a batch of some groups."""
        groups = [self.groups[index] for index, _ in items]
        sizes = [len(group.images) for group in groups]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        owners = [[i] * size for i, size in enumerate(sizes)]
        pairs = [
            (start + a, start + b, i, row)
            for i, (group, start) in enumerate(zip(groups, starts, strict=True))
            for a, b, row in group.pairs
        ]
        first, second, owner, rows = (torch.tensor(column) for column in zip(*pairs, strict=True))
        totals = self.totals[[index for index, _ in items]]
        return PairBatch(
            torch.cat([pixels for _, pixels in items]),
            [self.part.prompts[group.prompt] for group in groups],
            torch.tensor([place for each in owners for place in each]),
            first,
            second,
            owner,
            self.labels.label[rows].float(),
            (self.labels.weight[rows] / totals[owner].clamp(min=1e-12)).float(),
            (totals / self.mean).float(),
            torch.tensor(
                [start + self.winners[i] for start, (i, _) in zip(starts, items, strict=True)]
            ),
            [index for index, _ in items],
        )

    def placed(self, batch: PairBatch, device: torch.device) -> PairBatch:
        """Move a batch to the device and normalise its images."""
        tensors: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(batch).items()
            if isinstance(value, Tensor)
        }
        batch = replace(batch, **tensors)
        scorer = self.scorer
        batch.pixels = scorer.preprocess.normalise(batch.pixels).to(scorer.dtype)
        return batch

    def batches(
        self, args: LoopConfig, accelerator: Accelerator, start: int
    ) -> Iterator[PairBatch]:
        """Read the batches of this process without end.

        Args:
            args (`LoopConfig`): Settings of the run.
            accelerator (`Accelerator`): Processes and device.
            start (`int`): Position in the data, in groups over all processes.
        """
        size = args.per_device_train_batch_size
        order = RowOrder(len(self), args.seed if args.data_seed is None else args.data_seed)
        place = accelerator.process_index, accelerator.num_processes
        sampler = PositionSampler(order, start, size, *place)
        for batch in endless_loader(self, sampler, self.collate):
            yield self.placed(batch, accelerator.device)

    def share(self, size: int, accelerator: Accelerator) -> Iterator[PairBatch]:
        """Read this process's share of the groups once, in order.

        Args:
            size (`int`): Groups in a batch.
            accelerator (`Accelerator`): Processes and device.
        """
        mine = range(accelerator.process_index, len(self), accelerator.num_processes)
        for start in range(0, len(mine), size):
            items = [self[0, index] for index in mine[start : start + size]]
            yield self.placed(self.collate(items), accelerator.device)
