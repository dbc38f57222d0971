"""LoRAs on a diffusers pipeline: loaded with what they hold checked, listed and restored with their weights."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from .exceptions import UserError
from .weight_files import (
    TEXT_PREFIXES,
    UNSUPPORTED,
    LoraContent,
    classify,
    could_be_hub_id,
    explained,
    fetch_lora_file,
    find_lora_file,
    loading_errors,
    read_header,
    what_is_wrong,
)

NETWORKS = ("unet", "transformer")


def denoiser(pipe: Any) -> Any:
    """The pipeline's UNet or transformer."""
    return next(getattr(pipe, n) for n in NETWORKS if isinstance(getattr(pipe, n, None), torch.nn.Module))


def active_adapters(network: Any) -> dict[str, float]:
    """The LoRAs that are active on a network, with the weights that they were set to, relative to their own alpha / r."""
    from peft.tuners.lora import LoraLayer

    weights: dict[str, float] = {}
    for layer in network.modules():
        if not isinstance(layer, LoraLayer) or layer.disable_adapters:
            continue
        for name in layer.active_adapters:
            if name in layer.scaling and name not in weights:
                rank = layer.r[name]
                root = _is_rank_stabilised(network, layer, name)
                weights[name] = layer.scaling[name] / (layer.lora_alpha[name] / (rank**0.5 if root else rank))
    return weights


def _is_rank_stabilised(network: Any, layer: Any, name: str) -> bool:
    flags = getattr(layer, "use_rslora", None)
    if isinstance(flags, Mapping) and name in flags:
        return bool(flags[name])
    config = getattr(network, "peft_config", {}).get(name)
    return bool(getattr(config, "use_rslora", False))


def adapter_state(pipe: Any) -> dict[str, dict[str, float]]:
    """Adapter -> component -> weight, of all adapters that are active on a pipeline."""
    state: dict[str, dict[str, float]] = {}
    for component, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            for name, weight in active_adapters(module).items():
                state.setdefault(name, {})[component] = weight
    return state


def set_adapter_state(pipe: Any, state: Mapping[str, Mapping[str, float]]) -> None:
    """Makes exactly these adapters active, with these weights."""
    if state:
        pipe.set_adapters(list(state), [dict(weights) for weights in state.values()])


def unwrapped(module: Any) -> Any:
    """The module that `torch.compile` wrapped, or the module itself."""
    return module._orig_mod if hasattr(module, "_orig_mod") else module


def load_lora(pipe: Any, weights: Any, name: str, role: str, *, denoiser_only: bool = False, refused: Sequence[str] = ()) -> None:
    """Loads a LoRA (folder, file or Hub id) as an adapter of the pipeline.

    Args:
        role: how messages name it, e.g. ``negative`` or ``--lora``.
        denoiser_only: leave a part for text encoders out, with a warning.
        refused: kinds of `weight_files.LoraContent` that the caller cannot use.

    Raises:
        UserError: it is no LoRA of this model, is damaged, or holds weights of a kind that cannot be used; nothing is then loaded.
    """
    network = denoiser(pipe)
    if hasattr(network, "_orig_mod"):
        raise UserError(f"{role}: a LoRA cannot be added to a network that torch.compile wrapped; compile it afterwards")
    place = Path(weights).expanduser()
    if place.exists():
        file = find_lora_file(place, role)
    elif place.suffix == ".safetensors" or not could_be_hub_id(str(weights)):
        raise UserError(f"{role}: there is no file or folder {str(weights)!r}, and it is no Hub id of the form 'user/name'")
    else:
        file = fetch_lora_file(str(weights), role)
    content = _checked_lora(file, role, refused)
    before = set(getattr(network, "peft_config", {}))
    try:
        with ExitStack() as stack:
            if content is not None and (content.compiled or (denoiser_only and content.text_encoders)):
                file = stack.enter_context(_rewritten(file, denoiser_only))
            stack.enter_context(_quiet())
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name, use_safetensors=True)
        if name not in getattr(network, "peft_config", {}):
            raise UserError(f"{role}: {str(weights)!r} holds no LoRA for the denoiser of this model")
        _check_loaded(network, name, content, role, weights)
    except loading_errors() as error:
        for component in pipe.components.values():
            if name in getattr(component, "peft_config", {}) and name not in before:
                with suppress(Exception):  # an adapter that is half there
                    pipe.delete_adapters(name)
                break
        if isinstance(error, UserError):
            raise
        raise UserError(f"{role}: {str(weights)!r} holds no LoRA for this model ({explained(error)[:200]})") from error
    if denoiser_only and content is not None and content.text_encoders:
        warnings.warn(
            f"{role}: {str(weights)!r} has a part for text encoders, which is left out: the prompt is encoded once for both branches",
            stacklevel=3,
        )


