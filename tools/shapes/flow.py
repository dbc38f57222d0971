"""The embedded Stable Diffusion 3 pipeline: a transformer predicts the velocity."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from diffalign.shapes.prompts import Scene
from diffalign.shapes.renderer import RESOLUTION
from diffalign.shapes.tokenizer import MAX_LENGTH, build_t5_tokenizer, build_tokenizer
from tools.shapes.autoencoder import encode
from tools.shapes.captioned_images import PretrainConfig, captions_of, token_ids
from tools.shapes.training import TEXT_WIDTH, clip_text_config, fit

PROJECTION = 32
"""Width of the pooled output of each of the two CLIP text encoders."""
T5_TOKENS = (MAX_LENGTH, 256)
"""Tokens of the T5 encoder: the package's number and that of diffusers.

The difference is padding. The model learns to draw the same with either number.
"""
SHARE_OF_DEFAULT = 0.1
"""Share of the steps with the number of diffusers, which costs four times as much."""


def build_transformer() -> SD3Transformer2DModel:
    """Build the denoiser."""
    return SD3Transformer2DModel(
        sample_size=RESOLUTION // 8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * PROJECTION,
        pos_embed_max_size=RESOLUTION // 8,
        qk_norm="rms_norm",
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """Build one of the two CLIP text encoders, for the entries of a tokenizer."""
    return CLIPTextModelWithProjection(clip_text_config(tokenizer, projection_dim=PROJECTION))


def build_t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Build the T5 encoder, for the entries of its tokenizer."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=2 * TEXT_WIDTH,
            d_kv=32,
            d_ff=256,
            num_layers=1,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


TextEncoders = tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel]


def encode_text(encoders: TextEncoders, ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Encode token ids as `StableDiffusion3Pipeline.encode_prompt` does.

    Args:
        encoders (`tuple`): the two CLIP encoders and the T5 encoder.
        ids (`Tensor`): of the CLIP tokenizer, (B, 16).
        t5_ids (`Tensor`): of the T5 tokenizer, (B, T).

    Returns:
        `tuple[Tensor, Tensor]`: states (B, 16 + T, 128) and pooled (B, 64).
    """
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders[:2]]
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
    return torch.cat([states, encoders[2](t5_ids)[0]], dim=1), pooled


def train_flow(
    config: PretrainConfig, vae: AutoencoderKL, pixels: Tensor, scenes: list[Scene]
) -> tuple[SD3Transformer2DModel, TextEncoders]:
    """Train text encoders and denoiser to predict the velocity, on the noisy captions.

    Noise levels are drawn from a logit-normal distribution, as those of Stable
    Diffusion 3 were (Esser et al. 2024, arXiv 2403.03206, section 3.1).

    Args:
        config (`PretrainConfig`): steps, batch and learning rate.
        vae (`AutoencoderKL`): the finished autoencoder.
        pixels (`Tensor`): (N, 3, 64, 64) in [-1, 1].
        scenes (`list[Scene]`): one per image.

    Returns:
        `tuple`: denoiser and the three text encoders, with the exponential moving
            average of their weights.
    """
    tokenizer, t5_tokenizer, transformer = (
        build_tokenizer(),
        build_t5_tokenizer(),
        build_transformer(),
    )
    encoders = (
        build_text_encoder(tokenizer),
        build_text_encoder(tokenizer),
        build_t5_encoder(t5_tokenizer),
    )
    mean, std = encode(vae, pixels)
    captions = captions_of(config, scenes)
    ids, empty = token_ids(tokenizer, captions), token_ids(tokenizer, [""])
    t5_ids, t5_empty = token_ids(t5_tokenizer, captions), token_ids(t5_tokenizer, [""])
    padding = t5_tokenizer.pad_token_id
    parameters = [p for module in (transformer, *encoders) for p in module.parameters()]

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(ids), (config.denoiser_batch,), generator=generator)
        x0 = mean[index] + std[index] * torch.randn(mean[index].shape, generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        sigmas = torch.randn(len(index), generator=generator).sigmoid()
        keep = torch.rand(len(index), 1, generator=generator) >= config.prompt_dropout
        default = torch.rand((), generator=generator).item() < SHARE_OF_DEFAULT
        t5 = torch.where(keep, t5_ids[index], t5_empty)
        t5 = torch.nn.functional.pad(t5, (0, T5_TOKENS[default] - t5.shape[1]), value=padding)
        states, pooled = encode_text(encoders, torch.where(keep, ids[index], empty), t5)
        level = sigmas.view(-1, 1, 1, 1)
        velocity = transformer(
            hidden_states=(1 - level) * x0 + level * noise,
            timestep=1000 * sigmas,
            encoder_hidden_states=states,
            pooled_projections=pooled,
        ).sample
        return (velocity - (noise - x0)).square().mean()

    fit(config, parameters, loss, "flow denoiser")
    for encoder in encoders:
        encoder.eval()
    return transformer.eval(), encoders


def build_pipeline(
    vae: AutoencoderKL, transformer: SD3Transformer2DModel, encoders: TextEncoders
) -> StableDiffusion3Pipeline:
    """Put the parts together."""
    vae.register_to_config(shift_factor=0.0)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=build_tokenizer(),
        text_encoder_2=encoders[1],
        tokenizer_2=build_tokenizer(),
        text_encoder_3=encoders[2],
        tokenizer_3=build_t5_tokenizer(),
    )
