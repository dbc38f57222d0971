"""CLIP scores, PickScore and HPSv2: a factor times the cosine of image and prompt.

All of them share one formula, `ClipScorer.similarity`. They differ in the weights,
the factor and the preprocessing.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...runtime.hashing import content_hash
from ..checkpoints import ConfigLike
from ..images import Preprocess
from ..model_scorer import ModelScorer
from ..spec import ScorerSpec
from ..towers import HFClip, OpenClip, tokenizer_digest, unit

_LAION_H14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class ClipScorer(ModelScorer):
    """The formula of this file: factor * max(cos(image, text), clamp_min).

    A subclass loads `clip`, sets `preprocess` and says its `factor`.
    """

    clip: HFClip | OpenClip
    config: ConfigLike = None
    prefix: str = ""
    clamp_min: float | None = None

    def factor(self, dtype: torch.dtype) -> Tensor | float:
        """Return the number that the cosine is multiplied with.

        Args:
            dtype (`torch.dtype`): of the cosine, float32 or wider.
        """
        raise NotImplementedError

    def towers(self) -> Iterable[nn.Module]:
        return [self.clip.module]

    def identity(self) -> dict[str, Any]:
        return {
            "weights": content_hash(self.clip.source),
            "pixels": self.preprocess.describe(),
            "config": self.config,
            "tokenizer": tokenizer_digest(self.clip.tokenizer),
        }

    def text_features(self, prompts: list[str]) -> tuple[Tensor, ...]:
        with self.tower_precision():
            features = self.clip.text([self.prefix + prompt for prompt in prompts])
        return (unit(features),)

    def image_features(self, pixels: Tensor) -> Tensor:
        with self.tower_precision():
            features = self.clip.image(pixels)
        return unit(features)

    def similarity(self, image: Tensor, text: tuple[Tensor, ...]) -> Tensor:
        cosine = (image * text[0]).sum(-1)
        if self.clamp_min is not None:
            cosine = cosine.clamp(min=self.clamp_min)
        return self.factor(image.dtype) * cosine

    def tower_precision(self) -> AbstractContextManager[object]:
        """Return the context in which the towers run. By default it changes nothing."""
        return nullcontext()

    def load_folder(
        self, model: str | Path | None, config: ConfigLike, tokenizer: str | Path | None
    ) -> None:
        """Load a `CLIPModel` folder or Hub id and move it to the device."""
        self.clip = HFClip(model, self.spec, config=config, tokenizer=tokenizer, dtype=self.dtype)
        self.preprocess, self.config = self.clip.preprocess, config
        self.clip.module.to(self.device)


# Scorers whose factor is learned


class PickScore(ClipScorer):
    """PickScore (Kirstain et al. 2023): exp(logit_scale) * cos(image, text).

    Differences within one prompt are logits of the preference.

    Args:
        model (path or `str`, *optional*): folder of a `CLIPModel` (config.json,
            weights, tokenizer, preprocessor_config.json) or Hub id. Defaults to the
            published weights.
        config (mapping or path, *optional*): fields that override config.json.
        tokenizer (path, *optional*): folder of the tokenizer. Defaults to the model's.
        **options: as for `Scorer`.
    """

    spec = ScorerSpec(
        key="pickscore",
        aliases=("pick_score", "pickscore_v1"),
        summary="human preference between two images of a prompt: "
        "exp(logit_scale) times the cosine of a CLIP ViT-H/14",
        licence="code MIT; the model card states none for the weights",
        weights="yuvalkirstain/PickScore_v1",
        range=(15.0, 26.0),
        differentiable=True,
        parameters=986_109_441,
        backbone=_LAION_H14,
        preprocess="clip-pil-224",
        text="clip-77-split-special",
        citation="Kirstain et al. 2023, arXiv 2305.01569, section 3",
    )

    def __init__(
        self,
        model: str | Path | None = None,
        config: ConfigLike = None,
        tokenizer: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.load_folder(model, config, tokenizer)

    def factor(self, dtype: torch.dtype) -> Tensor:
        # In half precision exp(4.6052) would be rounded to 99.
        return self.clip.module.logit_scale.to(dtype).exp()


class ShapesClip(PickScore):
    """The learned reward of the shapes world, whose weights come with the package.

    A small CLIP trained on noisy preferences. It is imperfect and can be exploited.
    Arguments as `PickScore`.
    """

    spec = ScorerSpec(
        key="shapes-clip",
        summary="embedded preference model of the shapes world, trained on noisy labels: "
        "imperfect and hackable",
        parameters=413_249,
        licence="Apache-2.0",
        range=(0.0, 3.0),
        differentiable=True,
        backbone="shapes-clip",
        preprocess="clip-pil-64",
        text="clip-16-split-special",
        citation="this package, configs/reward/shapes_clip.yaml",
    )

    def __init__(
        self,
        model: str | Path | None = None,
        config: ConfigLike = None,
        tokenizer: str | Path | None = None,
        **options: Any,
    ) -> None:
        if model is None:
            from ...shapes import reward_weights_dir

            model = reward_weights_dir()
        super().__init__(model, config, tokenizer, **options)


# Scorers whose factor is an option


class CosineScorer(ClipScorer):
    """scale * max(cos(image, text), clamp_min), by default the bare cosine.

    Two settings of the literature: torchmetrics takes ``scale=100, clamp_min=0`` over
    clip-l14. CLIPScore (Hessel et al. 2021) takes ``scale=2.5, clamp_min=0,
    prefix="A photo depicts "`` over open_clip:ViT-B-32/openai.

    Args:
        scale (`float`, *optional*, defaults to 1.0): factor of the cosine, above 0.
        clamp_min (`float`, *optional*): smallest cosine. Defaults to no limit.
        prefix (`str`, *optional*, defaults to ""): text before every prompt.
        **options: as for `Scorer`.

    Raises:
        ConfigError: `scale` is not above 0.
    """

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

    def factor(self, dtype: torch.dtype) -> float:
        return self.scale

    def identity(self) -> dict[str, Any]:
        return {
            **super().identity(),
            "scale": self.scale,
            "clamp_min": self.clamp_min,
            "prefix": self.prefix,
        }


class ClipL14(CosineScorer):
    """OpenAI's CLIP ViT-L/14 through transformers.

    Args:
        model, config, tokenizer: as for `PickScore`.
        **options: as for `CosineScorer`.
    """

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
        self,
        model: str | Path | None = None,
        config: ConfigLike = None,
        tokenizer: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.load_folder(model, config, tokenizer)


class OpenClipScore(CosineScorer):
    """Any open_clip model by name, or with a checkpoint of your own.

    Args:
        model (path or `str`, *optional*): checkpoint file in open_clip's format, or a
            folder with open_clip_config.json. Defaults to the published weights.
        config (mapping or path, *optional*): open_clip model config, as a mapping or
            JSON file. It overrides the architecture.
        tokenizer (path, *optional*): byte-pair file or tokenizer folder. Defaults to
            open_clip's own.
        architecture (`str`, *optional*): ``NAME`` or ``NAME/TAG`` in open_clip's terms.
        preprocess (`str`, *optional*): ``crop`` (shortest side, centre crop),
            ``squash``, ``letterbox`` (HPSv2's, antialiased) or ``legacy`` (the
            letterbox without antialiasing, as torchvision computed it until 0.16).
            Defaults to what the weights were published with.
        precision (`str`, *optional*, defaults to "fp32"): ``fp32``, or ``amp_fp16``:
            CUDA autocast over float32 weights, under which most published GPU numbers
            were made.
        **options: as for `CosineScorer`.

    Raises:
        ConfigError: an unknown option value, or a model with several published weights
            of which none is named.

    Example:
        ```python
        scorer = load_scorer("open_clip:ViT-B-32/laion2b_s34b_b79k")
        ```
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
        model: str | Path | None = None,
        config: ConfigLike = None,
        tokenizer: str | Path | None = None,
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
                f"open_clip has several weights of {name or 'a model'}; "
                f"write open_clip:{name or 'NAME'}/TAG or pass model=FILE",
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

    def tower_precision(self) -> AbstractContextManager[object]:
        if self.precision == "amp_fp16" and self.device.type == "cuda":
            return torch.autocast("cuda", torch.float16)
        return nullcontext()  # leaves the precision of a training as it is


