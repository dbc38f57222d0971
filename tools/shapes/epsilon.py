"""The embedded Stable Diffusion pipeline: a UNet that predicts the noise."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from diffalign.shapes.prompts import Scene
from diffalign.shapes.renderer import RESOLUTION
from diffalign.shapes.tokenizer import build_tokenizer
from tools.shapes.autoencoder import encode
from tools.shapes.captioned_images import PretrainConfig, captions_of, token_ids
from tools.shapes.training import clip_text_config, fit


def build_unet() -> UNet2DConditionModel:
    """Build the denoiser."""
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build the text encoder, for the entries of a tokenizer."""
    return CLIPTextModel(clip_text_config(tokenizer, projection_dim=64))


def build_scheduler() -> DDIMScheduler:
    """Build the scheduler, with the noise schedule of Stable Diffusion 1."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def train_denoiser(
    config: PretrainConfig, vae: AutoencoderKL, pixels: Tensor, scenes: list[Scene]
) -> tuple[UNet2DConditionModel, CLIPTextModel, CLIPTokenizer]:
    """Train text encoder and denoiser to predict epsilon, on the noisy captions.

    Args:
        config (`PretrainConfig`): steps, batch and learning rate.
        vae (`AutoencoderKL`): the finished autoencoder.
        pixels (`Tensor`): (N, 3, 64, 64) in [-1, 1].
        scenes (`list[Scene]`): one per image.

    Returns:
        `tuple`: denoiser and text encoder, with the exponential moving average of their
            weights, and the tokenizer.
    """
    tokenizer, unet, scheduler = build_tokenizer(), build_unet(), build_scheduler()
    text_encoder = build_text_encoder(tokenizer)
    mean, std = encode(vae, pixels)
    ids = token_ids(tokenizer, captions_of(config, scenes))
    empty = token_ids(tokenizer, [""])
    parameters = [*unet.parameters(), *text_encoder.parameters()]

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(ids), (config.denoiser_batch,), generator=generator)
        x0 = mean[index] + std[index] * torch.randn(mean[index].shape, generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        timesteps = torch.randint(1000, (len(index),), generator=generator)
        keep = torch.rand(len(index), 1, generator=generator) >= config.prompt_dropout
        states = text_encoder(torch.where(keep, ids[index], empty))[0]
        prediction = unet(scheduler.add_noise(x0, noise, timesteps), timesteps, states).sample
        return (prediction - noise).square().mean()

    fit(config, parameters, loss, "denoiser")
    return unet.eval(), text_encoder.eval(), tokenizer


def build_pipeline(
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
) -> StableDiffusionPipeline:
    """Put the parts together."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
