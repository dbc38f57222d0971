"""Options for small memory and for speed: 8-bit storage and compiled blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Conv2d, Module

from ..errors import ConfigError
from .config import TrainingConfig

if TYPE_CHECKING:
    from peft import LoraConfig

_ADAPTERS = "lora_"


def check_memory_options(args: TrainingConfig, peft_config: LoraConfig | None) -> None:
    """Refuse options that this run cannot have, before weights are loaded.

    Args:
        args (`TrainingConfig`): Settings of the run.
        peft_config (`LoraConfig`, *optional*): The LoRA.

    Raises:
        ConfigError: 8-bit storage with full fine-tuning or with a DoRA.
    """
    if not args.layerwise_casting:
        return
    if peft_config is None:
        raise ConfigError(
            "train.layerwise_casting",
            "only frozen weights can be stored in 8 bits, and without a lora section all "
            "weights train; add lora, or set it to false",
        )
    if peft_config.use_dora:
        raise ConfigError(
            "train.layerwise_casting",
            "a DoRA reads the frozen weights themselves, which 8 bits would round; set "
            "lora.use_dora or this to false",
        )


def store_in_8_bits(network: Any, compute_dtype: torch.dtype) -> None:
    """Store the frozen weights in float8, and cast each layer while it runs.

    Embeddings of positions, norms and the network's ends stay as they are, as diffusers
    does it. So do convolutions: autograd keeps their weights themselves, which do not
    stay cast until its backward pass. Adapters stay in their own precision.

    Args:
        network: Of diffusers, with its adapter.
        compute_dtype (`torch.dtype`): Precision of a layer while it runs.
    """
    from diffusers.hooks.layerwise_casting import (
        DEFAULT_SKIP_MODULES_PATTERN,
        apply_layerwise_casting,
    )

    own = getattr(network, "_skip_layerwise_casting_patterns", None) or ()
    apply_layerwise_casting(
        network,
        storage_dtype=torch.float8_e4m3fn,
        compute_dtype=compute_dtype,
        skip_modules_pattern=(*DEFAULT_SKIP_MODULES_PATTERN, *own, _ADAPTERS),
        skip_modules_classes=(Conv2d,),
    )


def compile_blocks(network: Module) -> int:
    """Compile the blocks that a network repeats, each kind once.

    Names of weights stay. Adapters may be switched off and on, which compiles a second
    version.

    Args:
        network: Of diffusers.

    Returns:
        `int`: Number of compiled blocks.

    Raises:
        ConfigError: The network names no blocks.
    """
    names = getattr(network, "_repeated_blocks", None) or getattr(
        network, "_no_split_modules", None
    )
    blocks = [module for module in network.modules() if type(module).__name__ in (names or ())]
    if not blocks:
        raise ConfigError(
            "train.compile",
            f"a {type(network).__name__} does not say which blocks repeat; set it to false",
        )
    for block in blocks:
        block.compile()
    return len(blocks)
