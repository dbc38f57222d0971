"""One small file per model family. A backbone knows how its family encodes images and prompts and calls its network; nothing else."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from .base import Backbone
from .loading import ModelSource
from .sd import StableDiffusionBackbone
from .sd3 import StableDiffusion3Backbone
from .sdxl import StableDiffusionXLBackbone

BACKBONES: tuple[type[Backbone], ...] = (
    StableDiffusionBackbone,
    StableDiffusionXLBackbone,
    StableDiffusion3Backbone,
)


def load_backbone(
    model: Any, *, revision: str | None = None, variant: str | None = None, vae: Any = None
) -> Backbone:
    """The backbone of a Hub id, a local folder or a loaded `DiffusionPipeline`; loads nothing heavy yet.

    Raises:
        ConfigError: when the model is missing, is no diffusers pipeline or its class is not supported (lists those that are).
    """
    source = ModelSource(model, revision=revision, variant=variant, vae=vae)
    for backbone in BACKBONES:
        if source.pipeline_class_name in backbone.pipeline_classes:
            return backbone(source)
    supported = ", ".join(name for backbone in BACKBONES for name in backbone.pipeline_classes)
    raise ConfigError(
        "model",
        f"{source.name!r} is a {source.pipeline_class_name}, which is not supported; supported are {supported}",
    )


__all__ = ["BACKBONES", "Backbone", "ModelSource", "load_backbone"]
