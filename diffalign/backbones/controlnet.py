"""ControlNets: a trained copy of a network's encoder that reads a condition image.

Zhang et al. 2023, arXiv 2302.05543. For Stable Diffusion 1.x, 2.x and SDXL.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..errors import ConfigError, one_line
from .base import Backbone

FAMILIES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


def load_controlnet(backbone: Backbone, unet: Any, place: str | Path | None) -> Any:
    """Load a ControlNet, or make one from the UNet.

    Args:
        backbone (`Backbone`): The model.
        unet: Its network. A new ControlNet starts with a copy of its encoder, and with
            outputs of zero.
        place (`str` or `Path`, *optional*): Hub id or folder of a ControlNet. None
            makes a new one.

    Returns:
        `ControlNetModel`: float32, in training mode.

    Raises:
        ConfigError: The family has no ControlNet here, or the one at `place` cannot be
            loaded or does not fit.
    """
    from diffusers import ControlNetModel

    name = backbone.source.pipeline_class_name
    if name not in FAMILIES:
        raise ConfigError(
            "model", f"a ControlNet is trained for {' and '.join(FAMILIES)}, not for {name}"
        )
    if place is None:
        # Each channel count but the first halves the condition image once.
        halvings = int(math.log2(backbone.vae_scale))
        channels = tuple((16, 32, 96, 256, 256, 256)[: halvings + 1])
        network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels)
    else:
        try:
            network = ControlNetModel.from_pretrained(str(place), use_safetensors=True)
        except (OSError, ValueError) as error:
            reason = one_line(error)
            raise ConfigError(
                "train.controlnet", f"{str(place)!r} cannot be loaded ({reason})"
            ) from error
        width = unet.config.cross_attention_dim
        if network.config.cross_attention_dim != width:
            raise ConfigError(
                "train.controlnet",
                f"{str(place)!r} reads prompts of width {network.config.cross_attention_dim}, "
                f"this model has {width}",
            )
    return network.to(backbone.device, torch.float32).requires_grad_(True).train()


def predict_with_control(
    controlnet: Module, unet: Module, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]
) -> Tensor:
    """Run a UNet at noisy latents with the residuals of a ControlNet.

    Args:
        controlnet: The ControlNet.
        unet: The frozen UNet.
        noisy (`Tensor`): (n, C, h, w).
        times (`Tensor`): as the networks are given them, (n,).
        condition (`dict[str, Tensor]`): of the backbone, and ``control``, the condition
            images in [0, 1], (n, 3, H, W).

    Returns:
        `Tensor`: (n, C, h, w).
    """
    added = {}
    if "time_ids" in condition:
        added = {
            "added_cond_kwargs": {
                "text_embeds": condition["pooled_prompt_embeds"],
                "time_ids": condition["time_ids"],
            }
        }
    embeds = condition["prompt_embeds"]
    down, middle = controlnet(
        noisy,
        times,
        encoder_hidden_states=embeds,
        controlnet_cond=condition["control"],
        return_dict=False,
        **added,
    )
    return unet(
        noisy,
        times,
        encoder_hidden_states=embeds,
        down_block_additional_residuals=[part.to(noisy.dtype) for part in down],
        mid_block_additional_residual=middle.to(noisy.dtype),
        return_dict=False,
        **added,
    )[0]
