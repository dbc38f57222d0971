"""The reference models of a run. A reference is called like the network, without gradient and without dropout."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..backbones import Backbone
from ..backbones.lora import unwrapped
from ..config.yaml_text import shown
from ..errors import ConfigError, UserError


class Reference(Protocol):
    """Anything that predicts like the starting weights."""

    description: str

    def predict(
        self, backbone: Backbone, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]
    ) -> Tensor: ...


def without_dropout(network: Any) -> Any:
    """The network in the policy's mode, but without dropout.

    Not `eval()`: diffusers' residual blocks choose memory layouts by the mode, and other layouts round differently, so that
    policy and reference would differ where they are equal.
    """
    network.train()
    for module in network.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.eval()
    return network


class DropoutOff:
    """Switches the dropout of a network off for a prediction.

    Args:
        network: complete: layers that are added later are not known.
    """

    def __init__(self, network: Any) -> None:
        self.layers = [
            module
            for module in network.modules()
            if isinstance(module, torch.nn.modules.dropout._DropoutNd)
        ]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """No dropout while the block runs."""
        active = [layer for layer in self.layers if layer.training]
        for layer in active:
            layer.eval()
        try:
            yield
        finally:
            for layer in active:
                layer.train()


class AdapterOffReference:
    """The same network with its LoRA switched off: no second model in memory."""

    description = "adapter-off (the base weights under the LoRA)"

    def __init__(self, network: Any) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.network, self.dropout_off = network, DropoutOff(network)
        self.layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        for layer in self.layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.enable_adapters(True)

    def predict(
        self, backbone: Backbone, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        with torch.no_grad(), self.adapters_off(), self.dropout_off():
            return backbone.predict(self.network, noisy, times, condition)


class SnapshotReference:
    """The policy as it was at some moment: its trainable weights are kept, and put in place for a prediction.

    Under LoRA that costs the adapter's size, under full fine-tuning as much as a frozen copy.
    """

    description = "the policy at the beginning of the round (iterated)"

    def __init__(self, network: Any) -> None:
        self.network, self.dropout_off = network, DropoutOff(network)
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.weights: dict[str, Tensor] = {}
        self.take()

    def take(self) -> None:
        """Remembers the weights of now."""
        self.weights = {name: p.detach().clone() for name, p in self.parameters.items()}

    @contextmanager
    def in_place(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """The network under other weights; pointers are exchanged, nothing is copied."""
        own = {name: p.data for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            p.data = weights[name]
        try:
            yield
        finally:
            for name, p in self.parameters.items():
                p.data = own[name]

    def predict(
        self, backbone: Backbone, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        with torch.no_grad(), self.in_place(self.weights), self.dropout_off():
            return backbone.predict(self.network, noisy, times, condition)

    def save(self, folder: Path, rank: int) -> None:
        """Part of a checkpoint; equal on all processes."""
        from safetensors.torch import save_file

        if rank == 0:
            save_file(
                {name: w.cpu().contiguous() for name, w in self.weights.items()},
                folder / "reference.safetensors",
            )

    def load(self, folder: Path, rank: int, device: Any) -> None:
        """Reads it back.

        Raises:
            UserError: the checkpoint has none.
        """
        from ..runtime.files import read_tensors

        if not (folder / "reference.safetensors").is_file():
            raise UserError(
                f"train.reference: {folder} holds no reference; it was saved by a run with "
                "another setting"
            )
        self.weights = {
            name: w.to(device)
            for name, w in read_tensors(folder / "reference.safetensors")[0].items()
        }


class FrozenCopyReference:
    """A second copy of the starting weights, for full fine-tuning; optionally parked on the CPU between calls.

    Args:
        network: copied now, before anything trains; taken as it is with ``copy_weights=False``.
        device: where its forward pass runs.
        offload: keep it on the CPU meanwhile.
    """

    def __init__(
        self, network: Any, device: torch.device, offload: bool = False, copy_weights: bool = True
    ) -> None:
        self.network = without_dropout(
            (copy.deepcopy(network) if copy_weights else network).requires_grad_(False)
        )
        self.device, self.offload = device, offload and device.type != "cpu"
        self.network.to("cpu" if self.offload else device)
        self.description = (
            "frozen copy of the starting weights" if copy_weights else "frozen network"
        ) + (" (offloaded)" if self.offload else "")

    def predict(
        self, backbone: Backbone, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        if self.offload:
            self.network.to(self.device)
        with torch.no_grad():
            prediction = backbone.predict(self.network, noisy, times, condition)
        if self.offload:
            self.network.to("cpu")
        return prediction


def check_reference(backbone: Backbone, ref_backbone: Backbone) -> None:
    """Refuses a reference whose output means something else than the policy's.

    Raises:
        ConfigError: the policy's own pipeline, another model family, prediction type, noise schedule or shape of inputs.
    """
    mine, theirs = backbone.source, ref_backbone.source
    name, network = shown(ref_backbone.source.name), backbone.network_name
    if mine.pipe is not None and theirs.pipe is not None:
        parts = (getattr(mine.pipe, network), getattr(theirs.pipe, ref_backbone.network_name, None))
        if unwrapped(parts[0]) is unwrapped(parts[1]):
            raise ConfigError(
                "ref_model",
                "is the policy's own pipeline, which trains; leave it out, or load the "
                "pipeline a second time",
            )
    if type(ref_backbone) is not type(backbone):
        raise ConfigError(
            "ref_model",
            f"{name} is of another model family than the policy "
            f"({theirs.pipeline_class_name}, {mine.pipeline_class_name})",
        )
    kinds = ref_backbone.process.prediction_type, backbone.process.prediction_type
    if kinds[0] != kinds[1]:
        raise ConfigError(
            "ref_model",
            f"{name} predicts {kinds[0]}, the policy {kinds[1]}; their errors cannot be compared",
        )
    schedules = [getattr(part.process, "alphas_cumprod", None) for part in (ref_backbone, backbone)]
    if schedules[0] is not None and schedules[1] is not None:
        same = len(schedules[0]) == len(schedules[1]) and torch.allclose(
            schedules[0], schedules[1], rtol=1e-4, atol=1e-7
        )
    else:
        same = ref_backbone.process.num_timesteps == backbone.process.num_timesteps
    if not same:
        raise ConfigError(
            "ref_model",
            f"{name} has another noise schedule than the policy; give both the same scheduler",
        )
    configs = [part.source.component_config(part.network_name) for part in (ref_backbone, backbone)]
    for field in (
        "in_channels",
        "out_channels",
        "cross_attention_dim",
        "joint_attention_dim",
        "pooled_projection_dim",
    ):
        values = [config.get(field) for config in configs]
        if values[0] != values[1]:
            raise ConfigError(
                "ref_model",
                f"{name} has {field} {values[0]}, the policy {values[1]}; it must read the "
                "same inputs",
            )


def build_reference(
    backbone: Backbone,
    network: Any,
    ref_backbone: Backbone | None,
    is_lora: bool,
    device: torch.device,
    offload: bool,
) -> Reference:
    """The fixed reference of a run: another model, the network without its adapter, or a frozen copy."""
    if ref_backbone is not None:
        ref_backbone.place(device, backbone.dtype)
        return FrozenCopyReference(
            ref_backbone.load_network(backbone.dtype), device, offload, copy_weights=False
        )
    return (
        AdapterOffReference(network) if is_lora else FrozenCopyReference(network, device, offload)
    )
