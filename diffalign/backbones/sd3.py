"""Stable Diffusion 3 and 3.5: an MMDiT with up to three text encoders.

It is trained by flow matching.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..shapes.sampling_defaults import sampling_settings
from .base import Backbone


class StableDiffusion3Backbone(Backbone):
    """Stable Diffusion 3 and 3.5."""

    licence = "Stability AI Community License"
    network_name = "transformer"
    text_encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")

    @property
    def patch(self) -> int:
        """Latent pixels along a side of one token of the network."""
        return int(self.source.component_config("transformer").get("patch_size", 2))

    @property
    def lora_targets(self) -> str:  # type: ignore[override]
        """Attention of image and text. The last block's text queries lead nowhere."""
        last = self.source.component_config("transformer")["num_layers"] - 1
        return (
            rf"(?!transformer_blocks\.{last}\.attn\.add_q_proj)"
            r".*\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        )

    def _encoding_pipe(self) -> Any:
        """Build a pipeline with text encoders only, see `Backbone`.

        Without a T5 encoder, diffusers reads the width of the zeros in its place from
        the config of the transformer, which itself need not be loaded.
        """
        pipe = super()._encoding_pipe()
        if pipe.text_encoder_3 is None and pipe.transformer is None:
            config = self.source.component_config("transformer")
            pipe.transformer = SimpleNamespace(config=SimpleNamespace(**config))
        return pipe

    @property
    def prompt_settings(self) -> dict[str, Any]:
        """For the embedded model the number of T5 tokens, see `sampling_settings`."""
        settings = sampling_settings(self.source.embedded) if self.source.embedded else {}
        return {k: v for k, v in settings.items() if k == "max_sequence_length"}

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return shapes of both embeddings, see `Backbone.condition_shapes`."""
        tokens = 77 + (256 if self.source.has("text_encoder_3") else 77)
        pooled = self._network_size("pooled_projection_dim")
        embeds = (tokens, self._network_size("joint_attention_dim"))
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": (pooled,)}

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts into ``prompt_embeds`` and ``pooled_prompt_embeds``."""
        embeds, _, pooled, _ = self._encoding_pipe().encode_prompt(
            list(prompts),
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            **self.prompt_settings,
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
