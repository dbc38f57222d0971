"""ImageReward (Xu et al. 2023, arXiv 2304.05977) on transformers' own BLIP classes.

It is a BLIP vision tower, a BERT that attends to it, and an affine head on the first
token, normalised to about N(0, 1). Two defaults of transformers are silently wrong for
it: the vision tower's layer-norm epsilon and the text tower's number of heads. So every
value of the architecture is written down here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError
from ...runtime.hashing import content_hash
from .. import checkpoints
from ..checkpoints import ConfigLike
from ..images import Preprocess
from ..model_scorer import ModelScorer
from ..spec import ScorerSpec
from ..towers import check_vocabulary, load_tokenizer, tokenize, tokenizer_digest, upcast

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw head over the training prompts; part of the published model."""
MAX_LENGTH = 35
"""Tokens that the published code reads of a prompt, [CLS] and [SEP] included."""
_BERT_ENTRIES = 30522

_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
}
_TEXT = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    # Builds the cross-attention. The causal mask that decoders have is not wanted and
    # is switched off in the call.
    "is_decoder": True,
    # The published configuration has 0.1, which an accidental train() would turn into
    # noise.
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
# The linear layers. 1, 3 and 5 are dropouts, and there are no activations between them.
_HEAD = (0, 2, 4, 6, 7)


class ImageReward(ModelScorer):
    """(head(h_CLS) - MEAN) / STD, about N(0, 1) over the prompts it was trained on.

    Args:
        model (path or `str`, *optional*): the published `ImageReward.pt` (a bare state
            dict), or a folder or Hub id that holds it.
        config (mapping or path, *optional*): ``{"vision": BlipVisionConfig fields,
            "text": BlipTextConfig fields}`` that override the published architecture.
        tokenizer (path, *optional*): folder or `vocab.txt` of BERT base uncased.
            Defaults to the vocabulary beside the weights, else the Hub's.
        **options: as for `ModelScorer`.
    """

    spec = ScorerSpec(
        key="imagereward",
        aliases=("image_reward", "imagereward_v1.0"),
        summary="human preference and prompt alignment, normalised to about N(0, 1)",
        licence="Apache-2.0",
        weights="THUDM/ImageReward",
        filename="ImageReward.pt",
        range=(-2.0, 2.0),
        affine=(0.0, 1.0),
        differentiable=True,
        parameters=446_206_689,
        backbone="BLIP ViT-L/16 + BERT base",
        preprocess="pil-224-rgb-last",
        text="bert-35",
        citation="Xu et al. 2023, arXiv 2304.05977",
    )

    def __init__(
        self,
        model: str | Path | None = None,
        config: ConfigLike = None,
        tokenizer: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        vision, text = architecture(config)
        self.source = checkpoints.find_weights(model, self.spec)
        self.config = {"vision": vision, "text": text}
        beside = self.source.parent if (self.source.parent / "vocab.txt").is_file() else None
        self.tokenizer = self._load_tokenizer(
            tokenizer or beside or "google-bert/bert-base-uncased", text["vocab_size"]
        )
        self.vision, self.text, self.head = build(
            checkpoints.read_state(self.source), vision, text, self.dtype
        )
        self.preprocess = Preprocess(
            size=vision["image_size"], rounding="half_even", rgb_first=False
        )
        for module in self.modules():
            module.to(self.device)

    def _load_tokenizer(self, source: str | Path, vocab_size: int) -> Any:
        from transformers import BertTokenizer

        tokenizer = load_tokenizer(BertTokenizer, source, self.name)
        if vocab_size == _TEXT["vocab_size"] and len(tokenizer) != _BERT_ENTRIES:
            raise ConfigError(
                "tokenizer",
                f"{str(source)!r} has {len(tokenizer)} entries, BERT base uncased has "
                f"{_BERT_ENTRIES}; pass its folder or vocab.txt",
            )
        check_vocabulary(len(tokenizer) - 1, vocab_size, self.name)
        if vocab_size >= len(tokenizer) + 2:
            # BLIP's two extra entries. They are never written, but a prompt that spells
            # them is read so by the published code.
            tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
        return tokenizer

    def towers(self) -> Iterable[nn.Module]:
        return [self.vision, self.text]

    def heads(self) -> Iterable[nn.Module]:
        return [self.head]

    def identity(self) -> dict[str, Any]:
        return {
            "weights": content_hash(self.source),
            "config": self.config,
            "vocabulary": len(self.tokenizer),
            "tokenizer": tokenizer_digest(self.tokenizer),
            "pixels": self.preprocess.describe(),
        }

    def text_features(self, prompts: list[str]) -> tuple[Tensor, ...]:
        tokens = tokenize(
            self.tokenizer, prompts, max_length=MAX_LENGTH, name=self.name, padding="max_length"
        )
        return tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device)

    def image_features(self, pixels: Tensor) -> Tensor:
        # Not the pooled output, which goes through the last layer norm twice.
        return self.vision(pixel_values=pixels).last_hidden_state

    def joint_features(self, image: Tensor, text: tuple[Tensor, ...]) -> Tensor:
        """Embed images together with their prompts: h_CLS, which the head reads.

        Args:
            image (`Tensor`): from `image_features`, (n, patches, width).
            text (tuple of `Tensor`): from `text_features`, n rows each.

        Returns:
            `Tensor`: (n, d), float32 or wider.
        """
        ids, mask = text
        hidden = self.text(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=image, is_decoder=False
        ).last_hidden_state
        return upcast(hidden[:, 0])

    def joint_score(self, features: Tensor) -> Tensor:
        """Score what `joint_features` returns, (n, d) -> (n,)."""
        with torch.autocast(features.device.type, enabled=False):
            return (self.head(features).squeeze(-1) - MEAN) / STD

    def similarity(self, image: Tensor, text: tuple[Tensor, ...]) -> Tensor:
        return self.joint_score(self.joint_features(image, text))


