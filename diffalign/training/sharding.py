"""FSDP2: a network and its optimizer's state, spread over processes.

The optimizer's state of a sharded run is written without pickle: every process writes
its own shards as safetensors, and any number of processes can read them back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    TorchDynamoPlugin,
)
from safetensors import safe_open
from torch import Tensor
from torch.nn import Module

from ..errors import ConfigError, UserError
from ..runtime.distributed import copy_whole, is_sharded, local_part, reshard
from ..runtime.files import save_tensors, write_atomically

_FIELD = "--accelerate_config"
_OPTIMIZER = "optimizer"


def asks_for_sharding() -> bool:
    """Return whether accelerate's launcher was told to shard the weights."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def shard_on_cpus(mixed_precision: str, timeout: timedelta) -> None:
    """Let accelerate use FSDP2 also on CPUs. Call it before the `Accelerator` is built.

    accelerate shards on GPUs alone. torch's FSDP2 runs on CPUs as well, which the tests
    and dry runs of a cluster's settings need.

    Args:
        mixed_precision (`str`): Precision of the run.
        timeout (`timedelta`): How long a process waits for the others.
    """
    PartialState(cpu=True, timeout=timeout)
    state = AcceleratorState(
        mixed_precision, cpu=True, dynamo_plugin=TorchDynamoPlugin(), _from_accelerator=True
    )
    # A new one: the plugin remembers the blocks of an earlier trainer's network.
    plugin = FullyShardedDataParallelPlugin()
    if mixed_precision != "no":
        plugin.set_mixed_precision(mixed_precision)
    state.fsdp_plugin, state.distributed_type = plugin, DistributedType.FSDP
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        state.parallelism_config = ParallelismConfig()
    # accelerate copies it from here whenever the state is asked for.
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def check_engine(accelerator: Accelerator) -> None:
    """Refuse the engines that references and samplers cannot use.

    Args:
        accelerator (`Accelerator`): Of the run.

    Raises:
        ConfigError: FSDP1 or DeepSpeed ZeRO-3.
    """
    if accelerator.distributed_type == DistributedType.FSDP and not is_fsdp(accelerator):
        raise ConfigError(_FIELD, "fsdp_version 1 is not supported; set fsdp_version: 2")
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None and deepspeed.zero_stage >= 3:
        raise ConfigError(
            _FIELD,
            "DeepSpeed ZeRO-3 gathers weights by hooks that references and samplers go around; "
            "use fsdp2, which shards the weights too, or zero2",
        )


_UNET_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")


def is_fsdp(accelerator: Accelerator) -> bool:
    """Return whether FSDP2 shards the weights of the run."""
    return bool(getattr(accelerator, "is_fsdp2", False))


def block_names(network: Module) -> list[str]:
    """List the classes of blocks that FSDP2 gathers together.

    They are those that diffusers lists in `_no_split_modules`. A UNet lists classes
    that it may not have. A ControlNet lists none, and has the blocks of a UNet.

    Args:
        network: A network of diffusers, not yet sharded.
    """
    classes = {type(module).__name__ for module in network.modules()}
    names: Any = getattr(network, "_no_split_modules", None) or _UNET_BLOCKS
    return [name for name in names if name in classes]


def choose_units(accelerator: Accelerator, network: Module) -> None:
    """Tell FSDP2 which blocks of a network are gathered together.

    They are `block_names`, unless the accelerate config names others.

    Args:
        accelerator (`Accelerator`): Changed in place.
        network: A network of diffusers, not yet prepared.
    """
    if not is_fsdp(accelerator):
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = block_names(network)


def shard_frozen(accelerator: Accelerator, network: Any) -> Any:
    """Shard a frozen network over the same units as the policy.

    Args:
        accelerator (`Accelerator`): Its run uses FSDP2.
        network: On the device of the run. Changed in place.

    Returns:
        The network.
    """
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    choose_units(accelerator, network)
    return fsdp2_prepare_model(accelerator, network)


@contextmanager
def without_weights(accelerator: Accelerator) -> Iterator[None]:
    """Hide network and optimizer from accelerate while a checkpoint is saved or loaded.

    accelerate would write the frozen weights with the trained ones, and the index of
    its shards as a pickle.

    Args:
        accelerator (`Accelerator`): Of a sharded run. Others are left as they are.
    """
    if not is_fsdp(accelerator):
        yield
        return
    models, optimizers = accelerator._models, accelerator._optimizers
    accelerator._models, accelerator._optimizers = [], []
    try:
        yield
    finally:
        accelerator._models, accelerator._optimizers = models, optimizers


