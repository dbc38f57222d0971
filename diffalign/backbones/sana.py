"""Sana: a linear transformer on the latents of a deep-compression autoencoder.

The autoencoder has no posterior. Positive prompts are encoded behind the instruction
that the pipeline's call has as a default.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from .base import Backbone


class SanaBackbone(Backbone):
    """Sana 0.6B and 1.6B, and Sana 1.5."""

    network_name = "transformer"
    steps = 20

    @property
    def vae_scale(self) -> int:
        """Image pixels along a side of one latent pixel."""
        blocks = self.source.component_config("vae")["encoder_block_out_channels"]
        return int(2 ** (len(blocks) - 1))

    @property
    def patch(self) -> int:
        """Latent pixels along a side of one token of the network."""
        return int(self.source.component_config("transformer").get("patch_size", 1))

    @staticmethod
    def pixels(vae: Any, latents: Tensor) -> Tensor:
        """Decode latents, see `Backbone.pixels`."""
        latents = latents.to(vae.dtype) / vae.config.scaling_factor
        return vae.decode(latents, return_dict=False)[0]

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images, see `Backbone.posterior`. The deviation is 0."""
        vae = self.component("vae")
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent
        mean = self.normalised(vae, latents.float())
        return mean, torch.zeros_like(mean)

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
        """Encode prompts into ``prompt_embeds`` and ``prompt_attention_mask``.

        The empty prompt has no instruction in front of it, as in the pipeline.
        """
        call = inspect.signature(self.source.pipeline_class().__call__).parameters
        instruction = call["complex_human_instruction"].default
        parts = [
            self._encoding_pipe().encode_prompt(
                [prompt],
                False,
                device=self.device,
                complex_human_instruction=instruction if prompt else None,
            )[:2]
            for prompt in prompts
        ]
        embeds, masks = (torch.cat(part) for part in zip(*parts, strict=True))
        return {"prompt_embeds": embeds, "prompt_attention_mask": masks}

    def predict(
        self, network: Module, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        """Run the transformer at noisy latents, see `Backbone.predict`."""
        output = network(
            noisy,
            encoder_hidden_states=condition["prompt_embeds"],
            encoder_attention_mask=condition["prompt_attention_mask"],
            timestep=times * self.source.component_config("transformer")["timestep_scale"],
            return_dict=False,
        )[0]
        return output[:, : noisy.shape[1]]  # without a learned variance
