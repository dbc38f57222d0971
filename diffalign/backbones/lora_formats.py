"""LoRA files of other programs: read, fused, split and written.

`read_lora` and `write_lora` know four formats: ``diffusers`` (also of this package),
``peft`` (a folder with `adapter_config.json`), ``kohya`` (kohya-ss/sd-scripts) and
``comfy`` (ComfyUI). Between them stands one form, `LoraLayer` by diffusers' names.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import UserError
from ..runtime.files import make_folder
from ..runtime.weight_files import USUAL_LORA, find_lora_file, read_header, what_is_wrong
from .lora_names import NAMINGS, Naming, Part, naming_of

LoraFormat = Literal["diffusers", "peft", "kohya", "comfy"]
FORMATS: tuple[str, ...] = get_args(LoraFormat)
_PEFT_CONFIG, _PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
_METADATA = "lora_adapter_metadata"
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_COMPONENTS = ("unet", "transformer", *_TEXT_ENCODERS)


@dataclass(frozen=True)
class LoraLayer:
    """The LoRA of one layer: the weight changes by ``alpha / rank * up @ down``.

    Attributes:
        down (`Tensor`): (rank, in), with two more dimensions for a convolution.
        up (`Tensor`): (out, rank), with two more dimensions for a convolution.
        alpha (`float`): scale times rank.
        magnitude (`Tensor`, *optional*): (out,), the row norms of a DoRA.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Number of rows of `down`."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """Factor of ``up @ down``."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA in the form between formats.

    Attributes:
        layers (`dict[str, LoraLayer]`): by diffusers' name with that of the component,
            such as ``transformer.transformer_blocks.0.attn.to_q``.
        naming (`Naming`, *optional*): table of its family, None if it has none.
        source (`str`): the format it was read from.
    """

    layers: dict[str, LoraLayer]
    naming: Naming | None
    source: str


# Fused layers -------------------------------------------------------------------------


def fuse(parts: Sequence[LoraLayer | None], rows: Sequence[int]) -> LoraLayer:
    """Put the LoRAs of layers together whose rows one original layer has.

    The result has the sum of the ranks, and blocks in `up`, so that nothing is lost.

    Args:
        parts: a LoRA per layer, in the order of rows. None where a layer has none.
        rows: relative numbers of rows.

    Returns:
        `LoraLayer`: of the original layer.

    Raises:
        UserError: some of the layers have a DoRA and others do not.
    """
    present = [(place, part) for place, part in enumerate(parts) if part is not None]
    if len(parts) == 1:
        return present[0][1]
    rank = max(part.rank for _, part in present)
    one_scale = len({part.scale for _, part in present}) == 1
    place, first = present[0]
    unit = first.up.shape[0] // rows[place]
    heights = [unit * row for row in rows]
    down = first.down.new_zeros(len(parts) * rank, first.down.shape[1])
    up = first.up.new_zeros(sum(heights), len(parts) * rank)
    for place, part in present:
        start, column = sum(heights[:place]), place * rank
        down[column : column + part.rank] = part.down
        block = part.up if one_scale else part.up * part.scale
        up[start : start + heights[place], column : column + part.rank] = block
    alpha = float(len(parts) * rank)
    if one_scale:
        alpha = first.alpha * len(parts) if first.rank == rank else first.scale * alpha
    magnitudes = [part.magnitude for part in parts if part and part.magnitude is not None]
    if magnitudes and len(magnitudes) != len(parts):
        raise UserError(
            "a DoRA of some of the layers that the format fuses cannot be written; train "
            "it on all of them, or fuse it into the model"
        )
    return LoraLayer(down, up, alpha, torch.cat(magnitudes) if magnitudes else None)


def split(layer: LoraLayer, rows: Sequence[int]) -> list[LoraLayer | None]:
    """Take a fused layer's LoRA apart, the other way of `fuse`.

    Blocks give the ranks back that were fused. Without blocks every part has the whole
    `down`, and its rows of `up`.

    Args:
        layer (`LoraLayer`): of the original layer.
        rows: relative numbers of rows.

    Returns:
        `list`: a LoRA per layer, None where its part is zero.
    """
    count = len(rows)
    if count == 1:
        return [layer]
    unit = layer.up.shape[0] // sum(rows)
    ups = list(layer.up.split([unit * row for row in rows]))
    downs = [layer.down] * count
    alpha = layer.alpha
    if layer.rank % count == 0:
        rank = layer.rank // count
        columns = [slice(place * rank, (place + 1) * rank) for place in range(count)]
        outside = [
            ups[i][:, columns[j]].any() for i in range(count) for j in range(count) if i != j
        ]
        if not torch.stack(outside).any():
            ups = [up[:, column].contiguous() for up, column in zip(ups, columns, strict=True)]
            downs = [layer.down[column].contiguous() for column in columns]
            alpha = layer.alpha / count
    magnitudes: list[Tensor | None] = [None] * count
    if layer.magnitude is not None:
        magnitudes = list(layer.magnitude.split([unit * row for row in rows]))
    return [
        LoraLayer(down, up, alpha, magnitude) if down.any() or up.any() else None
        for down, up, magnitude in zip(downs, ups, magnitudes, strict=True)
    ]


def fold_alpha(lora: LoraWeights) -> LoraWeights:
    """Multiply alpha / rank into the weights.

    Programs that read no alpha, or only one beside the tensors, then see the same LoRA.

    Args:
        lora (`LoraWeights`): without DoRA.

    Returns:
        `LoraWeights`: each alpha is the rank.

    Raises:
        UserError: a layer has a DoRA, which those programs do not read either.
    """
    if any(layer.magnitude is not None for layer in lora.layers.values()):
        raise UserError("a DoRA cannot be written for programs that read no magnitudes")
    folded = {
        name: replace(layer, up=layer.up * layer.scale, alpha=float(layer.rank))
        for name, layer in lora.layers.items()
    }
    return replace(lora, layers=folded)


# Reading ------------------------------------------------------------------------------


def read_lora(place: str | Path, role: str, pipeline_class: str | None = None) -> LoraWeights:
    """Read a LoRA of any of the formats.

    Args:
        place (`str` or `Path`): file or folder.
        role (`str`): how messages name it, such as ``--lora``.
        pipeline_class (`str`, *optional*): of the model, where the names alone do not
            tell Stable Diffusion from SDXL.

    Returns:
        `LoraWeights`: its layers by diffusers' names.

    Raises:
        UserError: there is no such file, it is damaged, or has layers that no table
            knows. The message names one.
    """
    from safetensors.torch import load_file

    path = Path(place).expanduser()
    if not path.exists():
        raise UserError(f"{role}: there is no file or folder {str(place)!r}")
    config = path / _PEFT_CONFIG if path.is_dir() else path.with_name(_PEFT_CONFIG)
    file = find_lora_file(path, role)
    reason = what_is_wrong(file)
    if reason is not None:
        raise UserError(f"{role}: {str(file)!r} {reason}")
    if file.suffix != ".safetensors":
        raise UserError(f"{role}: {str(file)!r} is no safetensors file, and only these are read")
    tensors = load_file(file)
    names = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    hint = naming_of(pipeline_class) if pipeline_class else None
    try:
        form = original_format(names)
        if form is not None:
            return _from_original(names, form, hint)
        if not names:
            raise _Unknown("holds no tensors")
        if file.name == _PEFT_WEIGHTS and config.is_file():
            return _from_peft(names, _read_config(config), hint)
        metadata = read_header(file).metadata.get(_METADATA)
        return _from_diffusers(names, json.loads(metadata) if metadata else {}, hint)
    except _Unknown as error:
        raise UserError(f"{role}: {str(file)!r} {error}") from error


def _read_config(file: Path) -> dict[str, Any]:
    """Read the config of peft beside a LoRA."""
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise _Unknown(f"has a damaged {file.name} beside it")
    return config


def original_format(names: Iterable[str]) -> LoraFormat | None:
    """Tell whether names of tensors are those of kohya's scripts or of ComfyUI.

    Args:
        names (iterable of `str`): of the tensors.

    Returns:
        `str`, *optional*: ``kohya`` or ``comfy``. None for other formats.
    """
    for name in names:
        if name.startswith(("lora_unet_", "lora_transformer_", "lora_te")):
            return "kohya"
        if name.startswith("diffusion_model."):
            return "comfy"
    return None


class _Unknown(Exception):
    """Names that cannot be read, as the end of a sentence."""


_SUFFIXES = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "alpha": "alpha",
    "dora_scale": "magnitude",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector.default.weight": "magnitude",
}
"""End of a tensor's name -> what it is."""


