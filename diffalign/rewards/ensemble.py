"""Several scorers' numbers made one: pure functions of (groups, k images, n scorers) tensors, NaN = missing.

A group is the images of one prompt. Raw scores of different scorers have different scales, so nothing here averages them unless their
scale is declared: PickScore's standard deviation of about 1 would drown HPSv2's of about 0.01.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import suggestion
from ..exceptions import ConfigError, UserError

MISSING = ("renormalise", "drop", "fail")
KINDS = ("mean", "min", "mean_minus_std")


def apply_missing(scores: Tensor, policy: str = "renormalise", names: Sequence[str] | None = None) -> Tensor:
    """What becomes of images that some scorers could not score.

    Args:
        scores: (groups, k, n).
        policy: ``renormalise`` leaves them to the other scorers' weights, ``drop`` makes the whole image missing, ``fail`` refuses.
            An image without any score is padding and no reason to fail.

    Raises:
        ConfigError: unknown policy.
        UserError: under ``fail``, how many and of which scorers.
    """
    if policy not in MISSING:
        raise ConfigError("combine.missing", f"expected {', '.join(MISSING)}, got {policy!r}{suggestion(str(policy), MISSING)}")
    gone = scores.isnan()
    partly = gone & ~gone.all(-1, keepdim=True)
    if policy == "renormalise" or not bool(partly.any()):
        return scores
    if policy == "drop":
        return scores.masked_fill(partly.any(-1, keepdim=True), float("nan"))
    counts = partly.flatten(0, -2).sum(0).tolist()
    what = ", ".join(f"{count} of {names[i] if names else f'scorer {i}'}" for i, count in enumerate(counts) if count)
    raise UserError(f"combine.missing: scores are missing ({what}); score again, or set missing to renormalise or drop")


def win_rates(scores: Tensor, weights: Sequence[float] | Tensor | None = None) -> Tensor:
    """RankDPO's phi: how often an image beats the others of its group, averaged over scorers (arXiv 2410.18013, section 3.2).

    phi_i = sum_r w_r / (k_r - 1) sum_{j != i} (1[s_i > s_j] + 1/2 1[s_i = s_j]) / sum_r w_r, over the scorers r that scored image i;
    k_r images of the group have a score of r. Scale-free, and equal to (mean rank - 1) / (k - 1) where nothing is missing.

    Args:
        scores: (groups, k, n), higher is better, NaN = missing.
        weights: (n,), at least 0; None weighs all scorers the same.

    Returns:
        phi (groups, k) in [0, 1]; NaN for an image without any score. Constant groups, and groups of one, give 1/2.
    """
    values, given, weight = _prepared(scores, weights)
    here = given.to(values.dtype)
    higher = (values[:, :, None] > values[:, None]).to(values.dtype) + 0.5 * (values[:, :, None] == values[:, None]).to(
        values.dtype
    )
    both = here[:, :, None] * here[:, None]
    others = here.sum(1, keepdim=True) - 1
    wins = (higher * both).sum(2) - 0.5 * here  # an image ties with itself
    rate = torch.where(others > 0, wins / others.clamp(min=1), torch.full_like(wins, 0.5))
    return _average(rate, given, weight).to(scores.dtype)


def zscore(scores: Tensor, weights: Sequence[float] | Tensor | None = None, *, ddof: int = 0, eps: float = 1e-8) -> Tensor:
    """Weighted mean of (s - mean) / (std + eps) within each group; a constant group gives 0.

    Args:
        scores: (groups, k, n).
        weights: (n,).
        ddof: 0 divides the variance by k (numpy, Flow-Factory), 1 by k - 1 (TRL).

    Returns:
        (groups, k); NaN for an image without any score.
    """
    values, given, weight = _prepared(scores, weights)
    count = given.sum(1, keepdim=True)
    filled = values.masked_fill(~given, 0.0)
    mean = filled.sum(1, keepdim=True) / count.clamp(min=1)
    centred = (filled - mean).masked_fill(~given, 0.0)
    std = (centred.square().sum(1, keepdim=True) / (count - ddof).clamp(min=1)).sqrt()
    return _average(centred / (std + eps), given, weight).to(scores.dtype)


def weighted_sum(
    scores: Tensor,
    weights: Sequence[float] | Tensor | None = None,
    *,
    affine: Sequence[tuple[float, float] | None] | str,
    names: Sequence[str] | None = None,
) -> Tensor:
    """sum_r w_r (s_r - mean_r) / std_r with declared scales; where scores are missing the present weights are scaled up to the full sum.

    Args:
        scores: (groups, k, n).
        weights: (n,).
        affine: (mean, std) per scorer, or ``"none"`` to add raw scores on purpose.

    Raises:
        UserError: a scorer without a declared scale.
    """
    values, given, weight = _prepared(scores, weights)
    if affine != "none":
        scales = [None] * scores.shape[-1] if isinstance(affine, str) else list(affine)
        undeclared = [names[i] if names else f"scorer {i}" for i, scale in enumerate(scales) if scale is None]
        if undeclared:
            raise UserError(
                f"combine.method: weighted_sum adds scores of different scales, and {', '.join(undeclared)} declares none; give each a "
                "normalize: {kind: affine, mean: ..., std: ...}, or normalize: none to add raw scores, or use winrate"
            )
        constants = values.new_tensor(scales)
        values = (values - constants[:, 0]) / constants[:, 1]
    return (_average(values, given, weight) * weight.sum()).to(scores.dtype)


def minmax(scores: Tensor, weights: Sequence[float] | Tensor | None = None) -> Tensor:
    """Weighted mean of scores stretched to [0, 1] within each group; one outlier moves all others, so prefer `win_rates`."""
    values, given, weight = _prepared(scores, weights)
    low = values.masked_fill(~given, float("inf")).amin(1, keepdim=True)
    span = values.masked_fill(~given, float("-inf")).amax(1, keepdim=True) - low
    stretched = torch.where(
        span > 0, (values - low) / span.clamp(min=torch.finfo(values.dtype).tiny), torch.full_like(values, 0.5)
    )
    return _average(stretched, given, weight).to(scores.dtype)


def majority(scores: Tensor, weights: Sequence[float] | Tensor | None = None) -> Tensor:
    """Which of two images most of the weight prefers: sign sum_r w_r sign(s_i - s_j); scorers that lack one of them abstain.

    Returns:
        (groups, k, k), antisymmetric, in {-1, 0, 1}. May be cyclic: a over b, b over c, c over a.
    """
    values, given, weight = _prepared(scores, weights)
    signs = torch.sign(values[:, :, None] - values[:, None])
    signs = signs.masked_fill(~(given[:, :, None] & given[:, None]), 0.0)
    return torch.sign((signs * weight).sum(-1))


def majority_score(scores: Tensor, weights: Sequence[float] | Tensor | None = None) -> Tensor:
    """Copeland's score: the share of the other images of the group that an image beats by majority, ties one half; (groups, k)."""
    present = ~scores.isnan().all(-1)
    wins = (majority(scores, weights) + 1) / 2
    pairs = (present[:, :, None] & present[:, None]).to(wins.dtype)
    others = (present.sum(1, keepdim=True) - 1).to(wins.dtype)
    total = (wins * pairs).sum(-1) - 0.5  # against itself
    score = torch.where(others > 0, total / others.clamp(min=1), torch.full_like(total, 0.5))
    return score.masked_fill(~present, float("nan")).to(scores.dtype)


