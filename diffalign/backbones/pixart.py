"""PixArt-Sigma: a transformer that predicts epsilon, and a variance that is not used.

diffusers has no LoRA for it: all weights are trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from .base import Backbone


class PixArtSigmaBackbone(Backbone):
    """PixArt-Sigma."""

    licence = "CreativeML OpenRAIL++-M"
    network_name = "transformer"
    steps = 20
    supports_lora = False

    @property
    def patch(self) -> int:
        """Latent pixels along a side of one token of the network."""
        return int(self.source.component_config("transformer").get("patch_size", 2))

    @staticmethod
    def call_arguments(settings: dict[str, Any]) -> dict[str, Any]:
        """Draw the size that is asked for, not the nearest of the pipeline's own."""
        return {"use_resolution_binning": "height" not in settings, **settings}

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return shapes of embeddings and mask, see `Backbone.condition_shapes`."""
        embeds = (300, self._network_size("caption_channels"))
        return {"prompt_embeds": embeds, "prompt_attention_mask": (300,)}

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts into ``prompt_embeds`` and ``prompt_attention_mask``."""
        embeds, mask, _, _ = self._encoding_pipe().encode_prompt(
            list(prompts), False, device=self.device
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def predict(
        self, network: Module, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        """Run the transformer at noisy latents, see `Backbone.predict`."""
        output = network(
            noisy,
            encoder_hidden_states=condition["prompt_embeds"],
            encoder_attention_mask=condition["prompt_attention_mask"],
            timestep=times,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output[:, : noisy.shape[1]]  # without the learned variance
