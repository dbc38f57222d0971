"""Options for small memory and for speed: 8-bit storage and compiled blocks."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Conv2d, Linear, Module

from ..errors import ConfigError
from .config import TrainingConfig

if TYPE_CHECKING:
    from peft import LoraConfig

_ADAPTERS = "lora_"
_BLOCKS_OF_UNETS = ("ResnetBlock2D",)
"""UNets name only their transformer blocks. Their convolutions and norms are here."""
_VERSIONS = 64
"""Of one kind of block: a UNet has some ten widths and sizes, each with and without a
gradient. torch would stop at eight, and run the rest uncompiled without a word."""


def check_memory_options(args: TrainingConfig, peft_config: LoraConfig | None) -> None:
    """Refuse options that this run cannot have, before weights are loaded.

    Args:
        args (`TrainingConfig`): Settings of the run.
        peft_config (`LoraConfig`, *optional*): The LoRA.

    Raises:
        ConfigError: fewer bits with full fine-tuning or with a DoRA, both kinds at
            once, or a kind that this machine cannot do.
    """
    check_combinations(args, peft_config)
    if args.quantization:
        quantization_config(args.quantization, torch.bfloat16)


def check_combinations(args: TrainingConfig, peft_config: LoraConfig | None) -> None:
    """Refuse options that no machine can have together.

    Args:
        args (`TrainingConfig`): Settings of the run.
        peft_config (`LoraConfig`, *optional*): The LoRA.

    Raises:
        ConfigError: fewer bits with full fine-tuning or with a DoRA, or both kinds at
            once.
    """
    for name, off in (("quantization", "null"), ("layerwise_casting", "false")):
        if not getattr(args, name):
            continue
        if peft_config is None:
            raise ConfigError(
                f"train.{name}",
                "only the frozen weights under a LoRA can be stored in fewer bits; add lora where "
                f"the method trains one, or set it to {off}",
            )
        if peft_config.use_dora:
            raise ConfigError(
                f"train.{name}",
                "a DoRA reads the frozen weights themselves, which fewer bits would round; set "
                f"lora.use_dora to false, or this to {off}",
            )
    if args.quantization and args.layerwise_casting:
        raise ConfigError(
            "train.layerwise_casting", "quantised weights are small already; set it to false"
        )


def refuse_offload(args: TrainingConfig) -> None:
    """Refuse to offload what a method needs a gradient through.

    Args:
        args (`TrainingConfig`): Settings of the run.

    Raises:
        ConfigError: `offload: group`.
    """
    if args.offload == "group":
        raise ConfigError(
            "train.offload",
            "the gradient runs through the autoencoder, whose offloaded weights would be gone in "
            "the backward pass; set it to none",
        )


def quantization_config(kind: str, dtype: torch.dtype) -> Any:
    """Build diffusers' config of a quantised network.

    Args:
        kind (`str`): `nf4`, `int8` or `fp8`.
        dtype (`torch.dtype`): Precision of the products.

    Returns:
        The config, for `from_pretrained`.

    Raises:
        ConfigError: The package is not installed, or there is no GPU.
    """
    from diffusers import BitsAndBytesConfig, TorchAoConfig

    field = "train.quantization"
    package = "bitsandbytes" if kind == "nf4" else "torchao"
    if importlib.util.find_spec(package) is None:
        raise ConfigError(field, f"{kind} needs {package}: pip install 'diffalign[quantization]'")
    if kind == "nf4":
        if not torch.cuda.is_available():
            raise ConfigError(field, "nf4 needs a CUDA GPU; int8 and fp8 work on a CPU too")
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig())


def store_in_8_bits(network: Any, compute_dtype: torch.dtype) -> None:
    """Store the frozen weights in float8, and cast each layer while it runs.

    Embeddings of positions, norms and the network's ends stay as they are, as diffusers
    does it. So do convolutions: autograd keeps their weights themselves, which do not
    stay cast until its backward pass. Adapters stay in their own precision.

    Args:
        network: Of diffusers, with its adapter.
        compute_dtype (`torch.dtype`): Precision of a layer while it runs.
    """
    from diffusers.hooks.layerwise_casting import apply_layerwise_casting

    apply_layerwise_casting(
        network,
        storage_dtype=torch.float8_e4m3fn,
        compute_dtype=compute_dtype,
        skip_modules_pattern=_uncast(network),
        skip_modules_classes=(Conv2d,),
    )


def _uncast(network: Any) -> tuple[str, ...]:
    """Patterns of the names of modules that are not stored in 8 bits."""
    from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

    own = getattr(network, "_skip_layerwise_casting_patterns", None) or ()
    return (*DEFAULT_SKIP_MODULES_PATTERN, *own, _ADAPTERS)


def cast_layers(network: Module) -> Iterator[Linear]:
    """Yield the linear layers that `store_in_8_bits` casts.

    Args:
        network (`Module`): Of diffusers, with its adapter.
    """
    patterns = _uncast(network)

    def walk(module: Module, name: str) -> Iterator[Linear]:
        if isinstance(module, Conv2d) or any(re.search(pattern, name) for pattern in patterns):
            return
        if isinstance(module, Linear):
            yield module
            return
        for child_name, child in module.named_children():
            yield from walk(child, f"{name}.{child_name}" if name else child_name)

    return walk(network, "")


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
    repeated = getattr(network, "_repeated_blocks", None) or getattr(
        network, "_no_split_modules", None
    )
    names = {*(repeated or ()), *_BLOCKS_OF_UNETS}
    blocks = [module for module in network.modules() if type(module).__name__ in names]
    if not blocks:
        raise ConfigError(
            "train.compile",
            f"a {type(network).__name__} does not say which blocks repeat; set it to false",
        )
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _VERSIONS)
    for block in blocks:
        block.compile()
    return len(blocks)
