"""LoRAs on a diffusers pipeline.

They are checked before they are loaded, listed with their weights, and taken off again.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..errors import UserError, one_line
from ..runtime.distributed import whole
from ..runtime.weight_files import (
    TEXT_PREFIXES,
    UNSUPPORTED,
    LoraContent,
    classify,
    could_be_hub_id,
    fetch_lora_file,
    find_lora_file,
    loading_errors,
    read_header,
    what_is_wrong,
)
from .lora_family import check_lora_family
from .lora_formats import default_file, original_format, read_lora, write_lora

NETWORKS = ("unet", "transformer")


def denoiser(pipe: Any) -> Any:
    """Return the pipeline's UNet or transformer."""
    return next(
        getattr(pipe, n) for n in NETWORKS if isinstance(getattr(pipe, n, None), torch.nn.Module)
    )


def active_adapters(network: Module) -> dict[str, float]:
    """List the LoRAs that are active on a network, with their weights.

    Args:
        network (`torch.nn.Module`): with adapters of peft.

    Returns:
        `dict[str, float]`: adapter -> weight, relative to its own alpha / r.
    """
    from peft.tuners.lora import LoraLayer

    weights: dict[str, float] = {}
    for layer in network.modules():
        if not isinstance(layer, LoraLayer) or layer.disable_adapters:
            continue
        for name in layer.active_adapters:
            if name in layer.scaling and name not in weights:
                rank = layer.r[name]
                root = _is_rank_stabilised(network, layer, name)
                weights[name] = layer.scaling[name] / (
                    layer.lora_alpha[name] / (rank**0.5 if root else rank)
                )
    return weights


def _is_rank_stabilised(network: Module, layer: Any, name: str) -> bool:
    flags = getattr(layer, "use_rslora", None)
    if isinstance(flags, Mapping) and name in flags:
        return bool(flags[name])
    config = getattr(network, "peft_config", {}).get(name)
    return bool(getattr(config, "use_rslora", False))


def adapter_state(pipe: Any) -> dict[str, dict[str, float]]:
    """List all adapters that are active on a pipeline, with their weights.

    Returns:
        `dict[str, dict[str, float]]`: adapter -> component -> weight.
    """
    state: dict[str, dict[str, float]] = {}
    for component, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            for name, weight in active_adapters(module).items():
                state.setdefault(name, {})[component] = weight
    return state


def fixed_adapters(network: Module) -> dict[str, str]:
    """List the active adapters whose effect is not proportional to their weight.

    They are DoRA and other kinds than LoRA.

    Returns:
        `dict[str, str]`: adapter -> what it is, in words.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    kinds: dict[str, str] = {}
    for layer in network.modules():
        if isinstance(layer, LoraLayer) and not layer.disable_adapters:
            for name in layer.active_adapters:
                if name in layer.lora_variant:
                    kinds[name] = (
                        "a DoRA"
                        if "Dora" in type(layer.lora_variant[name]).__name__
                        else "a variant of LoRA"
                    )
        elif (
            isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper))
            and not layer.disable_adapters
        ):
            trained = isinstance(layer, AuxiliaryTrainingWrapper)
            for name in layer.active_adapters:
                kinds[name] = (
                    "a whole layer"
                    if trained
                    else f"a {type(layer).__mro__[1].__name__.removesuffix('Layer')}"
                )
    return kinds


def check_not_merged(network: Module, role: str) -> None:
    """Refuse a network with adapters that are fused into its weights and still there.

    peft then ignores every other adapter without a word.

    Args:
        network (`torch.nn.Module`): with adapters of peft.
        role (`str`): how the message names the LoRA that would be added.

    Raises:
        UserError: names the adapter.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)]
    merged = {name for layer in layers for name in layer.merged_adapters}
    if merged:
        raise UserError(
            f"{role}: the adapter {min(merged)!r} is fused into the pipeline's weights, so that no "
            "other has an effect; call "
            "pipe.unload_lora_weights() first, which keeps the fused weights"
        )


