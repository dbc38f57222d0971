"""Build the accelerator and the network that a run trains."""

from __future__ import annotations

import copy
import re
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)
from torch.nn import Module, Parameter
from torch.nn.parallel import DistributedDataParallel

from ..backbones import Backbone
from ..backbones.lora import unwrapped
from ..config.yaml_text import shown
from ..errors import ConfigError, one_line
from ..likelihood import NoiseSchedule, VariancePreserving, with_zero_terminal_snr
from ..runtime.distributed import process_count, reshard
from .config import TrainingConfig
from .data_pipeline import DataPipeline
from .loop_config import LoopConfig
from .memory import quantization_config
from .sharding import asks_for_sharding, check_engine, shard_on_cpus

if TYPE_CHECKING:
    from peft import LoraConfig

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def build_accelerator(args: LoopConfig, output_dir: Path, passes: int) -> Accelerator:
    """Set up accelerate: processes, precision, gradient accumulation, trackers.

    Args:
        args (`LoopConfig`): Settings of the run.
        output_dir (`Path`): Folder of the run.
        passes (`int`): Forward passes per optimizer step.

    Raises:
        ConfigError: The machine lacks this precision or tracker.
    """
    # torch prefers cuDNN's attention on Hopper. Its backward pass gives NaN for some
    # lengths (pytorch/pytorch#196678); flash attention, the next in line, does not.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if args.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("train.mixed_precision", "fp16 needs a GPU; use bf16 or no")
    if (
        AcceleratorState._shared_state
        and AcceleratorState().mixed_precision != args.mixed_precision
    ):
        # accelerate keeps its first precision. A second trainer may want another one.
        AcceleratorState._reset_state(reset_partial_state=False)
    # Started by torchrun without accelerators, accelerate would not join the processes.
    several_on_cpu = process_count() > 1 and not torch.accelerator.is_available()
    timeout = timedelta(seconds=args.ddp_timeout)
    if several_on_cpu and asks_for_sharding():
        shard_on_cpus(args.mixed_precision, timeout)
    try:
        accelerator = Accelerator(
            cpu=several_on_cpu,
            mixed_precision=args.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=passes, sync_with_dataloader=False
            ),
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(
                project_dir=str(output_dir), logging_dir=str(output_dir / "logs")
            ),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
        )
    except (ValueError, ImportError) as error:
        if args.report_to == "none":
            raise
        raise ConfigError(
            "train.report_to", f"{args.report_to!r} cannot be used ({' '.join(str(error).split())})"
        ) from error
    check_engine(accelerator)
    return accelerator


def keep_buffers(prepared: Module) -> None:
    """Let no forward pass of DDP broadcast buffers, which do not change in training.

    A process without rows to evaluate would keep the others waiting for its buffers.

    Args:
        prepared (`Module`): The network as accelerate prepared it.
    """
    if isinstance(prepared, DistributedDataParallel):
        prepared.broadcast_buffers = False


def keep_precision(accelerator: Accelerator, mixed_precision: str) -> None:
    """Restore the precision of a run that another Accelerator may have changed.

    accelerate has one precision for the whole process.

    Args:
        accelerator (`Accelerator`): Of the run.
        mixed_precision (`str`): Of the run.
    """
    if accelerator.distributed_type.value != "DEEPSPEED":
        accelerator.state._shared_state["_mixed_precision"] = mixed_precision


def load_plain_network(backbone: Backbone, args: TrainingConfig, dtype: torch.dtype) -> Any:
    """Load the network with the run's attention backend and checkpoints of activations.

    Args:
        backbone (`Backbone`): The model.
        args (`TrainingConfig`): Settings of the run.
        dtype (`torch.dtype`): Of its weights.

    Returns:
        The network, frozen.

    Raises:
        ConfigError: It carries adapters or compiled parts, or the attention backend
            cannot be used here.
    """
    _check_adapters(backbone)
    quantization = quantization_config(args.quantization, dtype) if args.quantization else None
    network = backbone.load_network(dtype, quantization)
    if any("_orig_mod" in name for name, _ in network.named_parameters()):
        raise ConfigError(
            "model",
            "parts of the network are compiled (_orig_mod in the names of its weights); pass "
            "the plain network",
        )
    set_attention(network, args.attention)
    if args.gradient_checkpointing:
        backbone.checkpoint_activations(network)
    return network


