"""Flux.1: dev, Krea-dev and schnell.

dev and Krea-dev take guidance as an input of the network. schnell takes none and draws
in a few steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Module

from .flow_transformer import FlowTransformerBackbone
from .guidance_rules import EMBEDDED
from .packing import packed, position_ids, unpacked


class FluxBackbone(FlowTransformerBackbone):
    """Flux.1 dev, Krea-dev and schnell."""

    licence = "Apache-2.0 for schnell, non-commercial for dev and Krea-dev"
    text_encoder_names = ("text_encoder", "text_encoder_2")
    steps = 28
    guidance_rule = EMBEDDED
    default_guidance = 3.5
    # All linear layers of the blocks. The bare end `proj_out` would also hit the last
    # layer of the network.
    lora_targets = (
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|ff(_context)?\.net\.(0\.proj|2))"
        r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)"
    )

    @property
    def few_steps(self) -> int | None:
        """Steps of a model that was distilled to a few of them: 4 of schnell."""
        return None if self.embeds_guidance else 4

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return shapes of both embeddings, see `Backbone.condition_shapes`."""
        pooled = self._network_size("pooled_projection_dim")
        embeds = (512, self._network_size("joint_attention_dim"))
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": (pooled,)}

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts into ``prompt_embeds`` and ``pooled_prompt_embeds``."""
        embeds, pooled, _ = self._encoding_pipe().encode_prompt(
            list(prompts), None, device=self.device, **self.prompt_settings
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def predict(
        self, network: Module, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        """Run the transformer at noisy latents, see `Backbone.predict`."""
        height, width = noisy.shape[-2:]
        states = condition["prompt_embeds"]
        output = network(
            hidden_states=packed(noisy),
            timestep=times / 1000,
            guidance=self.guidance_input(noisy),
            pooled_projections=condition["pooled_prompt_embeds"],
            encoder_hidden_states=states,
            txt_ids=states.new_zeros(states.shape[1], 3),
            img_ids=position_ids(height // 2, width // 2, noisy),
            return_dict=False,
        )[0]
        return unpacked(output, height, width)
