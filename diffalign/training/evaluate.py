"""Evaluate a run on held-out data, and measure the rounding of half precision."""

from __future__ import annotations

import copy

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Module

from ..backbones import Backbone
from ..backbones.conditions import cast
from ..likelihood import implicit_rewards
from ..runtime.weight_files import explained
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
    for examples in data.passes():
        loss, metrics = task.compute_loss(task.prepare(data.builder(examples)))
        window.add({"loss": loss, **metrics})
    network.train()
    return {f"eval/{name}": value for name, value in window.reduce(accelerator).items()}


def measure_rounding(
    policy: Denoiser,
    network: Module,
    backbone: Backbone,
    data: DataPipeline,
    *,
    is_lora: bool,
) -> str | None:
    """Describe how much half precision moves the logits of a run.

    One batch goes through the same weights in the run's precision and in float32. Under
    LoRA this copies the network to float32 for a moment.

    Args:
        policy (`Denoiser`): The network in the run's precision.
        network: The network itself.
        backbone (`Backbone`): The model.
        data (`DataPipeline`): The training data.
        is_lora (`bool`): Whether the base weights are in the run's precision.

    Returns:
        `str`, *optional*: A sentence for the user. None in full precision, with
        weights in fewer bits, and for a method whose beta does not multiply errors.
    """
    precision, beta = data.args.mixed_precision, data.args.error_beta
    small = data.args.quantization or data.args.layerwise_casting
    if precision == "no" or beta is None or small:
        return None
    device = data.accelerator.device
    try:
        spread, pairs = _rounding(policy, network, backbone, data, beta, is_lora)
    except Exception as error:  # too little memory, no float32 attention, or quantised
        sentence = f"rounding: not measured ({type(error).__name__}: {explained(error)[:100]})"
    else:
        sentence = (
            f"rounding: {precision} alone moves the logit of the same weights by "
            f"{spread:.2g} (root mean square of {pairs} "
            "pairs against float32); until rewards/margins grow beyond it, margins and "
            "accuracies are mostly rounding, and the gradient "
            "is not"
        )
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return sentence


@torch.no_grad()
def _rounding(
    policy: Denoiser,
    network: Module,
    backbone: Backbone,
    data: DataPipeline,
    beta: float,
    is_lora: bool,
) -> tuple[float, int]:
    """Return the root mean square of the logit's rounding, and the number of pairs."""
    device = data.accelerator.device
    first = data.chunks([(0, row) for row in range(len(data.dataset))])[0]
    batch = data.builder([data.reader[key] for key in first])
    needed = 4 * sum(parameter.numel() for parameter in network.parameters())
    if is_lora and device.type == "cuda" and needed > 0.5 * torch.cuda.mem_get_info(device)[0]:
        raise MemoryError(f"a copy of the network in float32 needs {needed / 2**30:.1f} GiB")
    with sampling_mode(network):
        rounded = policy.errors(batch)
        copied = copy.deepcopy(network).float() if is_lora else copy.copy(network)
        # accelerate's wrapper belongs to the original network and casts a second time.
        vars(copied).pop("forward", None)

        def forward(noisy: Tensor, times: Tensor, condition: dict[str, Tensor]) -> Tensor:
            with torch.autocast(device.type, enabled=False):
                exact = cast(condition, torch.float32)
                return backbone.predict(copied, noisy.float(), times, exact)

        exact_policy = copy.copy(policy)
        exact_policy.forward, exact_policy.dtype = forward, torch.float32
        rewards = implicit_rewards(rounded, exact_policy.errors(batch), beta)
    return float((rewards[:, 0] - rewards[:, 1]).square().mean().sqrt()), len(batch)