def architecture(config: ConfigLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Complete the published vision and text configurations with overrides.

    Args:
        config (mapping or path or None): overrides under `vision` and `text`.

    Returns:
        the vision and the text configuration.

    Raises:
        ConfigError: another section, or a field the configuration classes do not have.
    """
    from transformers import BlipTextConfig, BlipVisionConfig

    overrides = checkpoints.read_config(config) or {}
    unknown = sorted(set(overrides) - {"vision", "text"})
    if unknown:
        raise ConfigError(
            "config", f"unknown section {unknown[0]!r}; imagereward takes vision and text"
        )
    sections = []
    for section, base, cls in (
        ("vision", _VISION, BlipVisionConfig),
        ("text", _TEXT, BlipTextConfig),
    ):
        values = overrides.get(section) or {}
        if not isinstance(values, Mapping):
            raise ConfigError(f"config.{section}", f"expected a mapping, got {values!r}")
        known = set(cls().to_dict())
        for field in values:
            if field not in known:
                raise ConfigError(f"config.{section}.{field}", f"{cls.__name__} has no such field")
        sections.append({**base, **values})
    vision, text = sections
    text.setdefault("encoder_hidden_size", vision["hidden_size"])
    if text["encoder_hidden_size"] != vision["hidden_size"]:
        raise ConfigError(
            "config.text.encoder_hidden_size",
            f"is {text['encoder_hidden_size']}, but the vision tower is "
            f"{vision['hidden_size']} wide",
        )
    text["is_decoder"] = True
    return vision, text


def build(
    state: Mapping[str, Tensor],
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Build the networks from a state dict in the published format.

    Every key is used or known to be unused.

    Args:
        state (`dict[str, Tensor]`): by the published names.
        vision, text (mapping): configurations, see `architecture`.
        dtype (`torch.dtype`, *optional*, defaults to float32): of the towers.

    Returns:
        vision tower, text tower, head.

    Raises:
        UserError: keys missing, left over or misshapen.
    """
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    parts = split_keys(state)
    tower: Any = checkpoints.build_empty(lambda: BlipVisionModel(BlipVisionConfig(**vision)))
    encoder = checkpoints.build_empty(
        lambda: BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)
    )
    checkpoints.load_strict(tower, parts["vision"], "imagereward's vision tower", dtype=dtype)
    for layer in tower.encoder.layers:
        layer.self_attn.forward = MethodType(_fused_attention, layer.self_attn)
    checkpoints.load_strict(encoder, parts["text"], "imagereward's text tower", dtype=dtype)
    head = build_head(
        parts["head"], int(text["hidden_size"]), torch.promote_types(dtype, torch.float32)
    )
    return tower, encoder, head


