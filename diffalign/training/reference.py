"""Who the policy is compared with. A reference is called like the network and never sees a gradient."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from ..backbones import Backbone


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
