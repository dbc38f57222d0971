"""LAION's aesthetic predictors on the unit image feature of CLIP ViT-L/14.

Version 1 is a linear map, version 2 a stack of linear layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...runtime.hashing import content_hash
from .. import checkpoints
from ..checkpoints import ConfigLike
from ..model_scorer import ModelScorer
from ..spec import ScorerSpec
from ..towers import HFClip, unit
from .imagereward import build_head

_CLIP = "openai/clip-vit-large-patch14"


class AestheticV2(ModelScorer):
    """Predicted rating of an image's look, 1 to 10: head(v / |v|).

    v is the image feature of CLIP ViT-L/14. The prompt plays no part.

    Args:
        model (path, *optional*): the published head,
            `sac+logos+ava1-l14-linearMSE.pth`, or a folder that holds it.
        config (mapping, *optional*): ``{"clip": folder or Hub id of the CLIP
            ViT-L/14}``. Defaults to the one in the head's own folder, else OpenAI's
            from the Hub.
        tokenizer (path, *optional*): folder of the CLIP's tokenizer if it lies
            elsewhere. It is not used.
        **options: as for `ModelScorer`.
    """

    spec = ScorerSpec(
        key="aesthetic-v2",
        aliases=("aesthetic_v2",),
        summary="predicted rating of an image's look, 1 to 10 (improved aesthetic predictor)",
        licence="Apache-2.0",
        weights="https://github.com/christophschuhmann/improved-aesthetic-predictor",
        filename="sac+logos+ava1-l14-linearMSE.pth",
        revision="6934dd81792f086e613a121dbce43082cb8be85e",
        sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
        requires=("image",),
        range=(4.0, 7.0),
        differentiable=True,
        parameters=304_000_000,
        backbone=_CLIP,
        preprocess="clip-pil-224",
        text="none",
        citation="Schuhmann 2022, improved-aesthetic-predictor",
    )

    def __init__(
        self,
        model: str | Path | None = None,
        config: ConfigLike = None,
        tokenizer: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        values = checkpoints.read_config(config) or {}
        if set(values) - {"clip"}:
            raise ConfigError(
                "config",
                f"unknown key {sorted(set(values) - {'clip'})[0]!r}; "
                f"{self.name} takes clip, the folder of its CLIP",
            )
        self.source = checkpoints.find_weights(model, self.spec)
        state = checkpoints.read_state(self.source)
        clip_spec = replace(self.spec, weights=_CLIP, filename=None)
        beside = self.source.parent if (self.source.parent / "config.json").is_file() else None
        self.clip = HFClip(
            values.get("clip", beside), clip_spec, tokenizer=tokenizer, dtype=self.dtype
        )
        width = int(self.clip.module.config.projection_dim)
        self.head = self.build_head(state, width, torch.promote_types(self.dtype, torch.float32))
        self.preprocess = self.clip.preprocess
        for module in self.modules():
            module.to(self.device)

    def build_head(self, state: dict[str, Tensor], width: int, dtype: torch.dtype) -> nn.Module:
        """Build the head from its published tensors."""
        return build_head(_without_prefix(state), width, dtype, f"{self.name}'s head")

    def towers(self) -> Iterable[nn.Module]:
        return [self.clip.module]

    def heads(self) -> Iterable[nn.Module]:
        return [self.head]

    def identity(self) -> dict[str, Any]:
        return {
            "head": content_hash(self.source),
            "clip": content_hash(self.clip.source),
            "pixels": self.preprocess.describe(),
        }

    def text_features(self, prompts: list[str]) -> tuple[Tensor, ...]:
        return (torch.zeros(len(prompts), 1, device=self.device),)

    def image_features(self, pixels: Tensor) -> Tensor:
        return unit(self.clip.image(pixels))

    def similarity(self, image: Tensor, text: tuple[Tensor, ...]) -> Tensor:
        return self.head(image).squeeze(-1)


class AestheticV1(AestheticV2):
    """The first predictor, w . v / |v| + b, under which LAION-Aesthetics was filtered.

    Arguments as `AestheticV2`.
    """

    spec = replace(
        AestheticV2.spec,
        key="aesthetic-v1",
        aliases=("aesthetic_v1",),
        summary="predicted rating of an image's look, 1 to 10 (first LAION aesthetic predictor)",
        licence="MIT",
        weights="https://github.com/LAION-AI/aesthetic-predictor",
        filename="sa_0_4_vit_l_14_linear.pth",
        revision="6d122adad522ab246644d9dc1c6d7a3810ee255f",
        sha256="2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
        citation="Schuhmann et al. 2022, LAION aesthetic-predictor",
    )

    def build_head(self, state: dict[str, Tensor], width: int, dtype: torch.dtype) -> nn.Module:
        return checkpoints.load_strict(
            nn.Linear(width, 1), state, f"{self.name}'s head", dtype=dtype
        )


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("layers."): value for name, value in state.items()}
