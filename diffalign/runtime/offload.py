"""Frozen networks that wait on the CPU and come to the device layer by layer."""

from __future__ import annotations

import torch
from torch.nn import Module


def offload_layers(module: Module, device: torch.device) -> None:
    """Keep a frozen network on the CPU, and run each of its layers on a device.

    On CUDA the next layer is copied while the current one runs.

    Args:
        module (`Module`): of diffusers or transformers, without gradients.
        device (`torch.device`): where the layers run.
    """
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        module,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        use_stream=device.type == "cuda",
    )
