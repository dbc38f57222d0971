"""Tiny randomly initialised pipelines of every supported family, and tiny preference data, built in code."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffalign.shapes.tokenizer import build_tokenizer

FAMILIES = ("sd", "sd_v", "sdxl", "sd3")
RESOLUTION = 32


def _vae(channels: int = 4, **options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=RESOLUTION,
        **options,
    )


def _text(cls: Any, tokenizer: Any, hidden: int, projection: int) -> Any:
    return cls(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=32,
            projection_dim=projection,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _unet(cross: int, **options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross,
        attention_head_dim=2,
        norm_num_groups=4,
        **options,
    )


def _ddim(prediction_type: str = "epsilon") -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip


def build_pipeline(family: str, seed: int = 0) -> Any:
    """A pipeline of `FAMILIES`: SD1 (epsilon), SD2 (v), SDXL (two encoders, size conditioning), SD3 (flow matching)."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    if family in ("sd", "sd_v"):
        return StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=_text(CLIPTextModel, tokenizer, 16, 16).eval(),
            tokenizer=tokenizer,
            unet=_unet(16),
            scheduler=_ddim("v_prediction" if family == "sd_v" else "epsilon"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    if family == "sdxl":
        unet = _unet(
            32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
            transformer_layers_per_block=1,
        )
        return StableDiffusionXLPipeline(
            vae=_vae(),
            text_encoder=_text(CLIPTextModel, tokenizer, 16, 16).eval(),
            text_encoder_2=_text(CLIPTextModelWithProjection, tokenizer, 16, 16).eval(),
            tokenizer=tokenizer,
            tokenizer_2=build_tokenizer(),
            unet=unet,
            scheduler=_ddim(),
        )
    transformer = SD3Transformer2DModel(
        sample_size=RESOLUTION // 2,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=32,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(shift_factor=0.0609),
        text_encoder=_text(CLIPTextModelWithProjection, tokenizer, 16, 16).eval(),
        tokenizer=tokenizer,
        text_encoder_2=_text(CLIPTextModelWithProjection, tokenizer, 16, 16).eval(),
        tokenizer_2=build_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def picture(value: int, seed: int, size: int = RESOLUTION) -> Image.Image:
    """A picture of about one brightness with a little texture."""
    noise = np.random.default_rng(seed).integers(-12, 13, (size, size, 3))
    return Image.fromarray(np.clip(value + noise, 0, 255).astype(np.uint8))


def pair_rows(count: int = 8, size: int = RESOLUTION) -> list[dict[str, Any]]:
    """Separable pairs: the chosen image is bright, the rejected one dark."""
    prompts = ["a small red circle on the left of a gray background", "a large blue star in the center of a white background"]
    return [
        {"prompt": prompts[i % 2], "chosen": picture(210, i, size), "rejected": picture(40, 1000 + i, size)} for i in range(count)
    ]
