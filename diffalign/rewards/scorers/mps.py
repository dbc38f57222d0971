"""MPS, the Multi-dimensional Preference Score (Zhang et al. 2024, arXiv 2405.14705).

It is a CLIP ViT-H/14 whose image tokens attend to those prompt tokens that a condition
sentence selects. The published code divides the selection by its maximum over the whole
batch, which makes a score depend on the images beside it. Here the maximum is each
sample's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError
from ...runtime.hashing import content_hash
from ...runtime.protocols import DeviceLike, DtypeLike
from .. import checkpoints
from ..checkpoints import ConfigLike
from ..images import Preprocess
from ..model_scorer import ModelScorer
from ..spec import ScorerSpec
from ..towers import (
    build_clip,
    clip_tokenizer,
    merged,
    preprocess_of_folder,
    tokenize,
    tokenizer_digest,
    unit,
)

CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, "
    "structure, instance, texture, quantity, "
    "attributes, position, number, location, word, things."
)
"""The published condition for the overall preference."""
_LAION_H14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_CLIP_H14: dict[str, Any] = {
    "projection_dim": 1024,
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
        "hidden_act": "gelu",
    },
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
}


class MPS(ModelScorer):
    """exp(logit_scale) * cos(end-of-text feature, image token 0).

    The image token comes after cross-attention to the selected prompt tokens.

    Args:
        model (path or `str`): a state dict of the published module (names ``model.*``
            and ``cross_model.*``), as a file, or a folder or Hub id that holds it. The
            published
            file is a pickled module, which would run code: save its `state_dict()`
                first.
        config (mapping or path, *optional*): `CLIPConfig` fields (or ``{"clip": ...}``,
            or a config.json) of a reduced checkpoint. The sizes of the cross-attention
            are read from its tensors.
        tokenizer (path, *optional*): folder of the tokenizer. Defaults to the one
            beside the weights, else LAION's from the Hub.
        condition (`str`, *optional*): words whose meaning selects prompt tokens.
            Defaults to the published ones for the overall preference.
        threshold (`float`, *optional*, defaults to 0.3): a prompt token is selected
            when its similarity to the condition, over the sample's largest, is above
            this. 0.3 is what the published evaluation scripts use (and the benchmark
            numbers), 0.01 what the README's model code has.
        **options: as for `ModelScorer`.

    Raises:
        ConfigError: no model, or an option that makes no sense.
    """

    spec = ScorerSpec(
        key="mps",
        summary="human preference over several dimensions; overall condition by default",
        licence="code MIT",
        filename="MPS_overall_checkpoint.safetensors",
        range=(5.0, 20.0),
        differentiable=True,
        parameters=1_104_609_281,
        backbone=_LAION_H14,
        preprocess="clip-pil-224",
        text="clip-77-padded",
        citation="Zhang et al. 2024, arXiv 2405.14705",
    )

    def __init__(
        self,
        model: str | Path | None = None,
        config: ConfigLike = None,
        tokenizer: str | Path | None = None,
        *,
        condition: str = CONDITION,
        threshold: float = 0.3,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not isinstance(threshold, (int, float)) or not 0 <= threshold < 1:
            raise ConfigError("threshold", f"expected a number in [0, 1), got {threshold!r}")
        if not isinstance(condition, str) or not condition.strip():
            raise ConfigError("condition", f"expected words, got {condition!r}")
        self.condition, self.threshold = condition, float(threshold)
        if model is None:
            raise ConfigError(
                "model",
                "mps is published as a pickled module, which would run code; "
                "save its state_dict() and pass model=FILE",
            )
        self.source = checkpoints.find_weights(model, self.spec)
        folder = self.source.parent
        self.config = _clip_config(config, folder)
        state = checkpoints.read_state(self.source)
        self.clip = build_clip(
            self.config, checkpoints.rename(state, "model."), self.name, self.dtype
        )
        self.cross = build_cross_model(
            {k: v for k, v in state.items() if not k.startswith("model.")}, self.dtype
        )
        beside = (
            folder
            if (folder / "tokenizer_config.json").is_file() or (folder / "vocab.json").is_file()
            else None
        )
        self.tokenizer, self.max_length = clip_tokenizer(
            tokenizer or beside or _LAION_H14, self.clip, self.name
        )
        size = int(self.clip.config.vision_config.image_size)
        has_own = (folder / "preprocessor_config.json").is_file()
        self.preprocess = preprocess_of_folder(folder, size) if has_own else Preprocess(size=size)
        self._condition: Tensor | None = None
        for module in self.modules():
            module.to(self.device)

    def towers(self) -> Iterable[nn.Module]:
        return [self.clip, self.cross]

    def to(self, device: DeviceLike = None, dtype: DtypeLike = None) -> MPS:
        self._condition = None
        super().to(device, dtype)
        return self

    def identity(self) -> dict[str, Any]:
        return {
            "weights": content_hash(self.source),
            "config": self.config,
            "condition": self.condition,
            "threshold": self.threshold,
            "pixels": self.preprocess.describe(),
            "tokenizer": tokenizer_digest(self.tokenizer),
        }

    def _tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode prompts with all their tokens.

        Returns:
            projected features of all tokens (n, length, d) and of the end-of-text token
            (n, d).
        """
        # Padded to the full length and without a mask, as published: padding takes
        # part.
        tokens = tokenize(
            self.tokenizer,
            prompts,
            max_length=self.max_length,
            name=self.name,
            padding="max_length",
            split_special_tokens=True,
        )
        outputs = self.clip.text_model(input_ids=tokens["input_ids"].to(self.clip.device))
        return self.clip.text_projection(outputs.last_hidden_state), self.clip.text_projection(
            outputs.pooler_output
        )

    def text_features(self, prompts: list[str]) -> tuple[Tensor, ...]:
        if self._condition is None:
            self._condition = self._tokens([self.condition])[0][0]
        tokens, end = self._tokens(prompts)
        return tokens, unit(end), select_tokens(tokens, self._condition, self.threshold)

    def image_features(self, pixels: Tensor) -> Tensor:
        # All tokens, and without the norm that CLIP puts before its pooled feature.
        return self.clip.visual_projection(
            self.clip.vision_model(pixel_values=pixels).last_hidden_state
        )

    def similarity(self, image: Tensor, text: tuple[Tensor, ...]) -> Tensor:
        tokens, end, selected = text
        attended = self.cross(image, tokens, selected)
        return self.clip.logit_scale.to(end.dtype).exp() * (end * unit(attended[:, 0])).sum(-1)


