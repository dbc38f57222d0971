"""The optimizer, the learning-rate schedule and the average of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from ..errors import ConfigError
from ..runtime.distributed import is_sharded, reshard
from .build import trainable_parameters
from .config import TrainingConfig
from .loop_config import LoopConfig


def build_ema(parameters: list[Parameter], args: TrainingConfig, device: torch.device) -> Any:
    """Build diffusers' `EMAModel` over the trainable parameters.

    Args:
        parameters (`list[Parameter]`): The trainable parameters.
        args (`TrainingConfig`): Settings of the run.
        device (`torch.device`): Device of the average, unless it is kept on the CPU.

    Returns:
        The average. None without `use_ema`.
    """
    if not args.use_ema:
        return None
    from diffusers.training_utils import EMAModel

    class FixedRate(EMAModel):
        """Average with one decay from the first step on, as in Self-NPO's code."""

        def get_decay(self, optimization_step: int) -> float:
            return self.decay

    # Of all weights at once on a GPU, in place of three kernels for each.
    # Sharded tensors have no such kernel.
    foreach = device.type == "cuda" and not args.offload_ema and not is_sharded(parameters[0])
    averaging = EMAModel if args.ema_warmup else FixedRate
    ema = averaging(parameters, decay=args.ema_decay, foreach=foreach)
    ema.to("cpu" if args.offload_ema else device)
    return ema


@contextmanager
def averaged(ema: Any, network: Module) -> Iterator[None]:
    """Put the averaged weights into the network while the block runs.

    Args:
        ema: The average. None changes nothing.
        network: Gets its own weights back afterwards.
    """
    if ema is None or getattr(ema, "is_in_network", False):
        yield
        return
    parameters = trainable_parameters(network)
    shadows = ema.shadow_params
    pairs = list(zip(parameters, shadows, strict=True))
    # Where both can swap their storage nothing is copied. diffusers' `store` copies all
    # weights to the CPU.
    can_swap = all(not is_sharded(p) and p.device == shadow.device for p, shadow in pairs)
    if can_swap:
        _swap(parameters, shadows)
    else:
        ema.store(parameters)
        ema.copy_to(parameters)
    ema.is_in_network = True
    try:
        yield
    finally:
        ema.is_in_network = False
        if can_swap:
            _swap(parameters, shadows)
        else:
            reshard(network)
            ema.restore(parameters)


def _swap(parameters: list[Parameter], others: list[Tensor]) -> None:
    for parameter, other in zip(parameters, others, strict=True):
        parameter.data, other.data = other.data, parameter.data


def _extra(name: str, package: str, error: ImportError) -> ConfigError:
    return ConfigError(
        "train.optim", f"{name} needs {package}: pip install 'diffalign[optim]' ({error})"
    )


def build_optimizer(parameters: Iterable[Parameter], args: LoopConfig) -> torch.optim.Optimizer:
    """Build the optimizer that `optim` names.

    Args:
        parameters (`Iterable[Parameter]`): The trainable parameters.
        args (`LoopConfig`): Settings of the run.

    Raises:
        ConfigError: Its package is not installed.
    """
    betas = (args.adam_beta1, args.adam_beta2)
    common: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if args.optim in ("adamw", "adamw_fused"):
        fused = True if args.optim == "adamw_fused" else None
        return torch.optim.AdamW(
            parameters, betas=betas, eps=args.adam_epsilon, fused=fused, **common
        )
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

    # As in Diffusion-DPO's SDXL code: no parameter scaling and no relative step. The
    # loop clips the gradients itself.
    return Adafactor(
        parameters, scale_parameter=False, relative_step=False, clip_threshold=1.0, **common
    )


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer, args: LoopConfig, max_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Build diffusers' learning-rate schedule, counted in optimizer steps.

    accelerate must not prepare it, because it would step once per process.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer.
        args (`LoopConfig`): Settings of the run.
        max_steps (`int`): Optimizer steps of the run.
    """
    from diffusers.optimization import get_scheduler

    name = (
        "constant_with_warmup"
        if args.lr_scheduler == "constant" and args.warmup_steps
        else args.lr_scheduler
    )
    return get_scheduler(
        name, optimizer, num_warmup_steps=args.warmup_steps, num_training_steps=max_steps
    )


def update_ema(ema: Any, parameters: list[Any], device: torch.device, offload: bool) -> None:
    """Update the average of the weights.

    Args:
        ema: The average.
        parameters (`list[Parameter]`): The trainable parameters.
        device (`torch.device`): Device of the parameters.
        offload (`bool`): Whether the average is kept on the CPU between updates.
    """
    if offload:
        ema.to(device)
    ema.step(parameters)
    if offload:
        ema.to("cpu")
