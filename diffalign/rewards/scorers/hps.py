"""Human Preference Score v2 and v2.1 (Wu et al. 2023, arXiv 2306.09341): the cosine of a fine-tuned open_clip ViT-H/14."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...errors import ConfigError
from ..spec import ScorerSpec
from .clip_score import OpenClipScore


class HPSv21(OpenClipScore):
    """HPS v2.1: cosine, neither scaled nor clamped; published tables show it times 100.

    Args:
        model: the published ``.pt`` file (a dictionary with `state_dict`), or a folder or Hub id that holds it.
        config: open_clip model config as a mapping or JSON file, for a reduced checkpoint of the same format.
        tokenizer: byte-pair file or tokenizer folder; None takes open_clip's own.
        antialias: of the letterbox's resize. True is what any current torchvision computes for the published code; False (the same as
            ``preprocess="legacy"``) is what it computed when the 2023 tables were made.
        precision: ``fp32``, or ``amp_fp16`` as the published code runs on CUDA.
    """

    spec = ScorerSpec(
        key="hpsv2.1",
        summary="human preference: cosine of an open_clip ViT-H/14 fine-tuned on HPD v2 (version 2.1)",
        licence="Apache-2.0",
        weights="xswu/HPSv2",
        filename="HPS_v2.1_compressed.pt",
        range=(0.13, 0.34),
        differentiable=True,
        parameters=986_109_441,
        backbone="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        preprocess="letterbox-224",
        text="open_clip-77",
        dependencies=("open_clip_torch",),
        citation="Wu et al. 2023, arXiv 2306.09341",
    )
    default_architecture = "ViT-H-14"
    default_preprocess = "letterbox"

    def __init__(
        self,
        model: Any = None,
        config: Any = None,
        tokenizer: Any = None,
        *,
        antialias: bool | None = None,
        preprocess: str | None = None,
        **options: Any,
    ) -> None:
        if antialias is not None:
            named = "letterbox" if antialias else "legacy"
            if preprocess not in (None, named):
                raise ConfigError(
                    "antialias",
                    f"{antialias!r} contradicts preprocess={preprocess!r}; give one of them",
                )
            preprocess = named
        super().__init__(model, config, tokenizer, preprocess=preprocess, **options)


class HPSv20(HPSv21):
    """HPS v2.0; its numbers are not comparable with those of v2.1. Arguments as `HPSv21`."""

    spec = replace(
        HPSv21.spec,
        key="hpsv2.0",
        summary="human preference: cosine of an open_clip ViT-H/14 fine-tuned on HPD v2 (version 2.0)",
        filename="HPS_v2_compressed.pt",
        range=(0.20, 0.30),
    )