def build_network(backbone: Backbone, args: TrainingConfig, peft_config: LoraConfig | None) -> Any:
    """Load the network and make it trainable, as a whole or with a LoRA.

    With a LoRA the base weights are in the run's precision and the adapter in float32.
    Without one all weights are trained in float32.

    Args:
        backbone (`Backbone`): The model.
        args (`TrainingConfig`): Settings of the run.
        peft_config (`LoraConfig`, *optional*): The LoRA. None trains all weights.

    Returns:
        The network, in training mode.

    Raises:
        ConfigError: No module matches the LoRA targets, or the attention backend cannot
            be used here.
    """
    if peft_config is not None:
        check_peft_config(peft_config)
    dtype = DTYPES[args.mixed_precision] if peft_config is not None else torch.float32
    network = load_plain_network(backbone, args, dtype)
    if peft_config is None:
        return network.requires_grad_(True).train()
    from diffusers.training_utils import cast_training_params

    config = copy.deepcopy(peft_config)
    if config.target_modules is None:
        config.target_modules = backbone.lora_targets
    try:
        network.add_adapter(config)
    except (ValueError, re.error, NotImplementedError) as error:
        modules = network.named_modules()
        linear_names = {
            name.rsplit(".", 1)[-1] for name, m in modules if isinstance(m, torch.nn.Linear)
        }
        linear = sorted(linear_names)
        raise ConfigError(
            "lora.target_modules",
            f"{shown(config.target_modules)} matches no module of the "
            f"{backbone.network_name} that can have a LoRA; its linear layers are "
            f"named {', '.join(linear[:12])}",
        ) from error
    cast_training_params(network, dtype=torch.float32)
    _set_magnitudes(network, args.mixed_precision)
    # Dropout would run in the lower precision, with a rounded factor.
    if args.mixed_precision != "no" and not config.use_dora and not config.lora_dropout:
        _leave_casts_to_autocast(network)
    return network.train()


def _leave_casts_to_autocast(network: Module) -> None:
    """Do not let peft cast the inputs of a LoRA to float32 under autocast.

    Autocast would cast them straight back: two copies of every activation, of which the
    backward pass keeps one. Results are the same to the bit.
    """
    from peft.tuners.lora import LoraLayer

    for layer in network.modules():
        if isinstance(layer, LoraLayer):
            layer._cast_input_dtype = _input_of_lora  # type: ignore[method-assign, assignment]


