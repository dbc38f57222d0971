"""Run the network of a pipeline in micro-batches, or on distinct particles only.

The rows are counted. This lasts for one call of the pipeline, which is as before
afterwards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import ConfigError, UserError

Forward: TypeAlias = Callable[..., Any]
"""A network's forward, or another method that is replaced while a block runs."""

# All rows share these positions. Their first dimension may equal the batch by accident.
_SHARED = ("img_ids", "txt_ids", "image_rotary_emb")


def pick_rows(value: Any, batch: int, index: slice | Tensor, lists: bool = False) -> Any:
    """Pick the rows `index` of every tensor inside a nest of lists, tuples and dicts.

    Args:
        value: The nest. Tensors whose first dimension is not `batch` stay as they are.
        batch (`int`): Rows of the batch.
        index (`slice` or `Tensor`): The rows to pick.
        lists (`bool`, *optional*, defaults to `False`): Lists of `batch` tensors hold a
            row in each tensor.
    """
    if isinstance(value, Tensor):
        if value.ndim == 0 or value.shape[0] != batch:
            return value
        return value[index] if isinstance(index, slice) else value[index.to(value.device)]
    if isinstance(value, dict):
        return {
            k: v if k in _SHARED else pick_rows(v, batch, index, lists) for k, v in value.items()
        }
    if lists and _holds_rows(value, batch):
        places = range(batch)[index] if isinstance(index, slice) else index.tolist()
        return [value[place] for place in places]
    if isinstance(value, (list, tuple)):
        return type(value)(pick_rows(v, batch, index, lists) for v in value)
    return value


def _takes_lists(args: tuple[Any, ...]) -> bool:
    """Whether the network takes lists of rows, as Z-Image's does."""
    return bool(args) and isinstance(args[0], list)


def _holds_rows(value: Any, rows: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == rows
        and all(isinstance(row, Tensor) for row in value)
    )


