"""Devices and precisions by name."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ConfigError


def read_device(device: Any) -> torch.device:
    """A device; None and `auto` take the GPU when there is one. Raises `ConfigError` for what is unknown or not there."""
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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


def read_dtype(dtype: Any) -> torch.dtype:
    """A floating type by itself or by name; None is float32. Raises `ConfigError` for anything else."""
    if dtype is None:
        return torch.float32
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(
            "dtype", f"expected one of float32, bfloat16, float16, float64, got {dtype!r}"
        )
    return found
