"""Guidance with a negative model at inference.

Diffusion-NPO (Wang et al. 2025, arXiv 2505.11245) and Self-NPO (Wang et al. 2025, arXiv 2505.11777):

    eps       = eps_neg(x, c_neg) + g (eps_pos(x, c) - eps_neg(x, c_neg))
    theta_neg = theta + alpha (theta_pos - theta) + beta (theta_npo - theta)

The two branches of classifier-free guidance run under different weights, on the same rows as ordinary guidance. The pipeline is unmodified: its network's forward is wrapped while guidance is on. With LoRAs one
network serves both branches by switching adapters; with full weights a second network is merged once. alpha keeps both predictions correlated: at alpha 0 and large guidance the difference of two models
adds noise.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapters import NETWORKS, active_adapters, adapter_state, load_lora, set_adapter_state
from .batching import join_rows, pick_rows
from .exceptions import ConfigError, UserError


def negative_weights(base: Tensor, positive: Tensor, npo: Tensor, alpha: float, beta: float) -> Tensor:
    """theta + alpha (theta_pos - theta) + beta (theta_npo - theta), in the base's dtype.

    Args:
        base, positive, npo (`Tensor`): of one shape.
        alpha, beta (`float`): usually in [0, 1].
    """
    wide = torch.promote_types(base.dtype, torch.float32)
    theta, pos, neg = (x.to(base.device, wide) for x in (base, positive, npo))
    return (theta + alpha * (pos - theta) + beta * (neg - theta)).to(base.dtype)


def guided(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """eps_neg + scale (eps_pos - eps_neg)."""
    return negative + scale * (positive - negative)


class NegativeGuidance:
    """A positive and a negative network on an unmodified diffusers pipeline with classifier-free guidance (SD, SDXL and SD3 classes).

    ``with NegativeGuidance(pipe, negative="runs/npo"): pipe(prompt)``, or call it like the pipeline.

    Args:
        pipe: the pipeline. LoRAs that are active on it belong to the positive branch.
        positive (*optional*): LoRA (folder, file or Hub id) or a network of full weights; None is the pipeline's own network as it is.
        negative: LoRA or network of the negative model, e.g. trained by `diffusion_npo` or `self_npo`.
        alpha (`float`): share of the positive offset in the negative branch (the paper's choice is 1).
        beta (`float`): share of the negative offset.

    Raises:
        ConfigError: alpha or beta is no number; outside [0, 1] is a warning.
        UserError: a pipeline without classifier-free guidance, weights that do not fit, a LoRA beside full weights.
    """

    def __init__(self, pipe: Any, positive: Any = None, negative: Any = None, *, alpha: float = 1.0, beta: float = 1.0) -> None:
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not isinstance(value, (int, float)) or not -1e9 < value < 1e9:
                raise ConfigError(name, f"expected a number, usually in [0, 1], got {value!r}")
            if not 0 <= value <= 1:
                warnings.warn(f"{name}: {value} lies outside [0, 1], which the papers do not use", stacklevel=2)
        if negative is None:
            raise ConfigError("negative", "name a negative LoRA or network")
        self.network_name = next((n for n in NETWORKS if isinstance(getattr(pipe, n, None), torch.nn.Module)), "")
        if not self.network_name or not hasattr(type(pipe), "do_classifier_free_guidance"):
            raise UserError(
                f"pipe: {type(pipe).__name__} has no classifier-free guidance with two branches in one batch; use an SD, SDXL or SD3 pipeline"
            )
        self.pipe, self.positive, self.negative = pipe, positive, negative
        self.alpha, self.beta = float(alpha), float(beta)
        full = [isinstance(x, torch.nn.Module) for x in (positive, negative)]
        if full[1]:
            check_same_network(self.network, negative, "negative")
        if full[0]:
            check_same_network(self.network, positive, "positive")
        if (full[1] and positive is not None and not full[0]) or (full[0] and not full[1]):
            raise UserError(
                "positive, negative: one is a LoRA and the other a network; merge the LoRA into a network first (diffalign merge)"
            )
        if full[1] and active_adapters(self.network):
            raise UserError(
                "negative: a network cannot be combined with LoRAs that are active on the pipeline; fuse them first (pipe.fuse_lora())"
            )
        self._branches: tuple[Callable[..., Any], Callable[..., Any]] | None = None
        self._undo: list[Callable[[], None]] = []

    @property
    def network(self) -> Any:
        """The pipeline's denoiser."""
        return getattr(self.pipe, self.network_name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's call under negative guidance."""
        with self:
            return self.pipe(*args, **kwargs)

    def __enter__(self) -> NegativeGuidance:
        if self._branches is not None:
            raise UserError("negative guidance is on already; leave the first with-block before the next")
        try:
            self._branches = self._network_branches() if isinstance(self.negative, torch.nn.Module) else self._adapter_branches()
            self._patch()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        while self._undo:
            self._undo.pop()()
        self._branches = None

    def _patch(self) -> None:
        network = self.network
        there, before = "forward" in vars(network), vars(network).get("forward")

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(args, kwargs)

        network.forward = forward
        self._undo.append(lambda: setattr(network, "forward", before) if there else delattr(network, "forward"))

    def _forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Both halves of a guided batch under their own weights; a batch without guidance (scale at or below 1) is all positive."""
        assert self._branches is not None
        negative, positive = self._branches
        if not self.pipe.do_classifier_free_guidance:
            return positive(*args, **kwargs)
        first = next(x for x in (*args, kwargs.get("sample"), kwargs.get("hidden_states")) if isinstance(x, Tensor))
        rows = first.shape[0]
        if rows % 2:
            raise UserError(f"pipe: expected the two guidance branches in one batch, got {rows} rows")
        halves = (slice(0, rows // 2), slice(rows // 2, rows))
        parts = [
            branch(*pick_rows(args, rows, half), **pick_rows(dict(kwargs), rows, half))
            for branch, half in zip((negative, positive), halves, strict=True)
        ]
        return join_rows(parts, [rows // 2] * 2)

    def _network_branches(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """A second network with the merged weights, and the pipeline's own or the positive one."""
        base = self.network
        positive = base if self.positive is None else self.positive
        merged = copy.deepcopy(base)
        state, pos, npo = base.state_dict(), positive.state_dict(), self.negative.state_dict()
        merged.load_state_dict(
            {
                n: negative_weights(w, pos[n], npo[n], self.alpha, self.beta) if w.is_floating_point() else w
                for n, w in state.items()
            }
        )
        own = positive.forward  # before it is wrapped
        return merged.forward, own

    def _adapter_branches(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """One network, its adapters switched before each half."""
        network = self.network
        mine: list[str] = []
        before, state = active_adapters(network), adapter_state(self.pipe)
        pos = dict(before)

        def put_back() -> None:
            present = [name for name in mine if name in getattr(network, "peft_config", {})]
            if present:
                self.pipe.delete_adapters(present)
            if before:
                set_adapter_state(self.pipe, state)

        self._undo.append(put_back)
        for role, weights in (("positive", self.positive), ("negative", self.negative)):
            if weights is None:
                continue
            name = f"guidance_{role}"
            mine.append(name)
            load_lora(self.pipe, weights, name, role, denoiser_only=True, refused=("DoRA",))
            if role == "positive":
                pos[name] = 1.0
        neg = {name: self.alpha * scale for name, scale in pos.items()}
        neg["guidance_negative"] = self.beta
        own = network.forward

        def branch(adapters: Mapping[str, float]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                # Every adapter is named, with weight 0 where it has no part, so that switching never leaves one on.
                names = [*neg]
                network.set_adapters(names, [adapters.get(name, 0.0) for name in names])
                return own(*args, **kwargs)

            return forward

        return branch(neg), branch(pos)


def load_negative(pipe: Any, source: str) -> Any:
    """What `NegativeGuidance` takes as `negative`: the network of a pipeline folder, or a LoRA as it is named.

    Raises:
        UserError: see `load_network`.
    """
    return load_network(pipe, source) if (Path(source) / "model_index.json").is_file() else source


def check_same_network(base: Any, other: Any, role: str) -> None:
    """Refuses networks of another architecture or prediction type.

    Raises:
        UserError: names the first difference.
    """
    if type(base).__name__ != type(other).__name__:
        raise UserError(f"{role}: a {type(other).__name__} cannot be combined with this pipeline's {type(base).__name__}")
    check_same_states(base.state_dict(), other.state_dict(), role, "the pipeline's")


def check_same_states(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], role: str, whose: str) -> None:
    """Refuses weights of other names or shapes.

    Raises:
        UserError: names the first difference.
    """
    missing = sorted(set(mine) ^ set(theirs))
    if missing:
        raise UserError(
            f"{role}: its architecture differs from {whose}, e.g. in {missing[0]}; use weights of the same model family"
        )
    for name, weight in mine.items():
        if weight.shape != theirs[name].shape:
            shapes = f"{tuple(theirs[name].shape)}, {whose} {tuple(weight.shape)}"
            raise UserError(f"{role}: {name} has shape {shapes}; use weights of the same model family")


def load_network(pipe: Any, folder: str | Path) -> Any:
    """The denoiser of a pipeline folder or Hub id, for `NegativeGuidance`, with the prediction type checked.

    Raises:
        UserError: another prediction type or architecture.
    """
    from .backbones.loading import ModelSource

    source = ModelSource(str(folder))
    name = next(n for n in NETWORKS if isinstance(getattr(pipe, n, None), torch.nn.Module))
    if not source.has(name):
        raise UserError(f"negative: {str(folder)!r} has no {name}, this pipeline has one; use weights of the same model family")
    kinds = [
        str(config.get("prediction_type", "epsilon")) for config in (pipe.scheduler.config, source.component_config("scheduler"))
    ]
    if kinds[0] != kinds[1]:
        raise UserError(f"negative: it predicts {kinds[1]}, the pipeline's model {kinds[0]}; their outputs cannot be combined")
    network = getattr(pipe, name)
    other = source.load(name, network.dtype).to(network.device).eval()
    check_same_network(network, other, "negative")
    return other
