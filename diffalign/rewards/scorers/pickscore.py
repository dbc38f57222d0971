"""PickScore (Kirstain et al. 2023, arXiv 2305.01569) and, by the same code, the embedded shapes-clip."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .. import checkpoints
from ..model_scorer import ModelScorer
from ..spec import ScorerSpec
from ..towers import HFClip, unit


class PickScore(ModelScorer):
    """exp(logit_scale) cos(text, image). Differences within one prompt are logits of the preference.

    Args:
        model: folder of a `CLIPModel` (config.json, weights, tokenizer, preprocessor_config.json) or Hub id.
        config: fields that override config.json.
        tokenizer: folder of the tokenizer; None takes the model's.
    """

    spec = ScorerSpec(
        key="pickscore",
        aliases=("pick_score", "pickscore_v1"),
        summary="human preference between two images of a prompt: exp(logit_scale) times the cosine of a CLIP ViT-H/14",
        licence="code MIT; the model card states none for the weights",
        weights="yuvalkirstain/PickScore_v1",
        range=(15.0, 26.0),
        differentiable=True,
        parameters=986_109_441,
        backbone="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        preprocess="clip-pil-224",
        text="clip-77-split-special",
        citation="Kirstain et al. 2023, arXiv 2305.01569, section 3",
    )

    def __init__(
        self, model: Any = None, config: Any = None, tokenizer: Any = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.clip = HFClip(model, self.spec, config=config, tokenizer=tokenizer, dtype=self.dtype)
        self.preprocess = self.clip.preprocess
        self.clip.module.to(self.device)
        self.config = config

    def towers(self) -> Iterable[nn.Module]:
        return [self.clip.module]

    def identity(self) -> dict[str, Any]:
        return {
            "weights": checkpoints.content_hash(self.clip.source),
            "pixels": self.preprocess.describe(),
            "config": self.config,
        }

    def text_features(self, prompts: list[str]) -> tuple[Tensor, ...]:
        return (unit(self.clip.text(prompts)),)

    def image_features(self, pixels: Tensor) -> Tensor:
        return unit(self.clip.image(pixels))

    def similarity(self, image: Tensor, text: tuple[Tensor, ...]) -> Tensor:
        # In half precision exp(4.6052) would be rounded to 99.
        return self.clip.module.logit_scale.to(image.dtype).exp() * (image * text[0]).sum(-1)


class ShapesClip(PickScore):
    """The embedded learned reward of the shapes world: a small CLIP trained on noisy preferences, imperfect and hackable."""

    spec = ScorerSpec(
        key="shapes-clip",
        summary="embedded preference model of the shapes world, trained on noisy labels: imperfect and hackable",
        parameters=413_249,
        licence="Apache-2.0",
        range=(0.0, 3.0),
        differentiable=True,
        backbone="shapes-clip",
        preprocess="clip-pil-64",
        text="clip-16-split-special",
        citation="this package, tools.shapes.pretrain_reward",
    )

    def __init__(
        self, model: Any = None, config: Any = None, tokenizer: Any = None, **options: Any
    ) -> None:
        if model is None:
            from ...shapes import reward_weights_dir

            model = reward_weights_dir()
        super().__init__(model, config, tokenizer, **options)
