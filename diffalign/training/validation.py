"""Validation grids: the starting weights beside the current ones, same prompts, same seeds."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..config import ValidationConfig
from ..evaluation.grids import comparison_grid
from ..evaluation.sampling import generate

if TYPE_CHECKING:
    from ..backbones import Backbone


class Validator:
    """Draws the grids of one run on the main process.

    The base images are drawn once, before the first step, and kept in ``samples/base``; they need no second model later, and a
    resumed run reads them back.
    """

    def __init__(
        self, config: ValidationConfig, backbone: Backbone, output_dir: Path, autocast: Callable[[], Any] = nullcontext
    ) -> None:
        # Under mixed precision the components differ in dtype; the training forward is autocast too.
        self.autocast = autocast
        self.config, self.backbone, self.folder = config, backbone, output_dir / "samples"
        count = config.num_validation_images
        self.prompts = [p for p in config.validation_prompts for _ in range(count)]
        self.seeds = [config.validation_seed + i for _ in config.validation_prompts for i in range(count)]

    def _draw(self, network: Any, description: str) -> list[Image.Image]:
        training = network.training
        network.eval()
        pipe = self.backbone.pipeline(network=network)
        try:
            with self.autocast():
                return generate(
                    pipe, self.prompts, self.seeds, batch_size=8, description=description, **self.config.pipe_kwargs()
                )
        finally:
            network.train(training)

    def draw_base(self, network: Any) -> None:
        """Call with the starting weights."""
        folder = self.folder / "base"
        if len(list(folder.glob("*.png"))) == len(self.prompts):
            return
        folder.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(self._draw(network, "validation (base)")):
            temporary = folder / f".{i:04d}.tmp"
            image.save(temporary, "png")
            os.replace(temporary, folder / f"{i:04d}.png")

    def draw(self, network: Any, step: int) -> tuple[Image.Image, Path]:
        """The grid of the current weights and the file it is in, ``samples/step-<n>.png``."""
        tuned = self._draw(network, "validation")
        base = [Image.open(self.folder / "base" / f"{i:04d}.png") for i in range(len(tuned))]
        count = self.config.num_validation_images
        rows = [
            (prompt, base[i * count : (i + 1) * count], tuned[i * count : (i + 1) * count])
            for i, prompt in enumerate(self.config.validation_prompts)
        ]
        grid = comparison_grid(rows, right=f"step {step}")
        path = self.folder / f"step-{step}.png"
        grid.save(path)
        return grid, path
