"""Captioned images, whose contrastive loss keeps what trained towers know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data import PreferenceDataset, load_preferences
from ..errors import UserError
from ..training.row_order import PositionSampler, RowOrder, endless_loader


class CaptionData(torch.utils.data.Dataset[Any]):
    """Captioned images, prepared for a scorer's towers.

    Args:
        source: Anything that `load_preferences` reads, with one image per row.
        scorer: Prepares the images.
        batch_size (`int`): Images per process and forward pass.
        seed (`int`): Of the order.

    Raises:
        UserError: There are less than two.
    """

    def __init__(self, source: Any, scorer: Any, batch_size: int, seed: int) -> None:
        self.data = source
        if not isinstance(source, PreferenceDataset):
            self.data = load_preferences(source, kind="single", verbose=False)
        if len(self.data) < 2:
            raise UserError("train.anchor_data: a contrastive loss needs two captions or more")
        self.scorer, self.batch_size, self.seed = scorer, batch_size, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, str]:
        """Read one prepared image, (3, size, size), and its caption."""
        group = self.data[key[1]]
        return self.scorer.preprocess.exact(group.open_image(0)), group.prompts[0]

    def batches(self, accelerator: Accelerator, passes: int) -> Iterator[tuple[Tensor, list[str]]]:
        """Read the batches of this process without end.

        Args:
            accelerator (`Accelerator`): Processes and device.
            passes (`int`): Forward passes that each process has done.
        """
        world, scorer = accelerator.num_processes, self.scorer
        sampler = PositionSampler(
            RowOrder(len(self), self.seed),
            passes * self.batch_size * world,
            self.batch_size,
            accelerator.process_index,
            world,
        )
        for items in endless_loader(self, sampler, lambda items: items):
            pixels = scorer.preprocess.stack([image for image, _ in items])
            pixels = scorer.preprocess.normalise(pixels.to(accelerator.device))
            yield pixels.to(scorer.dtype), [caption for _, caption in items]
