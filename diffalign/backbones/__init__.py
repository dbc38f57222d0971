"""One small file per model family.

A backbone knows how its family encodes images and prompts and calls its network, and
nothing else. `BACKBONES` is the only list of them. A new family adds one line here and
its own file.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..errors import ConfigError
from .base import Backbone
from .loading import ModelSource

BACKBONES: dict[str, str] = {
    "StableDiffusionPipeline": "sd:StableDiffusionBackbone",
    "StableDiffusionXLPipeline": "sdxl:StableDiffusionXLBackbone",
    "StableDiffusion3Pipeline": "sd3:StableDiffusion3Backbone",
    "FluxPipeline": "flux:FluxBackbone",
    "ChromaPipeline": "chroma:ChromaBackbone",
    "Flux2KleinPipeline": "flux2:Flux2KleinBackbone",
    "Flux2Pipeline": "flux2:Flux2Backbone",
    "ZImagePipeline": "z_image:ZImageBackbone",
    "QwenImagePipeline": "qwen_image:QwenImageBackbone",
    "QwenImage21Pipeline": "qwen_image_21:QwenImage21Backbone",
    "SanaPipeline": "sana:SanaBackbone",
    "PixArtSigmaPipeline": "pixart:PixArtSigmaBackbone",
}
"""Class of the diffusers pipeline -> ``module:class`` of its backbone."""


def backbone_class(pipeline_class: str) -> type[Backbone] | None:
    """Find the backbone of a diffusers pipeline by the name of its class.

    Args:
        pipeline_class (`str`): such as ``FluxPipeline``.

    Returns:
        `type[Backbone]`, *optional*: None if the class is not supported.
    """
    place = BACKBONES.get(pipeline_class)
    if place is None:
        return None
    module, _, name = place.partition(":")
    backbone: type[Backbone] = getattr(import_module(f".{module}", __name__), name)
    return backbone


def load_backbone(
    model: Any,
    *,
    revision: str | None = None,
    variant: str | None = None,
    vae: Any = None,
    base: str | None = None,
) -> Backbone:
    """Find the backbone of a model, without loading anything heavy yet.

    Args:
        model: Hub id, local folder, safetensors file, ``"shapes"`` or a loaded
            `DiffusionPipeline`.
        revision (`str`, *optional*): Git revision on the Hub.
        variant (`str`, *optional*): of the weights, such as ``fp16``.
        vae (*optional*): another autoencoder: Hub id, folder or module.
        base (`str`, *optional*): pipeline that a model in one file takes its configs
            and missing parts from.

    Returns:
        `Backbone`: of the model's family.

    Raises:
        ConfigError: the model is missing, is no diffusers pipeline, or its class is not
            supported. The message lists those that are.
    """
    source = ModelSource(model, revision=revision, variant=variant, vae=vae, base=base)
    backbone = backbone_class(source.pipeline_class_name)
    if backbone is None:
        raise ConfigError(
            "model",
            f"{source.name!r} is a {source.pipeline_class_name}, which is not supported; "
            f"supported are {', '.join(BACKBONES)}; docs/guides/new-model.md adds another",
        )
    return backbone(source)


__all__ = ["BACKBONES", "Backbone", "ModelSource", "backbone_class", "load_backbone"]