def unanimous(scores: Tensor, margins: Sequence[float] | Tensor | None = None, min_agree: int | None = None) -> Tensor:
    """Pairs on which enough scorers agree by a margin.

    Args:
        scores: (groups, k, n).
        margins: (n,): least difference that counts, at least 0; with 0 any strict difference counts.
        min_agree: number of scorers that must prefer i; None asks all n. More than half are asked for, so no pair is kept both ways.

    Returns:
        bool (groups, k, k): image i is preferred over image j.
    """
    values, given, _ = _prepared(scores, None)
    n = scores.shape[-1]
    needed = n if min_agree is None else min_agree
    if not n / 2 < needed <= n:
        raise ConfigError("combine.min_agree", f"expected more than half of the {n} scorers and at most all, got {needed}")
    margin = values.new_zeros(n) if margins is None else torch.as_tensor(margins, dtype=values.dtype)
    if margin.shape != (n,) or bool((margin < 0).any()):
        raise ConfigError("combine.margins", f"expected {n} numbers of at least 0, got {margin.tolist()}")
    difference = values[:, :, None] - values[:, None]
    agrees = (difference >= margin) & (difference > 0) & given[:, :, None] & given[:, None]
    return agrees.sum(-1) >= needed


def conservative(
    scores: Tensor, kind: str = "mean", *, k: float = 1.0, ddof: int = 0, weights: Sequence[float] | Tensor | None = None
) -> Tensor:
    """An ensemble that over-optimisation cannot exploit through one member (Coste et al. 2023, arXiv 2310.02743).

    Args:
        scores: (..., n), members on one scale; NaN = missing.
        kind: ``mean``; ``min``, the worst case; ``mean_minus_std``, the mean minus `k` standard deviations across members.
        k: at least 0.
        ddof: of the standard deviation.
        weights: of the members in mean and standard deviation.

    Returns:
        (...); NaN where every member is missing. One present member has a standard deviation of 0.
    """
    if kind not in KINDS:
        raise ConfigError("combine.method", f"expected {', '.join(KINDS)}, got {kind!r}{suggestion(str(kind), KINDS)}")
    if not k >= 0:
        raise ConfigError("combine.k", f"expected a number of at least 0, got {k!r}")
    values, given, weight = _prepared(scores, weights)
    if kind == "min":
        found = values.masked_fill(~given, float("inf")).amin(-1)
        return found.masked_fill(~given.any(-1), float("nan")).to(scores.dtype)
    mean = _average(values, given, weight)
    if kind == "mean":
        return mean.to(scores.dtype)
    share = weight * given
    total = share.sum(-1)
    spread = (share * (values - mean[..., None]).masked_fill(~given, 0.0).square()).sum(-1)
    count = given.sum(-1)
    correction = count / (count - ddof).clamp(min=1) if ddof else torch.ones_like(total)
    return (mean - k * (spread / total * correction).sqrt()).to(scores.dtype)


