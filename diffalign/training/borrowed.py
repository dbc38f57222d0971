"""A pipeline that the user passed as an object, while a run works with it."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module


class BorrowedPipeline:
    """Gives a user's pipeline back as it can be used, and takes it again.

    A run changes the precision of its parts, puts the network into training mode and
    lets accelerate replace its `forward`.

    Args:
        pipe (`DiffusionPipeline`): The pipeline, before anything was changed.
    """

    def __init__(self, pipe: Any) -> None:
        parts = [part for part in pipe.components.values() if isinstance(part, Module)]
        self._dtypes: list[tuple[Tensor, torch.dtype]] = [
            (tensor, tensor.dtype)
            for part in parts
            for tensor in (*part.parameters(), *part.buffers())
            if tensor.is_floating_point()
        ]
        self._modes: list[tuple[Module, bool]] = []
        self._forward: MethodType | None = None
        self._run_dtypes: list[tuple[Tensor, torch.dtype]] = []
        self.is_back = False

    def give_back(self, network: Module) -> None:
        """Restore precisions, evaluation mode and the network's own `forward`.

        Args:
            network (`Module`): The network of the run, a part of the pipeline.
        """
        self._modes = [(module, module.training) for module in network.modules()]
        network.eval()
        own = vars(network).get("_original_forward")
        if own is not None:
            self._forward = vars(network)["forward"]
            network.forward = own
        self._run_dtypes = [(t, t.dtype) for t, dtype in self._dtypes if t.dtype != dtype]
        _convert(self._dtypes)
        self.is_back = True

    def take(self, network: Module) -> None:
        """Undo `give_back`.

        Args:
            network (`Module`): As for `give_back`.
        """
        _convert(self._run_dtypes)
        if self._forward is not None:
            network.forward = self._forward
        for module, mode in self._modes:
            module.training = mode
        self.is_back = False


def _convert(dtypes: list[tuple[Tensor, torch.dtype]]) -> None:
    for tensor, dtype in dtypes:
        if tensor.dtype != dtype and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