def join_rows(parts: list[Any], sizes: list[int]) -> Any:
    """Join the outputs of micro-batches, concatenating tensors that have their rows.

    Args:
        parts (`list`): M outputs of one structure.
        sizes (`list[int]`): M numbers of rows.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        rows = all(p.ndim > 0 and p.shape[0] == n for p, n in zip(parts, sizes, strict=True))
        return torch.cat(parts) if rows else first
    if isinstance(first, dict):
        joined = {k: join_rows([p[k] for p in parts], sizes) for k in first}
        return type(first)(**joined) if type(first) is not dict else joined
    if all(_holds_rows(p, n) for p, n in zip(parts, sizes, strict=True)):
        return [row for part in parts for row in part]
    if isinstance(first, (list, tuple)):
        return type(first)(join_rows([p[i] for p in parts], sizes) for i in range(len(first)))
    return first


def perturbs_attention(pipe: object) -> bool:
    """Whether the pipeline's call is under perturbed-attention guidance.

    Its attention layers then split the whole batch.

    Args:
        pipe (`DiffusionPipeline`): The pipeline.
    """
    return bool(getattr(pipe, "do_perturbed_attention_guidance", False))


@dataclass(frozen=True)
class CallRows:
    """The rows of the pipeline's own batch with which a network is called.

    Attributes:
        total (`int`): Rows of the batch.
        index (`Tensor`): (rows of the call,) int64, ascending.
    """

    total: int
    index: Tensor


_rows: ContextVar[CallRows | None] = ContextVar("rows of the network's call", default=None)


def call_rows(rows: int) -> CallRows:
    """Return the rows of the running call: all of them, unless `Batches` split it.

    Args:
        rows (`int`): Rows that the network sees.

    Returns:
        `CallRows`.
    """
    current = _rows.get()
    return CallRows(rows, torch.arange(rows)) if current is None else current


@contextmanager
def _calling(total: int, index: Tensor) -> Iterator[None]:
    token = _rows.set(CallRows(total, index))
    try:
        yield
    finally:
        _rows.reset(token)


class Batches:
    """Run a network's forward whole, in micro-batches, or on distinct rows only.

    It counts what was run.

    Args:
        rows (`int`): Particles of the call. A batch holds a multiple of them (guidance
            doubles it).
        size (`int`, *optional*): Largest micro-batch. None runs the batch whole.
        grouped (`int`, *optional*, defaults to `0`): Particles per group, whose text
            conditioning must be the same. 0 does not check.
        whole (`Callable[[], bool]`, *optional*): Whether the network looks at the batch
            as a whole, as under perturbed-attention guidance. It then cannot be split.

    Attributes:
        calls (`int`): Forward passes.
        computed (`int`): Rows of them.
        same_as (`Tensor`, *optional*): (rows,) int64, the first row with an equal
            state. For `mode="prune"`.
    """

    def __init__(
        self,
        rows: int,
        size: int | None = None,
        grouped: int = 0,
        whole: Callable[[], bool] = lambda: False,
    ) -> None:
        self.rows, self.size, self.grouped, self.whole = rows, size, grouped, whole
        self.calls = self.computed = 0
        self.same_as: Tensor | None = None

    def forward(self, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the network's forward as these settings say.

        Args:
            original (`Callable`): The network's own forward.
            args (`tuple`): Its arguments.
            kwargs (`dict[str, Any]`): Its keyword arguments.

        Returns:
            What `original` returns for the whole batch.

        Raises:
            ConfigError: The batch must stay whole and is larger than `size`.
            UserError: Rows of a group differ in their text conditioning.
        """
        lists = _takes_lists(args)
        first = next(
            (
                x
                for x in (*args, kwargs.get("sample"), kwargs.get("hidden_states"), kwargs.get("z"))
                if isinstance(x, Tensor) or lists
            ),
            None,
        )
        batch = 0 if first is None or (isinstance(first, Tensor) and not first.ndim) else len(first)
        if batch == 0 or batch % self.rows:
            self.calls += 1
            self.computed += batch
            return original(*args, **kwargs)
        self._check_groups(kwargs.get("encoder_hidden_states"), batch)
        if self.same_as is not None:
            distinct, back = self._distinct(batch)
            if len(distinct) < batch:
                args = pick_rows(args, batch, distinct, lists)
                kwargs = pick_rows(kwargs, batch, distinct, lists)
                out = self._split(original, args, kwargs, batch, distinct)
                return pick_rows(out, len(distinct), back, lists)
        return self._split(original, args, kwargs, batch, torch.arange(batch))

    def _split(
        self,
        original: Forward,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        total: int,
        index: Tensor,
    ) -> Any:
        """Run some rows of a batch in micro-batches.

        `args` and `kwargs` hold the rows `index` of a batch of `total`.
        """
        batch = len(index)
        size = self.size or batch
        if size < batch and self.whole():
            raise ConfigError(
                "model_batch_size",
                f"perturbed-attention guidance needs all {batch} rows in one forward pass, got "
                f"{size}; leave it out",
            )
        if (size < batch or batch < total) and kwargs.get("kv_cache") is not None:
            raise ConfigError(
                "model_batch_size" if size < batch else "mode",
                "the pipeline keeps keys and values of all rows between the steps; pass "
                "use_kv_cache=False to the call",
            )
        self.calls += -(-batch // size)
        self.computed += batch
        parts, sizes, lists = [], [], _takes_lists(args)
        for start in range(0, batch, size):
            part = slice(start, min(start + size, batch))
            part_args, part_kwargs = args, kwargs
            if size < batch:
                part_args = pick_rows(args, batch, part, lists)
                part_kwargs = pick_rows(kwargs, batch, part, lists)
            with _calling(total, index[part]):
                parts.append(original(*part_args, **part_kwargs))
            sizes.append(part.stop - part.start)
        return parts[0] if len(parts) == 1 else join_rows(parts, sizes)

    def _distinct(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return the rows to compute, and every row's place among them.

        Both cover all guidance copies.
        """
        assert self.same_as is not None
        offsets = torch.arange(batch // self.rows)[:, None] * self.rows
        distinct, back = torch.unique((self.same_as + offsets).flatten(), return_inverse=True)
        return distinct, back

    def _check_groups(self, embeddings: object, batch: int) -> None:
        if not self.grouped or not isinstance(embeddings, Tensor) or embeddings.shape[0] != batch:
            return
        groups = embeddings.unflatten(0, (-1, self.grouped))
        if not torch.equal(groups, groups[:, :1].expand_as(groups)):
            raise UserError(
                "pipe: its rows are not one prompt's particles after the other, so they cannot "
                "be told apart; steer one prompt per call (prompts_per_call=1)"
            )
        self.grouped = 0  # one check is enough


@contextmanager
def replaced(owner: object, name: str, function: Forward, **marks: object) -> Iterator[None]:
    """Replace an object's method by `function` while the block runs.

    The object is as before afterwards, whatever happens.

    Args:
        owner: The object.
        name (`str`): Name of the method.
        function (`Callable`): What is called in its place.
        **marks: Attributes of the replacement.
    """
    there, before = name in vars(owner), vars(owner).get(name)

    @functools.wraps(getattr(owner, name))
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    for mark, value in marks.items():
        setattr(stand_in, mark, value)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        if there:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def batched(module: torch.nn.Module, name: str, batches: Batches) -> Iterator[None]:
    """Run `module.name` through `batches` on this instance while the block runs.

    Args:
        module: The network.
        name (`str`): Name of the method.
        batches (`Batches`): How it is run.
    """
    original = getattr(module, name)
    with replaced(module, name, lambda *args, **kwargs: batches.forward(original, args, kwargs)):
        yield
