"""Guidance with a negative model at inference.

Diffusion-NPO (Wang et al. 2025, arXiv 2505.11245) and Self-NPO (Wang et al. 2025, arXiv 2505.11777):

    eps       = eps_neg(x, c_neg) + g (eps_pos(x, c) - eps_neg(x, c_neg))
    theta_neg = theta + alpha (theta_pos - theta) + beta (theta_npo - theta)

The two branches of classifier-free guidance run under different weights, on the same rows as ordinary guidance. The pipeline is
unmodified: its network's forward is wrapped while guidance is on. With LoRAs one network serves both branches by switching adapters;
with full weights a second network is merged once. alpha keeps both predictions correlated: at alpha 0 and large guidance the
difference of two models adds noise.

A pipeline puts its branches into one batch: the negative rows first, then the positive ones, then those of perturbed-attention
guidance. Which row is which is known from its place in that batch, also when steering hands the batch on in parts. Passes of
skip-layer and perturbed-attention guidance belong to the positive prompt and run under the positive weights.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbones.lora import (
    NETWORKS,
    active_adapters,
    adapters_kept,
    check_not_merged,
    fixed_adapters,
    load_lora,
    plain_state,
    strip_adapters,
)
from ..errors import ConfigError, UserError
from .micro_batches import call_rows, join_rows, perturbs_attention, pick_rows, replaced


def negative_weights(
    base: Tensor, positive: Tensor, npo: Tensor, alpha: float, beta: float
) -> Tensor:
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
        UserError: a pipeline without classifier-free guidance, weights that do not fit, a LoRA beside full weights, adapters on the
            pipeline that cannot be scaled (see `_check_adapters`).
    """

    def __init__(
        self,
        pipe: Any,
        positive: Any = None,
        negative: Any = None,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
    ) -> None:
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not isinstance(value, (int, float)) or not -1e9 < value < 1e9:
                raise ConfigError(name, f"expected a number, usually in [0, 1], got {value!r}")
            if not 0 <= value <= 1:
                warnings.warn(
                    f"{name}: {value} lies outside [0, 1], which the papers do not use",
                    stacklevel=2,
                )
        if negative is None:
            raise ConfigError("negative", "name a negative LoRA or network")
        self.network_name = next(
            (n for n in NETWORKS if isinstance(getattr(pipe, n, None), torch.nn.Module)), ""
        )
        if (
            not self.network_name
            or not hasattr(type(pipe), "do_classifier_free_guidance")
            or not hasattr(pipe, "encode_prompt")
            or "image_guidance_scale"
            in inspect.signature(type(pipe).__call__).parameters  # three branches
        ):
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
        if full[1] and (active_adapters(self.network) or fixed_adapters(self.network)):
            raise UserError(
                "negative: a network cannot be combined with LoRAs that are active on the pipeline; fuse them first (pipe.fuse_lora())"
            )
        self._branches: tuple[Callable[..., Any], Callable[..., Any]] | None = None
        self._undo = ExitStack()
        self._images: int | None = None
        """Images of the call that is running: rows of each branch."""

    @property
    def network(self) -> Any:
        """The pipeline's denoiser."""
        return getattr(self.pipe, self.network_name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's call under negative guidance."""
        with self:
            return self.pipe(*args, **kwargs)

    def __enter__(self) -> NegativeGuidance:
        if self._branches is not None or hasattr(vars(self.network).get("forward"), _MARK):
            raise UserError(
                "negative guidance is on already; leave the first with-block before the next"
            )
        with ExitStack() as undo:
            self._check_adapters()
            if isinstance(self.negative, torch.nn.Module):
                self._branches = self._network_branches()
            else:
                undo.enter_context(adapters_kept(self.pipe))
                self._branches = self._adapter_branches()
            undo.enter_context(replaced(self.network, "forward", self._forward, **{_MARK: True}))
            undo.enter_context(
                replaced(self.pipe, "encode_prompt", _counting(self.pipe.encode_prompt, self))
            )
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._branches = None
        self._undo.close()

    def _check_adapters(self) -> None:
        """Refuses adapters on the pipeline that cannot be taken apart.

        Raises:
            UserError: fused adapters that are still loaded; with alpha other than 1 a DoRA, whose effect is not proportional to its
                weight; adapters of other kinds than LoRA.
        """
        check_not_merged(self.network, "negative")
        for name, kind in fixed_adapters(self.network).items():
            if kind != "a DoRA" or self.alpha != 1:
                why = (
                    "is not proportional to its weight"
                    if kind == "a DoRA"
                    else "cannot be switched beside LoRAs"
                )
                raise UserError(
                    f"negative: the adapter {name!r} on the pipeline is {kind}, whose effect {why}; fuse it first (pipe.fuse_lora(), "
                    "pipe.unload_lora_weights())"
                )

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's call, every row under the weights of its branch."""
        assert self._branches is not None
        negative, positive = self._branches
        if not self.pipe.do_classifier_free_guidance or kwargs.get("skip_layers") is not None:
            return positive(*args, **kwargs)
        first = next(
            x
            for x in (*args, kwargs.get("sample"), kwargs.get("hidden_states"))
            if isinstance(x, Tensor)
        )
        rows, call = first.shape[0], call_rows(first.shape[0])
        perturbed = perturbs_attention(self.pipe)
        branches = 3 if perturbed else 2
        if (
            len(call.index) != rows
            or call.total % branches
            or (self._images or 0) * branches not in (0, call.total)
        ):
            raise UserError(
                f"pipe: expected the {branches} guidance branches of {self._images} images in one batch, got {call.total} rows; "
                f"{type(self.pipe).__name__} cannot be used with negative guidance"
            )
        first_positive = int((call.index < call.total // branches).sum())
        if first_positive in (0, rows):
            return (negative if first_positive else positive)(*args, **kwargs)
        halves = (slice(0, first_positive), slice(first_positive, rows))
        if perturbed:  # its attention layers divide the whole batch
            outs = [branch(*args, **kwargs) for branch in (negative, positive)]
            parts = [pick_rows(out, rows, half) for out, half in zip(outs, halves, strict=True)]
        else:
            parts = [
                branch(*pick_rows(args, rows, half), **pick_rows(dict(kwargs), rows, half))
                for branch, half in zip((negative, positive), halves, strict=True)
            ]
        return join_rows(parts, [half.stop - half.start for half in halves])

    def _network_branches(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """A second network with the merged weights, and the pipeline's own or the positive one."""
        merged = strip_adapters(copy.deepcopy(self.network))
        base = merged.state_dict()
        positive = base if self.positive is None else plain_state(self.positive)
        npo = plain_state(self.negative)
        merged.load_state_dict(
            {
                name: negative_weights(weight, positive[name], npo[name], self.alpha, self.beta)
                if weight.is_floating_point()
                else weight
                for name, weight in base.items()
            }
        )
        own = (
            self.network if self.positive is None else self.positive
        ).forward  # before it is wrapped
        return merged.forward, own

    def _adapter_branches(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """One network, its adapters switched before each half."""
        network = self.network
        pos = active_adapters(network)
        for role, weights in (("positive", self.positive), ("negative", self.negative)):
            if weights is not None:
                load_lora(
                    self.pipe,
                    weights,
                    f"guidance_{role}",
                    role,
                    denoiser_only=True,
                    refused=("DoRA",),
                )
        neg = {name: self.alpha * scale for name, scale in pos.items()}
        if self.positive is not None:
            pos["guidance_positive"], neg["guidance_positive"] = 1.0, self.alpha
        neg["guidance_negative"] = self.beta
        network.enable_lora()
        own = network.forward

        def branch(adapters: Mapping[str, float]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                # Every adapter is named, with weight 0 where it has no part, so that switching never leaves one on.
                names = [*neg]
                network.set_adapters(names, [adapters.get(name, 0.0) for name in names])
                return own(*args, **kwargs)

            return forward

        return branch(neg), branch(pos)


_MARK = "_negative_guidance"


def _counting(encode: Callable[..., Any], guidance: NegativeGuidance) -> Callable[..., Any]:
    """A pipeline's `encode_prompt` that tells the guidance how many images the call draws."""

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        encoded = encode(*args, **kwargs)
        embeddings = encoded[0] if isinstance(encoded, tuple) else encoded
        guidance._images = len(embeddings)
        return encoded

    return encode_prompt


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
        raise UserError(
            f"{role}: a {type(other).__name__} cannot be combined with this pipeline's {type(base).__name__}"
        )
    check_same_states(plain_state(base), plain_state(other), role, "the pipeline's")


def check_same_states(
    mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], role: str, whose: str
) -> None:
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
            raise UserError(
                f"{role}: {name} has shape {shapes}; use weights of the same model family"
            )


def load_network(pipe: Any, folder: str | Path) -> Any:
    """The denoiser of a pipeline folder or Hub id, for `NegativeGuidance`, with the prediction type checked.

    Raises:
        UserError: another prediction type or architecture.
    """
    from ..backbones.loading import ModelSource

    source = ModelSource(str(folder))
    name = next(n for n in NETWORKS if isinstance(getattr(pipe, n, None), torch.nn.Module))
    if not source.has(name):
        raise UserError(
            f"negative: {str(folder)!r} has no {name}, this pipeline has one; use weights of the same model family"
        )
    kinds = [
        str(config.get("prediction_type", "epsilon"))
        for config in (pipe.scheduler.config, source.component_config("scheduler"))
    ]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"negative: it predicts {kinds[1]}, the pipeline's model {kinds[0]}; their outputs cannot be combined"
        )
    network = getattr(pipe, name)
    other = source.load(name, network.dtype).to(network.device).eval()
    check_same_network(network, other, "negative")
    return other
