"""Z-Image and Z-Image-Turbo.

The network takes lists of images and of prompts, each with the tokens that it has. Its
time runs from noise (0) to image (1), and its output is the negated velocity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from .conditions import MASK, stack_ragged
from .flow_transformer import FlowTransformerBackbone
from .guidance_rules import OFFSET_BY_ONE


class ZImageBackbone(FlowTransformerBackbone):
    """Z-Image and Z-Image-Turbo."""

    licence = "Apache-2.0"
    ragged = ("prompt_embeds",)
    guidance_rule = OFFSET_BY_ONE
    # Plain ends of names would also hit the blocks that refine noise and text.
    lora_targets = r"layers\.\d+\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])"

    @property
    def few_steps(self) -> int | None:
        """Steps of a model that was distilled to a few of them. Only its name tells."""
        return 9 if "turbo" in self.source.name.lower() else None

    @staticmethod
    def unpacked(pipe: Any, latents: Tensor, height: int, width: int) -> Tensor:
        """The pipeline does not pack."""
        return latents

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of unpadded embeddings, see `Backbone.condition_shapes`."""
        return {"prompt_embeds": (512, self._network_size("cap_feat_dim"))}

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts into ``prompt_embeds``, padded, and their mask."""
        # The pipeline writes its template into the list that it is given.
        rows, _ = self._encoding_pipe().encode_prompt(
            list(prompts),
            device=self.device,
            do_classifier_free_guidance=False,
            **self.prompt_settings,
        )
        embeds, mask = stack_ragged(rows)
        return {"prompt_embeds": embeds, MASK: mask}

    def predict(
        self, network: Module, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        """Run the transformer at noisy latents, see `Backbone.predict`."""
        prompts = list(condition["prompt_embeds"])
        if MASK in condition:
            prompts = [rows[mask] for rows, mask in zip(prompts, condition[MASK], strict=True)]
        output = network(
            list(noisy.unsqueeze(2).unbind(0)),
            (1000 - times) / 1000,
            prompts,
            return_dict=False,
        )[0]
        return -torch.stack(output).squeeze(2)
