"""A tiny HPSv3 in the published layout, for this environment and for the authors' one.

Weights are drawn from `numpy.random.RandomState` by their names, so that they are the
same everywhere.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from PIL import Image

PIXELS = 256 * 28 * 28
HEAD = {"hidden": 24, "last": 8}
WIDTH = 32
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
         "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
CHAT = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|>"
    "<|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def words(reward: bool = True) -> Any:
    """Bytes as words, so that every text can be written, and the marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        padding_side="right",
    )  # fmt: skip
    made.add_tokens(MARKS, special_tokens=True)
    if reward:
        made.add_tokens(["<|Reward|>"], special_tokens=True)
    made.chat_template = CHAT
    return made


def sizes(tokens: Any) -> dict[str, Any]:
    """Sizes of the tiny model, and the ids of the marks."""
    mark = {name: tokens.convert_tokens_to_ids(name) for name in MARKS}
    return {
        "text": {
            "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokens),
            "max_position_embeddings": 8192, "mrope_section": [1, 1, 2],
        },
        "vision": {
            "depth": 2, "embed_dim": 32, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        "ids": {
            "image_token_id": mark["<|image_pad|>"], "video_token_id": mark["<|video_pad|>"],
            "vision_start_token_id": mark["<|vision_start|>"],
            "vision_end_token_id": mark["<|vision_end|>"],
        },
    }  # fmt: skip


def head() -> torch.nn.Sequential:
    """The published head with smaller layers."""
    nn = torch.nn
    return nn.Sequential(
        nn.Linear(WIDTH, HEAD["hidden"]), nn.ReLU(), nn.Dropout(0.05),
        nn.Linear(HEAD["hidden"], HEAD["last"]), nn.ReLU(), nn.Linear(HEAD["last"], 2),
    )  # fmt: skip


def state(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Random weights by the names of the published checkpoint."""
    tensors = {}
    for name, shape in shapes.items():
        random = np.random.RandomState(zlib.crc32(name.encode()))
        values = random.random_sample(shape) * 2 - 1
        scale = 1.0
        if len(shape) > 1:  # large enough that positions and pictures matter
            scale = 3.0 / float(np.prod(shape[1:])) ** 0.5
        if "norm" in name or "ln_q" in name:
            values, scale = 1 + 0.3 * values, 1.0
        if name.endswith("bias"):
            values, scale = 0.3 * values, 1.0
        tensors[name] = torch.from_numpy((values * scale).astype(np.float32))
    return tensors


def samples() -> list[tuple[Image.Image, str]]:
    """Images of several shapes, and prompts."""
    pairs = []
    prompts = ["a red cat", "a {brace} and “quotes”", "", "一只猫", "two dogs " * 20]
    shapes = [(512, 512), (320, 200), (97, 400), (448, 448), (640, 1000)]
    for seed, (prompt, (width, height)) in enumerate(zip(prompts, shapes, strict=True)):
        random = np.random.RandomState(seed)
        small = random.randint(0, 255, (8, 8, 3)).astype(np.uint8)
        pairs.append((Image.fromarray(small).resize((width, height), 3), prompt))
    return pairs