def _by_layer(names: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Layer -> what -> tensor."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in names.items():
        suffix = next((s for s in _SUFFIXES if name.endswith(f".{s}")), None)
        if suffix is None:
            raise _Unknown(f"has the tensor {name!r}, which is no part of a LoRA or DoRA")
        if not torch.isfinite(tensor.float()).all():
            raise _Unknown(f"holds values that are not finite, in {name!r}")
        layers.setdefault(name.removesuffix(f".{suffix}"), {})[_SUFFIXES[suffix]] = tensor
    for layer, parts in layers.items():
        if not {"down", "up"} <= parts.keys():
            raise _Unknown(f"has only one of the two matrices of {layer!r}; it is incomplete")
    return layers


def _layer(parts: Mapping[str, Tensor], alpha: float | None) -> LoraLayer:
    if "alpha" in parts:
        alpha = float(parts["alpha"])
    rank = parts["down"].shape[0]
    return LoraLayer(
        parts["down"], parts["up"], rank if alpha is None else alpha, _magnitude(parts)
    )


def _magnitude(parts: Mapping[str, Tensor]) -> Tensor | None:
    """The scales of a DoRA, one per output, (out,).

    kohya's scripts write (out, 1) or (out, 1, 1, 1), peft (out,) or (1, out, 1, 1).
    """
    magnitude, outputs = parts.get("magnitude"), parts["up"].shape[0]
    if magnitude is None:
        return None
    per_input = magnitude.dim() == 2 and magnitude.shape[0] == 1 < magnitude.shape[1]
    if per_input or magnitude.numel() != outputs:
        raise _Unknown(
            f"has DoRA scales of shape {tuple(magnitude.shape)} for a layer with {outputs} "
            "outputs; only scales per output can be written in other formats"
        )
    return magnitude.flatten()


def _from_original(
    names: Mapping[str, Tensor], source: LoraFormat, hint: Naming | None
) -> LoraWeights:
    layers = _by_layer(names)
    if hint is not None:
        return LoraWeights(_renamed(layers, hint), hint, source)
    best, others = _likeliest(layers)
    result = _renamed(layers, best)
    return LoraWeights(result, _family(result) if others else best, source)


def _likeliest(layers: Mapping[str, Mapping[str, Tensor]]) -> tuple[Naming, list[Naming]]:
    """The family whose table has most of the layers, and others that have as many."""

    def known(naming: Naming) -> int:
        places = [(naming.find(_bare(layer)), parts) for layer, parts in layers.items()]
        # Flux.2 fuses other layers than Flux.1 under one name, so sizes must divide.
        return sum(
            part is not None and parts["up"].shape[0] % sum(part.rows) == 0
            for part, parts in places
        )

    best = max(NAMINGS.values(), key=known)
    others = [
        naming
        for naming in NAMINGS.values()
        if naming.network == best.network == "transformer"
        and naming is not best
        and known(naming) == known(best)
    ]
    paths = [
        [part and part.paths for part in (naming.find(_bare(layer)) for layer in layers)]
        for naming in (best, *others)
    ]
    if any(each != paths[0] for each in paths[1:]):
        raise _Unknown(
            f"may be of {' or '.join(naming.title for naming in (best, *others))} by its names; "
            "name its model with --model"
        )
    if best is NAMINGS["sdxl"]:
        # Of diffusers' names in kohya's form SDXL's table has all that SD's has.
        dotted = {
            f"unet.{part.paths[0]}": _layer(parts, None)
            for layer, parts in layers.items()
            if (part := best.find(_bare(layer))) is not None
        }
        if not any("input_blocks" in layer or "output_blocks" in layer for layer in layers):
            best = _unet_family(dotted) or NAMINGS["sd"]
    return best, others


_PREFIXES = ("lora_unet_", "lora_transformer_", "diffusion_model.")


def _bare(layer: str) -> str:
    prefix = next((prefix for prefix in _PREFIXES if layer.startswith(prefix)), "")
    return layer.removeprefix(prefix)


def _renamed(layers: Mapping[str, Mapping[str, Tensor]], naming: Naming) -> dict[str, LoraLayer]:
    """The layers by diffusers' names."""
    result: dict[str, LoraLayer] = {}
    for name, parts in layers.items():
        layer = _layer(parts, None)
        encoder = _text_layer(name, naming)
        if encoder is not None:
            result[encoder] = layer
            continue
        part = naming.find(_bare(name))
        if part is None:
            raise _Unknown(f"has the layer {name!r}, which is none of {naming.title}'s")
        for path, piece in zip(part.paths, split(layer, part.rows), strict=True):
            if piece is not None:
                result[f"{naming.network}.{path}"] = piece
    return result


_TEXT_WORDS = ("text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj")


def _text_layer(name: str, naming: Naming) -> str | None:
    """diffusers' name of a text encoder's layer, from kohya's."""
    for component, prefix in naming.text_encoders.items():
        if name.startswith(prefix):
            path = name.removeprefix(prefix)
            for word in _TEXT_WORDS:
                path = path.replace(word, word.replace("_", "-"))
            return f"{component}.{path.replace('_', '.').replace('-', '_')}"
    return None


def _from_peft(
    names: Mapping[str, Tensor], config: Mapping[str, Any], hint: Naming | None
) -> LoraWeights:
    layers = _by_layer({name.removeprefix(_PEFT_PREFIX): t for name, t in names.items()})
    unet = any(name.startswith(("down_blocks.", "mid_block.", "up_blocks.")) for name in layers)
    network = "unet" if unet else "transformer"
    result = {
        f"{network}.{name}": _layer(parts, _alpha(config, name, parts["down"].shape[0]))
        for name, parts in layers.items()
    }
    return LoraWeights(result, hint or _family(result), "peft")


def _from_diffusers(
    names: Mapping[str, Tensor], metadata: Mapping[str, Any], hint: Naming | None
) -> LoraWeights:
    from diffusers.utils import convert_unet_state_dict_to_peft

    if any(".processor." in name or "_lora." in name for name in names):
        names = convert_unet_state_dict_to_peft(dict(names))
    result = {}
    for name, parts in _by_layer(names).items():
        component, _, path = name.partition(".")
        if component not in _COMPONENTS:
            raise _Unknown(f"has the layer {name!r}, whose format is not known")
        config = {
            key.removeprefix(f"{component}."): value
            for key, value in metadata.items()
            if key.startswith(f"{component}.")
        }
        result[name] = _layer(parts, _alpha(config, path, parts["down"].shape[0]))
    return LoraWeights(result, hint or _family(result), "diffusers")


def _alpha(config: Mapping[str, Any], path: str, rank: int) -> float | None:
    """The alpha of a layer by a config of peft, as if without rank stabilisation."""
    if "lora_alpha" not in config:
        return None
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    key = path if path in patterns else get_pattern_key(list(patterns), path)
    alpha = float(patterns.get(key, config["lora_alpha"]))
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _family(layers: Mapping[str, LoraLayer]) -> Naming | None:
    """The family whose table has all layers of the denoiser, None if none does."""
    paths: dict[str, list[str]] = {}
    for name in layers:
        component, _, path = name.partition(".")
        paths.setdefault(component, []).append(path)
    if "unet" in paths:
        return _unet_family(layers)
    fitting = [
        (naming, [naming.part(path) for path in paths.get(naming.network, [""])])
        for naming in NAMINGS.values()
    ]
    fitting = [(naming, parts) for naming, parts in fitting if None not in parts]
    widths = {layer.down.shape[1] for name, layer in layers.items() if name.endswith(".to_q")}
    if widths and widths <= _SD3_WIDTHS:
        fitting = [each for each in fitting if each[0] is NAMINGS["sd3"]] or fitting
    elif widths and min(widths) > max(_SD3_WIDTHS):
        fitting = [each for each in fitting if each[0] is not NAMINGS["sd3"]]
    # Several families share names of attention, which each fuses in its own way.
    if not fitting or any(parts != fitting[0][1] for _, parts in fitting[1:]):
        return None
    return fitting[0][0]


_SD3_WIDTHS = {1536, 2432}  # of Stable Diffusion 3 and 3.5, medium and large


def _unet_family(layers: Mapping[str, LoraLayer]) -> Naming | None:
    """SDXL or Stable Diffusion, by depth, widths and places that only one has."""
    for name, layer in layers.items():
        width = layer.down.shape[1]
        if name.startswith("text_encoder_2.") or ".add_embedding." in name:
            return NAMINGS["sdxl"]
        if ".transformer_blocks." in name and ".transformer_blocks.0." not in name:
            return NAMINGS["sdxl"]
        if ".attn2.to_k" in name and width in (768, 1024, 2048):
            return NAMINGS["sdxl" if width == 2048 else "sd"]
        if ".down_blocks.3." in name or ".up_blocks.3." in name:
            return NAMINGS["sd"]
    return None


# Writing ------------------------------------------------------------------------------


def write_lora(lora: LoraWeights, file: Path, form: LoraFormat) -> None:
    """Write a LoRA in one of the formats.

    Args:
        lora (`LoraWeights`): of `read_lora`.
        file (`Path`): a safetensors file, for ``peft`` a folder.
        form (`str`): the format.

    Raises:
        UserError: the format has no name for a layer, or cannot hold a part. Nothing is
            written then.
    """
    from safetensors.torch import save_file

    metadata: dict[str, str] = {}
    if form == "peft":
        tensors, config = _to_peft(lora)
        config.save_pretrained(str(file))
        file = file / _PEFT_WEIGHTS
    elif form == "diffusers":
        tensors, metadata = _to_diffusers(lora)
    else:
        tensors = _to_original(lora, form)
    make_folder(file.parent, "--output")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        file,
        {"format": "pt", **metadata},
    )


