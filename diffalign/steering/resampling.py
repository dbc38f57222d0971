"""Resampling schemes and the effective sample size.

They are pure functions of weights and uniform numbers. The schemes are those of Douc,
Cappe & Moulines 2005 (arXiv cs/0507025). All are unbiased: particle k is copied K *
weight_k times on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import ConfigError

SCHEMES = ("systematic", "stratified", "residual", "multinomial")
Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None


def ess(log_weights: Tensor) -> Tensor:
    """Compute the effective sample size 1 / sum W^2 of each group.

    Args:
        log_weights (`Tensor`): (groups, k), normalised or not. -inf is a weight of
            zero. A group of zeros counts as flat.

    Returns:
        `Tensor`: (groups,) float64 in [1, k].
    """
    log_weights = log_weights.double()
    dead = torch.isneginf(log_weights).all(-1, keepdim=True)
    log_weights = torch.where(dead, torch.zeros_like(log_weights), log_weights)
    return (2 * log_weights.logsumexp(-1) - (2 * log_weights).logsumexp(-1)).exp()


def resample(
    weights: Tensor,
    scheme: str = "systematic",
    *,
    generator: Generators = None,
    uniforms: Tensor | None = None,
) -> Tensor:
    """Draw the ancestors of the next generation.

    Args:
        weights (`Tensor`): (groups, k), not negative, of any positive sum.
        scheme (`str`, *optional*, defaults to `"systematic"`): ``systematic`` (one
            uniform number per group), ``stratified``, ``residual`` or ``multinomial``
            (k of them).
        generator (`torch.Generator` or one per group, *optional*): source of the
            uniform numbers. None is torch's global one. With one per group, a group's
            ancestors do not depend on the others.
        uniforms (`Tensor`, *optional*): the uniform numbers themselves, in [0, 1):
            (groups,) or (groups, 1) for ``systematic``, else (groups, k).

    Returns:
        `Tensor`: int64 (groups, k). Slot j continues particle ``ancestors[g, j]`` of
            its group g.

    Raises:
        ConfigError: an unknown scheme; weights that are negative, NaN or all zero;
            uniform numbers of the wrong shape or out of range.
    """
    if scheme not in SCHEMES:
        raise ConfigError("scheme", f"expected one of {', '.join(SCHEMES)}, got {scheme!r}")
    weights = torch.as_tensor(weights).detach()
    rounding = 1e-12 if weights.dtype == torch.float64 else 1e-6
    weights = weights.to("cpu", torch.float64)
    if weights.ndim != 2:
        raise ConfigError("weights", f"expected (groups, k), got shape {tuple(weights.shape)}")
    if not torch.isfinite(weights).all() or (weights < 0).any() or (weights.sum(1) <= 0).any():
        raise ConfigError(
            "weights", "expected finite numbers >= 0 with a positive sum in every group"
        )
    groups, k = weights.shape
    count = 1 if scheme == "systematic" else k
    if uniforms is None:
        uniforms = _uniforms(groups, count, generator)
    else:
        uniforms = torch.as_tensor(uniforms, dtype=torch.float64, device="cpu")
        uniforms = uniforms[:, None] if uniforms.ndim == 1 else uniforms
        if uniforms.shape != (groups, count) or (uniforms < 0).any() or (uniforms >= 1).any():
            raise ConfigError(
                "uniforms",
                f"expected {(groups, count)} numbers in [0, 1) for {scheme}, got shape "
                f"{tuple(uniforms.shape)}",
            )
    if scheme == "multinomial":
        return _invert(weights, uniforms)
    if scheme == "residual":
        return _residual(weights, uniforms, rounding)
    return _invert(weights, (uniforms + torch.arange(k, dtype=torch.float64)) / k)


def _uniforms(groups: int, count: int, generator: Generators) -> Tensor:
    if generator is None or isinstance(generator, torch.Generator):
        device = generator.device if generator is not None else "cpu"
        return torch.rand(
            groups, count, dtype=torch.float64, generator=generator, device=device
        ).cpu()
    if len(generator) != groups:
        raise ConfigError("generator", f"expected one per group ({groups}), got {len(generator)}")
    return torch.cat(
        [
            torch.rand(1, count, dtype=torch.float64, generator=g, device=g.device).cpu()
            for g in generator
        ]
    )


def _invert(weights: Tensor, points: Tensor) -> Tensor:
    """Find the particles whose share of the cumulated weights holds the points.

    The points are (groups, n) in [0, 1).
    """
    cumulated = weights.cumsum(1)
    cumulated = cumulated / cumulated[:, -1:]
    # With the left side, a point on a boundary would pick a particle of weight zero.
    particles = torch.searchsorted(cumulated, points.contiguous(), right=True)
    # Points that rounding put beyond the end go to the last particle with weight.
    alive = weights > 0
    last = weights.shape[1] - 1 - alive.flip(1).to(torch.int8).argmax(1, keepdim=True)
    return torch.minimum(particles, last)


def _residual(weights: Tensor, uniforms: Tensor, rounding: float) -> Tensor:
    k = weights.shape[1]
    expected = k * weights / weights.sum(1, keepdim=True)
    copies = (expected + rounding * k).floor()  # a third times three must be one
    rest = (expected - copies).clamp(min=0)
    total = copies.sum(1, keepdim=True)
    slots = torch.arange(k, dtype=torch.float64).expand_as(weights).contiguous()
    copied = torch.searchsorted(copies.cumsum(1), slots, right=True).clamp(max=k - 1)
    # Where nothing is left over, no slot reads the rest.
    rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, weights)
    return torch.where(slots < total, copied, _invert(rest, uniforms))
