"""Stable Diffusion 3 and 3.5: an MMDiT with up to three text encoders.

It is trained by flow matching.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Module

from .base import Backbone


class StableDiffusion3Backbone(Backbone):
    """Stable Diffusion 3 and 3.5."""

    network_name = "transformer"
    text_encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")

    @property
    def size_factor(self) -> int:
        """The number of which image sides must be multiples: whole patches."""
        return self.vae_scale * self.source.component_config("transformer").get("patch_size", 2)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts into ``prompt_embeds`` and ``pooled_prompt_embeds``."""
        embeds, _, pooled, _ = self._encoding_pipe().encode_prompt(
            list(prompts), None, None, device=self.device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def predict(
        self, network: Module, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        """Run the transformer at noisy latents, see `Backbone.predict`."""
        return network(
            hidden_states=noisy,
            timestep=times,
            encoder_hidden_states=condition["prompt_embeds"],
            pooled_projections=condition["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
