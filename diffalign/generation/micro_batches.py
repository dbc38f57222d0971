"""Networks of a pipeline run in micro-batches, or on distinct particles only, and count their rows, for the duration of one call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, UserError

# Positions, shared by all rows: their first dimension may equal the batch by accident.
_SHARED = ("img_ids", "txt_ids", "image_rotary_emb")


def pick_rows(value: Any, batch: int, index: slice | Tensor) -> Any:
    """The rows `index` of every tensor with `batch` rows inside a nest of lists, tuples and dicts."""
    if isinstance(value, Tensor):
        if value.ndim == 0 or value.shape[0] != batch:
            return value
        return value[index] if isinstance(index, slice) else value[index.to(value.device)]
    if isinstance(value, dict):
        return {k: v if k in _SHARED else pick_rows(v, batch, index) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(pick_rows(v, batch, index) for v in value)
    return value


def join_rows(parts: list[Any], sizes: list[int]) -> Any:
    """One output of the outputs of micro-batches, concatenated where they have their rows."""
    first = parts[0]
    if isinstance(first, Tensor):
        rows = all(p.ndim > 0 and p.shape[0] == n for p, n in zip(parts, sizes, strict=True))
        return torch.cat(parts) if rows else first
    if isinstance(first, dict):
        joined = {k: join_rows([p[k] for p in parts], sizes) for k in first}
        return type(first)(**joined) if type(first) is not dict else joined
    if isinstance(first, (list, tuple)):
        return type(first)(join_rows([p[i] for p in parts], sizes) for i in range(len(first)))
    return first


def perturbs_attention(pipe: Any) -> bool:
    """Whether the pipeline's call is under perturbed-attention guidance, whose attention layers divide the whole batch."""
    return bool(getattr(pipe, "do_perturbed_attention_guidance", False))


@dataclass(frozen=True)
class CallRows:
    """Which rows of the pipeline's own batch a network is called with.

    Attributes:
        total: rows of the batch.
        index: (rows of the call,) int64, ascending.
    """

    total: int
    index: Tensor


_rows: ContextVar[CallRows | None] = ContextVar("rows of the network's call", default=None)


def call_rows(rows: int) -> CallRows:
    """The rows of the call that is running, of which the network sees `rows`: all, unless `Batches` took it apart."""
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
    """How a network's forward is run: whole, in micro-batches, on distinct rows only; and what was run.

    Args:
        rows (`int`): particles of the call; a batch holds a multiple of them (guidance doubles it).
        size (`int`, *optional*): largest micro-batch; None runs the batch whole.
        grouped (`int`): particles per group, whose text conditioning must be the same; 0 does not check.
        whole: whether the network looks at the batch as a whole, as under perturbed-attention guidance; it then cannot be taken apart.

    Attributes:
        calls, computed: forward passes and rows of them.
        same_as: (rows,) int64 or None: the first row with an equal state, for `mode="prune"`.
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

    def forward(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        first = next(
            (
                x
                for x in (*args, kwargs.get("sample"), kwargs.get("hidden_states"), kwargs.get("z"))
                if isinstance(x, Tensor)
            ),
            None,
        )
        if first is None or first.ndim == 0 or first.shape[0] % self.rows:
            self.calls += 1
            self.computed += 0 if first is None or first.ndim == 0 else first.shape[0]
            return original(*args, **kwargs)
        batch = first.shape[0]
        self._check_groups(kwargs.get("encoder_hidden_states"), batch)
        if self.same_as is not None:
            distinct, back = self._distinct(batch)
            if len(distinct) < batch:
                args, kwargs = pick_rows(args, batch, distinct), pick_rows(kwargs, batch, distinct)
                out = self._split(original, args, kwargs, batch, distinct)
                return pick_rows(out, len(distinct), back)
        return self._split(original, args, kwargs, batch, torch.arange(batch))

    def _split(
        self, original: Callable[..., Any], args: Any, kwargs: Any, total: int, index: Tensor
    ) -> Any:
        """Runs the rows `index` of a batch of `total`, which are those in `args` and `kwargs`, in micro-batches."""
        batch = len(index)
        size = self.size or batch
        if size < batch and self.whole():
            raise ConfigError(
                "model_batch_size",
                f"perturbed-attention guidance needs all {batch} rows in one forward pass, got {size}; leave it out",
            )
        self.calls += -(-batch // size)
        self.computed += batch
        parts, sizes = [], []
        for start in range(0, batch, size):
            part = slice(start, min(start + size, batch))
            own = (
                (args, kwargs)
                if size >= batch
                else (pick_rows(args, batch, part), pick_rows(kwargs, batch, part))
            )
            with _calling(total, index[part]):
                parts.append(original(*own[0], **own[1]))
            sizes.append(part.stop - part.start)
        return parts[0] if len(parts) == 1 else join_rows(parts, sizes)

    def _distinct(self, batch: int) -> tuple[Tensor, Tensor]:
        """(rows to compute, for every row the place of its result among them), over all guidance copies."""
        assert self.same_as is not None
        offsets = torch.arange(batch // self.rows)[:, None] * self.rows
        distinct, back = torch.unique((self.same_as + offsets).flatten(), return_inverse=True)
        return distinct, back

    def _check_groups(self, embeddings: Any, batch: int) -> None:
        if not self.grouped or not isinstance(embeddings, Tensor) or embeddings.shape[0] != batch:
            return
        groups = embeddings.unflatten(0, (-1, self.grouped))
        if not torch.equal(groups, groups[:, :1].expand_as(groups)):
            raise UserError(
                "pipe: its rows are not one prompt's particles after the other, so they cannot be told apart; "
                "steer one prompt per call (prompts_per_call=1)"
            )
        self.grouped = 0  # once is enough


@contextmanager
def replaced(owner: Any, name: str, function: Callable[..., Any], **marks: Any) -> Iterator[None]:
    """`function` in place of an object's method, with attributes `marks`; the object is as before afterwards, whatever happens."""
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
def batched(module: Any, name: str, batches: Batches) -> Iterator[None]:
    """Puts `batches` in front of ``module.name`` on this instance and takes it away afterwards."""
    original = getattr(module, name)
    with replaced(module, name, lambda *args, **kwargs: batches.forward(original, args, kwargs)):
        yield
