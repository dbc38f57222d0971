"""A random UNet of some 50 M parameters on the embedded pipeline: for figures that a
tiny network would not show."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

from diffalign.generation.pipelines import base_pipeline


def large_pipeline() -> Any:
    """The embedded pipeline with that network, in evaluation mode."""
    torch.manual_seed(0)
    pipe = base_pipeline()
    small = pipe.unet.config
    unet = UNet2DConditionModel(
        sample_size=small["sample_size"],
        in_channels=small["in_channels"],
        out_channels=small["out_channels"],
        block_out_channels=(128, 256, 384),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=small["cross_attention_dim"],
        attention_head_dim=32,
    )
    pipe.register_modules(unet=unet.eval())
    return pipe
