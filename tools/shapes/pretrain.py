"""Make the embedded pipeline: ``python -m tools.shapes.pretrain --output_dir OUT``.

There are three seeded stages on rendered images. First, an autoencoder is trained. Then
text encoder and denoiser are trained jointly, on captions that are deliberately noisy.
The base thus follows its prompts imperfectly, and there is something to align. Last,
the decoder is trained once more, for sharp edges. The base's held-out accuracy is
measured at the end and written into the model card. It takes about 45 minutes on two
CPU cores.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, set_seed
from torch import Tensor
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffalign.shapes.prompts import ATTRIBUTES, Scene, all_scenes, held_out_prompts
from diffalign.shapes.renderer import RESOLUTION, render
from diffalign.shapes.sampling_defaults import SAMPLING
from diffalign.shapes.tokenizer import MAX_LENGTH, build_tokenizer
from diffalign.shapes.verifier import attribute_table


@dataclass
class PretrainConfig:
    """Settings of this command, whose defaults made the shipped weights."""

    seed: int = 0
    """Seed of images, captions, initialisation and batches."""
    images_per_scene: int = 12
    """Images rendered of each of the 720 scenes."""
    vae_steps: int = 5000
    """Optimizer steps of the autoencoder."""
    vae_batch: int = 16
    """Images per step of autoencoder and decoder."""
    vae_learning_rate: float = 1e-3
    """Peak of their one-cycle schedules."""
    decoder_steps: int = 3000
    """Further steps of the decoder alone."""
    denoiser_steps: int = 4500
    """Optimizer steps of denoiser and text encoder."""
    denoiser_batch: int = 64
    """Images per step of these."""
    denoiser_learning_rate: float = 1e-3
    """Peak of their one-cycle schedule."""
    prompt_dropout: float = 0.1
    """Share of captions that are left empty, for guidance."""
    caption_noise: float = 0.35
    """Share of captions in which shape and colour are drawn anew.

    In these, every other attribute is drawn anew with probability 1/4.
    """
    bf16: bool = True
    """Autocast the autoencoder's training to bfloat16.

    It is two to three times faster on processors with AMX.
    """


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
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


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


def noisy_caption(scene: Scene, rng: random.Random, share: float) -> str:
    """Caption a scene, with errors in a share of the captions.

    Preferences can mend this flaw.

    Args:
        scene (`Scene`): what the image shows.
        rng (`random.Random`): draws the errors.
        share (`float`): probability of a caption with redrawn attributes.

    Returns:
        `str`: the scene's prompt, or that of another scene.
    """
    if rng.random() >= share:
        return scene.prompt
    values = asdict(scene)
    for name, choices in ATTRIBUTES.items():
        if name in ("shape", "color") or rng.random() < 0.25:
            values[name] = rng.choice(choices)
    return Scene(**values).prompt


def rendered_set(config: PretrainConfig) -> tuple[Tensor, list[Scene]]:
    """Render all scenes `images_per_scene` times.

    Returns:
        `tuple[Tensor, list[Scene]]`: pixels (N, 3, 64, 64) in [-1, 1], and their
        scenes.
    """
    rng = random.Random(config.seed)
    scenes = all_scenes() * config.images_per_scene
    pixels = np.stack([np.asarray(render(scene, rng)) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0, scenes


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
    rng = random.Random(config.seed + 1)
    # The noise belongs to the image, as a wrong caption in a real dataset does: it is
    # drawn once.
    captions = [noisy_caption(scene, rng, config.caption_noise) for scene in scenes]

    def token_ids(texts: list[str]) -> Tensor:
        return tokenizer(
            texts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
        ).input_ids

    ids, empty = token_ids(captions), token_ids([""])
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.denoiser_learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.denoiser_learning_rate, total_steps=config.denoiser_steps, pct_start=0.1
    )
    average = EMAModel(parameters, decay=0.995)
    generator = torch.Generator().manual_seed(config.seed + 1)
    bar = tqdm(range(config.denoiser_steps), desc="denoiser", mininterval=5)
    for _ in bar:
        index = torch.randint(len(ids), (config.denoiser_batch,), generator=generator)
        x0 = mean[index] + std[index] * torch.randn(mean[index].shape, generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        timesteps = torch.randint(1000, (len(index),), generator=generator)
        keep = torch.rand(len(index), 1, generator=generator) >= config.prompt_dropout
        states = text_encoder(torch.where(keep, ids[index], empty))[0]
        prediction = unet(scheduler.add_noise(x0, noise, timesteps), timesteps, states).sample
        loss = (prediction - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.step(parameters)
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    average.copy_to(parameters)
    return unet.eval(), text_encoder.eval(), tokenizer


def measure(
    pipe: StableDiffusionPipeline, guidance_scale: float, images_per_prompt: int = 4
) -> dict[str, float]:
    """Measure the accuracy on held-out prompts.

    Args:
        pipe (`StableDiffusionPipeline`): the finished pipeline.
        guidance_scale (`float`): of its sampler.
        images_per_prompt (`int`, *optional*, defaults to `4`): images drawn per prompt.

    Returns:
        `dict[str, float]`: accuracy per attribute and of all at once, and the standard
        error of the latter, clustered by prompt.
    """
    from diffalign.generation.sampling import generate

    prompts = [prompt for prompt in held_out_prompts() for _ in range(images_per_prompt)]
    sampling = {**SAMPLING, "guidance_scale": guidance_scale}
    images = generate(
        pipe,
        prompts,
        seeds=list(range(len(prompts))),
        batch_size=32,
        description="measuring",
        **sampling,
    )
    table = attribute_table(images, prompts)
    means = {name: float(np.mean([row[name] for row in table])) for name in table[0]}
    per_prompt = (
        np.array([row["all"] for row in table], dtype=float).reshape(-1, images_per_prompt).mean(1)
    )
    return {**means, "all_standard_error": float(per_prompt.std(ddof=1) / np.sqrt(len(per_prompt)))}


CARD = """---
license: apache-2.0
pipeline_tag: text-to-image
library_name: diffusers
tags: [text-to-image, diffusers, stable-diffusion, diffalign, shapes]
---
# The shapes pipeline

