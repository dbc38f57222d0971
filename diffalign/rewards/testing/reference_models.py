"""Tiny random checkpoints of the reward models, and odd inputs to score.

The checkpoints have the formats that the authors distribute. Everything is drawn from
`numpy.random.RandomState`, whose stream is frozen, and uses no transcendental function,
so the weights and images are bit-identical on every machine. The file runs both here
and in the old environments of `originals/`, where the authors' code turned these same
weights into the numbers under `fixtures/`. It therefore needs only numpy, torch and
PIL.

Weights are scaled so that mistakes show. Scores differ by much more than 0.1 from image
to image, the inputs of several LayerNorms have variances near their epsilon, and the
numbers of heads are not the libraries' defaults though these would divide the widths.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

PROMPTS = [
    "a photo of a red cat",
    "A Painting of Two Dogs, oil on canvas, 4k!",
    "",
    "   spaces \t and\nnewlines  ",
    "the cat’s “blue” house — it’ll be fine",
    "salt &amp;amp; pepper &lt;b&gt;",
    "caf\u00e9 na\u00efve \u00c5ngstr\u00f6m \u00dcber stra\u00dfe",
    "cafÃ© â€œmojibakeâ€\u009d",
    "ﬁne ﬂower ﬀ ①②",
    "一只红色的猫 in 東京",
    "кошка γάτα قطة",
    "emoji 😀 👩‍👩‍👧 flag 🇩🇪",
    "a <|endoftext|> b <|startoftext|> c",
    "a [MASK] cat [SEP] dog [PAD]",
    "<start_of_text> a <end_of_text>",
    "unaffable supercalifragilisticexpialidocious 1234567890 3.14",
    "zero\u200bwidth \u00a0nbsp \ufeffbom e\u0301 decomposed Ⅷ",
    # Words of their own only because the original ImageReward adds them to BERT's.
    "a [DEC] cat [ENC] dog",
    " ".join(["a very long prompt about a red cat and two blue dogs in the house"] * 22),
]


def sample_images() -> dict[str, Image.Image]:
    """Draw images of odd sizes and modes, by a name ``MODE_WIDTHxHEIGHT``.

    They are smooth colour fields with noise, different in contrast.
    """
    images = {}
    sizes = [
        ("RGB", 300, 200),
        ("RGB", 97, 211),
        ("RGB", 224, 224),
        ("RGB", 512, 384),
        ("RGBA", 180, 260),
        ("LA", 250, 231),
    ]
    sizes += [("P", 120, 90), ("L", 333, 100), ("RGB", 20, 31)]
    for seed, (mode, width, height) in enumerate(sizes):
        channels = len(mode) if mode != "P" else 1
        data = random_pixels(seed, width, height, channels)
        image = Image.frombytes(mode, (width, height), data.tobytes())
        if mode == "P":
            image.putpalette(np.random.RandomState(900 + seed).randint(0, 256, 768).tolist())
        images[f"{mode}_{width}x{height}"] = image
    return images


def random_pixels(seed: int, width: int, height: int, channels: int) -> np.ndarray:
    """Draw uint8 pixels (height, width, channels).

    A coarse random grid is interpolated linearly in integers, plus noise.
    """
    rng = np.random.RandomState(1000 + seed)
    cells = 2 + seed % 4
    coarse = rng.randint(0, 256, (cells + 1, cells + 1, channels)).astype(np.int64)
    y, x = np.arange(height) * cells * 256 // height, np.arange(width) * cells * 256 // width
    (y0, fy), (x0, fx) = (y // 256, (y % 256)[:, None, None]), (x // 256, (x % 256)[None, :, None])
    top, bottom = (coarse[y][:, x0] * (256 - fx) + coarse[y][:, x0 + 1] * fx for y in (y0, y0 + 1))
    smooth = (top * (256 - fy) + bottom * fy) // 65536
    noise = rng.randint(-24 - 8 * (seed % 3), 25 + 8 * (seed % 3), smooth.shape)
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)


def random_features(seed: int = 0, count: int = 8, width: int = 768) -> np.ndarray:
    """Draw float32 rows (count, width) with norms that differ.

    They stand in for CLIP embeddings.
    """
    rng = np.random.RandomState(seed)
    return (
        rng.standard_normal((count, width)) * np.linspace(0.1, 3.0, count)[:, None] + 0.2
    ).astype(np.float32)


def random_model_input(seed: int = 0, count: int = 2, size: int = 224) -> np.ndarray:
    """Draw float32 pixels (count, 3, size, size) as after normalisation.

    They are the input of the gradient fixtures.
    """
    return np.random.RandomState(seed).standard_normal((count, 3, size, size)).astype(np.float32)


class _Draw:
    """A state dict being filled with random tensors."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.RandomState(seed)
        self.state: dict[str, np.ndarray] = {}

    def normal(self, name: str, *shape: int, std: float = 1.0, mean: float = 0.0) -> None:
        self.state[name] = np.asarray(
            mean + std * self.rng.standard_normal(shape), dtype=np.float32
        )

    def linear(self, name: str, out: int, inp: int, gain: float = 1.0, bias: bool = True) -> None:
        self.normal(f"{name}.weight", out, inp, std=gain / inp**0.5)
        if bias:
            self.normal(f"{name}.bias", out, std=0.1 * gain)

    def norm(self, name: str, width: int, gain: float = 1.0) -> None:
        self.normal(f"{name}.weight", width, mean=gain, std=0.2 * gain)
        self.normal(f"{name}.bias", width, std=0.1 * gain)

    def arange(self, name: str, count: int) -> None:
        self.state[name] = np.arange(count, dtype=np.int64)[None]