def _checked_lora(file: Path, role: str, refused: Sequence[str]) -> LoraContent | None:
    """What a local LoRA file holds; None for a file of torch.save, which diffusers reads without running code."""
    reason = what_is_wrong(file)
    if reason is not None:
        raise UserError(f"{role}: {str(file)!r} {reason}")
    if file.suffix != ".safetensors":
        return None
    content = classify(read_header(file).shapes)
    kinds = [kind for kind in content.kinds if kind in (*UNSUPPORTED, *refused)]
    if kinds:
        remedy = "fuse it into the model first" if kinds[0] in ("DoRA", "LoRA biases") else "save it as a plain LoRA"
        raise UserError(f"{role}: {str(file)!r} holds {', '.join(kinds)}, which cannot be used here; {remedy}")
    if "text encoder" in refused and content.text_encoders:
        raise UserError(
            f"{role}: {str(file)!r} has a part for text encoders ({content.text_encoders} layers), which cannot be used here; fuse it first"
        )
    if content.unpaired is not None:
        raise UserError(f"{role}: {str(file)!r} has only one of the two matrices of {content.unpaired}; the file is incomplete")
    _check_values(file, role)
    return content


def _check_values(file: Path, role: str) -> None:
    """Raises `UserError` for values that are not finite, and for kohya's alphas where they differ, which diffusers reads wrongly."""
    from safetensors import safe_open

    alphas: set[float] = set()
    without = False
    with safe_open(file, "pt") as opened:
        names = set(opened.keys())
        for name in sorted(names):
            tensor = opened.get_tensor(name)
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise UserError(
                    f"{role}: {str(file)!r} holds values that are not finite, in {name}; it was saved by a broken run"
                )
            if name.endswith(".alpha") and tensor.numel() == 1:
                alphas.add(float(tensor))
            without |= name.endswith(".lora_down.weight") and name.replace(".lora_down.weight", ".alpha") not in names
    if len(alphas) > 1 or (alphas and without):
        raise UserError(
            f"{role}: the layers of {str(file)!r} have different alphas, which diffusers would mix up; save it with one alpha for all layers"
        )


def _check_loaded(network: Any, name: str, content: LoraContent | None, role: str, weights: Any) -> None:
    """Raises `UserError` when a part of the file did not arrive in the network."""
    from peft.tuners.lora import LoraLayer

    layers = [layer for layer in network.modules() if isinstance(layer, LoraLayer) and name in layer.lora_A]
    if any(
        parameter.is_meta
        for layer in layers
        for parameter in (*layer.lora_A[name].parameters(), *layer.lora_B[name].parameters())
    ):
        raise UserError(f"{role}: {str(weights)!r} lacks weights of layers that it names; the file is incomplete")
    if content is not None and content.layers > len(layers):
        raise UserError(
            f"{role}: {str(weights)!r} has {content.layers} layers for the denoiser, of which this model has {len(layers)}; it belongs to "
            "another model"
        )


@contextmanager
def _rewritten(file: Path, denoiser_only: bool) -> Iterator[Path]:
    """A copy of a LoRA file without `_orig_mod` in its names and, if asked for, without text encoders."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder, safe_open(file, "pt") as opened:
        names = [name for name in opened.keys() if not (denoiser_only and name.startswith(TEXT_PREFIXES))]  # noqa: SIM118
        tensors = {name.replace("_orig_mod.", ""): opened.get_tensor(name) for name in names}
        metadata = {key: value.replace("_orig_mod.", "") for key, value in (opened.metadata() or {}).items()}
        target = Path(folder) / "pytorch_lora_weights.safetensors"
        save_file(tensors, target, metadata=metadata or None)
        yield target


@contextmanager
def _quiet() -> Iterator[None]:
    """diffusers' warnings about parts that a LoRA does not have are no news; parts that are lost are errors here."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
