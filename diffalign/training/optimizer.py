"""Optimizer, learning-rate schedule and the average of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Parameter

from ..errors import ConfigError
from .build import trainable_parameters
from .config import TrainingConfig


def build_ema(parameters: list[Parameter], args: TrainingConfig, device: torch.device) -> Any:
    """diffusers' `EMAModel` over the trainable parameters, with its warm-up or without; None where there is no average."""
    if not args.use_ema:
        return None
    from diffusers.training_utils import EMAModel

    class FixedRate(EMAModel):
        """One decay from the first step on, as in the official code of Self-NPO."""

        def get_decay(self, optimization_step: int) -> float:
            return self.decay

    ema = (EMAModel if args.ema_warmup else FixedRate)(parameters, decay=args.ema_decay)
    ema.to("cpu" if args.offload_ema else device)
    return ema


@contextmanager
def averaged(ema: Any, network: Any) -> Iterator[None]:
    """The averaged weights in place of the current ones while the block runs; without `ema` nothing changes."""
    if ema is None:
        yield
        return
    parameters = trainable_parameters(network)
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def _extra(name: str, package: str, error: ImportError) -> ConfigError:
    return ConfigError(
        "train.optim", f"{name} needs {package}: pip install 'diffalign[optim]' ({error})"
    )


def build_optimizer(parameters: Iterable[Parameter], args: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer that `optim` names.

    Raises:
        ConfigError: when its package is not installed, with the command that installs it.
    """
    betas = (args.adam_beta1, args.adam_beta2)
    common: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if args.optim == "adamw":
        return torch.optim.AdamW(parameters, betas=betas, eps=args.adam_epsilon, **common)
    if args.optim == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise _extra("adamw_8bit", "bitsandbytes", error) from error
        return AdamW8bit(parameters, betas=betas, eps=args.adam_epsilon, **common)
    if args.optim == "prodigy":
        try:
            from prodigyopt import Prodigy
        except ImportError as error:
            raise _extra("prodigy", "prodigyopt", error) from error
        return Prodigy(
            parameters,
            betas=betas,
            eps=args.adam_epsilon,
            use_bias_correction=True,
            safeguard_warmup=True,
            **common,
        )
    from transformers.optimization import Adafactor

    # As the official SDXL code: no parameter scaling, no relative step; the loop clips, so the optimizer need not.
    return Adafactor(
        parameters, scale_parameter=False, relative_step=False, clip_threshold=1.0, **common
    )


def build_schedule(
    optimizer: torch.optim.Optimizer, args: TrainingConfig, max_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """diffusers' schedule, in optimizer steps: it is not handed to accelerate, which would step it once per process."""
    from diffusers.optimization import get_scheduler

    name = (
        "constant_with_warmup"
        if args.lr_scheduler == "constant" and args.warmup_steps
        else args.lr_scheduler
    )
    return get_scheduler(
        name, optimizer, num_warmup_steps=args.warmup_steps, num_training_steps=max_steps
    )


def update_ema(ema: Any, parameters: list[Any], device: Any, offload: bool) -> None:
    """One step of the average, which is fetched from the CPU for it where it is kept there."""
    if offload:
        ema.to(device)
    ema.step(parameters)
    if offload:
        ema.to("cpu")