PROJECTION = 8  # of ImageReward's unused contrastive heads; 256 in the original


def imagereward_config() -> dict[str, Any]:
    """Return the sizes of the tiny ImageReward under transformers' names.

    LayerNorm epsilons are the original's, 1e-6 and 1e-12.
    """
    return {
        "vision": {
            "image_size": 224,
            "patch_size": 16,
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "layer_norm_eps": 1e-6,
        },
        "text": {
            "vocab_size": len(bert_vocabulary()) + 2,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "encoder_hidden_size": 32,
            "layer_norm_eps": 1e-12,
        },
    }


def imagereward_med_config() -> dict[str, Any]:
    """Return `med_config.json`, which the original reads beside its checkpoint."""
    text = {
        name: value
        for name, value in imagereward_config()["text"].items()
        if name != "encoder_hidden_size"
    }
    fixed = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "encoder_width": 768,
    }
    return {
        **text,
        **fixed,
        "attention_probs_dropout_prob": 0.1,
        "hidden_dropout_prob": 0.1,
        "add_cross_attention": True,
    }


def imagereward_state(seed: int = 0) -> dict[str, np.ndarray]:
    """Draw the state dict of ImageReward.pt.

    It holds `blip.visual_encoder`, `blip.text_encoder`, the two unused projections,
    `mlp`.
    """
    vision, text = imagereward_config().values()
    draw = _Draw(seed)
    width, patch = vision["hidden_size"], vision["patch_size"]
    draw.normal("blip.visual_encoder.cls_token", 1, 1, width, std=0.002)
    draw.normal(
        "blip.visual_encoder.pos_embed",
        1,
        (vision["image_size"] // patch) ** 2 + 1,
        width,
        std=0.002,
    )
    draw.normal(
        "blip.visual_encoder.patch_embed.proj.weight", width, 3, patch, patch, std=0.0015 / patch
    )
    draw.normal("blip.visual_encoder.patch_embed.proj.bias", width, std=0.001)
    for i in range(vision["num_hidden_layers"]):
        block = f"blip.visual_encoder.blocks.{i}"
        draw.norm(f"{block}.norm1", width)
        draw.linear(f"{block}.attn.qkv", 3 * width, width, gain=1.6)
        draw.linear(
            f"{block}.attn.proj", width, width, gain=0.004
        )  # small, so that eps matters in every block
        draw.norm(f"{block}.norm2", width)
        draw.linear(f"{block}.mlp.fc1", vision["intermediate_size"], width, gain=1.5)
        draw.linear(f"{block}.mlp.fc2", width, vision["intermediate_size"], gain=0.006)
    draw.norm("blip.visual_encoder.norm", width)
    _imagereward_text(draw, text)
    draw.linear("blip.vision_proj", PROJECTION, width)
    draw.linear("blip.text_proj", PROJECTION, text["hidden_size"])
    sizes = (text["hidden_size"], 1024, 128, 64, 16, 1)
    for index, inp, out in zip((0, 2, 4, 6, 7), sizes, sizes[1:]):  # noqa: B905 - the old Python has no strict
        draw.linear(f"mlp.layers.{index}", out, inp, gain=3.0 if index == 0 else 1.0)
    return draw.state


def _imagereward_text(draw: _Draw, text: dict[str, Any]) -> None:
    width, prefix = text["hidden_size"], "blip.text_encoder"
    draw.arange(f"{prefix}.embeddings.position_ids", text["max_position_embeddings"])
    draw.normal(
        f"{prefix}.embeddings.word_embeddings.weight", text["vocab_size"], width, std=0.0005
    )
    draw.normal(
        f"{prefix}.embeddings.position_embeddings.weight",
        text["max_position_embeddings"],
        width,
        std=0.0003,
    )
    draw.norm(f"{prefix}.embeddings.LayerNorm", width)
    for i in range(text["num_hidden_layers"]):
        layer = f"{prefix}.encoder.layer.{i}"
        for kind, source in (("attention", width), ("crossattention", text["encoder_hidden_size"])):
            draw.linear(f"{layer}.{kind}.self.query", width, width, gain=1.6)
            draw.linear(f"{layer}.{kind}.self.key", width, source, gain=1.6)
            draw.linear(f"{layer}.{kind}.self.value", width, source, gain=3.0)
            draw.linear(
                f"{layer}.{kind}.output.dense",
                width,
                width,
                gain=4.0 if kind == "attention" else 1.5,
            )
            draw.norm(f"{layer}.{kind}.output.LayerNorm", width)
        draw.linear(f"{layer}.intermediate.dense", text["intermediate_size"], width, gain=1.5)
        draw.linear(f"{layer}.output.dense", width, text["intermediate_size"], gain=1.5)
        draw.norm(f"{layer}.output.LayerNorm", width)


def clip_config(hidden_act: str = "gelu", projection_dim: int = 16) -> dict[str, Any]:
    """Return `config.json` of a tiny CLIPModel as PickScore_v1 has it.

    It has exact GELU, the legacy eos_token_id 2 and the full vocabulary.
    """
    shared = {
        "hidden_act": hidden_act,
        "layer_norm_eps": 1e-5,
        "projection_dim": projection_dim,
        "attention_dropout": 0.0,
    }
    text = {
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "model_type": "clip_text_model",
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 224,
        "patch_size": 14,
        "num_channels": 3,
        "model_type": "clip_vision_model",
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": projection_dim,
        "logit_scale_init_value": 2.6592,
        "text_config": {**text, **shared},
        "vision_config": {**vision, **shared},
    }


def clip_state(
    seed: int = 0, config: dict[str, Any] | None = None, position_ids: bool = True
) -> dict[str, np.ndarray]:
    """Draw the state dict of transformers' CLIPModel.

    It has the `position_ids` buffers that files before transformers 4.31 hold.
    """
    config, draw = config or clip_config(), _Draw(seed)
    text, vision, shared = config["text_config"], config["vision_config"], config["projection_dim"]
    draw.state["logit_scale"] = np.asarray(4.6052, dtype=np.float32)
    name, width = "text_model", text["hidden_size"]
    draw.normal(f"{name}.embeddings.token_embedding.weight", text["vocab_size"], width, std=0.006)
    draw.normal(
        f"{name}.embeddings.position_embedding.weight",
        text["max_position_embeddings"],
        width,
        std=0.003,
    )
    _clip_layers(draw, name, text, gain=0.3)
    draw.norm(f"{name}.final_layer_norm", width)
    name, width, patch = "vision_model", vision["hidden_size"], vision["patch_size"]
    positions = (vision["image_size"] // patch) ** 2 + 1
    draw.normal(f"{name}.embeddings.class_embedding", width, std=0.006)
    draw.normal(
        f"{name}.embeddings.patch_embedding.weight", width, 3, patch, patch, std=0.006 / patch
    )
    draw.normal(f"{name}.embeddings.position_embedding.weight", positions, width, std=0.003)
    draw.norm(f"{name}.pre_layrnorm", width, gain=0.1)
    _clip_layers(draw, name, vision, gain=0.3)
    draw.norm(f"{name}.post_layernorm", width)
    draw.linear("visual_projection", shared, vision["hidden_size"], bias=False)
    draw.linear("text_projection", shared, text["hidden_size"], bias=False)
    if position_ids:
        draw.arange("text_model.embeddings.position_ids", text["max_position_embeddings"])
        draw.arange("vision_model.embeddings.position_ids", positions)
    return draw.state


def _clip_layers(draw: _Draw, name: str, config: dict[str, Any], gain: float) -> None:
    width = config["hidden_size"]
    for i in range(config["num_hidden_layers"]):
        layer = f"{name}.encoder.layers.{i}"
        for part in ("k_proj", "v_proj", "q_proj"):
            draw.linear(f"{layer}.self_attn.{part}", width, width, gain=1.8)
        draw.linear(f"{layer}.self_attn.out_proj", width, width, gain=2 * gain)
        draw.norm(f"{layer}.layer_norm1", width)
        draw.linear(f"{layer}.mlp.fc1", config["intermediate_size"], width, gain=1.5)
        draw.linear(f"{layer}.mlp.fc2", width, config["intermediate_size"], gain=gain)
        draw.norm(f"{layer}.layer_norm2", width)


def pickscore_state(seed: int = 1) -> dict[str, np.ndarray]:
    """Draw the state dict of PickScore_v1, a CLIPModel of `clip_config()`."""
    return clip_state(seed)


def hpsv2_config() -> dict[str, Any]:
    """Return open_clip's model config of the tiny HPSv2, sized as `clip_config()`."""
    return {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 224,
            "layers": 2,
            "width": 32,
            "head_width": 8,
            "patch_size": 14,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 2,
        },
    }


def hpsv2_state(seed: int = 2) -> dict[str, np.ndarray]:
    """Draw the state dict of open_clip's CLIP as in `HPS_v2_compressed.pt`.

    There it lies under the key `state_dict`.
    """
    state, out = clip_state(seed, position_ids=False), {}
    layers = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    layers["self_attn.out_proj"] = "attn.out_proj"
    for tower, prefix in (("text_model", ""), ("vision_model", "visual.")):
        for i in range(2):
            old, new = f"{tower}.encoder.layers.{i}", f"{prefix}transformer.resblocks.{i}"
            for kind in ("weight", "bias"):
                parts = [state[f"{old}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
                out[f"{new}.attn.in_proj_{kind}"] = np.concatenate(parts)
                out.update(
                    {f"{new}.{b}.{kind}": state[f"{old}.{a}.{kind}"] for a, b in layers.items()}
                )
    names = {"ln_final": "text_model.final_layer_norm"}
    names.update(
        {
            "visual.ln_pre": "vision_model.pre_layrnorm",
            "visual.ln_post": "vision_model.post_layernorm",
        }
    )
    out.update(
        {
            f"{new}.{kind}": state[f"{old}.{kind}"]
            for new, old in names.items()
            for kind in ("weight", "bias")
        }
    )
    out["positional_embedding"] = state["text_model.embeddings.position_embedding.weight"]
    out["token_embedding.weight"] = state["text_model.embeddings.token_embedding.weight"]
    out["visual.class_embedding"] = state["vision_model.embeddings.class_embedding"]
    out["visual.positional_embedding"] = state["vision_model.embeddings.position_embedding.weight"]
    out["visual.conv1.weight"] = state["vision_model.embeddings.patch_embedding.weight"]
    out["visual.proj"] = np.ascontiguousarray(state["visual_projection.weight"].T)
    out["text_projection"] = np.ascontiguousarray(state["text_projection.weight"].T)
    out["logit_scale"] = state["logit_scale"]
    return out


# Tokens of its sentence "light, color, clarity, ...".
MPS_CONDITION_IDS = [
    267, 269, 884, 1395, 1710, 1739, 1844, 2225, 2653, 2842, 3140, 3500, 4372, 4657,
    5285, 6448, 8408, 11844, 16505, 21323, 26920, 34572, 34886, 38570, 40763, 49406,
    49407,
]  # fmt: skip


def mps_config() -> dict[str, Any]:
    """Return the sizes of the tiny MPS.

    The CLIP is under `clip`, the arguments of the original Cross_model under `cross`.
    """
    return {
        "clip": clip_config(),
        "cross": {"dim": 16, "layer_num": 2, "dim_head": 8, "heads": 4, "ff_mult": 4},
    }


def mps_state(seed: int = 3) -> dict[str, np.ndarray]:
    """Draw the state dict of MPS' module.

    The CLIPModel is under `model.`, the cross-attention layers under `cross_model.`.
    """
    config, draw = mps_config(), _Draw(seed + 100)
    clip = clip_state(seed, config["clip"])
    # Words lie along one axis, those of MPS' condition sentence all on its positive
    # side, so that each threshold drops some of a prompt.
    side = draw.rng.standard_normal(len(clip["text_model.embeddings.token_embedding.weight"]))
    side[MPS_CONDITION_IDS] = 1.5
    axis = np.tile([1.0, -1.0], config["clip"]["text_config"]["hidden_size"] // 2)
    clip["text_model.embeddings.token_embedding.weight"] += (0.02 * side[:, None] * axis).astype(
        np.float32
    )
    draw.state.update({f"model.{name}": value for name, value in clip.items()})
    dim, head = config["cross"]["dim"], config["cross"]["dim_head"]
    inner, hidden = head * config["cross"]["heads"], dim * config["cross"]["ff_mult"]
    for i in range(config["cross"]["layer_num"]):
        cross, block = f"cross_model.layers.{i}.0.fn", f"cross_model.layers.{i}.1.fn"
        for part in (cross, block):
            draw.normal(f"{part}.norm.weight", dim, mean=1.0, std=0.2)
            draw.state[f"{part}.norm.bias"] = np.zeros(
                dim, dtype=np.float32
            )  # a buffer, never trained
        draw.linear(f"{cross}.to_q", inner, dim, gain=1.8, bias=False)
        draw.linear(f"{cross}.to_kv", 2 * head, dim, gain=2.0, bias=False)
        draw.linear(f"{cross}.to_out", dim, inner, gain=2.0, bias=False)
        draw.linear(f"{cross}.ff.0", 2 * hidden, dim, gain=1.5, bias=False)
        draw.linear(f"{cross}.ff.2", dim, hidden, bias=False)
        rates = 1.0 / (10000 ** (torch.arange(0, head, 2).float() / head))
        draw.state[f"{block}.rotary_emb.inv_freq"] = rates.numpy()
        draw.linear(
            f"{block}.fused_attn_ff_proj", inner + 2 * head + 2 * hidden, dim, gain=1.5, bias=False
        )
        draw.linear(f"{block}.attn_out", dim, inner, gain=1.5, bias=False)
        draw.linear(f"{block}.ff_out.1", dim, hidden, bias=False)
    return draw.state


def aesthetic_v1_state(seed: int = 4, width: int = 768) -> dict[str, np.ndarray]:
    """Draw `sa_0_4_vit_l_14_linear.pth`.

    It is one linear layer over the normalised CLIP embedding.
    """
    draw = _Draw(seed)
    draw.normal("weight", 1, width)
    draw.normal("bias", 1, mean=5.0)
    return draw.state


def aesthetic_v2_state(seed: int = 5, width: int = 768) -> dict[str, np.ndarray]:
    """Draw `sac+logos+ava1-l14-linearMSE.pth`.

    It is five linear layers over the normalised CLIP embedding.
    """
    draw, sizes = _Draw(seed), (width, 1024, 128, 64, 16, 1)
    for index, inp, out in zip((0, 2, 4, 6, 7), sizes, sizes[1:]):  # noqa: B905
        draw.linear(f"layers.{index}", out, inp, gain=8.0 if index == 0 else 1.0)
    return draw.state


def bert_vocabulary() -> list[str]:
    """Return a small uncased BERT vocabulary.

    The special tokens have their ids of bert-base-uncased (0, 100, 101, 102, 103).
    """
    specials = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = [chr(c) for c in range(33, 127) if not "A" <= chr(c) <= "Z"] + list(
        "’“”—一只色的猫東京γατкошка"
    )
    words = "the of and in a photo painting red blue cat dog house two oil canvas on long"
    words += " very prompt about fine it be ca na super un spaces"
    pieces = ["##s", "##ing", "##able", "##ff", "##un", "##fe", "##ive", "##cal", "##12", "##dog"]
    continued = [f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789"]
    return list(dict.fromkeys([*specials, *characters, *words.split(), *pieces, *continued]))


def write_bert_tokenizer(folder: Path) -> Path:
    """Write a folder for BertTokenizer.from_pretrained."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(bert_vocabulary()) + "\n", encoding="utf-8")
    config = {"do_lower_case": True, "model_max_length": 512, "tokenizer_class": "BertTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def bpe_file() -> Path:
    """Find CLIP's published merges, which the package open_clip_torch carries."""
    import open_clip

    return Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"


def write_clip_tokenizer(folder: Path, bpe: Path | None = None) -> Path:
    """Write a folder for CLIPTokenizer with all 49408 published tokens.

    Args:
        folder (`Path`): where to.
        bpe (`Path`, *optional*): `bpe_simple_vocab_16e6.txt.gz`. Defaults to the one
            inside open_clip_torch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = gzip.decompress((bpe or bpe_file()).read_bytes()).decode("utf-8").split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    characters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = characters + [c + "</w>" for c in characters] + ["".join(m.split()) for m in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    assert len(vocabulary) == 49408
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8"
    )
    end = "<|endoftext|>"
    special = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": end}
    config = {
        "do_lower_case": True,
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
        "errors": "replace",
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**config, **special}), encoding="utf-8"
    )
    return folder


def preprocessor_config() -> dict[str, Any]:
    """Return `preprocessor_config.json` of PickScore_v1 and LAION's CLIP-H."""
    return {
        "do_resize": True,
        "size": {"shortest_edge": 224},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 0.00392156862745098,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True,
        "image_processor_type": "CLIPImageProcessor",
        "feature_extractor_type": "CLIPFeatureExtractor",
    }


def tensors(state: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Return the state as torch tensors that own their memory."""
    return {name: torch.from_numpy(np.array(value)) for name, value in state.items()}


def write_imagereward(folder: Path, seed: int = 0) -> Path:
    """Write `ImageReward.pt` and `med_config.json`, return the .pt file.

    The tokenizer of bert-base-uncased's kind is under `tokenizer`.
    """
    write_bert_tokenizer(folder / "tokenizer")
    torch.save(tensors(imagereward_state(seed)), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(imagereward_med_config()), encoding="utf-8")
    return folder / "ImageReward.pt"


def write_hpsv2(folder: Path, seed: int = 2, name: str = "HPS_v2_compressed.pt") -> Path:
    """Write the checkpoint, open_clip's `model_config.json` and a CLIP `tokenizer`.

    Returns:
        `Path`: the .pt file.
    """
    write_clip_tokenizer(folder / "tokenizer")
    torch.save(
        {"epoch": 1, "name": "tiny", "state_dict": tensors(hpsv2_state(seed))}, folder / name
    )
    (folder / "model_config.json").write_text(json.dumps(hpsv2_config()), encoding="utf-8")
    return folder / name


def write_clip_folder(folder: Path, state: dict[str, np.ndarray], config: dict[str, Any]) -> Path:
    """Write a complete transformers folder.

    It holds config.json, model.safetensors, tokenizer and preprocessor files.
    """
    from safetensors.numpy import save_file

    write_clip_tokenizer(folder)
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(
        json.dumps(preprocessor_config()), encoding="utf-8"
    )
    return folder


def write_pickscore(folder: Path, seed: int = 1) -> Path:
    """Write the folder of PickScore_v1."""
    return write_clip_folder(folder, pickscore_state(seed), clip_config())


def write_clip(
    folder: Path, seed: int = 6, hidden_act: str = "quick_gelu", projection_dim: int = 16
) -> Path:
    """Write the folder of an OpenAI CLIP (quick GELU)."""
    return write_clip_folder(
        folder, clip_state(seed, config := clip_config(hidden_act, projection_dim)), config
    )


def write_mps(folder: Path, seed: int = 3) -> Path:
    """Write `mps.safetensors`, `mps_config.json` and a CLIP `tokenizer`.

    Returns:
        `Path`: the safetensors file.
    """
    from safetensors.numpy import save_file

    write_clip_tokenizer(folder / "tokenizer")
    save_file(mps_state(seed), str(folder / "mps.safetensors"), metadata={"format": "pt"})
    (folder / "mps_config.json").write_text(json.dumps(mps_config()), encoding="utf-8")
    return folder / "mps.safetensors"


def write_aesthetic(folder: Path, version: int = 2, width: int = 768) -> Path:
    """Write the head of version 1 or 2 under its published file name.

    Returns:
        `Path`: the .pth file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = "sa_0_4_vit_l_14_linear.pth" if version == 1 else "sac+logos+ava1-l14-linearMSE.pth"
    state = aesthetic_v1_state(width=width) if version == 1 else aesthetic_v2_state(width=width)
    torch.save(tensors(state), folder / name)
    return folder / name
