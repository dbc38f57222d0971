"""Read devices and precisions by name."""

from __future__ import annotations

import os

import torch

from ..errors import ConfigError
from .protocols import DeviceLike, DtypeLike


def read_device(device: DeviceLike) -> torch.device:
    """Read a device by name.

    Args:
        device (`str` or `torch.device`, *optional*): None and ``auto`` take the GPU
            when there is one: under a launcher the process's own.

    Returns:
        `torch.device`: the device.

    Raises:
        ConfigError: an unknown device, or one that is not there.
    """
    if device is None or device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # A process of several takes its own GPU, also before accelerate has chosen it.
        rank = os.environ.get("LOCAL_RANK", "")
        if rank.isdigit() and int(rank) < torch.cuda.device_count():
            return torch.device("cuda", int(rank))
        return torch.device("cuda")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            "device", f"expected auto, cpu, cuda or cuda:N, got {device!r}"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device", f"{str(device)!r} was asked for, but torch sees no GPU; use device=cpu"
        )
    return device


_DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "no": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
    "float64": torch.float64, "fp64": torch.float64,
}  # fmt: skip


def read_dtype(dtype: DtypeLike) -> torch.dtype:
    """Read a floating type by name.

    Args:
        dtype (`str` or `torch.dtype`, *optional*): None is float32.

    Returns:
        `torch.dtype`: the type.

    Raises:
        ConfigError: anything else.
    """
    if dtype is None:
        return torch.float32
    torch_dtype = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise ConfigError(
            "dtype", f"expected one of float32, bfloat16, float16, float64, got {dtype!r}"
        )
    return torch_dtype
