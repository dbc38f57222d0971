"""Chroma: Flux.1's transformer without guidance input and without pooled text.

Its pipeline guides with a second prediction, and masks the padding of the T5 encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.checkpoint import checkpoint

from .flow_transformer import FlowTransformerBackbone
from .flux import FluxBackbone
from .packing import packed, position_ids, unpacked


class ChromaBackbone(FlowTransformerBackbone):
    """Chroma1."""

    licence = "Apache-2.0"
    steps = 35
    lora_targets = FluxBackbone.lora_targets

    @staticmethod
    def checkpoint_activations(network: Any) -> None:
        """Make the network compute activations again in its backward pass.

        While it does so, diffusers (0.42) leaves the mask of the padding out
        of the single-stream blocks. The mask of the last double-stream block is theirs.
        """
        mask: Tensor | None = None

        def checkpointed(block: Module, *args: Any) -> Any:
            nonlocal mask
            if len(args) == 5:  # states of image and text, modulation, positions, mask
                mask = args[4]
            elif len(args) == 3:  # states, modulation, positions
                args = (*args, mask)
            return checkpoint(block, *args, use_reentrant=False)

        network.enable_gradient_checkpointing(checkpointed)

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return shapes of embeddings and mask, see `Backbone.condition_shapes`."""
        embeds = (512, self._network_size("joint_attention_dim"))
        return {"prompt_embeds": embeds, "attention_mask": (512,)}

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts into ``prompt_embeds`` and their ``attention_mask``."""
        embeds, _, mask, *_ = self._encoding_pipe().encode_prompt(
            list(prompts),
            device=self.device,
            do_classifier_free_guidance=False,
            **self.prompt_settings,
        )
        return {"prompt_embeds": embeds, "attention_mask": mask}

    def predict(
        self, network: Module, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        """Run the transformer at noisy latents, see `Backbone.predict`."""
        height, width = noisy.shape[-2:]
        states, text = condition["prompt_embeds"], condition["attention_mask"]
        image = text.new_ones(len(noisy), (height // 2) * (width // 2))
        output = network(
            hidden_states=packed(noisy),
            timestep=times / 1000,
            encoder_hidden_states=states,
            txt_ids=states.new_zeros(states.shape[1], 3),
            img_ids=position_ids(height // 2, width // 2, noisy),
            attention_mask=torch.cat([text, image], dim=1),
            return_dict=False,
        )[0]
        return unpacked(output, height, width)
