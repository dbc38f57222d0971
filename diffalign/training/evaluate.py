"""Evaluate a run on held-out data, and measure the rounding of half precision."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Module

from ..backbones import Backbone
from ..backbones.conditions import cast
from ..errors import one_line
from ..likelihood import implicit_rewards
from ..runtime.distributed import sharded_modules
from .data_pipeline import DataPipeline
from .denoiser import Denoiser
from .loop import Task
from .online.rollout import sampling_mode
from .reference import without_dropout
from .tracking import MetricWindow


def evaluate(
    task: Task, data: DataPipeline, network: Module, accelerator: Accelerator
) -> dict[str, float]:
    """Average the loss and the metrics over all groups of a dataset.

    All processes must call this, without gradients.

    Args:
        task (`Task`): The method.
        data (`DataPipeline`): The evaluation data.
        network: Its dropout is off meanwhile.
        accelerator (`Accelerator`): Averages over the processes.

    Returns:
        `dict[str, float]`: The averages, named `eval/...`.
    """
    window = MetricWindow()
    without_dropout(network)
    for examples, counts in data.passes(together=bool(sharded_modules(network))):
        loss, metrics = task.compute_loss(task.prepare(data.builder(examples)))
        if counts:
            window.add({"loss": loss, **metrics})
    network.train()
    return {f"eval/{name}": value for name, value in window.reduce(accelerator).items()}


def measure_rounding(
    policy: Denoiser,
    network: Module,
    backbone: Backbone,
    data: DataPipeline,
) -> str | None:
    """Describe how much half precision moves the logits of a run.

    One batch goes through the same weights in the run's precision and in float32.

    Args:
        policy (`Denoiser`): The network in the run's precision.
        network: The network itself.
        backbone (`Backbone`): The model.
        data (`DataPipeline`): The training data.

    Returns:
        `str`, *optional*: A sentence for the user. None in full precision, with
        weights in fewer bits, and for a method whose beta does not multiply errors.
    """
    precision, beta = data.args.mixed_precision, data.args.error_beta
    small = data.args.quantization or data.args.layerwise_casting
    if precision == "no" or beta is None or small:
        return None
    try:
        spread, pairs = _rounding(policy, network, backbone, data, beta)
    except Exception as error:  # too little memory, no float32 attention, or quantised
        sentence = f"rounding: not measured ({type(error).__name__}: {one_line(error, 100)})"
    else:
        sentence = (
            f"rounding: {precision} alone moves the logit of the same weights by "
            f"{spread:.2g} (root mean square of {pairs} "
            "pairs against float32); until rewards/margins grow beyond it, margins and "
            "accuracies are mostly rounding, and the gradient "
            "is not"
        )
    if data.accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    return sentence


@contextmanager
def float32_layers(network: Module, together: int = 2**25) -> Iterator[None]:
    """Run a network in float32, of which one layer at a time holds float32 weights.

    A copy of the network would take twice its half-precision weights. Compiled blocks
    run uncompiled meanwhile, without gradients.

    Args:
        network: With weights of any precision, which it has again afterwards.
        together (`int`): A module with at most so many weights is one layer. Some
            embeddings look at the precision of the layers inside them.
    """
    narrow: dict[Module, list[tuple[Tensor, Tensor]]] = {}
    sizes = {m: sum(p.numel() for p in m.parameters()) for m in network.modules()}

    def widen(module: Module, _: Any) -> None:
        # An adapter reads the weights of the layer inside it.
        whole = hasattr(module, "base_layer") or sizes[module] <= together
        tensors = [*module.parameters(whole), *module.buffers(whole)]
        narrow[module] = [
            (tensor, tensor.data)
            for tensor in tensors
            if tensor.is_floating_point() and tensor.dtype != torch.float32
        ]
        for tensor, data in narrow[module]:
            tensor.data = data.float()

    def restore(module: Module, *_: Any) -> None:
        for tensor, data in narrow.pop(module, ()):
            tensor.data = data

    handles = []
    for module in network.modules():
        handles.append(module.register_forward_pre_hook(widen, prepend=True))
        handles.append(module.register_forward_hook(restore, always_call=True))
    # accelerate's wrapper turns autocast on.
    wrapped = vars(network).pop("forward", None)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        if wrapped is not None:
            network.forward = wrapped
        for handle in handles:
            handle.remove()
        for module in list(narrow):
            restore(module)


@torch.no_grad()
def _rounding(
    policy: Denoiser,
    network: Module,
    backbone: Backbone,
    data: DataPipeline,
    beta: float,
) -> tuple[float, int]:
    """Return the root mean square of the logit's rounding, and the number of pairs."""
    device = data.accelerator.device
    first = data.chunks([(0, row) for row in range(len(data.dataset))])[0]
    batch = data.builder([data.reader[key] for key in first])

    def forward(noisy: Tensor, times: Tensor, condition: dict[str, Tensor]) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            exact = cast(condition, torch.float32)
            return backbone.predict(network, noisy.float(), times, exact)

    with sampling_mode(network):
        rounded = policy.errors(batch)
        exact_policy = copy.copy(policy)
        exact_policy.forward, exact_policy.dtype = forward, torch.float32
        with float32_layers(network):
            exact = exact_policy.errors(batch)
        rewards = implicit_rewards(rounded, exact, beta)
    return float((rewards[:, 0] - rewards[:, 1]).square().mean().sqrt()), len(batch)
