"""CLIP score: the cosine of image and prompt, under OpenAI's ViT-L/14, LAION's ViT-H/14 or any open_clip model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from .. import checkpoints
from ..images import Preprocess
from ..model_scorer import ModelScorer
from ..spec import ScorerSpec
from ..towers import HFClip, OpenClip, unit


class CosineScorer(ModelScorer):
    """scale * max(cos(text, image), clamp_min), with `prefix` before every prompt.

    The base value is the bare cosine. Presets of the literature: torchmetrics ``scale=100, clamp_min=0`` over clip-l14; CLIPScore
    (Hessel et al. 2021) ``scale=2.5, clamp_min=0, prefix="A photo depicts "`` over open_clip:ViT-B-32/openai.
    """

    clip: HFClip | OpenClip

    def __init__(
        self,
        *,
        scale: float = 1.0,
        clamp_min: float | None = None,
        prefix: str = "",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not isinstance(scale, (int, float)) or not scale > 0:
            raise ConfigError("scale", f"expected a number above 0, got {scale!r}")
        self.scale, self.clamp_min, self.prefix = float(scale), clamp_min, prefix
        self.config: Any = None

    def towers(self) -> Iterable[nn.Module]:
        return [self.clip.module]

    def identity(self) -> dict[str, Any]:
        return {
            "weights": checkpoints.content_hash(self.clip.source),
            "pixels": self.preprocess.describe(),
            "config": self.config,
            "scale": self.scale,
            "clamp_min": self.clamp_min,
            "prefix": self.prefix,
        }

    def text_features(self, prompts: list[str]) -> tuple[Tensor, ...]:
        return (unit(self.clip.text([self.prefix + prompt for prompt in prompts])),)

    def image_features(self, pixels: Tensor) -> Tensor:
        return unit(self.clip.image(pixels))

    def similarity(self, image: Tensor, text: tuple[Tensor, ...]) -> Tensor:
        cosine = (image * text[0]).sum(-1)
        return self.scale * (cosine if self.clamp_min is None else cosine.clamp(min=self.clamp_min))


class ClipL14(CosineScorer):
    """OpenAI CLIP ViT-L/14 through transformers. `model`, `config`, `tokenizer` as for `pickscore`."""

    spec = ScorerSpec(
        key="clip-l14",
        summary="cosine under OpenAI's CLIP ViT-L/14",
        licence="MIT",
        weights="openai/clip-vit-large-patch14",
        range=(0.15, 0.35),
        differentiable=True,
        parameters=427_616_513,
        backbone="openai/clip-vit-large-patch14",
        preprocess="clip-pil-224",
        text="clip-77-split-special",
        citation="Radford et al. 2021, arXiv 2103.00020",
    )

    def __init__(
        self, model: Any = None, config: Any = None, tokenizer: Any = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.clip = HFClip(model, self.spec, config=config, tokenizer=tokenizer, dtype=self.dtype)
        self.preprocess, self.config = self.clip.preprocess, config
        self.clip.module.to(self.device)


class OpenClipScore(CosineScorer):
    """Any open_clip model by name: ``load_scorer("open_clip:ViT-B-32/laion2b_s34b_b79k")``, or with your own checkpoint.

    Args:
        model: checkpoint file in open_clip's format, or a folder with open_clip_config.json; None takes the published weights.
        config: open_clip model config, as a mapping or JSON file; overrides the architecture.
        tokenizer: byte-pair file or tokenizer folder; None takes open_clip's own.
        architecture: ``NAME`` or ``NAME/TAG`` in open_clip's terms.
        preprocess: ``crop`` (shortest side, centre crop), ``squash``, ``letterbox`` (HPSv2's, antialiased) or ``legacy`` (the letterbox
            without antialiasing, as torchvision computed it until 0.16); None takes what the weights were published with.
        precision: ``fp32``, or ``amp_fp16``: CUDA autocast over float32 weights, under which most published GPU numbers were made.
    """

    spec = ScorerSpec(
        key="open_clip",
        summary="cosine under any open_clip model",
        licence="of the chosen weights",
        range=(0.1, 0.45),
        differentiable=True,
        preprocess="open_clip",
        text="open_clip",
        dependencies=("open_clip_torch",),
        citation="Ilharco et al. 2021, open_clip",
    )
    filename: str | None = None
    tag: str | None = None
    default_architecture: str | None = None
    default_preprocess: str | None = None

    def __init__(
        self,
        model: Any = None,
        config: Any = None,
        tokenizer: Any = None,
        *,
        architecture: str | None = None,
        preprocess: str | None = None,
        precision: str = "fp32",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if precision not in ("fp32", "amp_fp16"):
            raise ConfigError("precision", f"expected fp32 or amp_fp16, got {precision!r}")
        name, _, tag = (architecture or self.default_architecture or "").partition("/")
        if model is None and self.spec.weights is None and not (tag or self.tag):
            raise ConfigError(
                "model",
                f"open_clip has several weights of {name or 'a model'}; write open_clip:{name or 'NAME'}/TAG or pass model=FILE",
            )
        self.clip: OpenClip = OpenClip(
            model,
            self.spec,
            architecture=name or None,
            tag=tag or self.tag,
            filename=self.filename,
            config=config,
            tokenizer=tokenizer,
            dtype=self.dtype,
        )
        self.precision, self.config = precision, self.clip.config
        self.preprocess = _preprocess(preprocess or self.default_preprocess, self.clip)
        self.clip.module.to(self.device)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "precision": self.precision}

    def _amp(self) -> torch.autocast:
        return torch.autocast(
            "cuda",
            torch.float16,
            enabled=self.precision == "amp_fp16" and self.device.type == "cuda",
        )

    def text_features(self, prompts: list[str]) -> tuple[Tensor, ...]:
        with self._amp():
            features = self.clip.text([self.prefix + prompt for prompt in prompts])
        return (unit(features),)

    def image_features(self, pixels: Tensor) -> Tensor:
        with self._amp():
            features = self.clip.image(pixels)
        return unit(features)


def _preprocess(kind: str | None, clip: OpenClip) -> Preprocess:
    published = clip.preprocess_config
    values: dict[str, Any] = {
        "size": clip.image_size,
        "rounding": "half_even",
    }  # open_clip crops as torchvision does
    values |= {key: tuple(published[key]) for key in ("mean", "std") if key in published}
    if kind is None:
        kind = {"shortest": "crop", "squash": "squash"}.get(
            published.get("resize_mode", "shortest"), ""
        )
        if not kind or published.get("interpolation", "bicubic") != "bicubic":
            raise ConfigError(
                "preprocess",
                f"the published preprocessing {published!r} is not supported; name crop, squash, letterbox or legacy",
            )
    if kind not in ("crop", "squash", "letterbox", "legacy"):
        raise ConfigError("preprocess", f"expected crop, squash, letterbox or legacy, got {kind!r}")
    if kind in ("letterbox", "legacy"):
        values |= {"mode": "letterbox", "antialias": kind == "letterbox"}
    else:
        values["mode"] = kind
    # open_clip resizes before it converts to RGB.
    return Preprocess(rgb_first=False, **values)


class ClipH14(OpenClipScore):
    """LAION's CLIP ViT-H/14 as preference papers report it: the cosine after HPSv2's letterbox.

    ``preprocess="crop"`` gives the model's own preprocessing instead.
    """

    spec = ScorerSpec(
        key="clip-h14",
        summary="cosine under LAION's CLIP ViT-H/14, letterboxed",
        licence="MIT",
        weights="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        filename="open_clip_model.safetensors",
        range=(0.15, 0.45),
        differentiable=True,
        parameters=986_109_441,
        backbone="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        preprocess="letterbox-224",
        text="open_clip-77",
        dependencies=("open_clip_torch",),
        citation="Schuhmann et al. 2022, arXiv 2210.08402; preprocessing of the Diffusion-DPO evaluation (arXiv 2311.12908)",
    )
    default_architecture = "ViT-H-14"
    tag = "laion2b_s32b_b79k"
    default_preprocess = "letterbox"
