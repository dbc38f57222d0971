"""The processes of a command, started by torchrun or accelerate, or the only one."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from .protocols import DeviceLike

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator, PartialState
    from torch import Tensor

T = TypeVar("T")


def process_rank() -> int:
    """Return the number of this process among those of torchrun or accelerate.

    It is known also before the process has joined them. 0 is the first one, or the only
    one.
    """
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """Return how many processes torchrun or accelerate started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_sharded(tensor: object) -> bool:
    """Tell whether a tensor is spread over processes, as a `DTensor` of torch."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor, and return a plain one as it is.

    All processes must call this for the same tensors.
    """
    if not hasattr(tensor, "full_tensor"):
        return tensor
    gathered = tensor.full_tensor()
    # On CPUs it is a promise, which files cannot hold.
    return gathered.wait() if hasattr(gathered, "wait") else gathered


def local_part(tensor: Any) -> tuple[Tensor, tuple[int, ...]]:
    """Return this process's part of a tensor, and where it begins in the whole.

    Args:
        tensor (`Tensor`): a sharded or a plain one.

    Returns:
        `tuple[Tensor, tuple[int, ...]]`: the part, which shares its memory with the
        tensor, and one offset per dimension.
    """
    if not is_sharded(tensor):
        return tensor, (0,) * tensor.ndim
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tensor.to_local(), tuple(offset)


def copy_whole(target: Tensor, values: Tensor) -> None:
    """Copy a whole tensor into a sharded or a plain one, without communication.

    Args:
        target (`Tensor`): changed in place.
        values (`Tensor`): of the same whole shape, on any device.
    """
    import torch

    part, start = local_part(target)
    place = tuple(slice(a, a + n) for a, n in zip(start, part.shape, strict=True))
    with torch.no_grad():
        part.copy_(values[place])


def sharded_modules(network: torch.nn.Module) -> list[Any]:
    """List the modules that hold shards of a network.

    Args:
        network (`torch.nn.Module`): of FSDP, or any other.

    Returns:
        `list`: torch's `FSDPModule`s. Empty for a network that is not sharded.
    """
    return [module for module in network.modules() if hasattr(module, "set_reshard_after_forward")]


def reshard(network: torch.nn.Module) -> None:
    """Let go of the weights that a forward pass has gathered.

    After one without a backward pass the outermost parameters stay gathered. A sharded
    network then shows them in place of its own, and does not see when these change.

    Args:
        network (`torch.nn.Module`): of FSDP, or any other.
    """
    for module in sharded_modules(network):
        module.reshard()


_ENDED: list[object] = []


def end_training(accelerator: Accelerator) -> None:
    """End a run of accelerate while its trainer still holds the network.

    The network's reducer would otherwise hold the last reference to the process group.
    It would end the group's threads while it holds the interpreter's lock, which these
    threads may need to end. With torch 2.8, a finished run was seen to hang so.

    A thread that still holds the tensors of the last collective needs that lock too. At
    the end of the process it does not get it, and aborts the process. So the threads
    are ended before that.
    """
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _ENDED.append(torch.distributed.group.WORLD)  # torch's own handle lets go of the lock first
        atexit.register(_ENDED.clear)
    accelerator.end_training()


@dataclass
class DistributedContext:
    """This process among those of torchrun or accelerate, alone where there are none.

    Attributes:
        rank (`int`): its number. 0 is the first one.
        world (`int`): how many there are.
        device (`str`): where it computes.
        state (*optional*): the `PartialState` of accelerate. None where it is alone.
    """

    rank: int
    world: int
    device: DeviceLike
    state: PartialState | None = None

    @classmethod
    def start(cls, device: DeviceLike) -> DistributedContext:
        """Join the other processes.

        Args:
            device (`str`): ``cpu``, or what the only process computes on.
        """
        if process_count() == 1:
            return cls(0, 1, device)
        from datetime import timedelta

        import torch
        from accelerate import PartialState

        # Started by torchrun on a machine without accelerators, accelerate would let
        # every process work for itself.
        on_cpu = device == "cpu" or not torch.accelerator.is_available()
        # A process whose share was scored before waits for the others at the end,
        # however long they need.
        state = PartialState(cpu=on_cpu, timeout=timedelta(days=30))
        return cls(state.process_index, state.num_processes, str(state.device), state)

    def gather(self, mine: list[T]) -> list[T]:
        """Collect the items of all processes, in the order of their ranks."""
        if self.world == 1:
            return mine
        from accelerate.utils import gather_object

        return gather_object(mine)

    def wait(self) -> None:
        """Wait for all processes to come here."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def stop(self) -> None:
        """Leave the other processes."""
        if self.state is not None:
            self.state.destroy_process_group()
