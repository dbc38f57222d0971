"""Put a handler between a pipeline and its scheduler, for the duration of one call.

Pipelines decide from the signature of ``step`` whether to hand it eta and a generator,
so the hook has the signature of what it replaces. A pipeline that deep-copies its
scheduler must not drive the original, so a copied hook refuses to step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeGuard

from torch import Tensor

from ..errors import UserError

Step: TypeAlias = Callable[..., Any]
"""The step of a scheduler, bound to it."""

Handler: TypeAlias = Callable[[dict[str, Any], Step], Any]
"""(arguments of the step by name, the scheduler's own step) -> output of the step."""


class SteeredStep:
    """Replaces ``scheduler.step``: binds the arguments to their names for a handler.

    Args:
        original: the bound method.
        handler: called with the arguments by name and with `original`.
    """

    def __init__(self, original: Step, handler: Handler) -> None:
        self.original, self.handler = original, handler
        self.__signature__ = inspect.signature(original)
        self.__name__, self.__doc__ = "step", original.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(self.__signature__.bind(*args, **kwargs).arguments)
        for name, parameter in self.__signature__.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments |= arguments.pop(name, {})
        return self.handler(arguments, self.original)

    def __deepcopy__(self, memo: object) -> _CopiedStep:
        return _CopiedStep(self.__signature__)


class _CopiedStep:
    def __init__(self, signature: inspect.Signature) -> None:
        self.__signature__ = signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise UserError(
            "scheduler: this pipeline steps through a copy of its scheduler, which cannot be "
            "steered from outside; use a pipeline with one "
            "step of pipe.scheduler per iteration"
        )


@contextmanager
def steered(scheduler: Any, handler: Handler) -> Iterator[None]:
    """Put a handler in front of ``scheduler.step`` for the duration of a block.

    Args:
        scheduler: of diffusers.
        handler: see `SteeredStep`.

    Raises:
        UserError: the step is wrapped already.
    """
    if "step" in vars(scheduler):
        raise UserError(
            "scheduler: its step is already wrapped, by another steering call or another tool; "
            "finish that one first, or give the pipeline "
            "a scheduler of its own: pipe.scheduler = "
            "type(pipe.scheduler).from_config(pipe.scheduler.config)"
        )
    scheduler.step = SteeredStep(scheduler.step, handler)
    try:
        yield
    finally:
        del scheduler.step


def permute_buffers(scheduler: object, index: Tensor, like: Tensor) -> list[str]:
    """Reorder every tensor of a scheduler that has one row per particle.

    Such tensors are solver histories and halves of a second-order step.

    Args:
        scheduler: of diffusers.
        index (`Tensor`): int64 (rows,). Row r continues row ``index[r]``.
        like (`Tensor`): a batch of latents, (rows, ...). A tensor belongs to particles
            when it has as many rows and dimensions.

    Returns:
        `list[str]`: names of the reordered attributes.
    """

    def mine(value: object) -> TypeGuard[Tensor]:
        return (
            isinstance(value, Tensor)
            and value.ndim == like.ndim
            and value.ndim > 1
            and value.shape[0] == len(index)
        )

    names = []
    for name, value in vars(scheduler).items():
        if mine(value):
            setattr(scheduler, name, value[index.to(value.device)])
            names.append(name)
        elif isinstance(value, (list, tuple)) and any(mine(x) for x in value):
            moved = [x[index.to(x.device)] if mine(x) else x for x in value]
            setattr(scheduler, name, type(value)(moved))
            names.append(name)
    return names