A `StableDiffusionPipeline` of {parameters:.1f} M parameters that draws one shape on a plain
background, 64x64 pixels. It is the embedded default of diffalign: small enough to align on two CPU
cores in minutes, real enough to go through every code path.

Made by `python -m tools.shapes.pretrain --output_dir OUT` (seed {seed}) from {images} rendered
images. In {noise:.0%} of the captions shape and colour were drawn anew *on purpose*, so the model
follows its prompts imperfectly and preferences have something to mend.

Held-out prompts ({count} images, 4 for each of 120 prompts), DDIM, {steps} steps, judged by
`diffalign.shapes.verify`; the standard error is clustered by prompt:

| guidance | all correct | size | color | shape | position | background |
|---|---|---|---|---|---|---|
{rows}

The default guidance of the package's recipes is {guidance}.
"""


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


def write_card(
    folder: Path, config: PretrainConfig, parameters: int, results: dict[str, dict[str, float]]
) -> None:
    """Write ``README.md`` with the results of `measure`, by guidance scale."""
    rows = "\n".join(
        f"| {scale} | {r['all']:.1%} ± {r['all_standard_error']:.1%} | "
        + " | ".join(f"{r[name]:.1%}" for name in ATTRIBUTES)
        + " |"
        for scale, r in results.items()
    )
    text = CARD.format(
        parameters=parameters / 1e6,
        seed=config.seed,
        images=config.images_per_scene * len(all_scenes()),
        noise=config.caption_noise,
        count=4 * len(held_out_prompts()),
        steps=SAMPLING["num_inference_steps"],
        guidance=SAMPLING["guidance_scale"],
        rows=rows,
    )
    (folder / "README.md").write_text(text)


def save(
    folder: Path,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
) -> None:
    """Write the pipeline as half-precision safetensors."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(folder, safe_serialization=True)
    # A component that was itself loaded remembers from where.
    for path in folder.glob("*/config.json"):
        values = json.loads(path.read_text())
        values.pop("_name_or_path", None)
        path.write_text(json.dumps(values, indent=2) + "\n")
    # transformers loads a model in the dtype its config names, diffusers in float32:
    # make a plain `from_pretrained` consistent.
    text_config = folder / "text_encoder" / "config.json"
    text_config.write_text(
        json.dumps({**json.loads(text_config.read_text()), "dtype": "float32"}, indent=2) + "\n"
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--vae",
        type=Path,
        help="reuse the autoencoder of this pipeline folder instead of training one",
    )
    parser.add_argument(
        "--measure_only",
        action="store_true",
        help="only measure the pipeline in --output_dir and rewrite its card",
    )
    for name, value in asdict(PretrainConfig()).items():
        parser.add_argument(
            f"--{name}",
            type=type(value) if not isinstance(value, bool) else lambda text: text == "true",
            default=value,
        )
    options = vars(parser.parse_args(arguments))
    folder, vae_folder, measure_only = (
        options.pop("output_dir"),
        options.pop("vae"),
        options.pop("measure_only"),
    )
    config = PretrainConfig(**options)
    set_seed(config.seed)
    if not measure_only:
        pixels, scenes = rendered_set(config)
        if vae_folder is None:
            vae = train_vae(config, pixels)
            vae.save_pretrained(folder / "vae-float32")
        else:
            vae = AutoencoderKL.from_pretrained(vae_folder)
        unet, text_encoder, tokenizer = train_denoiser(config, vae, pixels, scenes)
        refine_decoder(config, vae, pixels)
        save(folder, vae, unet, text_encoder, tokenizer)
    # Loaded back from the half-precision files: the numbers must be those of what is
    # shipped.
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    results = {str(scale): measure(pipe, scale) for scale in (1.0, 2.0, 3.0, 5.0)}
    parameters = sum(
        p.numel()
        for module in (pipe.unet, pipe.vae, pipe.text_encoder)
        for p in module.parameters()
    )
    write_card(folder, config, parameters, results)
    (folder / "accuracy.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