def select_tokens(tokens: Tensor, condition: Tensor, threshold: float) -> Tensor:
    """Find which prompt tokens the condition selects.

    Args:
        tokens (`Tensor`): (n, length, d).
        condition (`Tensor`): (m, d).
        threshold (`float`): of max_k <token, condition_k> over its maximum within the
            sample.

    Returns:
        `Tensor`: bool (n, length).
    """
    similarity = (tokens @ condition.T).amax(-1)
    return similarity / similarity.amax(-1, keepdim=True) > threshold


class _LayerNorm(nn.Module):
    """Layer norm whose bias is a stored zero, not a parameter."""

    bias: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.register_buffer("bias", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias)


class _SwiGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * value


def _multi_query(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Attend with many query heads over one key and value head.

    Args:
        q (`Tensor`): (n, i, heads * d).
        k, v (`Tensor`): (n, j, d).
        heads (`int`): of the queries.
        mask (`Tensor`, *optional*): bool (n, 1, 1, j).

    Returns:
        `Tensor`: (n, i, heads * d).
    """
    n, i, _ = q.shape
    q = q.view(n, i, heads, -1).transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q,
        k[:, None].expand(-1, heads, -1, -1),
        v[:, None].expand(-1, heads, -1, -1),
        attn_mask=mask,
    )
    return out.transpose(1, 2).reshape(n, i, -1)


class _CrossAttention(nn.Module):
    """Image tokens attend to the selected prompt tokens.

    A gated feed-forward runs beside.
    """

    def __init__(self, dim: int, dim_head: int, heads: int, ff_mult: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = _LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, dim_head * 2, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.ff = nn.Sequential(
            nn.Linear(dim, ff_mult * dim * 2, bias=False),
            _SwiGLU(),
            nn.Linear(ff_mult * dim, dim, bias=False),
        )

    def forward(self, x: Tensor, context: Tensor, selected: Tensor) -> Tensor:
        x = self.norm(x)
        k, v = self.to_kv(context).chunk(2, dim=-1)
        return self.to_out(
            _multi_query(self.to_q(x), k, v, self.heads, selected[:, None, None, :])
        ) + self.ff(x)


class _Rotary(nn.Module):
    inv_freq: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / (10000 ** (torch.arange(0, dim, 2).float() / dim)))

    def forward(self, x: Tensor, heads: int) -> Tensor:
        """Rotate (n, length, heads * d) by position.

        The halves of d are the two coordinates.
        """
        n, length, width = x.shape
        angles = (
            torch.arange(length, device=x.device, dtype=torch.float32)[:, None]
            * self.inv_freq.float()
        )  # type: ignore[operator]
        angles = torch.cat((angles, angles), dim=-1)[:, None].to(
            torch.promote_types(x.dtype, torch.float32)
        )
        x = x.view(n, length, heads, -1)
        first, second = x.chunk(2, dim=-1)
        rotated = x * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()
        return rotated.to(x.dtype).reshape(n, length, width)


class _ParallelBlock(nn.Module):
    """Self-attention with rotary positions beside a gated feed-forward.

    Both come from one projection.
    """

    def __init__(self, dim: int, dim_head: int, heads: int, ff_mult: int) -> None:
        super().__init__()
        self.heads = heads
        self.widths = (heads * dim_head, dim_head, dim_head, ff_mult * dim * 2)
        self.norm = _LayerNorm(dim)
        self.rotary_emb = _Rotary(dim_head)
        self.fused_attn_ff_proj = nn.Linear(dim, sum(self.widths), bias=False)
        self.attn_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.ff_out = nn.Sequential(_SwiGLU(), nn.Linear(ff_mult * dim, dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, ff = self.fused_attn_ff_proj(self.norm(x)).split(self.widths, dim=-1)
        attended = _multi_query(
            self.rotary_emb(q, self.heads), self.rotary_emb(k, 1), v, self.heads
        )
        return self.attn_out(attended) + self.ff_out(ff)


class _Residual(nn.Module):
    """Holds its block under the published name."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return self.fn(x, *others) + x


class CrossModel(nn.Module):
    """Layers of cross-attention to the prompt and self-attention among image tokens."""

    layers: Any

    def __init__(self, dim: int, layers: int, dim_head: int, heads: int, ff_mult: int) -> None:
        super().__init__()
        shape = (dim, dim_head, heads, ff_mult)
        self.layers = nn.ModuleList(
            nn.ModuleList([_Residual(_CrossAttention(*shape)), _Residual(_ParallelBlock(*shape))])
            for _ in range(layers)
        )

    def forward(self, image: Tensor, text: Tensor, selected: Tensor) -> Tensor:
        """Run all layers.

        Args:
            image (`Tensor`): (n, tokens, d).
            text (`Tensor`): (n, length, d).
            selected (`Tensor`): bool (n, length), the prompt tokens that count.

        Returns:
            `Tensor`: image tokens (n, tokens, d).
        """
        for cross, block in self.layers:
            image = block(cross(image, text, selected))
        return image


def build_cross_model(state: Mapping[str, Tensor], dtype: torch.dtype) -> CrossModel:
    """Build the cross-attention network, with sizes read from the tensors.

    The published one has 4 layers, 1024 wide, with 16 heads of 64.

    Raises:
        ConfigError: it is not the state dict of the published module.
    """
    names = checkpoints.rename(state, "cross_model.")
    first = "layers.0.0.fn."
    try:
        dim, dim_head = (
            names[first + "to_kv.weight"].shape[1],
            names[first + "to_kv.weight"].shape[0] // 2,
        )
        heads = names[first + "to_q.weight"].shape[0] // dim_head
        ff_mult = names[first + "ff.2.weight"].shape[1] // dim
    except KeyError as error:
        raise ConfigError(
            "model",
            f"the checkpoint has no cross_model.{error.args[0]}; "
            "expected the state dict of the published module",
        ) from None
    layers = 1 + max(int(name.split(".")[1]) for name in names if name.startswith("layers."))
    module = checkpoints.build_empty(lambda: CrossModel(dim, layers, dim_head, heads, ff_mult))
    others = {name: value for name, value in state.items() if not name.startswith("cross_model.")}
    checkpoints.load_strict(module, {**names, **others}, "mps's cross-attention", dtype=dtype)
    return module  # type: ignore[return-value]


def _clip_config(config: ConfigLike, folder: Path) -> dict[str, Any]:
    if config is None and (folder / "config.json").is_file():
        config = folder / "config.json"
    if isinstance(config, (str, Path)) and Path(config).is_dir():
        config = Path(config) / "config.json"
    values = checkpoints.read_config(config) or {}
    values = (
        checkpoints.read_config(values["clip"], "config.clip") or {} if "clip" in values else values
    )
    return merged(_CLIP_H14, values)
