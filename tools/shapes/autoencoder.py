"""The autoencoder that both embedded pipelines share."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm.auto import tqdm

from diffalign.shapes.renderer import RESOLUTION
from tools.shapes.captioned_images import PretrainConfig


def build_vae() -> AutoencoderKL:
    """Build the autoencoder, for 64x64 images and 8x8 latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=RESOLUTION,
        mid_block_add_attention=False,
    )


def train_vae(config: PretrainConfig, pixels: Tensor) -> AutoencoderKL:
    """Train the autoencoder with L1, half of MSE and 1e-5 of KL.

    `scaling_factor` is set so that scaled latents have unit standard deviation.

    Args:
        config (`PretrainConfig`): steps, batch and learning rate.
        pixels (`Tensor`): (N, 3, 64, 64) in [-1, 1].

    Returns:
        `AutoencoderKL`: in evaluation mode.
    """
    vae = build_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.vae_learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.vae_learning_rate, total_steps=config.vae_steps, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(config.seed)
    bar = tqdm(range(config.vae_steps), desc="autoencoder", mininterval=5)
    for _ in bar:
        batch = pixels[torch.randint(len(pixels), (config.vae_batch,), generator=generator)]
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            posterior = vae.encode(batch).latent_dist
            decoded = vae.decode(posterior.sample(generator=generator)).sample.float()
        difference = decoded - batch
        loss = (
            difference.abs().mean()
            + 0.5 * difference.square().mean()
            + 1e-5 * posterior.kl().mean()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(mse=f"{difference.square().mean().item():.4f}", refresh=False)
    vae.eval()
    with torch.no_grad():
        vae.register_to_config(
            scaling_factor=round(1.0 / vae.encode(pixels[:512]).latent_dist.mean.std().item(), 5)
        )
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Encode all images.

    Args:
        vae (`AutoencoderKL`): the autoencoder.
        pixels (`Tensor`): (N, 3, 64, 64) in [-1, 1].

    Returns:
        `tuple[Tensor, Tensor]`: scaled posterior means and standard deviations, each
        (N, 4, 8, 8).
    """
    moments = [
        vae.encode(chunk).latent_dist
        for chunk in tqdm(pixels.split(64), desc="encoding", mininterval=5)
    ]
    factor = vae.config.scaling_factor
    return torch.cat([m.mean for m in moments]) * factor, torch.cat(
        [m.std for m in moments]
    ) * factor


def refine_decoder(config: PretrainConfig, vae: AutoencoderKL, pixels: Tensor) -> None:
    """Train the decoder alone, for sharper edges.

    It reads sampled latents of the finished encoder, which do not move.
    """
    mean, std = encode(vae, pixels)
    factor = vae.config.scaling_factor
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.vae_learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.vae_learning_rate, total_steps=config.decoder_steps, pct_start=0.05
    )
    generator = torch.Generator().manual_seed(config.seed + 2)
    bar = tqdm(range(config.decoder_steps), desc="decoder", mininterval=5)
    for _ in bar:
        index = torch.randint(len(pixels), (config.vae_batch,), generator=generator)
        latents = mean[index] + std[index] * torch.randn(mean[index].shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            decoded = vae.decode(latents / factor).sample.float()
        difference = decoded - pixels[index]
        loss = difference.abs().mean() + 0.5 * difference.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(mse=f"{difference.square().mean().item():.4f}", refresh=False)
    vae.eval()
