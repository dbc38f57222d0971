"""Differentiable predictors that say whether an image follows its condition image.

A `Consistency` reads pixels and returns logits of classes, a map, or one number per
image. Ctrl-U (Zhang et al. 2024, arXiv 2410.11236) and ControlNet++ (Li et al. 2024,
arXiv 2404.07987) back-propagate through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

from ..errors import ConfigError, UserError, one_line

Kind = Literal["classes", "map", "scalar"]
KINDS = get_args(Kind)
IGNORED = 255
"""Class of pixels that have no label."""


class Consistency(Protocol):
    """Reads from pixels what a condition image prescribes.

    Attributes:
        name (`str`): Name for messages.
        kind (`str`): `classes`, `map` or `scalar`.
    """

    name: str
    kind: str

    def predict(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Predict, with a gradient.

        Args:
            pixels (`Tensor`): (n, 3, H, W) in [0, 1].
            prompts (`Sequence[str]`): n prompts.

        Returns:
            `Tensor`: Logits (n, K, h, w), a map (n, C, h, w), or (n,).
        """
        ...

    def label(self, control: Tensor) -> Tensor:
        """Read the label from condition images, without a gradient.

        Args:
            control (`Tensor`): (n, 3, H, W) in [0, 1].

        Returns:
            `Tensor`: Classes (n, h, w) int64, a map (n, C, h, w), or (n,).
        """
        ...


def consistency_loss(
    prediction: Tensor, label: Tensor, kind: str, ignore_index: int = IGNORED
) -> tuple[Tensor, Tensor]:
    """Compute how far a prediction is from the label, per pixel.

    Args:
        prediction (`Tensor`): Of `Consistency.predict`.
        label (`Tensor`): Of `Consistency.label`.
        kind (`str`): `classes`: cross entropy. `map`: squared error. `scalar`: label
            minus prediction.
        ignore_index (`int`, *optional*, defaults to `255`): Class without a loss.

    Returns:
        `tuple[Tensor, Tensor]`: The loss, 0 for ignored pixels, and which pixels count,
        each (n, pixels).

    Raises:
        ValueError: Another kind.
    """
    if kind == "classes":
        loss = cross_entropy(prediction, label, ignore_index=ignore_index, reduction="none")
        return loss.flatten(1), (label != ignore_index).flatten(1)
    if kind == "map":
        loss = (prediction - label).square().flatten(1)
        return loss, torch.ones_like(loss, dtype=torch.bool)
    if kind == "scalar":
        loss = (label - prediction)[:, None]
        return loss, torch.ones_like(loss, dtype=torch.bool)
    raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")


def disagreement(first: Tensor, second: Tensor, kind: str) -> Tensor:
    """Compute how far two predictions are from each other, per pixel.

    Args:
        first (`Tensor`): Prediction at the first noise level.
        second (`Tensor`): Prediction at the second one.
        kind (`str`): `classes`: KL divergence of the first from the second. `map` and
            `scalar`: absolute difference.

    Returns:
        `Tensor`: (n, pixels).
    """
    if kind == "classes":
        log_first, log_second = first.log_softmax(1), second.log_softmax(1)
        return (log_second.exp() * (log_second - log_first)).sum(1).flatten(1)
    if kind == "map":
        return (first - second).abs().flatten(1)
    return (first - second).abs()[:, None]


def uncertainty_reward_loss(
    first: Tensor,
    second: Tensor,
    label: Tensor,
    *,
    kind: str,
    weight_scale: float = 1.0,
    detach_weight: bool = True,
    branches: str = "one",
    ignore_index: int = IGNORED,
) -> tuple[Tensor, Tensor]:
    """Compute Ctrl-U's consistency loss, weighted by certainty, and the uncertainty.

    U = disagreement of both predictions, w = exp(-weight_scale U),
    reward = mean over pixels of w times the loss against the label.

    Args:
        first (`Tensor`): Prediction at the first noise level.
        second (`Tensor`): Prediction at the second one.
        label (`Tensor`): What the condition prescribes.
        kind (`str`): `classes`, `map` or `scalar`.
        weight_scale (`float`, *optional*, defaults to `1.0`): How much an uncertain
            pixel loses.
        detach_weight (`bool`, *optional*, defaults to `True`): Give w no gradient. The
            official code gives it one, which can reward disagreement.
        branches (`str`, *optional*, defaults to `"one"`): `one`: the first prediction
            alone, as the official code. `both`: the mean of both, as the paper.
        ignore_index (`int`, *optional*, defaults to `255`): Class without a loss.

    Returns:
        `tuple[Tensor, Tensor]`: Weighted loss and uncertainty of each image, (n,).

    Raises:
        ValueError: Another kind, or another value of `branches`.

    Example:
        ```python
        import torch

        label = torch.zeros(1, 1, 2, 2)
        prediction = torch.full_like(label, 0.5)
        reward, uncertainty = uncertainty_reward_loss(
            prediction, prediction, label, kind="map"
        )
        assert reward.tolist() == [0.25] and uncertainty.tolist() == [0.0]
        ```
    """
    if branches not in ("one", "both"):
        raise ValueError(f"branches: expected one or both, got {branches!r}")
    uncertainty = disagreement(first, second, kind)
    weight = torch.exp(-weight_scale * uncertainty)
    if detach_weight:
        weight = weight.detach()
    loss, valid = consistency_loss(first, label, kind, ignore_index)
    if branches == "both":
        loss = (loss + consistency_loss(second, label, kind, ignore_index)[0]) / 2
    return (weight * loss).sum(1) / valid.sum(1).clamp(min=1), uncertainty.mean(1)


