"""The model family of a LoRA, read from the names of its weights."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import UserError

_FAMILIES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        r"single_transformer_blocks\.\d+\.attn\.to_qkv_mlp_proj",
        "Flux.2",
        ("Flux2Pipeline", "Flux2KleinPipeline"),
    ),
    (
        r"single_transformer_blocks\.\d+\.(attn\.to_q|proj_mlp|proj_out)\.",
        "Flux.1 or Chroma",
        ("FluxPipeline", "ChromaPipeline"),
    ),
    (r"(?<!_)layers\.\d+\.attention\.to_q", "Z-Image", ("ZImagePipeline",)),
    (r"img_mlp\.(gate_layer|out)\.", "Qwen-Image 2.1", ("QwenImage21Pipeline",)),
    (r"img_mlp\.net|(img|txt)_mod\.", "Qwen-Image", ("QwenImagePipeline",)),
    (r"^transformer\.transformer_blocks\.\d+\.attn1\.", "Sana", ("SanaPipeline",)),
    (
        r"^unet\.|^lora_unet_(down|mid|up)",
        "Stable Diffusion with a UNet",
        ("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
    ),
)
"""A name that only this family has, what messages call it, its pipelines."""
_CHECKED = {
    "StableDiffusion3Pipeline",  # no name tells its own LoRAs, but others' can be told
    *(name for _, _, pipelines in _FAMILIES for name in pipelines),
}


def lora_family(names: Iterable[str]) -> tuple[str, tuple[str, ...]] | None:
    """Find the family of a LoRA.

    Args:
        names (iterable of `str`): of its weights.

    Returns:
        `tuple`: what messages call the family, and its diffusers pipelines. None where
        the names do not tell.
    """
    listed = list(names)
    for pattern, title, pipelines in _FAMILIES:
        if any(re.search(pattern, name) for name in listed):
            return title, pipelines
    return None


def check_lora_family(names: Iterable[str], pipeline_class: str, role: str, weights: str) -> None:
    """Refuse a LoRA of another family than the model.

    Args:
        names (iterable of `str`): of its weights.
        pipeline_class (`str`): of the model. A class that is not known here takes any
            LoRA.
        role (`str`): how messages name the LoRA.
        weights (`str`): where it lies.

    Raises:
        UserError: the families differ. The message names both.
    """
    if pipeline_class not in _CHECKED:
        return
    family = lora_family(names)
    if family is not None and pipeline_class not in family[1]:
        raise UserError(
            f"{role}: {weights!r} is a LoRA of {family[0]}, and this model is a {pipeline_class}; "
            "it belongs to another model"
        )