def _preprocess(kind: str | None, clip: OpenClip) -> Preprocess:
    """Build the named preprocessing, by default that of the published weights."""
    published = clip.preprocess_config
    # open_clip crops as torchvision does.
    values: dict[str, Any] = {"size": clip.image_size, "rounding": "half_even"}
    values |= {key: tuple(published[key]) for key in ("mean", "std") if key in published}
    if kind is None:
        resize_mode = published.get("resize_mode", "shortest")
        kind = {"shortest": "crop", "squash": "squash"}.get(resize_mode, "")
        if not kind or published.get("interpolation", "bicubic") != "bicubic":
            raise ConfigError(
                "preprocess",
                f"the published preprocessing {published!r} is not supported; "
                "name crop, squash, letterbox or legacy",
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
    """LAION's CLIP ViT-H/14 as preference papers report it, after HPSv2's letterbox.

    ``preprocess="crop"`` gives the model's own preprocessing instead. Arguments as
    `OpenClipScore`.
    """

    spec = ScorerSpec(
        key="clip-h14",
        summary="cosine under LAION's CLIP ViT-H/14, letterboxed",
        licence="MIT",
        weights=_LAION_H14,
        filename="open_clip_model.safetensors",
        range=(0.15, 0.45),
        differentiable=True,
        parameters=986_109_441,
        backbone=_LAION_H14,
        preprocess="letterbox-224",
        text="open_clip-77",
        dependencies=("open_clip_torch",),
        citation="Schuhmann et al. 2022, arXiv 2210.08402; "
        "preprocessing of the Diffusion-DPO evaluation (arXiv 2311.12908)",
    )
    default_architecture = "ViT-H-14"
    tag = "laion2b_s32b_b79k"
    default_preprocess = "letterbox"


class HPSv21(OpenClipScore):
    """Human Preference Score v2.1 (Wu et al. 2023): the bare cosine.

    Published tables show it times 100.

    Args:
        model (path or `str`, *optional*): the published ``.pt`` file (a dictionary with
            `state_dict`), or a folder or Hub id that holds it.
        config (mapping or path, *optional*): open_clip model config as a mapping or
            JSON file, for a reduced checkpoint of the same format.
        tokenizer (path, *optional*): byte-pair file or tokenizer folder. Defaults to
            open_clip's own.
        antialias (`bool`, *optional*): of the letterbox's resize. True, the default, is
            what any current torchvision computes for the published code. False (the
            same as ``preprocess="legacy"``) is what it computed when the 2023 tables
            were made.
        preprocess (`str`, *optional*): as for `OpenClipScore`.
        **options: as for `OpenClipScore`. ``precision="amp_fp16"`` is how the published
            code runs on CUDA.

    Raises:
        ConfigError: `antialias` contradicts `preprocess`.
    """

    spec = ScorerSpec(
        key="hpsv2.1",
        summary="human preference: cosine of an open_clip ViT-H/14 fine-tuned on HPD v2 "
        "(version 2.1)",
        licence="Apache-2.0",
        weights="xswu/HPSv2",
        filename="HPS_v2.1_compressed.pt",
        range=(0.13, 0.34),
        differentiable=True,
        parameters=986_109_441,
        backbone=_LAION_H14,
        preprocess="letterbox-224",
        text="open_clip-77",
        dependencies=("open_clip_torch",),
        citation="Wu et al. 2023, arXiv 2306.09341",
    )
    default_architecture = "ViT-H-14"
    default_preprocess = "letterbox"

    def __init__(
        self,
        model: str | Path | None = None,
        config: ConfigLike = None,
        tokenizer: str | Path | None = None,
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
    """Human Preference Score v2.0, not comparable with v2.1. Arguments as `HPSv21`."""

    spec = replace(
        HPSv21.spec,
        key="hpsv2.0",
        summary="human preference: cosine of an open_clip ViT-H/14 fine-tuned on HPD v2 "
        "(version 2.0)",
        filename="HPS_v2_compressed.pt",
        range=(0.20, 0.30),
    )