def default_file(folder: Path, form: LoraFormat) -> Path:
    """Where `write_lora` puts a LoRA in a folder of its own."""
    return folder if form == "peft" else folder / USUAL_LORA


def _original_tensors(name: str, layer: LoraLayer) -> dict[str, Tensor]:
    tensors = {
        f"{name}.lora_down.weight": layer.down,
        f"{name}.lora_up.weight": layer.up,
        f"{name}.alpha": torch.tensor(layer.alpha, dtype=torch.float32),
    }
    if layer.magnitude is not None:
        tensors[f"{name}.dora_scale"] = layer.magnitude.reshape(-1, *[1] * (layer.down.dim() - 1))
    return tensors


def _to_original(lora: LoraWeights, form: LoraFormat) -> dict[str, Tensor]:
    naming = lora.naming
    if naming is None:
        raise UserError(
            f"--format: {form} has no names for this LoRA's family, or its layers do not tell "
            "which family it is of: name its model with --model; families with names are "
            f"{', '.join(naming.title for naming in NAMINGS.values())}"
        )
    tensors: dict[str, Tensor] = {}
    fused: dict[str, tuple[Part, list[LoraLayer | None]]] = {}
    for name, layer in lora.layers.items():
        component, _, path = name.partition(".")
        if component in naming.text_encoders:
            path = path if path.startswith("text_model.") else f"text_model.{path}"
            flat = naming.text_encoders[component] + path.replace(".", "_")
            tensors |= _original_tensors(flat, layer)
            continue
        part = naming.part(path) if component == naming.network else None
        if part is None:
            raise UserError(
                f"--format: {form} has no name for the layer {name!r} of {naming.title}; leave "
                "it out of lora.target_modules, or write another format"
            )
        _, pieces = fused.setdefault(part.original, (part, [None] * len(part.paths)))
        pieces[part.place] = layer
    for original, (part, pieces) in fused.items():
        dotted = form == "comfy" and naming.network == "transformer"
        name = (
            f"diffusion_model.{original}" if dotted else f"lora_unet_{original}".replace(".", "_")
        )
        tensors |= _original_tensors(name, fuse(pieces, part.rows))
    return tensors


