"""Merge LoRAs or full weights by weighted sums, as `diffalign merge` does.

    theta = base + sum_i w_i (theta_i - base)

With weights that sum to 1 this is interpolation, or a reward soup of several runs (Rame
et al. 2023, arXiv 2306.04488). LoRAs are merged exactly: the sum of low-rank updates
has the sum of their ranks. The result is plain diffusers weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backbones.lora_formats import pattern_keys
from ..errors import UserError
from ..runtime.files import replacing_folder
from ..shapes.models import embedded_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..backbones.base import Backbone


def merge_states(
    base: Mapping[str, Tensor], others: Sequence[Mapping[str, Tensor]], weights: Sequence[float]
) -> dict[str, Tensor]:
    """Return base + sum_i w_i (theta_i - base), summed in float32 or wider.

    Args:
        base (`Mapping[str, Tensor]`): Name -> weight.
        others (`Sequence[Mapping[str, Tensor]]`): N mappings with the same names and
            shapes.
        weights (`Sequence[float]`): N factors.

    Returns:
        `dict[str, Tensor]` in the base's dtypes.

    Raises:
        UserError: Names or shapes differ.
    """
    import torch

    from .guidance import check_same_states

    for number, other in enumerate(others):
        check_same_states(base, other, f"--inputs, number {number + 1}", "the base's")
    merged = {}
    for name, value in base.items():
        if not value.is_floating_point():
            merged[name] = value
            continue
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        total = wide.clone()
        for weight, other in zip(weights, others, strict=True):
            total += weight * (other[name].to(wide) - wide)
        merged[name] = total.to(value.dtype)
    return merged


def is_pipeline(name: str) -> bool:
    """Tell whether an input is a whole pipeline, and not a LoRA.

    Args:
        name (`str`): Folder, file or Hub id.
    """
    if embedded_name(name) is not None:
        return True
    if Path(name).exists():
        return (Path(name) / "model_index.json").is_file()
    from ..backbones.loading import ModelSource

    try:
        ModelSource(name)
    except UserError:
        return False
    return True


def merge_loras(
    model: str, loras: Sequence[str], weights: Sequence[float], output_dir: Path
) -> None:
    """Write the exact weighted sum of LoRAs as `pytorch_lora_weights.safetensors`.

    Args:
        model (`str`): The model that they belong to.
        loras (`Sequence[str]`): N LoRAs.
        weights (`Sequence[float]`): N factors.
        output_dir (`Path`): Where the file goes.

    Raises:
        UserError: One of them is no LoRA of the model.
    """
    import torch

    from ..backbones import load_backbone
    from ..backbones.lora import load_lora, lora_state

    backbone = load_backbone(model)
    backbone.place(torch.device("cpu"), torch.float32)
    network = backbone.load_network(torch.float32)
    pipe = backbone.pipeline(with_vae=False, network=network)
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for lora, weight in zip(loras, weights, strict=True):
        load_lora(pipe, lora, "input", "--inputs", refused=("DoRA", "LoRA biases", "text encoder"))
        for name, (down, up) in _factors(network, "input").items():
            parts.setdefault(name, []).append((down, weight * up))
        pipe.delete_adapters(["input"])
    factors = {
        name: (torch.cat([d for d, _ in each], 0), torch.cat([u for _, u in each], 1))
        for name, each in parts.items()
    }
    _put(network, factors)
    state = lora_state(network)
    with replacing_folder(output_dir) as temporary:
        backbone.save_lora(str(temporary), network, state)


def _factors(network: torch.nn.Module, adapter: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return layer -> (down, up) of an adapter, with alpha / r multiplied into up."""
    from peft.tuners.lora import LoraLayer

    factors = {}
    for name, layer in network.named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.lora_A:
            lora_a: Any = layer.lora_A[adapter]
            lora_b: Any = layer.lora_B[adapter]
            scale = layer.scaling[adapter]
            factors[name] = (
                lora_a.weight.detach().clone(),
                scale * lora_b.weight.detach(),
            )
    return factors


def _put(network: Any, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Add an adapter `default` with these factors, its alpha equal to its rank."""
    from peft import LoraConfig

    keys = pattern_keys(factors)
    ranks = {keys[name]: len(down) for name, (down, _) in factors.items()}
    most = max(ranks.values())
    pattern = {name: rank for name, rank in ranks.items() if rank != most}
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        target_modules=list(factors),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
    )
    network.add_adapter(config, adapter_name="default")
    for name, (down, up) in factors.items():
        layer = network.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(down)
        layer.lora_B["default"].weight.data.copy_(up)


def merge_pipelines(
    model: str, inputs: Sequence[str], weights: Sequence[float], output_dir: Path
) -> list[str]:
    """Write the weighted sum of full weights as a pipeline.

    Args:
        model (`str`): The base.
        inputs (`Sequence[str]`): N pipelines of its family.
        weights (`Sequence[float]`): N factors.
        output_dir (`Path`): Where the pipeline goes.

    Returns:
        `list[str]`: What was not merged, in words.

    Raises:
        UserError: A pipeline of another family, or a sum that is not finite.
    """
    import torch

    from ..backbones import load_backbone

    backbone = load_backbone(model)
    backbone.place(torch.device("cpu"), torch.float32)
    network = backbone.load_network(torch.float32)
    states, notes = [], []
    for name in inputs:
        other = load_backbone(name)
        if other.network_name != backbone.network_name:
            raise UserError(
                f"--inputs: {name!r} has a {other.network_name}, the base a "
                f"{backbone.network_name}; merge weights of one model family"
            )
        kinds = other.schedule.prediction_type, backbone.schedule.prediction_type
        if kinds[0] != kinds[1]:
            raise UserError(
                f"--inputs: {name!r} predicts {kinds[0]}, the base {kinds[1]}; merge weights of "
                "one model family"
            )
        other.place(torch.device("cpu"), torch.float32)
        states.append(other.load_network(torch.float32).state_dict())
        for part in ("vae", *backbone.text_encoder_names):
            if _differs(backbone, other, part):
                notes.append(
                    f"WARNING: the {part} of {name} is another one than the base's and is not "
                    "merged; the result has the base's"
                )
    merged = merge_states(network.state_dict(), states, weights)
    for name, value in merged.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(
                f"--inputs: the sum is not finite in {name}; one of the inputs was saved by a "
                "broken run"
            )
    network.load_state_dict(merged)
    with replacing_folder(output_dir) as temporary:
        backbone.pipeline(network=network).save_pretrained(temporary)
    return notes


def _differs(first: Backbone, second: Backbone, name: str) -> bool:
    """Whether a component has other weights, beyond the rounding of half precision."""
    import torch

    if not (first.source.has(name) and second.source.has(name)):
        return first.source.has(name) != second.source.has(name)
    if first.source.fingerprint(name) == second.source.fingerprint(name):
        return False
    states = [b.source.load(name, torch.float32).state_dict() for b in (first, second)]
    if {n: v.shape for n, v in states[0].items()} != {n: v.shape for n, v in states[1].items()}:
        return True
    norm = sum(float(v.double().square().sum()) for v in states[0].values())
    change = sum(
        float((v.double() - states[1][n].double()).square().sum()) for n, v in states[0].items()
    )
    return change > 1e-6 * norm
