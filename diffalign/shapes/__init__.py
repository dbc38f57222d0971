"""The shapes world: two tiny but real text-to-image pipelines with an exact judge.

It has prompts, a renderer and a verifier. Every method of the package can be trained
and judged on it, on a CPU in minutes.
"""

from pathlib import Path

from .models import EMBEDDED_MODELS, FLOW_MODEL, SHAPES_MODEL, weights_dir
from .prompts import (
    ATTRIBUTES,
    PREFERRED_STYLE,
    STYLES,
    Scene,
    all_scenes,
    held_out_prompts,
    parse_prompt,
    split_scenes,
    train_prompts,
)
from .renderer import render
from .verifier import Verdict, attribute_table, score, verify


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
    "EMBEDDED_MODELS",
    "FLOW_MODEL",
    "PREFERRED_STYLE",
    "SHAPES_MODEL",
    "STYLES",
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
