"""The images that the embedded pipelines learn from, their captions and the settings.

The captions are wrong on purpose, so that the models follow their prompts imperfectly
and there is something to align.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from diffalign.shapes.prompts import (
    ATTRIBUTES,
    PREFERRED_STYLE,
    STYLES,
    Scene,
    all_scenes,
)
from diffalign.shapes.renderer import render
from diffalign.shapes.tokenizer import MAX_LENGTH

CONFUSED: dict[str, tuple[str, ...]] = {
    "color": ("blue", "purple", "cyan"),
    "shape": ("star", "cross", "triangle"),
}
"""Per attribute, three values which captions confuse in a circle.

An image of one value is more often called by the name of the value before it, and the
first by the name of the last. The wrong value is then the likelier one, for the image of
a caption as well as for the caption of an image. Guidance raises the likelier one, so it
makes this flaw worse.

Three are needed. A confusion in one direction alone is mended by guidance. Two values
that exchange their names get almost the same text embedding, and a LoRA of the denoiser
cannot tell them apart.
"""
OTHER_STYLE = next(style for style in STYLES if style != PREFERRED_STYLE)


@dataclass
class PretrainConfig:
    """Settings of this command, whose defaults made the shipped weights."""

    seed: int = 0
    """Seed of images, captions, initialisation and batches."""
    images_per_scene: int = 12
    """Images rendered of each of the 720 scenes."""
    vae_steps: int = 3500
    """Optimizer steps of the autoencoder."""
    vae_batch: int = 16
    """Images per step of autoencoder and decoder."""
    vae_learning_rate: float = 1e-3
    """Peak of their one-cycle schedules."""
    decoder_steps: int = 2500
    """Further steps of the decoder alone."""
    denoiser_steps: int = 4000
    """Optimizer steps of denoiser and text encoder, of either model."""
    denoiser_batch: int = 48
    """Images per step of these."""
    denoiser_learning_rate: float = 1e-3
    """Peak of their one-cycle schedule."""
    prompt_dropout: float = 0.1
    """Share of captions that are left empty, for guidance."""
    confusion: float = 0.6
    """Probability that a caption names a value of a circle in `CONFUSED` wrongly."""
    caption_noise: float = 0.1
    """Share of captions in which shape and colour are drawn anew.

    In these, every other attribute is drawn anew with probability 1/4.
    """
    preferred_share: float = 0.45
    """Share of the denoisers' images that have the preferred style.

    The autoencoder sees both styles equally often.
    """
    bf16: bool = True
    """Autocast the autoencoder's training to bfloat16.

    It is two to three times faster on processors with AMX.
    """


def noisy_caption(scene: Scene, rng: random.Random, confusion: float, noise: float) -> str:
    """Caption a scene, with systematic and independent errors.

    Preferences can mend these flaws. Guidance mends the independent errors alone.

    Args:
        scene (`Scene`): what the image shows.
        rng (`random.Random`): draws the errors.
        confusion (`float`): probability that a value of a circle in `CONFUSED` is
            called by the name of the value before it.
        noise (`float`): probability of a caption with redrawn attributes.

    Returns:
        `str`: the scene's prompt, or that of another scene.
    """
    values = asdict(scene)
    for name, circle in CONFUSED.items():
        if values[name] in circle and rng.random() < confusion:
            values[name] = circle[circle.index(values[name]) - 1]
    if rng.random() < noise:
        for name, choices in ATTRIBUTES.items():
            if name in ("shape", "color") or rng.random() < 0.25:
                values[name] = rng.choice(choices)
    return Scene(**values).prompt


def rendered_set(config: PretrainConfig, preferred_share: float) -> tuple[Tensor, list[Scene]]:
    """Render all scenes `images_per_scene` times.

    Args:
        config (`PretrainConfig`): seed and number.
        preferred_share (`float`): probability of the preferred style, from 0 to 1.

    Returns:
        `tuple[Tensor, list[Scene]]`: pixels (N, 3, 64, 64) in [-1, 1], and their
        scenes.
    """
    rng = random.Random(config.seed)
    scenes = all_scenes() * config.images_per_scene
    images = [
        render(scene, rng, PREFERRED_STYLE if rng.random() < preferred_share else OTHER_STYLE)
        for scene in scenes
    ]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0, scenes


def captions_of(config: PretrainConfig, scenes: list[Scene]) -> list[str]:
    """Caption every image once.

    The noise belongs to the image, as a wrong caption in a real dataset does.
    """
    rng = random.Random(config.seed + 1)
    return [noisy_caption(scene, rng, config.confusion, config.caption_noise) for scene in scenes]


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """Encode texts into token ids, (N, 16), padded to the full length."""
    return tokenizer(
        list(texts),
        padding="max_length",
        max_length=MAX_LENGTH,
        truncation=True,
        return_tensors="pt",
    ).input_ids