def kendalls_w(scores: Tensor) -> Tensor:
    """Kendall's coefficient of concordance with the correction for ties: 1 when all scorers rank alike, near 0 when they do not.

    The cheapest sign of a broken scorer. Counted over the images that every scorer scored.

    Returns:
        (groups,); NaN with fewer than two scorers or two common images, or when no scorer tells any two images apart.
    """
    found = []
    for group in scores.double():
        common = group[~group.isnan().any(-1)]
        k, n = common.shape
        if k < 2 or n < 2:
            found.append(float("nan"))
            continue
        less = (common[:, None] > common[None]).sum(1).double()
        equal = (common[:, None] == common[None]).sum(1).double()
        ranks = less + (equal + 1) / 2
        # Each of t tied images contributes t^2 - 1, so that a group of them adds t^3 - t.
        ties = (equal.square() - 1).sum()
        spread = (ranks.sum(1) - n * (k + 1) / 2).square().sum()
        denominator = n * n * (k**3 - k) - n * ties
        found.append(float(12 * spread / denominator) if denominator > 0 else float("nan"))
    return torch.tensor(found, dtype=torch.float64)


def pairwise_agreement(scores: Tensor) -> Tensor:
    """(n, n): of the image pairs of all groups that both scorers tell apart, the share that they order alike; NaN without any."""
    values, given, _ = _prepared(scores, None)
    k = scores.shape[1]
    first, second = torch.triu_indices(k, k, 1)
    signs = torch.sign(values[:, first] - values[:, second]).masked_fill(~(given[:, first] & given[:, second]), 0.0).flatten(0, 1)
    told = (signs != 0).double()
    agree = (told.T @ told + signs.double().T @ signs.double()) / 2
    return agree / (told.T @ told)  # 0 / 0 is NaN


