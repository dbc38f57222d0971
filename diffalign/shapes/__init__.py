"""The shapes world: a tiny but real text-to-image pipeline with an exact judge.

It has prompts, a renderer and a verifier. Every method of the package can be trained
and judged on it, on a CPU in minutes.
"""

from pathlib import Path

from .prompts import (
    ATTRIBUTES,
    Scene,
    all_scenes,
    held_out_prompts,
    parse_prompt,
    split_scenes,
    train_prompts,
)
from .renderer import render
from .verifier import Verdict, attribute_table, score, verify

SHAPES_MODEL = "shapes"
"""The name under which `model:` accepts the embedded pipeline."""


def weights_dir() -> Path:
    """Return the folder of the embedded pipeline, for `from_pretrained`."""
    return Path(__file__).parent / "weights"


def reward_weights_dir() -> Path:
    """Return the folder of the embedded learned reward, for `from_pretrained`.

    It holds a `CLIPModel` with its tokenizer.
    """
    return Path(__file__).parent / "reward_weights"


def lora_dir() -> Path:
    """Return the folder of a Diffusion-DPO LoRA of the embedded pipeline.

    `pipe.load_lora_weights` reads it.
    """
    return Path(__file__).parent / "lora_weights"


def text_weights_dir() -> Path:
    """Return the folder of the embedded masked denoiser of captions.

    `diffalign.shapes.text_denoiser.load_text_denoiser` reads it.
    """
    return Path(__file__).parent / "text_weights"


__all__ = [
    "ATTRIBUTES",
    "SHAPES_MODEL",
    "Scene",
    "Verdict",
    "all_scenes",
    "attribute_table",
    "held_out_prompts",
    "lora_dir",
    "parse_prompt",
    "render",
    "reward_weights_dir",
    "score",
    "split_scenes",
    "text_weights_dir",
    "train_prompts",
    "verify",
    "weights_dir",
]
