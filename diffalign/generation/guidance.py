"""Classifier-free guidance with a negative model, as in Diffusion-NPO and Self-NPO.

Diffusion-NPO (Wang et al. 2025, arXiv 2505.11245) and Self-NPO (Wang et al. 2025, arXiv
2505.11777) guide with two models:

    eps       = eps_neg(x, c_neg) + g (eps_pos(x, c) - eps_neg(x, c_neg))
    theta_neg = theta + alpha (theta_pos - theta) + beta (theta_npo - theta)

The two branches of guidance run under different weights, on the same rows as ordinary
guidance. The pipeline stays unmodified: its network's forward is wrapped while guidance
is on. With LoRAs one network serves both branches by switching adapters. With full
weights a second network is merged once. alpha keeps both predictions correlated. At
alpha 0 and large guidance the difference of two models adds noise.

A pipeline puts its branches into one batch: the negative rows first, then the positive
ones, then those of perturbed-attention guidance. A row's place in that batch tells its
branch, also when steering runs the batch in parts. Passes of skip-layer and
perturbed-attention guidance belong to the positive prompt and run under the positive
weights.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbones import backbone_class
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
from ..runtime.protocols import GuidedPipeline, Pipeline
from .micro_batches import Forward, call_rows, join_rows, perturbs_attention, pick_rows, replaced


def negative_weights(
    base: Tensor, positive: Tensor, npo: Tensor, alpha: float, beta: float
) -> Tensor:
    """Return theta + alpha (theta_pos - theta) + beta (theta_npo - theta).

    Args:
        base (`Tensor`): theta, of any shape.
        positive (`Tensor`): theta_pos, of the same shape.
        npo (`Tensor`): theta_npo, of the same shape.
        alpha (`float`): Share of the positive offset, usually in [0, 1].
        beta (`float`): Share of the negative offset, usually in [0, 1].

    Returns:
        `Tensor` in the base's shape and dtype.
    """
    wide = torch.promote_types(base.dtype, torch.float32)
    theta, pos, neg = (x.to(base.device, wide) for x in (base, positive, npo))
    return (theta + alpha * (pos - theta) + beta * (neg - theta)).to(base.dtype)


def guided(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Return eps_neg + scale (eps_pos - eps_neg).

    Args:
        positive (`Tensor`): eps_pos, of any shape.
        negative (`Tensor`): eps_neg, of the same shape.
        scale (`float`): Guidance scale.
    """
    return negative + scale * (positive - negative)