def plain_state(network: Module) -> dict[str, torch.Tensor]:
    """Read the weights of a network without its adapters.

    Returns:
        `dict[str, Tensor]`: under the names that they have without adapters.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrapped = [path for path, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)]
    state = {}
    for name, value in network.state_dict().items():
        path = next((path for path in wrapped if name.startswith(f"{path}.")), None)
        if path is None:
            state[name] = value
        elif name.startswith(f"{path}.base_layer."):
            state[f"{path}.{name.removeprefix(f'{path}.base_layer.')}"] = value
    return state


def strip_adapters(network: Module) -> Any:
    """Take all adapters off a network, in place.

    Returns:
        `torch.nn.Module`: the same network.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, layer in list(network.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            _unwrap(network, path, layer)
    for name in _PEFT_ATTRIBUTES:
        if name in vars(network):
            delattr(network, name)
    return network


def _unwrap(network: Module, path: str, layer: Any) -> None:
    parent, _, child = path.rpartition(".")
    setattr(network.get_submodule(parent), child, layer.get_base_layer())


_PEFT_ATTRIBUTES = ("peft_config", "_hf_peft_config_loaded")


@contextmanager
def adapters_kept(pipe: Any) -> Iterator[None]:
    """Restore the adapters of a pipeline after a block, also after an exception.

    Adapters that the block adds are gone afterwards. The others are active and scaled
    as before. Layers that were wrapped for the block's adapters alone are unwrapped, so
    that weights have their names back.

    Args:
        pipe: of diffusers.
    """
    snapshots = _snapshots(pipe)
    try:
        yield
    finally:
        for snapshot in snapshots:
            snapshot.restore()


def _snapshots(pipe: Any) -> list[_AdapterSnapshot]:
    return [
        _AdapterSnapshot(part)
        for part in pipe.components.values()
        if isinstance(part, torch.nn.Module)
    ]


class _AdapterSnapshot:
    """Remembers the adapters of a network.

    These are which it has, which are active, their scale, and which parameters train.
    """

    def __init__(self, network: Any) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        # Held, since `restore` can run while Python ends, when nothing can be imported.
        self.wrapper = BaseTunerLayer
        self.network = network
        self.names = set(getattr(network, "peft_config", {}))
        self.attributes = {name: vars(network).get(name) for name in _PEFT_ATTRIBUTES}
        self.layers: list[tuple[Any, dict[str, Any]]] = []
        self.trained = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
        for layer in network.modules():
            if isinstance(layer, BaseTunerLayer):
                values: dict[str, Any] = {
                    "_active_adapter": layer._active_adapter,
                    "_disable_adapters": layer._disable_adapters,
                }
                scaling = getattr(layer, "scaling", None)
                if isinstance(scaling, dict):
                    values["scaling"] = dict(scaling)
                self.layers.append((layer, values))

    def restore(self) -> None:
        """Bring the network back to the state of the snapshot."""
        added = [
            name for name in getattr(self.network, "peft_config", {}) if name not in self.names
        ]
        known = {id(layer) for layer, _ in self.layers}
        for path, layer in list(self.network.named_modules()):
            if not isinstance(layer, self.wrapper):
                continue
            if id(layer) in known:
                for name in added:
                    layer.delete_adapter(name)
            else:
                _unwrap(self.network, path, layer)
        for name in added:
            self.network.peft_config.pop(name)
        for name, value in self.attributes.items():
            if value is not None:
                setattr(self.network, name, value)
            elif name in vars(self.network):
                delattr(self.network, name)
        for layer, values in self.layers:
            for name, value in values.items():
                setattr(layer, name, value)
        for parameter, trains in self.trained:
            parameter.requires_grad_(trains)


def unwrapped(module: Any) -> Any:
    """Return the module that `torch.compile` wrapped, or the module itself."""
    return module._orig_mod if hasattr(module, "_orig_mod") else module


def load_lora(
    pipe: Any,
    weights: Any,
    name: str,
    role: str,
    *,
    denoiser_only: bool = False,
    refused: Sequence[str] = (),
) -> None:
    """Load a LoRA as an adapter of a pipeline.

    Args:
        pipe: of diffusers.
        weights (`str` or `Path`): folder, file or Hub id.
        name (`str`): of the adapter.
        role (`str`): how messages name it, such as ``negative`` or ``--lora``.
        denoiser_only (`bool`, *optional*, defaults to `False`): leave out a part for
            text encoders, with a warning.
        refused (sequence of `str`, *optional*): kinds of `weight_files.LoraContent`
            that the caller cannot use.

    Raises:
        UserError: it is no LoRA of this model, is damaged, or holds weights of a kind
            that cannot be used. Nothing is loaded then.
    """
    network = denoiser(pipe)
    if hasattr(network, "_orig_mod"):
        raise UserError(
            f"{role}: a LoRA cannot be added to a network that torch.compile wrapped; compile it "
            "afterwards"
        )
    check_not_merged(network, role)
    place = Path(weights).expanduser()
    if place.exists():
        file = find_lora_file(place, role)
    elif place.suffix == ".safetensors" or not could_be_hub_id(str(weights)):
        raise UserError(
            f"{role}: there is no file or folder {str(weights)!r}, and it is no Hub id of the "
            "form 'user/name'"
        )
    else:
        file = fetch_lora_file(str(weights), role)
    before = _snapshots(pipe)
    try:
        with ExitStack() as stack:
            file = stack.enter_context(_diffusers_file(file, role, type(pipe).__name__))
            content = _checked_lora(file, role, refused, type(pipe).__name__)
            if content is not None and (
                content.compiled or (denoiser_only and content.text_encoders)
            ):
                file = stack.enter_context(_rewritten(file, denoiser_only))
            stack.enter_context(_quiet())
            pipe.load_lora_weights(
                str(file.parent), weight_name=file.name, adapter_name=name, use_safetensors=True
            )
            if name not in getattr(network, "peft_config", {}):
                raise UserError(
                    f"{role}: {str(weights)!r} holds no LoRA for the denoiser of this model"
                )
            _check_loaded(network, name, content, role, weights)
    except BaseException as error:
        for snapshot in before:
            snapshot.restore()
        if isinstance(error, UserError) or not isinstance(error, loading_errors()):
            raise
        raise UserError(
            f"{role}: {str(weights)!r} holds no LoRA for this model ({one_line(error)})"
        ) from error
    if denoiser_only and content is not None and content.text_encoders:
        warnings.warn(
            f"{role}: {str(weights)!r} has a part for text encoders, which is left out: the "
            "prompt is encoded once for both branches",
            stacklevel=3,
        )


@contextmanager
def _diffusers_file(file: Path, role: str, pipeline_class: str) -> Iterator[Path]:
    """Rewrite a file of peft, kohya's scripts or ComfyUI with diffusers' names.

    diffusers' own converters mix up alphas that differ, drop DoRA scales, and know
    fewer families. A file that our tables do not know is left to them.
    """
    if file.suffix != ".safetensors" or what_is_wrong(file) is not None:
        yield file
        return
    header = read_header(file)
    if classify(header.shapes).unpaired is not None or not _is_foreign(file, header.shapes):
        yield file
        return
    try:
        lora = read_lora(file, role, pipeline_class)
    except UserError:
        yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        target = default_file(Path(folder), "diffusers")
        write_lora(lora, target, "diffusers")
        yield target


def _is_foreign(file: Path, names: Iterable[str]) -> bool:
    peft = file.with_name("adapter_config.json").is_file() and not file.name.startswith("pytorch_")
    return peft or original_format(names) is not None


def _checked_lora(
    file: Path, role: str, refused: Sequence[str], pipeline_class: str
) -> LoraContent | None:
    """Read what a local LoRA file holds.

    None is for a file of torch.save, which diffusers reads without running code.
    """
    reason = what_is_wrong(file)
    if reason is not None:
        raise UserError(f"{role}: {str(file)!r} {reason}")
    if file.suffix != ".safetensors":
        return None
    names = read_header(file).shapes
    content = classify(names)
    kinds = [kind for kind in content.kinds if kind in (*UNSUPPORTED, *refused)]
    if kinds:
        remedy = (
            "fuse it into the model first"
            if kinds[0] in ("DoRA", "LoRA biases")
            else "save it as a plain LoRA"
        )
        raise UserError(
            f"{role}: {str(file)!r} holds {', '.join(kinds)}, which cannot be used here; {remedy}"
        )
    if "text encoder" in refused and content.text_encoders:
        raise UserError(
            f"{role}: {str(file)!r} has a part for text encoders ({content.text_encoders} "
            "layers), which cannot be used here; fuse it first"
        )
    if content.unpaired is not None:
        raise UserError(
            f"{role}: {str(file)!r} has only one of the two matrices of {content.unpaired}; the "
            "file is incomplete"
        )
    _check_values(file, role)
    check_lora_family(names, pipeline_class, role, str(file))
    return content


def _check_values(file: Path, role: str) -> None:
    """Refuse values that are not finite, and kohya's alphas where they differ.

    diffusers would read such alphas wrongly.
    """
    from safetensors import safe_open

    alphas: set[float] = set()
    without = False
    with safe_open(file, "pt") as opened:
        names = set(opened.keys())
        for name in sorted(names):
            tensor = opened.get_tensor(name)
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise UserError(
                    f"{role}: {str(file)!r} holds values that are not finite, in {name}; it was "
                    "saved by a broken run"
                )
            if name.endswith(".alpha") and tensor.numel() == 1:
                alphas.add(float(tensor))
            without |= (
                name.endswith(".lora_down.weight")
                and name.replace(".lora_down.weight", ".alpha") not in names
            )
    if len(alphas) > 1 or (alphas and without):
        raise UserError(
            f"{role}: the layers of {str(file)!r} have different alphas, which diffusers would "
            "mix up; save it with one alpha for all layers"
        )


def _check_loaded(
    network: Module, name: str, content: LoraContent | None, role: str, weights: Any
) -> None:
    """Refuse a file of which a part did not arrive in the network."""
    from peft.tuners.lora import LoraLayer

    layers = [
        layer
        for layer in network.modules()
        if isinstance(layer, LoraLayer) and name in layer.lora_A
    ]
    if any(
        parameter.is_meta
        for layer in layers
        for parameter in (*layer.lora_A[name].parameters(), *layer.lora_B[name].parameters())
    ):
        raise UserError(
            f"{role}: {str(weights)!r} lacks weights of layers that it names; the file is "
            "incomplete"
        )
    if content is not None and content.layers > len(layers):
        raise UserError(
            f"{role}: {str(weights)!r} has {content.layers} layers for the denoiser, of which "
            f"this model has {len(layers)}; it belongs to "
            "another model"
        )


@contextmanager
def _rewritten(file: Path, denoiser_only: bool) -> Iterator[Path]:
    """Copy a LoRA file without `_orig_mod` in its names.

    If asked for, the copy has no text encoders.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder, safe_open(file, "pt") as opened:
        names = list(opened.keys())
        if denoiser_only:
            names = [name for name in names if not name.startswith(TEXT_PREFIXES)]
        tensors = {name.replace("_orig_mod.", ""): opened.get_tensor(name) for name in names}
        metadata = {
            key: value.replace("_orig_mod.", "") for key, value in (opened.metadata() or {}).items()
        }
        target = Path(folder) / "pytorch_lora_weights.safetensors"
        save_file(tensors, target, metadata=metadata or None)
        yield target


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence diffusers' warnings about parts that a LoRA does not have.

    Parts that get lost are errors here.
    """
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def lora_state(network: Module) -> dict[str, Tensor]:
    """Read the weights of a network's adapter, with every key in peft's form.

    The form is ``...lora_A.weight``. diffusers' `convert_state_dict_to_diffusers`
    renames attention layers only, and its loader judges a file by one key. Of a file in
    both forms it would silently drop the renamed half. Sharded weights are gathered, so
    all processes must call this.
    """
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(network)
    return {name: whole(tensor) for name, tensor in state.items()}