def best_worst_pairs(combined: Tensor) -> tuple[Tensor, Tensor]:
    """The best and the worst image of each group.

    Args:
        combined: (groups, k), NaN = missing.

    Returns:
        indices (groups, 2) int64, -1 where a group has fewer than two scored images; margins (groups,), NaN there. The first of equals
        is taken; a margin of 0 is a tie.
    """
    given = ~combined.isnan()
    best = combined.masked_fill(~given, float("-inf")).argmax(1)
    worst = combined.masked_fill(~given, float("inf")).argmin(1)
    indices = torch.stack([best, worst], 1)
    margins = combined.gather(1, best[:, None])[:, 0] - combined.gather(1, worst[:, None])[:, 0]
    few = given.sum(1) < 2
    return indices.masked_fill(few[:, None], -1), margins.masked_fill(few, float("nan"))


METHODS = ("winrate", "weighted_sum", "zscore", "majority", "mean", "min", "mean_minus_std", "minmax")


def combine(
    scores: Tensor,
    method: str = "winrate",
    *,
    weights: Sequence[float] | Tensor | None = None,
    affine: Sequence[tuple[float, float] | None] | str | None = None,
    missing: str = "renormalise",
    names: Sequence[str] | None = None,
    k: float = 1.0,
    ddof: int = 0,
) -> Tensor:
    """One of `METHODS` by name: (groups, k, n) -> (groups, k).

    ``mean``, ``min`` and ``mean_minus_std`` compare members on one scale, so they too ask for declared scales through `affine`.

    Raises:
        ConfigError: unknown method.
        UserError: undeclared scales, or missing scores under ``missing="fail"``.
    """
    if method not in METHODS:
        raise ConfigError(
            "combine.method", f"unknown method {method!r}{suggestion(str(method), METHODS)}; there are {', '.join(METHODS)}"
        )
    scores = apply_missing(scores, missing, names)
    simple: dict[str, Any] = {"winrate": win_rates, "majority": majority_score, "minmax": minmax}
    if method in simple:
        return simple[method](scores, weights)
    if method == "zscore":
        return zscore(scores, weights, ddof=ddof)
    scales: Sequence[tuple[float, float] | None] | str = [None] * scores.shape[-1] if affine is None else affine
    if method == "weighted_sum":
        return weighted_sum(scores, weights, affine=scales, names=names)
    one_scale = [
        weighted_sum(scores[..., i : i + 1], affine=_one(scales, i), names=names[i : i + 1] if names else None)
        for i in range(scores.shape[-1])
    ]
    return conservative(torch.stack(one_scale, -1), method, k=k, ddof=ddof, weights=weights)


def _one(affine: Sequence[tuple[float, float] | None] | str, i: int) -> Sequence[tuple[float, float] | None] | str:
    return affine if isinstance(affine, str) else affine[i : i + 1]


def _prepared(scores: Tensor, weights: Sequence[float] | Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(float64 scores, which are given, float64 weights)."""
    values = scores.double()
    n = scores.shape[-1]
    weight = torch.ones(n, dtype=torch.float64) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    if weight.shape != (n,) or not bool((weight >= 0).all() & weight.isfinite().all()) or not float(weight.sum()) > 0:
        raise ConfigError("weights", f"expected {n} numbers of at least 0, not all 0, got {weight.tolist()}")
    return values, ~values.isnan(), weight.to(values.device)


def _average(values: Tensor, given: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over the last dimension of what is given; NaN where nothing of any weight is."""
    share = weight * given
    return (values.masked_fill(~given, 0.0) * share).sum(-1) / share.sum(-1)
