"""Names of a LoRA's layers in diffusers and in the networks' original code.

Kohya's scripts and ComfyUI use the original names, in which some layers are fused. One
table per family serves both directions. Sources: diffusers' converters of checkpoints
(`loaders/single_file_utils.py`) and of LoRAs (`loaders/lora_conversion_utils.py`), and
`networks/` of kohya-ss/sd-scripts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


class Part(NamedTuple):
    """Where a layer lies in the original network.

    Attributes:
        original (`str`): path of the layer there.
        place (`int`): which of the fused layers it is, in the order of output rows.
        paths (`tuple[str, ...]`): all layers that are fused there, in diffusers' names.
        rows (`tuple[int, ...]`): their relative numbers of output rows.
    """

    original: str
    place: int
    paths: tuple[str, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Naming:
    """The table of one family.

    Args:
        title (`str`): what messages call the family.
        pipelines (`tuple[str, ...]`): its diffusers pipelines.
        network (`str`): name of the denoiser in the pipeline.
        table: original path -> diffusers paths, the fused ones in the order of their
            rows. ``{i}`` stands for a number.
        rows: original path -> relative numbers of rows, where they are not equal.
        text_encoders: name in the pipeline -> kohya's prefix.
    """

    title: str
    pipelines: tuple[str, ...]
    network: str
    table: Mapping[str, tuple[str, ...]]
    rows: Mapping[str, tuple[int, ...]]
    text_encoders: Mapping[str, str]

    @cached_property
    def _by_diffusers(self) -> list[tuple[re.Pattern[str], str, int]]:
        return [
            (_pattern(path), original, place)
            for original, paths in self.table.items()
            for place, path in enumerate(paths)
        ]

    @cached_property
    def _by_original(self) -> list[tuple[re.Pattern[str], str]]:
        dotted = [(_pattern(original), original) for original in self.table]
        flat = [(_pattern(original.replace(".", "_")), original) for original in self.table]
        return dotted + flat

    @cached_property
    def _by_flat_diffusers(self) -> list[tuple[re.Pattern[str], str]]:
        paths = [path for fused in self.table.values() for path in fused]
        dotted = [(_pattern(path), path) for path in paths]
        return dotted + [(_pattern(path.replace(".", "_")), path) for path in paths]

    def part(self, path: str) -> Part | None:
        """Find a layer of the denoiser by its name in diffusers.

        Args:
            path (`str`): without the name of the network, such as
                ``transformer_blocks.0.attn.to_q``.

        Returns:
            `Part`, *optional*: None if the table does not have it.
        """
        for pattern, original, place in self._by_diffusers:
            match = pattern.fullmatch(path)
            if match:
                return self._part(original, place, match.groups())
        return None

    def find(self, name: str) -> Part | None:
        """Find a layer by its original name, dotted or flat as kohya's.

        Some programs write diffusers' names in kohya's form. These are found, too.

        Args:
            name (`str`): without prefix, such as ``double_blocks.0.img_attn.qkv`` or
                ``double_blocks_0_img_attn_qkv``.

        Returns:
            `Part`, *optional*: None if the table does not have it.
        """
        for pattern, original in self._by_original:
            match = pattern.fullmatch(name)
            if match:
                return self._part(original, 0, match.groups())
        for pattern, path in self._by_flat_diffusers:
            match = pattern.fullmatch(name)
            if match:
                path = _filled(path, match.groups())
                return Part(path, 0, (path,), (1,))
        return None

    def _part(self, original: str, place: int, numbers: tuple[str, ...]) -> Part:
        paths = self.table[original]
        rows = self.rows.get(original, (1,) * len(paths))
        return Part(
            _filled(original, numbers), place, tuple(_filled(p, numbers) for p in paths), rows
        )


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{i\}", r"(\d+)"))


def _filled(template: str, numbers: Iterable[str]) -> str:
    for number in numbers:
        template = template.replace("{i}", number, 1)
    return template


# Tables -------------------------------------------------------------------------------

_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


def _under(prefix: str, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for name in names)


def _sd3() -> dict[str, tuple[str, ...]]:
    block, joint = "transformer_blocks.{i}", "joint_blocks.{i}"
    return {
        f"{joint}.x_block.attn.qkv": _under(f"{block}.attn", _QKV),
        f"{joint}.x_block.attn.proj": (f"{block}.attn.to_out.0",),
        f"{joint}.x_block.attn2.qkv": _under(f"{block}.attn2", _QKV),
        f"{joint}.x_block.attn2.proj": (f"{block}.attn2.to_out.0",),
        f"{joint}.x_block.mlp.fc1": (f"{block}.ff.net.0.proj",),
        f"{joint}.x_block.mlp.fc2": (f"{block}.ff.net.2",),
        f"{joint}.x_block.adaLN_modulation.1": (f"{block}.norm1.linear",),
        f"{joint}.context_block.attn.qkv": _under(f"{block}.attn", _ADDED),
        f"{joint}.context_block.attn.proj": (f"{block}.attn.to_add_out",),
        f"{joint}.context_block.mlp.fc1": (f"{block}.ff_context.net.0.proj",),
        f"{joint}.context_block.mlp.fc2": (f"{block}.ff_context.net.2",),
        "context_embedder": ("context_embedder",),
        "final_layer.linear": ("proj_out",),
    }


def _flux_attention() -> dict[str, tuple[str, ...]]:
    block, double = "transformer_blocks.{i}", "double_blocks.{i}"
    return {
        f"{double}.img_attn.qkv": _under(f"{block}.attn", _QKV),
        f"{double}.img_attn.proj": (f"{block}.attn.to_out.0",),
        f"{double}.txt_attn.qkv": _under(f"{block}.attn", _ADDED),
        f"{double}.txt_attn.proj": (f"{block}.attn.to_add_out",),
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        "final_layer.linear": ("proj_out",),
    }


_FLUX_SINGLE = "single_blocks.{i}.linear1"


def _flux() -> dict[str, tuple[str, ...]]:
    block, double = "transformer_blocks.{i}", "double_blocks.{i}"
    single = "single_transformer_blocks.{i}"
    return {
        **_flux_attention(),
        f"{double}.img_mlp.0": (f"{block}.ff.net.0.proj",),
        f"{double}.img_mlp.2": (f"{block}.ff.net.2",),
        f"{double}.img_mod.lin": (f"{block}.norm1.linear",),
        f"{double}.txt_mlp.0": (f"{block}.ff_context.net.0.proj",),
        f"{double}.txt_mlp.2": (f"{block}.ff_context.net.2",),
        f"{double}.txt_mod.lin": (f"{block}.norm1_context.linear",),
        _FLUX_SINGLE: (*_under(f"{single}.attn", _QKV), f"{single}.proj_mlp"),
        "single_blocks.{i}.linear2": (f"{single}.proj_out",),
        "single_blocks.{i}.modulation.lin": (f"{single}.norm.linear",),
    }


def _flux2() -> dict[str, tuple[str, ...]]:
    block, double = "transformer_blocks.{i}", "double_blocks.{i}"
    single = "single_transformer_blocks.{i}"
    return {
        **_flux_attention(),
        f"{double}.img_mlp.0": (f"{block}.ff.linear_in",),
        f"{double}.img_mlp.2": (f"{block}.ff.linear_out",),
        f"{double}.txt_mlp.0": (f"{block}.ff_context.linear_in",),
        f"{double}.txt_mlp.2": (f"{block}.ff_context.linear_out",),
        _FLUX_SINGLE: (f"{single}.attn.to_qkv_mlp_proj",),
        "single_blocks.{i}.linear2": (f"{single}.attn.to_out",),
    }


def _z_image() -> dict[str, tuple[str, ...]]:
    table: dict[str, tuple[str, ...]] = {}
    for blocks in ("layers", "noise_refiner", "context_refiner"):
        block = f"{blocks}.{{i}}"
        table[f"{block}.attention.qkv"] = _under(f"{block}.attention", _QKV)
        table[f"{block}.attention.out"] = (f"{block}.attention.to_out.0",)
        for name in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0"):
            table[f"{block}.{name}"] = (f"{block}.{name}",)
    return table


def _qwen_image() -> dict[str, tuple[str, ...]]:
    """ComfyUI and kohya's scripts have diffusers' names."""
    names = [*_under("attn", [*_QKV, *_ADDED, "to_out.0", "to_add_out"])]
    for stream in ("img", "txt"):
        names += [f"{stream}_mlp.net.0.proj", f"{stream}_mlp.net.2", f"{stream}_mod.1"]
    paths = [*_under("transformer_blocks.{i}", names), "img_in", "txt_in", "proj_out"]
    return {path: (path,) for path in paths}


_ATTENTION_BLOCK = (
    "proj_in",
    "proj_out",
    "transformer_blocks.{i}.ff.net.0.proj",
    "transformer_blocks.{i}.ff.net.2",
    *(
        f"transformer_blocks.{{i}}.{attention}.{name}"
        for attention in ("attn1", "attn2")
        for name in (*_QKV, "to_out.0")
    ),
)
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def _unet_blocks(levels: int, layers: int) -> Iterator[tuple[str, str]]:
    """Pairs of diffusers' and the original name of every block and resampler.

    Args:
        levels: numbers of resolutions.
        layers: residual blocks of each on the way down. On the way up is one more.
    """
    for level in range(levels):
        for layer in range(layers):
            place = 1 + level * (layers + 1) + layer
            yield f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{place}.0"
            yield f"down_blocks.{level}.attentions.{layer}", f"input_blocks.{place}.1"
        place = (level + 1) * (layers + 1)
        yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{place}.0.op"
        for layer in range(layers + 1):
            place = level * (layers + 1) + layer
            yield f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{place}.0"
            yield f"up_blocks.{level}.attentions.{layer}", f"output_blocks.{place}.1"
        place = level * (layers + 1) + layers
        yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{place}.2.conv"
    yield "mid_block.resnets.0", "middle_block.0"
    yield "mid_block.attentions.0", "middle_block.1"
    yield "mid_block.resnets.1", "middle_block.2"


def _unet(levels: int, layers: int, *, original: bool) -> dict[str, tuple[str, ...]]:
    """The table of a UNet; kohya's scripts have diffusers' names but for SDXL."""
    pairs = dict(_UNET_ENDS)
    for ours, theirs in _unet_blocks(levels, layers):
        if ".resnets." in ours:
            pairs |= {f"{ours}.{name}": f"{theirs}.{other}" for name, other in _RESNET.items()}
        elif ".attentions." in ours:
            pairs |= {f"{ours}.{name}": f"{theirs}.{name}" for name in _ATTENTION_BLOCK}
        else:
            pairs[ours] = theirs
    return {theirs if original else ours: (ours,) for ours, theirs in pairs.items()}


_SD = ("StableDiffusionPipeline",)
_TWO_ENCODERS = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}

NAMINGS: dict[str, Naming] = {
    "sdxl": Naming(
        "SDXL",
        ("StableDiffusionXLPipeline",),
        "unet",
        _unet(3, 2, original=True),
        {},
        _TWO_ENCODERS,
    ),
    "sd": Naming(
        "Stable Diffusion 1.x or 2.x",
        _SD,
        "unet",
        _unet(4, 2, original=False),
        {},
        {"text_encoder": "lora_te_"},
    ),
    "sd3": Naming(
        "Stable Diffusion 3", ("StableDiffusion3Pipeline",), "transformer", _sd3(), {}, {}
    ),
    "flux": Naming(
        "Flux.1 or Chroma",
        ("FluxPipeline", "ChromaPipeline"),
        "transformer",
        _flux(),
        {_FLUX_SINGLE: (1, 1, 1, 4)},
        {},
    ),
    "flux2": Naming(
        "Flux.2", ("Flux2Pipeline", "Flux2KleinPipeline"), "transformer", _flux2(), {}, {}
    ),
    "z-image": Naming("Z-Image", ("ZImagePipeline",), "transformer", _z_image(), {}, {}),
    "qwen-image": Naming(
        "Qwen-Image", ("QwenImagePipeline",), "transformer", _qwen_image(), {}, {}
    ),
}
"""Key of the family -> its table."""


def naming_of(pipeline_class: str) -> Naming | None:
    """Find the table of a diffusers pipeline.

    Args:
        pipeline_class (`str`): such as ``FluxPipeline``.

    Returns:
        `Naming`, *optional*: None if the family has none.
    """
    for naming in NAMINGS.values():
        if pipeline_class in naming.pipelines:
            return naming
    return None