class NegativeGuidance:
    """Guide a diffusers pipeline with a positive and a negative network.

    The pipeline stays unmodified. It must have classifier-free guidance (SD, SDXL, SD3
    and Sana classes). Use it as a context manager, or call it like the pipeline.

    Args:
        pipe (`DiffusionPipeline`): The pipeline. LoRAs that are active on it belong to
            the positive branch.
        positive (`str` or `torch.nn.Module`, *optional*): A LoRA (folder, file or Hub
            id) or a network of full weights. None is the pipeline's own network as it
            is.
        negative (`str` or `torch.nn.Module`): LoRA or network of the negative model,
            e.g. trained by `diffusion_npo` or `self_npo`.
        alpha (`float`, *optional*, defaults to `1.0`): Share of the positive offset in
            the negative branch. The paper uses 1.
        beta (`float`, *optional*, defaults to `1.0`): Share of the negative offset.

    Raises:
        ConfigError: alpha or beta is no number, or `negative` is missing. Values
            outside [0, 1] are a warning.
        UserError: The pipeline has no classifier-free guidance, weights do not fit, or
            a LoRA stands beside full weights. When guidance starts: adapters on the
            pipeline cannot be scaled, or guidance is on already.

    Example:
        >>> from diffalign.generation.guidance import NegativeGuidance, load_network
        >>> from diffalign.generation.pipelines import load_pipeline
        >>> pipe = load_pipeline("shapes", device="cpu")
        >>> pipe.set_progress_bar_config(disable=True)
        >>> prompt = "a large yellow star on the right of a black background"
        >>> with NegativeGuidance(pipe, negative=load_network(pipe, "shapes")):
        ...     image = pipe(prompt, num_inference_steps=2).images[0]
        >>> image.size
        (64, 64)
    """

    def __init__(
        self,
        pipe: GuidedPipeline,
        positive: str | torch.nn.Module | None = None,
        negative: str | torch.nn.Module | None = None,
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
        if not self.network_name or not _has_two_branches(pipe):
            raise UserError(
                f"pipe: {type(pipe).__name__} has no classifier-free guidance with two branches "
                "in one batch; use an SD, SDXL, SD3 or Sana pipeline"
            )
        self.pipe, self.positive, self.negative = pipe, positive, negative
        self.alpha, self.beta = float(alpha), float(beta)
        full = [isinstance(x, torch.nn.Module) for x in (positive, negative)]
        if isinstance(negative, torch.nn.Module):
            check_same_network(self.network, negative, "negative")
        if isinstance(positive, torch.nn.Module):
            check_same_network(self.network, positive, "positive")
        if (full[1] and positive is not None and not full[0]) or (full[0] and not full[1]):
            raise UserError(
                "positive, negative: one is a LoRA and the other a network; merge the LoRA "
                "into a network first (diffalign merge)"
            )
        if full[1] and (active_adapters(self.network) or fixed_adapters(self.network)):
            raise UserError(
                "negative: a network cannot be combined with LoRAs that are active on the "
                "pipeline; fuse them first (pipe.fuse_lora())"
            )
        self._branches: tuple[Forward, Forward] | None = None
        self._undo = ExitStack()
        self._images: int | None = None
        """Images of the running call, which is the number of rows of each branch."""

    @property
    def network(self) -> Any:
        """The pipeline's denoiser."""
        return getattr(self.pipe, self.network_name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the pipeline under negative guidance, with the pipeline's arguments."""
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

    def __exit__(self, *exception: object) -> None:
        self._branches = None
        self._undo.close()

    def _check_adapters(self) -> None:
        """Refuse adapters on the pipeline that cannot be scaled.

        Raises:
            UserError: Fused adapters are still loaded, there are adapters of other
                kinds than LoRA, or there is a DoRA and alpha is not 1. A DoRA's effect
                is not proportional to its weight.
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
                    f"negative: the adapter {name!r} on the pipeline is {kind}, whose effect "
                    f"{why}; fuse it first (pipe.fuse_lora(), pipe.unload_lora_weights())"
                )

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network's call, every row under the weights of its branch."""
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
                f"pipe: expected the {branches} guidance branches of {self._images} images in "
                f"one batch, got {call.total} rows; {type(self.pipe).__name__} cannot be used "
                "with negative guidance"
            )
        first_positive = int((call.index < call.total // branches).sum())
        if first_positive in (0, rows):
            return (negative if first_positive else positive)(*args, **kwargs)
        halves = (slice(0, first_positive), slice(first_positive, rows))
        if perturbed:  # its attention layers split the whole batch
            outs = [branch(*args, **kwargs) for branch in (negative, positive)]
            parts = [pick_rows(out, rows, half) for out, half in zip(outs, halves, strict=True)]
        else:
            parts = [
                branch(*pick_rows(args, rows, half), **pick_rows(dict(kwargs), rows, half))
                for branch, half in zip((negative, positive), halves, strict=True)
            ]
        return join_rows(parts, [half.stop - half.start for half in halves])

    def _network_branches(self) -> tuple[Forward, Forward]:
        """Return two branches, of which the negative one is a network merged here."""
        merged = strip_adapters(copy.deepcopy(self.network))
        base = merged.state_dict()
        assert not isinstance(self.positive, str) and not isinstance(self.negative, str)
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
        positive_network: Any = self.network if self.positive is None else self.positive
        return merged.forward, positive_network.forward  # before it is wrapped

    def _adapter_branches(self) -> tuple[Forward, Forward]:
        """Return two branches of one network, which switch its adapters."""
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
        unwrapped = network.forward

        def branch(adapters: Mapping[str, float]) -> Forward:
            def forward(*args: Any, **kwargs: Any) -> Any:
                # Every adapter is named, some with weight 0, so that none of the other
                # branch stays on.
                names = [*neg]
                network.set_adapters(names, [adapters.get(name, 0.0) for name in names])
                return unwrapped(*args, **kwargs)

            return forward

        return branch(neg), branch(pos)


_MARK = "_negative_guidance"


def _has_two_branches(pipe: object) -> bool:
    """Whether a pipeline puts two guidance branches into one batch."""
    family = backbone_class(type(pipe).__name__)
    return (
        hasattr(type(pipe), "do_classifier_free_guidance")
        and (family is None or family.guides_in_one_batch)
        and hasattr(pipe, "encode_prompt")
        and "image_guidance_scale" not in inspect.signature(type(pipe).__call__).parameters
    )


def _counting(encode: Forward, guidance: NegativeGuidance) -> Forward:
    """Wrap `encode_prompt` so that the guidance knows how many images a call draws."""

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        encoded = encode(*args, **kwargs)
        embeddings = encoded[0] if isinstance(encoded, tuple) else encoded
        guidance._images = len(embeddings)
        return encoded

    return encode_prompt


def load_negative(pipe: Pipeline, source: str) -> str | torch.nn.Module:
    """Load what `NegativeGuidance` takes as `negative`.

    Args:
        pipe (`DiffusionPipeline`): The pipeline.
        source (`str`): A pipeline folder, or a LoRA.

    Returns:
        The network of a pipeline folder. A LoRA's name stays as it is.

    Raises:
        UserError: See `load_network`.
    """
    return load_network(pipe, source) if (Path(source) / "model_index.json").is_file() else source


def check_same_network(base: torch.nn.Module, other: torch.nn.Module, role: str) -> None:
    """Refuse a network of another architecture.

    Args:
        base (`torch.nn.Module`): The pipeline's network.
        other (`torch.nn.Module`): The other network.
        role (`str`): What messages call the other network.

    Raises:
        UserError: The networks differ. The message names the first difference.
    """
    if type(base).__name__ != type(other).__name__:
        raise UserError(
            f"{role}: a {type(other).__name__} cannot be combined with this pipeline's "
            f"{type(base).__name__}"
        )
    check_same_states(plain_state(base), plain_state(other), role, "the pipeline's")


def check_same_states(
    mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], role: str, whose: str
) -> None:
    """Refuse weights of other names or shapes.

    Args:
        mine (`Mapping[str, Tensor]`): The weights to compare with.
        theirs (`Mapping[str, Tensor]`): The weights to check.
        role (`str`): What messages call the checked weights.
        whose (`str`): Whose the first weights are, in words.

    Raises:
        UserError: They differ. The message names the first difference.
    """
    missing = sorted(set(mine) ^ set(theirs))
    if missing:
        raise UserError(
            f"{role}: its architecture differs from {whose}, e.g. in {missing[0]}; use weights "
            "of the same model family"
        )
    for name, weight in mine.items():
        if weight.shape != theirs[name].shape:
            shapes = f"{tuple(theirs[name].shape)}, {whose} {tuple(weight.shape)}"
            raise UserError(
                f"{role}: {name} has shape {shapes}; use weights of the same model family"
            )


def load_network(pipe: Pipeline, folder: str | Path) -> torch.nn.Module:
    """Load the denoiser of a pipeline folder or Hub id for `NegativeGuidance`.

    Args:
        pipe (`DiffusionPipeline`): The pipeline that it must fit.
        folder (`str` or `Path`): Pipeline folder or Hub id.

    Returns:
        `torch.nn.Module` on the device and in the dtype of the pipeline's network.

    Raises:
        UserError: It has another prediction type or architecture.
    """
    from ..backbones.loading import ModelSource

    source = ModelSource(str(folder))
    name = next(n for n in NETWORKS if isinstance(getattr(pipe, n, None), torch.nn.Module))
    if not source.has(name):
        raise UserError(
            f"negative: {str(folder)!r} has no {name}, this pipeline has one; use weights of "
            "the same model family"
        )
    kinds = [
        str(config.get("prediction_type", "epsilon"))
        for config in (pipe.scheduler.config, source.component_config("scheduler"))
    ]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"negative: it predicts {kinds[1]}, the pipeline's model {kinds[0]}; their outputs "
            "cannot be combined"
        )
    network = getattr(pipe, name)
    other = source.load(name, network.dtype).to(network.device).eval()
    check_same_network(network, other, "negative")
    return other
