"""Condition a frozen network on users: attention to user tokens beside its own.

    Z = attention(Q, K, V) + scale softmax(Q K_u^T / sqrt(d)) V_u,
    K_u = W_k U,  V_u = W_v U,  U = LayerNorm(W u)

Q is the layer's own query. This is the decoupled cross attention of IP-Adapter (Ye et
al. 2023, arXiv 2308.06721), as PPD uses it (Dang et al. 2025, arXiv 2501.06655). W_v
starts at zero, so that a new adapter changes nothing.

Which layers get the second term:

- networks with cross attention (UNets, PixArt, Sana): the cross-attention layers;
- networks with joint attention of image and text (SD3, Flux, Qwen-Image): these layers,
  for the tokens of the image;
- networks with one sequence (Z-Image, Qwen-Image 2.1): all attention layers but those
  that see the text alone.

The term is added to the input of the layer's output projection, by hooks. It works with
every attention backend, with a LoRA on the same layers and with checkpointed
activations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config.ranges import suggestion
from ..errors import UserError, one_line
from ..runtime.files import read_tensors, save_tensors, write_atomically

WEIGHTS, CONFIG = "user_adapter.safetensors", "user_adapter.json"
_TEXT_ONLY = ("context_refiner",)


def user_attention(query: Tensor, user_key: Tensor, user_value: Tensor, scale: float) -> Tensor:
    """Compute the term that attention to user tokens adds.

    Args:
        query (`Tensor`): queries of a layer, (b, h, q, d).
        user_key (`Tensor`): keys of the user tokens, (b, h, n, d).
        user_value (`Tensor`): values of the user tokens, (b, h, n, d).
        scale (`float`): factor of the term.

    Returns:
        `Tensor`: (b, h, q, d).

    Example:
        ```python
        query = torch.ones(1, 1, 3, 2)
        key = torch.zeros(1, 1, 1, 2)
        value = torch.tensor([[[[0.5, 0.0]]]])  # of a single user token
        term = user_attention(query, key, value, scale=1.0)
        assert term.flatten(0, 2).tolist() == [[0.5, 0.0]] * 3
        ```
    """
    weights = query @ user_key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return scale * (weights.softmax(-1) @ user_value)


def attention_layers(network: nn.Module) -> dict[str, Any]:
    """Find the attention layers that see users.

    Args:
        network (`torch.nn.Module`): a UNet or transformer of diffusers.

    Returns:
        `dict[str, torch.nn.Module]`: name -> layer with `to_q`, `to_out` and `heads`.

    Raises:
        UserError: the network has none.
    """
    layers: dict[str, Any] = {
        name: layer
        for name, layer in network.named_modules()
        if hasattr(layer, "to_q") and getattr(layer, "to_out", None) is not None
    }
    crossing = {n: layer for n, layer in layers.items() if getattr(layer, "is_cross_attention", 0)}
    if crossing:
        return crossing
    joint = {n: m for n, m in layers.items() if getattr(m, "add_k_proj", None) is not None}
    if joint:
        return joint
    mixed = {n: m for n, m in layers.items() if not any(part in n for part in _TEXT_ONLY)}
    if not mixed:
        raise UserError(
            f"model: a {type(network).__name__} has no attention layers that could see users"
        )
    return mixed


class _Layer(nn.Module):
    """Keys and values of one attention layer."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        nn.init.zeros_(self.to_v.weight)


