"""The loss and metrics of a run on evaluation data, and what rounding alone does to its margins."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..backbones import Backbone
from ..likelihood import implicit_rewards
from ..runtime.weight_files import explained
from .data_pipeline import DataPipeline
from .denoiser import Denoiser
from .loop import Task
from .online.rollout import sampling_mode
from .reference import without_dropout
from .tracking import MetricWindow


def evaluate(
    task: Task, data: DataPipeline, network: Any, accelerator: Accelerator
) -> dict[str, float]:
    """Means of the loss and metrics over all groups, named `eval/...`; call without gradients.

    Args:
        task: the method.
        data: the evaluation data.
        network: without dropout meanwhile.
        accelerator: of the run; all processes must call this.
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
    network: Any,
    backbone: Backbone,
    data: DataPipeline,
    beta: float,
    precision: str,
    is_lora: bool,
) -> str:
    """A sentence about what rounding alone does to the logits of a run in half precision.

    The same weights on one batch, in the run's precision and in float32: one forward pass each.
    Under LoRA it takes a copy of the network in float32 for that moment.

    Args:
        policy: the network in the run's precision, outside of training.
        network, backbone, data: of the run.
        beta (`float`): of the loss.
        precision (`str`): of the run, for the sentence.
        is_lora (`bool`): whether the base weights are in the run's precision.
    """
    device = data.accelerator.device
    try:
        spread, pairs = _rounding(policy, network, backbone, data, beta, is_lora)
    except Exception as error:  # no memory, an attention backend without float32, quantised weights
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
    network: Any,
    backbone: Backbone,
    data: DataPipeline,
    beta: float,
    is_lora: bool,
) -> tuple[float, int]:
    """(root mean square of the logit that rounding makes, number of pairs)."""
    device = data.accelerator.device
    first = data.chunks([(0, row) for row in range(len(data.dataset))])[0]
    batch = data.builder([data.reader[key] for key in first])
    needed = 4 * sum(parameter.numel() for parameter in network.parameters())
    if is_lora and device.type == "cuda" and needed > 0.5 * torch.cuda.mem_get_info(device)[0]:
        raise MemoryError(f"a copy of the network in float32 needs {needed / 2**30:.1f} GiB")
    with sampling_mode(network):
        rounded = policy.errors(batch)
        copied = copy.deepcopy(network).float() if is_lora else copy.copy(network)
        vars(copied).pop(
            "forward", None
        )  # accelerate's, which casts again (and belongs to the original)

        def forward(noisy: Tensor, times: Tensor, condition: dict[str, Tensor]) -> Tensor:
            with torch.autocast(device.type, enabled=False):
                exact = {name: value.float() for name, value in condition.items()}
                return backbone.predict(copied, noisy.float(), times, exact)

        exact_policy = copy.copy(policy)
        exact_policy.forward, exact_policy.dtype = forward, torch.float32
        rewards = implicit_rewards(rounded, exact_policy.errors(batch), beta)
    return float((rewards[:, 0] - rewards[:, 1]).square().mean().sqrt()), len(batch)