def build_head(
    state: Mapping[str, Tensor],
    width: int,
    dtype: torch.dtype = torch.float32,
    what: str = "imagereward's head",
) -> nn.Module:
    """Build the affine stack of linear layers, with inner widths read from the tensors.

    The published widths are 1024, 128, 64, 16, 1.

    Args:
        state (`dict[str, Tensor]`): of the head.
        width (`int`): of its input.
        dtype (`torch.dtype`, *optional*, defaults to float32): of the head.
        what (`str`, *optional*): how messages name it.
    """
    sizes = [
        width,
        *(int(state[f"{i}.weight"].shape[0]) if f"{i}.weight" in state else 1 for i in _HEAD),
    ]
    layers = [nn.Identity() for _ in range(max(_HEAD) + 1)]
    for place, (inputs, outputs) in zip(_HEAD, pairwise(sizes), strict=True):
        layers[place] = nn.Linear(inputs, outputs)  # type: ignore[call-overload]
    return checkpoints.load_strict(nn.Sequential(*layers), state, what, dtype=dtype)


def _fused_attention(attention: Any, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
    """Run `BlipAttention` by torch's fused kernel.

    Transformers has only the written-out form, which keeps all attention weights.
    """
    n, length, width = hidden_states.shape
    q, k, v = (
        attention.qkv(hidden_states)
        .view(n, length, 3, attention.num_heads, -1)
        .permute(2, 0, 3, 1, 4)
    )
    attended = F.scaled_dot_product_attention(q, k, v, scale=attention.scale)
    return attention.projection(attended.transpose(1, 2).reshape(n, length, width)), None


_VISION_NAMES = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("blocks.", "encoder.layers."),
    ("norm.", "post_layernorm."),
)
_BLOCK_NAMES = (
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
)
# The image-text-contrastive projections are stored and never used. Position ids are
# counted, not learned.
_UNUSED = ("vision_proj.", "text_proj.", "text_encoder.embeddings.position_ids")


def split_keys(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Sort a state dict into `vision`, `text` and `head`, by transformers' names.

    This is pure renaming: no tensor is split, transposed or reshaped. `dropped` holds
        the
    five unused tensors. A name that fits nothing goes under `text`, where the strict
    loader names it.
    """
    parts: dict[str, dict[str, Tensor]] = {"vision": {}, "text": {}, "head": {}, "dropped": {}}
    for full, value in state.items():
        name = full.removeprefix("blip.")
        if name.startswith("mlp.layers."):
            parts["head"][name.removeprefix("mlp.layers.")] = value
        elif name.startswith(_UNUSED):
            parts["dropped"][name] = value
        elif name.startswith("visual_encoder."):
            parts["vision"][_vision_name(name.removeprefix("visual_encoder."))] = value
        else:
            parts["text"][name.removeprefix("text_encoder.")] = value
    return parts


def _vision_name(name: str) -> str:
    for old, new in _VISION_NAMES:
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    for old, new in _BLOCK_NAMES:
        name = name.replace(old, new)
    return name