class PaletteSegmentation:
    """Classes by the nearest color of a palette: no weights, and exact labels.

    logit_k = -|pixel - palette_k|^2 / temperature.

    Args:
        palette (`Tensor`): Colors in [0, 1], (K, 3).
        temperature (`float`, *optional*, defaults to `0.1`): Smaller is sharper.

    Example:
        ```python
        import torch

        predictor = PaletteSegmentation(torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]))
        red = torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1)
        assert predictor.label(red).tolist() == [[[0]]]
        ```
    """

    kind = "classes"
    name = "palette"

    def __init__(self, palette: Tensor, temperature: float = 0.1) -> None:
        if palette.ndim != 2 or palette.shape[1] != 3 or len(palette) < 2:
            raise ConfigError(
                "palette", f"expected (K, 3) with K of at least 2, got {tuple(palette.shape)}"
            )
        self.palette, self.temperature = palette.float(), temperature

    def predict(self, pixels: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        """See `Consistency.predict`: logits (n, K, H, W)."""
        palette = self.palette.to(pixels)[None, :, :, None, None]
        return -(pixels[:, None] - palette).square().sum(2) / self.temperature

    def label(self, control: Tensor) -> Tensor:
        """See `Consistency.label`: classes (n, H, W)."""
        with torch.no_grad():
            return self.predict(control).argmax(1)


class TransformersConsistency:
    """A semantic segmentation or depth model of transformers.

    Args:
        model (`str` or `Path`): Hub id or folder.
        task (`str`): `segmentation` or `depth`.
        palette (`Tensor`, *optional*): Colors in [0, 1] of the model's classes in the
            condition images, (K, 3). `segmentation` needs it.

    Raises:
        ConfigError: Another task.
        UserError: The model cannot be loaded.
    """

    def __init__(self, model: str | Path, task: str, palette: Tensor | None = None) -> None:
        import transformers

        if task not in ("segmentation", "depth"):
            raise ConfigError("consistency", f"expected segmentation or depth, got {task!r}")
        if task == "segmentation" and palette is None:
            raise ConfigError(
                "consistency",
                "segmentation needs the palette of the condition images; in Python pass "
                "scorers=TransformersConsistency(model, 'segmentation', palette)",
            )
        self.colors = None if palette is None else PaletteSegmentation(palette)
        self.kind = "classes" if task == "segmentation" else "map"
        self.name = f"{task}:{model}"
        loader: Any = (
            transformers.AutoModelForSemanticSegmentation
            if task == "segmentation"
            else transformers.AutoModelForDepthEstimation
        )
        try:
            self.network = loader.from_pretrained(str(model))
            processor = transformers.AutoImageProcessor.from_pretrained(str(model))
        except (OSError, ValueError) as error:
            reason = one_line(error)
            raise UserError(f"consistency: {str(model)!r} cannot be loaded ({reason})") from error
        self.network.requires_grad_(False).eval()
        size = processor.size
        self.size = (
            (int(size["height"]), int(size["width"]))
            if "height" in size
            else (int(size["shortest_edge"]),) * 2
        )
        self.mean, self.std = processor.image_mean, processor.image_std
        self._map_size: torch.Size | None = None

    def predict(self, pixels: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        """See `Consistency.predict`. Depth is scaled to a maximum of 1 per image."""
        self.network.to(pixels.device)
        resized = interpolate(pixels.float(), self.size, mode="bilinear", antialias=True)
        mean, std = (
            torch.tensor(v, device=pixels.device)[None, :, None, None]
            for v in (self.mean, self.std)
        )
        output = self.network((resized - mean) / std)
        if self.kind == "classes":
            return output.logits
        depth = output.predicted_depth[:, None]
        return depth / depth.amax((1, 2, 3), keepdim=True).clamp(min=1e-6)

    def label(self, control: Tensor) -> Tensor:
        """See `Consistency.label`. Depth is the brightness of the condition image.

        Classes are the nearest colors of the palette.
        """
        with torch.no_grad():
            if self._map_size is None:  # images are resized, so there is one
                self._map_size = self.predict(control[:1]).shape[-2:]
            size = self._map_size
            if self.colors is not None:
                return self.colors.label(interpolate(control, size, mode="nearest"))
            depth = interpolate(
                control.mean(1, keepdim=True), size, mode="bilinear", antialias=True
            )
            return depth / depth.amax((1, 2, 3), keepdim=True).clamp(min=1e-6)


class ScorerConsistency:
    """A differentiable scorer as a consistency: its score is to reach a target.

    Args:
        scorer (`Scorer`): The scorer.
        target (`float`): In the scorer's units, negated where lower is better.

    Raises:
        ConfigError: The scorer gives no gradient.
    """

    kind = "scalar"

    def __init__(self, scorer: Any, target: float) -> None:
        if not getattr(scorer, "differentiable", False):
            raise ConfigError("scorers", f"{getattr(scorer, 'name', scorer)} gives no gradient")
        self.scorer, self.target, self.name = scorer, target, scorer.name

    def predict(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Consistency.predict`: (n,)."""
        sign = 1.0 if self.scorer.spec.higher_is_better else -1.0
        return sign * self.scorer.score_tensor(pixels, prompts).to(pixels.device).float()

    def label(self, control: Tensor) -> Tensor:
        """See `Consistency.label`: the target, (n,)."""
        return torch.full((len(control),), self.target, device=control.device)
