"""Qwen-Image, also 2512.

Prompts have lengths of their own, and their padding must be masked. Guidance keeps the
norm of every token of the conditional prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module

from .conditions import MASK
from .flow_transformer import FlowTransformerBackbone
from .guidance_rules import GuidanceRule, NormRescaled
from .packing import packed, unpacked


class QwenImageBackbone(FlowTransformerBackbone):
    """Qwen-Image."""

    licence = "Apache-2.0"
    ragged = ("prompt_embeds",)
    guidance_rule: ClassVar[GuidanceRule] = NormRescaled(patch=2)

    @property
    def lora_targets(self) -> str:  # type: ignore[override]
        """All linear layers of the blocks whose output reaches the image.

        The text that leaves the last block is dropped. Adapters there would have no
        gradient, which several processes take for an error.
        """
        last = self.source.component_config("transformer")["num_layers"] - 1
        return (
            rf"(?!transformer_blocks\.{last}\.(attn\.(add_q_proj|to_add_out)|txt_mlp))"
            r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
            r"|(img|txt)_mlp\.net\.(0\.proj|2)|(img|txt)_mod\.1)"
        )

    @property
    def vae_scale(self) -> int:
        """Image pixels along a side of one latent pixel."""
        return int(2 ** len(self.source.component_config("vae")["temperal_downsample"]))

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.source.component_config("vae")["z_dim"])

    @property
    def prompt_settings(self) -> dict[str, Any]:
        """The limit of tokens of the call. That of `encode_prompt` is another one."""
        return {"max_sequence_length": 512}

    @staticmethod
    def call_arguments(settings: dict[str, Any]) -> dict[str, Any]:
        """Name the guidance as the pipeline does, see `Backbone.call_arguments`."""
        return true_guidance(settings)

    @staticmethod
    def normalised(vae: Any, latents: Tensor, *, deviation: bool = False) -> Tensor:
        """Normalise every channel, see `Backbone.normalised`."""
        mean, std = _statistics(vae, latents)
        return latents / std if deviation else (latents - mean) / std

    @staticmethod
    def pixels(vae: Any, latents: Tensor) -> Tensor:
        """Decode latents as one frame, see `Backbone.pixels`."""
        mean, std = _statistics(vae, latents)
        frames = (latents * std + mean).unsqueeze(2)
        return vae.decode(frames.to(vae.dtype), return_dict=False)[0][:, :, 0]

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images as one frame, see `Backbone.posterior`."""
        vae = self.component("vae")
        posterior = vae.encode(pixels.unsqueeze(2).to(vae.device, vae.dtype)).latent_dist
        return (
            self.normalised(vae, posterior.mean[:, :, 0].float()),
            self.normalised(vae, posterior.std[:, :, 0].float(), deviation=True),
        )

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of unpadded embeddings, see `Backbone.condition_shapes`."""
        return {"prompt_embeds": (512, self._network_size("joint_attention_dim"))}

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts into ``prompt_embeds``, padded, and their mask."""
        embeds, mask, *_ = self._encoding_pipe().encode_prompt(
            list(prompts), device=self.device, **self.prompt_settings
        )
        if mask is None:  # nothing is padded
            mask = torch.ones(embeds.shape[:2], device=embeds.device)
        return {"prompt_embeds": embeds, MASK: mask.bool()}

    def predict(
        self, network: Module, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        """Run the transformer at noisy latents, see `Backbone.predict`."""
        n, _, height, width = noisy.shape
        output = network(
            hidden_states=packed(noisy),
            timestep=times / 1000,
            guidance=self.guidance_input(noisy),
            encoder_hidden_states_mask=padding_mask(condition.get(MASK)),
            encoder_hidden_states=condition["prompt_embeds"],
            img_shapes=[[(1, height // 2, width // 2)]] * n,
            return_dict=False,
        )[0]
        return unpacked(output, height, width)


def true_guidance(settings: dict[str, Any]) -> dict[str, Any]:
    """Rename ``guidance_scale`` for a pipeline that calls it ``true_cfg_scale``.

    Such a pipeline guides only beside a negative prompt, which is the empty one here.
    """
    named = dict(settings)
    if "guidance_scale" in named and "true_cfg_scale" not in named:
        named["true_cfg_scale"] = named.pop("guidance_scale")
    if named.get("true_cfg_scale", 1) > 1:
        prompts = named.get("prompt", "")
        empty = "" if isinstance(prompts, str) else [""] * len(prompts)
        named.setdefault("negative_prompt", empty)
    return named


def padding_mask(mask: Tensor | None) -> Tensor | None:
    """Return the mask as the pipelines pass it: None where nothing is padded."""
    return None if mask is None or bool(mask.all()) else mask.long()


def _statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, (1, C, 1, 1) each."""
    values = (vae.config.latents_mean, vae.config.latents_std)
    mean, std = (torch.tensor(value).view(1, -1, 1, 1).to(latents) for value in values)
    return mean, std