class UserAdapter(nn.Module):
    """The weights that read user tokens, and the hooks that add them to a network.

    Args:
        network (`torch.nn.Module`): the network. It stays as it is until `attach`.
        dim (`int`): size of a user token.
        tokens (`int`): tokens of a user.
        user_names (sequence of `str`, *optional*): users with embeddings of their own.
        expand (`int`, *optional*, defaults to `1`): tokens that the network sees of
            each. With a single one, attention has nothing to choose from.

    Attributes:
        table (`Parameter`, *optional*): embeddings of `user_names`, (users, tokens,
            dim).
        scale (`float`): factor of the second term. 0 is the network alone.
    """

    def __init__(
        self,
        network: nn.Module,
        dim: int,
        tokens: int,
        user_names: Sequence[str] = (),
        expand: int = 1,
    ) -> None:
        super().__init__()
        self.dim, self.tokens, self.expand, self.scale = dim, tokens, expand, 1.0
        self.user_names = list(user_names)
        self.table: nn.Parameter | None = None
        if self.user_names:
            self.table = nn.Parameter(torch.randn(len(self.user_names), tokens, dim))
        places = attention_layers(network)
        self.names = list(places)
        self.project = nn.Sequential(nn.Linear(dim, dim * expand), nn.LayerNorm(dim))
        self.layers = nn.ModuleList(
            _Layer(dim, places[name].to_q.out_features) for name in self.names
        )
        self._handles: list[Any] = []
        self._users: tuple[Tensor, Tensor | None] | None = None

    def embedding(self, users: str | Mapping[str, float]) -> Tensor:
        """Return the embedding of a user, or a mixture of several.

        Args:
            users (`str` or `Mapping[str, float]`): a name, or name -> weight. Weights
                need not sum to 1.

        Returns:
            `Tensor`: (tokens, dim).

        Raises:
            UserError: an unknown name, no name, or a weight that is not finite.
        """
        weights = {users: 1.0} if isinstance(users, str) else dict(users)
        if not weights or self.table is None:
            raise UserError(f"user: name one of {', '.join(self.user_names) or '(none)'}")
        total = torch.zeros_like(self.table[0])
        for name, weight in weights.items():
            if name not in self.user_names:
                shown = ", ".join(self.user_names[:20])
                raise UserError(
                    f"user: {name!r} is unknown{suggestion(name, self.user_names)}; there are "
                    f"{shown}{', ...' if len(self.user_names) > 20 else ''}"
                )
            if not math.isfinite(weight):
                raise UserError(f"user: the weight of {name!r} is {weight}, expected a number")
            total = total + weight * self.table[self.user_names.index(name)]
        return total

    def attach(self, network: nn.Module) -> None:
        """Add the hooks to a network.

        Args:
            network (`torch.nn.Module`): of the class that the adapter was made for.

        Raises:
            UserError: its attention layers have other names.
        """
        places = attention_layers(network)
        if list(places) != self.names:
            raise UserError(
                f"user adapter: it was made for other layers than those of this "
                f"{type(network).__name__}"
            )
        for name, weights in zip(self.names, self.layers, strict=True):
            assert isinstance(weights, _Layer)
            _Hook(self, places[name], weights).register(self._handles)

    def detach(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def set_users(self, users: Tensor | None, mask: Tensor | None = None) -> None:
        """Set the users of the rows of all following passes.

        Args:
            users (`Tensor`, *optional*): (n, tokens, dim). None runs the network alone.
            mask (`Tensor`, *optional*): (n,), 0 for rows without a user.
        """
        if users is None:
            self._users = None
            return
        widen, norm = self.project
        tokens = widen(users.to(next(self.project.parameters())))
        self._users = norm(tokens.unflatten(-1, (self.expand, self.dim)).flatten(1, 2)), mask

    @contextmanager
    def users(self, users: Tensor | None, mask: Tensor | None = None) -> Iterator[None]:
        """Set users while a block runs, and restore those of before.

        Arguments as `set_users`.
        """
        before = self._users
        self.set_users(users, mask)
        try:
            yield
        finally:
            self._users = before

    def term(self, layer: Any, weights: _Layer, query: Tensor) -> Tensor | None:
        """Compute what users add to the output of one layer.

        Args:
            layer: the attention layer.
            weights: of that layer.
            query (`Tensor`): output of its `to_q`, (b, q, inner).

        Returns:
            `Tensor`, *optional*: (b, q, inner). None without users.

        Raises:
            UserError: the rows of a pass are no multiple of the users.
        """
        if self._users is None or self.scale == 0:
            return None
        if weights.to_k.weight.device != query.device:  # the pipeline was moved
            self.to(query.device)
        users, mask = (None if x is None else x.to(query.device) for x in self._users)
        assert users is not None
        rows, repeats = len(query), len(query) // len(users)
        if repeats * len(users) != rows:
            raise UserError(
                f"user adapter: a pass of {rows} rows for {len(users)} users; Qwen-Image 2.1 runs "
                "prompts of unequal length one by one, so give it one prompt per batch"
            )
        dtype = weights.to_k.weight.dtype
        users = users.to(dtype)
        key, value = (
            part.repeat(repeats, 1, 1) if repeats > 1 else part
            for part in (weights.to_k(users), weights.to_v(users))
        )
        heads = layer.heads
        split = _heads(_normed(layer, query, heads), heads).to(key.dtype)
        term = user_attention(split, _heads(key, heads), _heads(value, heads), self.scale)
        term = term.transpose(1, 2).flatten(2)
        if mask is not None:
            mask = mask.repeat(repeats) if repeats > 1 else mask
            term = term * mask.to(term)[:, None, None]
        return term

    def save(self, folder: str | Path, facts: dict[str, Any] | None = None) -> None:
        """Write weights and sizes into a folder.

        Args:
            folder (`str` or `Path`): must exist.
            facts (`dict`, *optional*): plain values to keep beside the sizes.
        """
        state = {name: value.detach().cpu() for name, value in self.state_dict().items()}
        self.write(folder, state, facts)

    def write(
        self, folder: str | Path, state: dict[str, Tensor], facts: dict[str, Any] | None = None
    ) -> None:
        """Write gathered weights and sizes into a folder, see `save`.

        Args:
            folder (`str` or `Path`): must exist.
            state (`dict[str, Tensor]`): of `state_dict`, on the CPU.
            facts (`dict`, *optional*): plain values to keep beside the sizes.
        """
        save_tensors(state, Path(folder) / WEIGHTS)
        config = {
            "dim": self.dim,
            "tokens": self.tokens,
            "expand": self.expand,
            "users": self.user_names,
            "scale": self.scale,
            "layers": self.names,
            **(facts or {}),
        }
        write_atomically(Path(folder) / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


class _Hook:
    """Keep a layer's query, and add the users' term before its output projection."""

    def __init__(self, adapter: UserAdapter, layer: Any, weights: _Layer) -> None:
        self.adapter, self.layer, self.weights = adapter, layer, weights
        self.query: Tensor | None = None

    def register(self, handles: list[Any]) -> None:
        layer = self.layer
        out = layer.to_out[0] if isinstance(layer.to_out, nn.ModuleList) else layer.to_out
        handles.append(layer.to_q.register_forward_hook(self.keep))
        handles.append(out.register_forward_pre_hook(self.add))

    def keep(self, module: Any, arguments: Any, output: Tensor) -> None:
        self.query = output

    def add(self, module: Any, arguments: Any) -> Any:
        query, self.query = self.query, None
        if query is None:
            return None
        term = self.adapter.term(self.layer, self.weights, query)
        if term is None:
            return None
        hidden = arguments[0]
        return (hidden + term.to(hidden.dtype), *arguments[1:])


def _heads(values: Tensor, heads: int) -> Tensor:
    """(b, n, h d) -> (b, h, n, d)."""
    return values.unflatten(-1, (heads, -1)).transpose(1, 2)


def _normed(layer: Any, query: Tensor, heads: int) -> Tensor:
    """The query as the layer itself normalises it, per head or as a whole."""
    norm = getattr(layer, "norm_q", None)
    if norm is None:
        return query
    weight = getattr(norm, "weight", None)
    if weight is not None and weight.numel() == query.shape[-1]:
        return norm(query)
    return norm(query.unflatten(-1, (heads, -1))).flatten(-2)


def load_user_adapter(network: nn.Module, folder: str | Path) -> tuple[UserAdapter, dict[str, Any]]:
    """Read an adapter that `UserAdapter.save` wrote, and attach it to a network.

    Args:
        network (`torch.nn.Module`): of the class that the adapter was made for.
        folder (`str` or `Path`): where it lies.

    Returns:
        `tuple[UserAdapter, dict]`: the adapter on the network's device, and what was
        written beside it.

    Raises:
        UserError: there is no adapter, or it does not fit the network.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(f"user adapter: {str(folder)!r} holds no {CONFIG} and {WEIGHTS}")
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        users = [str(name) for name in config["users"]]
        sizes = [int(config[name]) for name in ("dim", "tokens", "expand")]
        adapter = UserAdapter(network, sizes[0], sizes[1], users, sizes[2])
        adapter.scale = float(config["scale"])
        names = list(config["layers"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"user adapter: {folder / CONFIG} is damaged ({error})") from None
    if names != adapter.names:
        raise UserError(
            f"user adapter: {str(folder)!r} was made for another network than a "
            f"{type(network).__name__}"
        )
    tensors, _ = read_tensors(folder / WEIGHTS)
    try:
        adapter.load_state_dict(tensors)
    except RuntimeError as error:
        reason = one_line(error)
        raise UserError(f"user adapter: {folder / WEIGHTS} does not fit ({reason})") from None
    adapter.to(next(network.parameters()).device)
    adapter.attach(network)
    return adapter, config
