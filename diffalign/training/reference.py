"""Who the policy is compared with. A reference is called like the network and never sees a gradient."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..backbones import Backbone
from ..exceptions import UserError


class Reference(Protocol):
    """Anything that predicts like the starting weights."""

    description: str

    def predict(self, backbone: Backbone, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]) -> Tensor: ...


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


class AdapterOffReference:
    """The same network with its LoRA switched off: no second model in memory."""

    description = "adapter-off (the base weights under the LoRA)"

    def __init__(self, network: Any) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.network = network
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

    def predict(self, backbone: Backbone, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]) -> Tensor:
        with torch.no_grad(), self.adapters_off():
            return backbone.predict(self.network, noisy, times, condition)


class SnapshotReference:
    """The policy as it was at some moment: its trainable weights are kept, and put in place for a prediction.

    Under LoRA that costs the adapter's size, under full fine-tuning as much as a frozen copy.
    """

    description = "the policy at the beginning of the round (iterated)"

    def __init__(self, network: Any) -> None:
        self.network = network
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

    def predict(self, backbone: Backbone, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]) -> Tensor:
        with torch.no_grad(), self.in_place(self.weights):
            return backbone.predict(self.network, noisy, times, condition)

    def save(self, folder: Path, rank: int) -> None:
        """Part of a checkpoint; equal on all processes."""
        from safetensors.torch import save_file

        if rank == 0:
            save_file({name: w.cpu().contiguous() for name, w in self.weights.items()}, folder / "reference.safetensors")

    def load(self, folder: Path, rank: int, device: Any) -> None:
        """Reads it back.

        Raises:
            UserError: the checkpoint has none.
        """
        from ..folders import read_tensors

        if not (folder / "reference.safetensors").is_file():
            raise UserError(f"train.reference: {folder} holds no reference; it was saved by a run with another setting")
        self.weights = {name: w.to(device) for name, w in read_tensors(folder / "reference.safetensors")[0].items()}


class FrozenCopyReference:
    """A second copy of the starting weights, for full fine-tuning; optionally parked on the CPU between calls.

    Args:
        network: copied now, before anything trains; taken as it is with ``copy_weights=False``.
        device: where its forward pass runs.
        offload: keep it on the CPU meanwhile.
    """

    def __init__(self, network: Any, device: torch.device, offload: bool = False, copy_weights: bool = True) -> None:
        self.network = without_dropout((copy.deepcopy(network) if copy_weights else network).requires_grad_(False))
        self.device, self.offload = device, offload and device.type != "cpu"
        self.network.to("cpu" if self.offload else device)
        self.description = ("frozen copy of the starting weights" if copy_weights else "frozen network") + (
            " (offloaded)" if self.offload else ""
        )

    def predict(self, backbone: Backbone, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]) -> Tensor:
        if self.offload:
            self.network.to(self.device)
        with torch.no_grad():
            prediction = backbone.predict(self.network, noisy, times, condition)
        if self.offload:
            self.network.to("cpu")
        return prediction


def build_reference(
    backbone: Backbone, network: Any, ref_backbone: Backbone | None, is_lora: bool, device: torch.device, offload: bool
) -> Reference:
    """The fixed reference of a run: another model, the network without its adapter, or a frozen copy."""
    if ref_backbone is not None:
        ref_backbone.place(device, backbone.dtype)
        return FrozenCopyReference(ref_backbone.load_network(backbone.dtype), device, offload, copy_weights=False)
    return AdapterOffReference(network) if is_lora else FrozenCopyReference(network, device, offload)
