"""Qwen-Image 2.1: one stream of text and image, and an autoencoder that halves 16 fold.

A token is one latent pixel. Every four of them share one place in the mask of the joint
sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from .conditions import MASK
from .guidance_rules import CLASSIFIER_FREE
from .qwen_image import QwenImageBackbone


class QwenImage21Backbone(QwenImageBackbone):
    """Qwen-Image 2.1."""

    licence = "see its model card"
    encoding_names = ("text_encoder", "processor")
    guidance_rule = CLASSIFIER_FREE
    lora_targets = (  # type: ignore[assignment]
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0)"
        r"|img_mlp\.(proj|out|gate_layer))"
    )

    @property
    def vae_scale(self) -> int:
        """Image pixels along a side of one latent pixel."""
        return 16

    @property
    def prompt_settings(self) -> dict[str, Any]:
        """The pipeline has no limit of tokens."""
        return {}

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return nothing: the network's own shapes depend on the content of masks."""
        return {}

    def tokens(self, height: int, width: int) -> int:
        """Count the latent pixels, of which every one is a token."""
        return (height // self.vae_scale) * (width // self.vae_scale)

    def sampler_arguments(self, steps: int, height: int, width: int) -> dict[str, Any]:
        """Return what the pipeline passes to `scheduler.set_timesteps`.

        A checkpoint may bring its own sigmas. They replace any number of steps.
        """
        arguments = super().sampler_arguments(steps, height, width)
        sigmas = self.source.pipeline_options().get("sample_sigmas")
        if sigmas:
            arguments["sigmas"] = sigmas
        return arguments

    @staticmethod
    def unpacked(pipe: Any, latents: Tensor, height: int, width: int) -> Tensor:
        """Bring a running pipeline's latents into the form (n, C, h, w)."""
        sides = tuple(2 * (side // (2 * pipe.vae_scale_factor)) for side in (height, width))
        return latents.transpose(1, 2).unflatten(2, sides)

    def predict(
        self, network: Module, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        """Run the transformer at noisy latents, see `Backbone.predict`.

        The network places the image behind the padded text, so padding would change the
        prediction. Prompts of another length run in a pass of their own.
        """
        if MASK not in condition:
            return self._predict(network, noisy, times, condition["prompt_embeds"])
        lengths = condition[MASK].sum(1)
        order, parts = [], []
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero()[:, 0]
            states = condition["prompt_embeds"][rows, :length]
            parts.append(self._predict(network, noisy[rows], times[rows], states))
            order.append(rows)
        return torch.cat(parts)[torch.cat(order).argsort()]

    @staticmethod
    def _predict(network: Module, noisy: Tensor, times: Tensor, states: Tensor) -> Tensor:
        n, _, height, width = noisy.shape
        slots = states.shape[1] + height * width // 4
        is_image = torch.arange(slots, device=noisy.device) >= states.shape[1]
        output = network(
            hidden_states=noisy.flatten(2).transpose(1, 2),
            timestep=times / 1000,
            encoder_hidden_states=states,
            encoder_hidden_states_mask=None,
            img_shapes=[[(1, height, width)]] * n,
            img_mask=is_image.expand(n, -1),
            return_dict=False,
        )[0]
        tokens = output[:, -height * width :]  # the text is in front of the image
        return tokens.transpose(1, 2).unflatten(2, (height, width))

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode opaque images, see `Backbone.posterior`."""
        return super().posterior(torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1))

    @staticmethod
    def pixels(vae: Any, latents: Tensor) -> Tensor:
        """Decode latents and leave out the opacity, see `Backbone.pixels`."""
        return QwenImageBackbone.pixels(vae, latents)[:, :3]
