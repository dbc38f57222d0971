"""What the flow-matching transformers of today share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Backbone
from .packing import unpacked


class FlowTransformerBackbone(Backbone):
    """A transformer that predicts the velocity, sampled at evenly spaced sigmas.

    Tokens are patches of 2x2 latent pixels, unless a family says otherwise.
    """

    network_name = "transformer"
    resolution = 1024
    even_sigmas = True
    guides_in_one_batch = False

    @property
    def patch(self) -> int:
        """Latent pixels along a side of one token of the network."""
        return 2

    def guidance_input(self, noisy: Tensor) -> Tensor | None:
        """Return the guidance of every row, (n,), where the network takes one."""
        if not self.embeds_guidance:
            return None
        return torch.full((len(noisy),), self.guidance, device=noisy.device)

    @staticmethod
    def unpacked(pipe: Any, latents: Tensor, height: int, width: int) -> Tensor:
        """Bring a running pipeline's packed latents into the form (n, C, h, w)."""
        sides = (2 * (side // (2 * pipe.vae_scale_factor)) for side in (height, width))
        return unpacked(latents, *sides)