def pattern_keys(paths: Iterable[str]) -> dict[str, str]:
    """Return the keys by which peft finds a layer's own rank or alpha.

    peft compares ends of names. A layer whose name ends those of others, as `proj_out`
    of Flux does, gets a key that stands for its whole name.

    Args:
        paths (iterable of `str`): the layers.

    Returns:
        `dict[str, str]`: path -> key.
    """
    paths = list(paths)
    ends = {path[i + 1 :] for path in paths for i, letter in enumerate(path) if letter == "."}
    return {path: f"^{re.escape(path)}" if path in ends else path for path in paths}


def peft_config(layers: Mapping[str, LoraLayer]) -> Any:
    """Make the config of peft for layers.

    Args:
        layers: name in the network -> its LoRA.

    Returns:
        `LoraConfig`: with a rank and an alpha for each layer.
    """
    from peft import LoraConfig

    def whole(alpha: float) -> Any:
        return int(alpha) if alpha == int(alpha) else alpha  # peft takes both

    keys = pattern_keys(layers)
    ranks = {keys[path]: layer.rank for path, layer in layers.items()}
    alphas = {keys[path]: layer.alpha for path, layer in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return LoraConfig(
        r=rank,
        lora_alpha=whole(alpha),
        target_modules=sorted(layers),
        rank_pattern={path: value for path, value in ranks.items() if value != rank},
        alpha_pattern={path: whole(value) for path, value in alphas.items() if value != alpha},
        use_dora=any(layer.magnitude is not None for layer in layers.values()),
    )


def peft_tensors(name: str, layer: LoraLayer) -> dict[str, Tensor]:
    """Name the tensors of a layer's LoRA as peft does.

    Args:
        name (`str`): of the layer.
        layer (`LoraLayer`): its LoRA.

    Returns:
        `dict[str, Tensor]`: name -> tensor.
    """
    tensors = {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.up}
    if layer.magnitude is not None:
        tensors[f"{name}.lora_magnitude_vector"] = layer.magnitude
    return tensors


def _by_component(lora: LoraWeights) -> dict[str, dict[str, LoraLayer]]:
    components: dict[str, dict[str, LoraLayer]] = {}
    for name, layer in lora.layers.items():
        component, _, path = name.partition(".")
        components.setdefault(component, {})[path] = layer
    return components


def _to_peft(lora: LoraWeights) -> tuple[dict[str, Tensor], Any]:
    components = _by_component(lora)
    if len(components) > 1:
        encoder = next(name for name in components if name in _TEXT_ENCODERS)
        raise UserError(
            f"--format: a peft folder holds the LoRA of one network, and this one has a part for "
            f"{encoder}; write diffusers, kohya or comfy"
        )
    layers = next(iter(components.values()))
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        tensors |= peft_tensors(f"{_PEFT_PREFIX}{path}", layer)
    return tensors, peft_config(layers)


def _to_diffusers(lora: LoraWeights) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for component, layers in _by_component(lora).items():
        for path, layer in layers.items():
            tensors |= peft_tensors(f"{component}.{path}", layer)
        # CLIP's text encoder has this prefix in some versions of transformers only.
        config = peft_config(
            {path.removeprefix("text_model."): layer for path, layer in layers.items()}
        ).to_dict()
        metadata |= {f"{component}.{key}": value for key, value in config.items()}
    text = json.dumps(metadata, indent=2, sort_keys=True, default=sorted)
    return tensors, {_METADATA: text}
