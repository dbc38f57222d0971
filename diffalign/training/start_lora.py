"""Training that goes on from a LoRA, such as one of a fine-tuning before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.nn import Module

from ..backbones import Backbone
from ..backbones.lora_family import check_lora_family
from ..backbones.lora_formats import LoraLayer, peft_config, peft_tensors, read_lora
from ..errors import ConfigError
from ..runtime.hashing import sampled_hash
from ..runtime.weight_files import fetch_lora_file, find_lora_file

if TYPE_CHECKING:
    from peft import LoraConfig

_FIELD = "lora.start_from"


@dataclass(frozen=True)
class StartLora:
    """The LoRA that a run starts from.

    Attributes:
        place (`str`): how the user named it.
        layers: name in the denoiser -> its LoRA.
        config (`LoraConfig`): of peft, for these layers.
        fingerprint (`str`): hash of the file.
    """

    place: str
    layers: Mapping[str, LoraLayer]
    config: LoraConfig
    fingerprint: str


def read_start_lora(place: str | Path, backbone: Backbone, dropout: float) -> StartLora:
    """Read the LoRA of a file, a folder or the Hub, in any format of `read_lora`.

    Args:
        place (`str` or `Path`): where it lies.
        backbone (`Backbone`): The model.
        dropout (`float`): On the input of the adapters.

    Returns:
        `StartLora`: Its weights and their config.

    Raises:
        UserError: It cannot be read, or belongs to another family.
        ConfigError: It has a part for text encoders, which are not trained.
    """
    path, pipeline_class = Path(place).expanduser(), backbone.source.pipeline_class_name
    file = find_lora_file(path, _FIELD) if path.exists() else fetch_lora_file(str(place), _FIELD)
    lora = read_lora(file, _FIELD, pipeline_class)
    check_lora_family(
        (f"{name}.lora_A.weight" for name in lora.layers), pipeline_class, _FIELD, str(place)
    )
    network = f"{backbone.network_name}."
    for name in lora.layers:
        if not name.startswith(network):
            raise ConfigError(
                _FIELD,
                f"{str(place)!r} has the layer {name!r}, and only the {backbone.network_name} is "
                "trained; fuse that part into the model first",
            )
    layers = {name.removeprefix(network): layer for name, layer in lora.layers.items()}
    config = peft_config(layers)
    config.lora_dropout = dropout
    return StartLora(str(place), layers, config, sampled_hash(file))


def put_start_lora(network: Module, start: StartLora) -> None:
    """Give the adapter of a network the weights of the LoRA.

    Args:
        network: With an adapter by the LoRA's config.
        start (`StartLora`): The LoRA.

    Raises:
        ConfigError: The network lacks one of its layers, or has one of another size.
    """
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    tensors: dict[str, Any] = {}
    for path, layer in start.layers.items():
        tensors |= peft_tensors(path, layer)
    there = get_peft_model_state_dict(network)
    for name, tensor in tensors.items():
        if name not in there or there[name].shape != tensor.shape:
            size = f" of size {tuple(tensor.shape)}" if name in there else ""
            raise ConfigError(
                _FIELD,
                f"{start.place!r} has {name}{size}, which this model lacks; it belongs to another "
                "model",
            )
    set_peft_model_state_dict(network, tensors)