def load_weights(network: Module, targets: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Copy whole weights into those of a network, sharded or not.

    Args:
        network: The network that holds the targets.
        targets (`dict[str, Tensor]`): Weights by name, as a state dict has them.
        state (`dict[str, Tensor]`): Values by the same names.
    """
    for name, target in targets.items():
        copy_whole(target, state[name])
    reshard(network)  # gathered weights would still be the old ones


def plain_network(network: Any, state: dict[str, Tensor]) -> Any:
    """Build an unsharded network of diffusers around whole weights, without a copy.

    Args:
        network: The sharded network, of a class that FSDP2 made.
        state (`dict[str, Tensor]`): Its whole weights.

    Returns:
        A network of the class of diffusers.
    """
    plain_class: Any = type(network).__bases__[1]
    with torch.device("meta"):
        plain = plain_class.from_config(network.config)
    plain.load_state_dict(state, assign=True)
    return plain


# The optimizer's state ----------------------------------------------------------------


def _plain(optimizer: Any) -> Any:
    """Return torch's optimizer.

    torch makes the state by a step, which the gradient scaler of fp16 would refuse.
    """
    return getattr(optimizer, "optimizer", optimizer)


def _flat(network: Module, optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of an optimizer's state by name, and everything else."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    state: dict[str, Any] = get_optimizer_state_dict(network, _plain(optimizer))
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {"state": {}, "param_groups": state["param_groups"]}
    for parameter, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{parameter}|{name}"] = value
            else:
                rest["state"].setdefault(parameter, {})[name] = value
    return tensors, rest


def _is_written(tensor: Any, rank: int) -> bool:
    """Whether this process writes its part. Of copies, only the first is written."""
    if not is_sharded(tensor):
        return rank == 0
    coordinates = tensor.device_mesh.get_coordinate()
    copies = zip(tensor.placements, coordinates, strict=True)
    return all(not placement.is_replicate() or place == 0 for placement, place in copies)


def save_optimizer(accelerator: Accelerator, network: Module, folder: Path) -> None:
    """Write this process's part of the optimizer's state. All processes must call this.

    Args:
        accelerator (`Accelerator`): Of a sharded run. Nothing is written for others.
        network: The prepared network.
        folder (`Path`): Folder of the checkpoint.
    """
    if not is_fsdp(accelerator):
        return
    rank = accelerator.process_index
    for number, optimizer in enumerate(accelerator._optimizers):
        tensors, rest = _flat(network, optimizer)
        mine = {name: tensor for name, tensor in tensors.items() if _is_written(tensor, rank)}
        parts = {name: local_part(tensor) for name, tensor in mine.items()}
        held = {name: part for name, (part, _) in parts.items() if part.numel()}
        offsets = {name: list(parts[name][1]) for name in held}
        save_tensors(
            {name: part.detach().cpu().contiguous().clone() for name, part in held.items()},
            folder / f"{_OPTIMIZER}-{number}-{rank:05d}.safetensors",
            metadata={"offsets": json.dumps(offsets)},
        )
        if rank == 0:
            write_atomically(
                folder / f"{_OPTIMIZER}-{number}.json", (json.dumps(rest) + "\n").encode()
            )


def check_state(accelerator: Accelerator, folder: Path) -> None:
    """Check that a checkpoint's optimizer state is of this kind of run.

    Args:
        accelerator (`Accelerator`): Of the run.
        folder (`Path`): Folder of the checkpoint.

    Raises:
        UserError: The run is sharded and the checkpoint is not, or the other way round.
    """
    sharded = (folder / f"{_OPTIMIZER}-0.json").is_file()
    if sharded and not is_fsdp(accelerator):
        raise UserError(
            f"{folder} is of a run sharded by FSDP2; resume it with --accelerate_config fsdp2, "
            "or start a new run from its weights"
        )
    if is_fsdp(accelerator) and not sharded:
        raise UserError(
            f"{folder} is of a run that was not sharded; resume it without FSDP2, or start a "
            "new run from its weights"
        )


def load_optimizer(accelerator: Accelerator, network: Module, folder: Path) -> None:
    """Read the optimizer's state, of any number of processes. All must call this.

    Args:
        accelerator (`Accelerator`): Of a sharded run. Nothing is read for others.
        network: The prepared network, with the weights of the checkpoint.
        folder (`Path`): Folder of the checkpoint.

    Raises:
        UserError: The checkpoint holds only part of the state.
    """
    if not is_fsdp(accelerator):
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    for number, optimizer in enumerate(accelerator._optimizers):
        paths = sorted(folder.glob(f"{_OPTIMIZER}-{number}-*.safetensors"))
        index = folder / f"{_OPTIMIZER}-{number}.json"
        tensors, _ = _flat(network, optimizer)
        state: dict[str, Any] = json.loads(index.read_text("utf-8"))
        for name in _fill(tensors, paths):
            parameter, _, field = name.rpartition("|")
            state["state"].setdefault(parameter, {})[field] = tensors[name]
        # A weight without a gradient, as in some families' last block, has no state.
        options = StateDictOptions(strict=False)
        set_optimizer_state_dict(network, _plain(optimizer), state, options=options)


@torch.no_grad()
def _fill(tensors: dict[str, Tensor], paths: list[Path]) -> set[str]:
    """Copy into each tensor what the files hold of this process's part.

    Returns:
        Names of the tensors that the files hold.
    """
    names: set[str] = set()
    parts = {name: local_part(tensor) for name, tensor in tensors.items()}
    missing = {name: part.numel() for name, (part, _) in parts.items()}
    for path in paths:
        with safe_open(path, "pt") as file:
            offsets = json.loads(file.metadata()["offsets"])
            names |= offsets.keys()
            for name in offsets:
                part, start = parts[name]
                saved = file.get_slice(name)
                if not saved.get_shape():
                    part.copy_(file.get_tensor(name))
                    missing[name] = 0
                    continue
                common = _common(start, part.shape, offsets[name], saved.get_shape())
                if common is not None:
                    mine, theirs = common
                    part[mine].copy_(saved[theirs])
                    missing[name] -= part[mine].numel()
    incomplete = [name for name in sorted(names) if missing[name]]
    if incomplete:
        raise UserError(
            f"{paths[0].parent}: the state of the optimizer is incomplete ({incomplete[0]}); "
            "resume from an earlier checkpoint"
        )
    return names


def _common(
    start: Sequence[int], shape: Sequence[int], begin: Sequence[int], saved: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Find what two parts of a tensor share: its place in either, or None."""
    mine, theirs = [], []
    for a, n, b, m in zip(start, shape, begin, saved, strict=True):
        low, high = max(a, b), min(a + n, b + m)
        if low >= high:
            return None
        mine.append(slice(low - a, high - a))
        theirs.append(slice(low - b, high - b))
    return tuple(mine), tuple(theirs)
