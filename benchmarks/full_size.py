"""Pipelines of full size with random weights, for figures of memory and speed.

Networks and autoencoders have the shapes of the released models. Text encoders have one
layer of the right width: prompts are encoded once, and are no part of a step here.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers

from diffalign.shapes.tokenizer import build_t5_tokenizer, build_tokenizer

SIZES = {"sd15": 512, "sdxl": 1024, "flux": 1024}
"""Model -> side of its images in pixels."""
TINY_SIDE = 64
"""Side of the images where networks are tiny."""


def network(name: str, blocks: int | None = None, tiny: bool = False) -> Any:
    """The denoiser alone, on the current default device.

    Args:
        name: sd15, sdxl or flux.
        blocks: of Flux, of which a third are double-stream blocks. None takes all 57.
        tiny: whether its layers are narrow, to try a benchmark without a GPU.
    """
    if name == "sd15":
        widths = {"block_out_channels": (32, 64, 64, 64)} if tiny else {}
        return diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, **widths)
    if name == "sdxl":
        return diffusers.UNet2DConditionModel(
            sample_size=128,
            cross_attention_dim=2048,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(32, 64, 64) if tiny else (320, 640, 1280),
            transformer_layers_per_block=(1, 1, 1) if tiny else (1, 2, 10),
            attention_head_dim=(2, 4, 4) if tiny else (5, 10, 20),
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        )
    double = 19 if blocks is None else max(1, blocks // 3)
    single = 38 if blocks is None else blocks - double
    heads: dict[str, Any] = {}
    if tiny:
        heads = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)}
    return diffusers.FluxTransformer2DModel(
        num_layers=double, num_single_layers=single, guidance_embeds=True, **heads
    )


def autoencoder(channels: int, tiny: bool = False, **options: Any) -> Any:
    """The autoencoder of Stable Diffusion, with 4 or 16 latent channels."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4 if tiny else (128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=channels,
        **options,
    )


def _clip(width: int, cls: Any = transformers.CLIPTextModel) -> Any:
    tokenizer = build_tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=1,
        num_attention_heads=8,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return cls(config).eval(), tokenizer


def pipeline(
    name: str,
    dtype: torch.dtype,
    blocks: int | None = None,
    device: str = "cpu",
    tiny: bool = False,
) -> Any:
    """A pipeline with the network in `dtype`.

    Args:
        name: sd15, sdxl or flux.
        dtype: of the network.
        blocks: of Flux, see `network`.
        device: where network and autoencoder are made.
        tiny: see `network`.
    """
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            denoiser = network(name, blocks, tiny)
            latents = {"channels": 16, "shift_factor": 0.1} if name == "flux" else {"channels": 4}
            vae = autoencoder(tiny=tiny, **latents)
    finally:
        torch.set_default_dtype(before)
    if name == "flux":
        tokenizer = build_t5_tokenizer()
        t5 = transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=len(tokenizer), d_model=4096, d_ff=64, num_layers=1, num_heads=8
            )
        )
        clip, clip_tokenizer = _clip(768)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        return diffusers.FluxPipeline(
            scheduler, vae, clip, clip_tokenizer, t5.eval(), tokenizer, denoiser
        )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    text, text_tokenizer = _clip(768)
    if name == "sd15":
        return diffusers.StableDiffusionPipeline(
            vae, text, text_tokenizer, denoiser, scheduler, None, None, None, False
        )
    second, second_tokenizer = _clip(1280, transformers.CLIPTextModelWithProjection)
    return diffusers.StableDiffusionXLPipeline(
        vae, text, second, text_tokenizer, second_tokenizer, denoiser, scheduler
    )


def step_estimate(
    name: str,
    blocks: int | None,
    side: int,
    lora: bool,
    tiny: bool = False,
    cached: bool = True,
    **options: Any,
) -> Any:
    """What `diffalign estimate` says of a Diffusion-DPO step.

    Args:
        name: sd15, sdxl or flux.
        blocks: of Flux.
        side: of the images in pixels.
        lora: whether a LoRA of rank 16 trains, or all weights.
        tiny: see `network`.
        cached: whether latents and prompts come from caches.
        options: settings of the run.
    """
    from peft import LoraConfig

    from diffalign import DiffusionDPOConfig
    from diffalign.backbones import load_backbone
    from diffalign.training.estimate import estimate

    return estimate(
        load_backbone(pipeline(name, torch.float32, blocks, "meta", tiny)),
        DiffusionDPOConfig(output_dir="never", **options),
        LoraConfig(r=16, lora_alpha=16) if lora else None,
        images_per_group=2,
        has_reference=True,
        size=(side, side),
        caches_latents=cached,
        caches_prompts=cached,
    )
