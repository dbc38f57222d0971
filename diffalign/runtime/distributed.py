"""The processes of a command, started by torchrun or accelerate, or the only one."""

from __future__ import annotations

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


def is_sharded(tensor: object) -> bool:
    """Tell whether a tensor is spread over processes, as a `DTensor` of torch."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor, and return a plain one as it is.

    All processes must call this for the same tensors.
    """
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharded_modules(network: torch.nn.Module) -> list[Any]:
    """List the modules that hold shards of a network.

    After a forward pass the outermost parameters stay gathered until the backward pass.
    A change of the shards is seen once these modules are told to `reshard`.

    Args:
        network (`torch.nn.Module`): of FSDP, or any other.

    Returns:
        `list`: torch's `FSDPModule`s. Empty for a network that is not sharded.
    """
    return [module for module in network.modules() if hasattr(module, "set_reshard_after_forward")]


_ENDED: list[object] = []


def end_training(accelerator: Accelerator) -> None:
    """End a run of accelerate while its trainer still holds the network.

    The network's reducer would otherwise hold the last reference to the process group.
    It would end the group's threads while it holds the interpreter's lock, which these
    threads may need to end. With torch 2.8, a finished run was seen to hang so.
    """
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _ENDED.append(torch.distributed.group.WORLD)  # torch's own handle lets go of the lock first
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
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
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
