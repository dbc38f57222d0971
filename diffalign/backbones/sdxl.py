"""Stable Diffusion XL: two text encoders and a pooled embedding.

The network is conditioned on the true size and crop of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from .base import Backbone


class StableDiffusionXLBackbone(Backbone):
    """Stable Diffusion XL."""

    licence = "CreativeML OpenRAIL++-M"
    text_encoder_names = ("text_encoder", "text_encoder_2")
    # It overflows in float16, and the official script keeps float32 in bf16.
    upcast_vae = (
        torch.float16,
        torch.bfloat16,
    )

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return shapes of embeddings and sizes, see `Backbone.condition_shapes`."""
        sizes = 6 * self._network_size("addition_time_embed_dim")
        pooled = self._network_size("projection_class_embeddings_input_dim") - sizes
        embeds = (77, self._network_size("cross_attention_dim"))
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": (pooled,), "time_ids": (6,)}

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts into ``prompt_embeds`` and ``pooled_prompt_embeds``."""
        pipe = self._encoding_pipe()
        embeds, _, pooled, _ = pipe.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False
        )
        if pipe.config.force_zeros_for_empty_prompt:
            # At inference this model's "no prompt" is zeros, not the encoding of an
            # empty string.
            keep = torch.tensor(
                [bool(prompt) for prompt in prompts], device=embeds.device, dtype=embeds.dtype
            )
            embeds, pooled = embeds * keep[:, None, None], pooled * keep[:, None]
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def geometry_condition(self, geometries: Sequence[Any]) -> dict[str, Tensor]:
        """Encode original size, crop and target size into ``time_ids``, (n, 6)."""
        rows = [[*g.original_size, *g.crop_top_left, *g.target_size] for g in geometries]
        return {"time_ids": torch.tensor(rows, dtype=torch.float32)}

    def predict(
        self, network: Module, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        """Run the UNet at noisy latents, see `Backbone.predict`."""
        added = {
            "text_embeds": condition["pooled_prompt_embeds"],
            "time_ids": condition["time_ids"],
        }
        return network(
            noisy,
            times,
            encoder_hidden_states=condition["prompt_embeds"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
