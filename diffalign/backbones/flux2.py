"""Flux.2: klein (base and distilled) and dev.

The autoencoder's latents are normalised after they are put into patches of 2x2, by a
frozen batch norm. So the latent is here (n, 128, H / 16, W / 16), and a token is one of
its pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from .flow_transformer import FlowTransformerBackbone
from .guidance_rules import CLASSIFIER_FREE, EMBEDDED, GuidanceRule


class Flux2KleinBackbone(FlowTransformerBackbone):
    """Flux.2 klein, base and distilled."""

    licence = "Apache-2.0 for klein 4B, non-commercial for klein 9B and dev"
    # `to_out` is a linear layer in the single blocks and a list in the double blocks,
    # which the end of a name cannot tell apart.
    lora_targets = (
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|ff(_context)?\.linear_(in|out))"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    )

    @property
    def patch(self) -> int:
        """Latent pixels along a side of one token of the network."""
        return 1

    @property
    def few_steps(self) -> int | None:
        """Steps of a model that was distilled to a few of them."""
        return 4 if self.source.pipeline_options().get("is_distilled") else None

    @property
    def guidance_rule(self) -> GuidanceRule:  # type: ignore[override]
        """Only the base is guided."""
        return EMBEDDED if self.few_steps else CLASSIFIER_FREE

    @property
    def vae_scale(self) -> int:
        """Image pixels along a side of one latent pixel, patches included."""
        return 2 * super().vae_scale

    @property
    def latent_channels(self) -> int:
        """Channels of the latents, patches included."""
        return 4 * super().latent_channels

    def dynamic_shift(self, height: int, width: int, steps: int) -> float:
        """Compute mu, which depends on the number of steps too."""
        return float(compute_empirical_mu(self.tokens(height, width), steps))

    @staticmethod
    def normalised(vae: Any, latents: Tensor, *, deviation: bool = False) -> Tensor:
        """Put latents into patches and normalise them, see `Backbone.normalised`."""
        mean, std = _statistics(vae, latents)
        patches = pixel_unshuffle(latents, 2)
        return patches / std if deviation else (patches - mean) / std

    @staticmethod
    def pixels(vae: Any, latents: Tensor) -> Tensor:
        """Decode latents, see `Backbone.pixels`."""
        mean, std = _statistics(vae, latents)
        latents = pixel_shuffle(latents * std + mean, 2)
        return vae.decode(latents.to(vae.dtype), return_dict=False)[0]

    @staticmethod
    def unpacked(pipe: Any, latents: Tensor, height: int, width: int) -> Tensor:
        """Bring a running pipeline's latents into the form (n, C, h, w)."""
        side = 2 * pipe.vae_scale_factor
        return latents.transpose(1, 2).unflatten(2, (height // side, width // side))

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of the embeddings, see `Backbone.condition_shapes`."""
        return {"prompt_embeds": (512, self._network_size("joint_attention_dim"))}

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts into ``prompt_embeds``. Their padding is not masked."""
        embeds, _ = self._encoding_pipe().encode_prompt(
            list(prompts), device=self.device, **self.prompt_settings
        )
        return {"prompt_embeds": embeds}

    def predict(
        self, network: Module, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        """Run the transformer at noisy latents, see `Backbone.predict`."""
        states, (n, _, height, width) = condition["prompt_embeds"], noisy.shape
        output = network(
            hidden_states=noisy.flatten(2).transpose(1, 2),
            timestep=times / 1000,
            guidance=self.guidance_input(noisy),
            encoder_hidden_states=states,
            txt_ids=_ids(noisy.device, n, 1, 1, states.shape[1]),
            img_ids=_ids(noisy.device, n, height, width, 1),
            return_dict=False,
        )[0]
        return output.transpose(1, 2).unflatten(2, (height, width))


class Flux2Backbone(Flux2KleinBackbone):
    """Flux.2 dev, which takes guidance as an input of the network."""

    few_steps = None
    guidance_rule = EMBEDDED
    default_guidance = 4.0


def _statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the frozen batch norm, (1, 128, 1, 1) each."""
    mean = vae.bn.running_mean.view(1, -1, 1, 1).to(latents)
    variance = vae.bn.running_var.view(1, -1, 1, 1)
    return mean, torch.sqrt(variance + vae.config.batch_norm_eps).to(latents)


def _ids(device: torch.device, n: int, height: int, width: int, length: int) -> Tensor:
    """Coordinates (time, row, column, word) of every token, (n, tokens, 4)."""
    axes = [torch.arange(size) for size in (1, height, width, length)]
    return torch.cartesian_prod(*axes).to(device).expand(n, -1, -1)
