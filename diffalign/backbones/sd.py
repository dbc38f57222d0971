"""Stable Diffusion 1.x and 2.x: one UNet and one CLIP text encoder.

The network predicts epsilon or v.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from .base import Backbone


class StableDiffusionBackbone(Backbone):
    """Stable Diffusion 1.x and 2.x."""

    licence = "CreativeML OpenRAIL-M"

    def pipeline_scheduler(self, scheduler: Any) -> Any:
        """Correct configurations of the early days, as `StableDiffusionPipeline` does.

        The offset is 1, and nothing is clipped.
        """
        fixed = {"steps_offset": 1, "clip_sample": False}
        outdated = {
            name: value
            for name, value in fixed.items()
            if scheduler.config.get(name, value) != value
        }
        return type(scheduler).from_config(scheduler.config, **outdated) if outdated else scheduler

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of the embeddings, see `Backbone.condition_shapes`."""
        return {"prompt_embeds": (77, self._network_size("cross_attention_dim"))}

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts into ``prompt_embeds``, (n, tokens, width)."""
        embeds, _ = self._encoding_pipe().encode_prompt(list(prompts), self.device, 1, False)
        return {"prompt_embeds": embeds}

    def predict(
        self, network: Module, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        """Run the UNet at noisy latents, see `Backbone.predict`."""
        return network(
            noisy, times, encoder_hidden_states=condition["prompt_embeds"], return_dict=False
        )[0]