def _input_of_lora(x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    if x is None or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(dtype)


@torch.no_grad()
def _set_magnitudes(network: Module, precision: str) -> None:
    """Set DoRA's magnitudes to the norms that this precision's forward pass computes.

    peft rounds them to the precision of the base weights. In bf16 the policy would then
    differ from its reference before the first step.
    """
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [module for module in network.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        for name, part in getattr(layer, "lora_magnitude_vector", {}).items():
            weight = layer.get_base_layer().weight
            if not weight.is_floating_point():
                continue  # quantised
            with torch.autocast(weight.device.type, DTYPES[precision], enabled=precision != "no"):
                update = part.get_lora_weight(layer.lora_A[name], layer.lora_B[name]).reshape(
                    weight.shape
                )
                # Linear layers compute the norm in the precision of the adapter.
                if weight.ndim == 2:
                    weight, update = weight.float(), update.float()
                norm = part.get_weight_norm(weight, update, layer.scaling[name])
            part.weight.copy_(norm.reshape(part.weight.shape))


def _check_adapters(backbone: Backbone) -> None:
    """Refuse a pipeline with adapters: they would become part of the base model."""
    pipe = backbone.source.pipe
    for name, component in (pipe.components if pipe is not None else {}).items():
        if getattr(unwrapped(component), "peft_config", None):
            raise ConfigError(
                "model",
                f"the pipeline already carries adapters (on its {name}); fuse or unload them "
                "first (pipe.fuse_lora(), "
                "pipe.unload_lora_weights())",
            )


_CHANGING_INITS = ("pissa", "olora", "corda", "eva", "loftq")


def check_peft_config(config: Any) -> None:
    """Refuse adapters that a plain pipeline could not load back from their file.

    Args:
        config (`LoraConfig`): The adapter.

    Raises:
        ConfigError: It is no LoRA or DoRA, it trains biases or whole modules, or its
            initialisation changes the base weights.
    """
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        raise ConfigError(
            "peft_config",
            f"expected a LoraConfig, got {type(config).__name__}; LoRA and DoRA are trained here",
        )
    for name, plain in (("bias", "none"), ("modules_to_save", None), ("target_parameters", None)):
        value = getattr(config, name, plain)
        if value not in (plain, [], ()):
            raise ConfigError(
                f"peft_config.{name}",
                f"expected {plain!r}, got {shown(value)}: a LoRA file has no place for it",
            )
    if str(config.init_lora_weights).startswith(_CHANGING_INITS):
        raise ConfigError(
            "peft_config.init_lora_weights",
            f"{config.init_lora_weights!r} changes the base weights; use gaussian or the default",
        )


def set_attention(network: Any, backend: str) -> None:
    """Select diffusers' attention backend.

    Args:
        network: The network of the model.
        backend (`str`): Name in diffusers. `native` is torch's scaled dot product
            attention, without cuDNN's kernel.

    Raises:
        ConfigError: The backend cannot be used here.
    """
    if backend == "native":
        return
    try:
        network.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError, NotImplementedError) as error:
        reason = one_line(error)
        raise ConfigError(
            "train.attention",
            f"the backend {backend!r} cannot be used here ({reason}); native always can",
        ) from error


def trainable_parameters(network: Module) -> list[Parameter]:
    """Return the parameters of `network` that receive gradients."""
    reshard(network)
    return [p for p in network.parameters() if p.requires_grad]


def planned_steps(args: TrainingConfig, data: DataPipeline, passes: int = 1) -> int:
    """Compute the number of optimizer steps of a run.

    Args:
        args (`TrainingConfig`): Settings of the run.
        data (`DataPipeline`): The training data.
        passes (`int`, *optional*, defaults to `1`): How often a group trains in an
            epoch.

    Raises:
        ConfigError: A stream needs `max_steps`.
    """
    if args.max_steps is not None:
        return args.max_steps
    if data.streaming:
        raise ConfigError("train.max_steps", "a streamed dataset has no length; set max_steps")
    return steps_of_epochs(args, data.epoch_rows * passes, data.global_batch)


def steps_of_epochs(args: LoopConfig, groups: int, groups_per_step: int) -> int:
    """Compute the optimizer steps of `num_train_epochs`, one epoch without it.

    Args:
        args (`LoopConfig`): Settings of the run.
        groups (`int`): Groups of the data.
        groups_per_step (`int`): Groups per optimizer step over all processes.
    """
    return -int(-groups * (args.num_train_epochs or 1) // groups_per_step)


def training_schedule(schedule: NoiseSchedule, args: TrainingConfig, rule: int) -> NoiseSchedule:
    """Return the noise schedule of the training images.

    It is the model's own. For SDXL-Turbo's timesteps it is rescaled to zero terminal
    SNR, as in Diffusion-DPO's code.

    Args:
        schedule (`NoiseSchedule`): Noise schedule of the model.
        args (`TrainingConfig`): Settings of the run.
        rule (`int`): See `SAMPLER_RULE`. Rule 1 does not rescale.
    """
    is_turbo = args.timestep_sampling == "turbo" and rule > 1
    if is_turbo and isinstance(schedule, VariancePreserving):
        return with_zero_terminal_snr(schedule)
    return schedule
