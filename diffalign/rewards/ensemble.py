"""Several scorers' numbers made one: pure functions of (groups, k images, n scorers) tensors, NaN = missing.

A group is the images of one prompt. Raw scores of different scorers have different scales, so nothing here averages them unless their
scale is declared: PickScore's standard deviation of about 1 would drown HPSv2's of about 0.01.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config.section import suggestion
from ..errors import ConfigError, UserError

MISSING = ("renormalise", "drop", "fail")
KINDS = ("mean", "min", "mean_minus_std")


def apply_missing(
    scores: Tensor, policy: str = "renormalise", names: Sequence[str] | None = None
) -> Tensor:
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
        raise ConfigError(
            "combine.missing",
            f"expected {', '.join(MISSING)}, got {policy!r}{suggestion(str(policy), MISSING)}",
        )
    gone = scores.isnan()
    partly = gone & ~gone.all(-1, keepdim=True)
    if policy == "renormalise" or not bool(partly.any()):
        return scores
    if policy == "drop":
        return scores.masked_fill(partly.any(-1, keepdim=True), float("nan"))
    counts = partly.flatten(0, -2).sum(0).tolist()
    what = ", ".join(
        f"{count} of {names[i] if names else f'scorer {i}'}"
        for i, count in enumerate(counts)
        if count
    )
    raise UserError(
        f"combine.missing: scores are missing ({what}); score again, or set missing to renormalise or drop"
    )


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
    values, given, weight = _prepared(_grouped(scores), weights)
    # A comparison with NaN is False, so missing scores neither win nor tie.
    wins = (values[:, :, None] > values[:, None]).sum(2).double()
    ties = (values[:, :, None] == values[:, None]).sum(2) - 1  # an image ties with itself
    others = given.sum(1, keepdim=True) - 1
    rate = torch.where(
        others > 0, (wins + 0.5 * ties) / others.clamp(min=1), torch.full_like(wins, 0.5)
    )
    return _like(_average(rate, given, weight), scores)


def zscore(
    scores: Tensor,
    weights: Sequence[float] | Tensor | None = None,
    *,
    ddof: int = 0,
    eps: float = 1e-8,
) -> Tensor:
    """Weighted mean of (s - mean) / (std + eps) within each group; a constant group gives 0.

    Args:
        scores: (groups, k, n).
        weights: (n,).
        ddof: 0 divides the variance by k (numpy, Flow-Factory), 1 by k - 1 (TRL).
        eps: added to the standard deviation, in the scores' own units.

    Returns:
        (groups, k); NaN for an image without any score.
    """
    values, given, weight = _prepared(_grouped(scores), weights)
    count = given.sum(1, keepdim=True)
    filled = values.masked_fill(~given, 0.0)
    mean = filled.sum(1, keepdim=True) / count.clamp(min=1)
    low, high = _extremes(values, given)
    centred = (filled - mean).masked_fill(
        ~given | (low == high), 0.0
    )  # a mean of equals may be off by its rounding
    std = (centred.square().sum(1, keepdim=True) / (count - ddof).clamp(min=1)).sqrt()
    return _like(_average(centred / (std + eps), given, weight), scores)


def weighted_sum(
    scores: Tensor,
    weights: Sequence[float] | Tensor | None = None,
    *,
    affine: Sequence[tuple[float, float] | None] | str,
    names: Sequence[str] | None = None,
) -> Tensor:
    """sum_r w_r (s_r - mean_r) / std_r with declared scales, not divided by sum_r w_r.

    Where scores are missing the present weights are scaled up to the full sum, so that rows stay comparable.

    Args:
        scores: (groups, k, n).
        weights: (n,).
        affine: (mean, std) per scorer, or ``"none"`` to add raw scores on purpose.
        names: the scorers' names, for messages.

    Returns:
        (groups, k); NaN for an image without any score.

    Raises:
        ConfigError: an unknown word, another number of scales, or a std that is not above 0.
        UserError: a scorer without a declared scale.
    """
    scaled = _scaled(scores, affine, names)
    values, given, weight = _prepared(_grouped(scaled), weights)
    return _like(_average(values, given, weight) * weight.sum(), scores)


def minmax(scores: Tensor, weights: Sequence[float] | Tensor | None = None) -> Tensor:
    """Weighted mean of scores stretched to [0, 1] within each group; one outlier moves all others, so prefer `win_rates`."""
    values, given, weight = _prepared(_grouped(scores), weights)
    low, high = _extremes(values, given)
    span = torch.where(high > low, high - low, 1.0)
    stretched = torch.where(high > low, (values - low) / span, 0.5)
    return _like(_average(stretched, given, weight), scores)


def majority(scores: Tensor, weights: Sequence[float] | Tensor | None = None) -> Tensor:
    """Which of two images most of the weight prefers: sign sum_r w_r sign(s_i - s_j); scorers that lack one of them abstain.

    Returns:
        float64 (groups, k, k), antisymmetric, in {-1, 0, 1}. May be cyclic: a over b, b over c, c over a.
    """
    values, _, weight = _prepared(_grouped(scores), weights)
    votes = _signs(values[:, :, None], values[:, None]) @ weight
    # 0.1 + 0.2 against 0.3 is a tie, whatever the rounding of the sum.
    return torch.sign(votes).masked_fill(votes.abs() <= 1e-12 * weight.sum(), 0.0)


def majority_score(scores: Tensor, weights: Sequence[float] | Tensor | None = None) -> Tensor:
    """Copeland's score: the share of the other images of the group that an image beats by majority, ties one half; (groups, k)."""
    present = _prepared(_grouped(scores), weights)[1].any(-1)
    wins = (majority(scores, weights) + 1) / 2
    pairs = (present[:, :, None] & present[:, None]).to(wins.dtype)
    others = (present.sum(1, keepdim=True) - 1).to(wins.dtype)
    total = (wins * pairs).sum(-1) - 0.5  # against itself
    score = torch.where(others > 0, total / others.clamp(min=1), torch.full_like(total, 0.5))
    return _like(score.masked_fill(~present, float("nan")), scores)


def unanimous(
    scores: Tensor, margins: Sequence[float] | Tensor | None = None, min_agree: int | None = None
) -> Tensor:
    """Pairs on which enough scorers agree by a margin.

    Args:
        scores: (groups, k, n).
        margins: (n,): least difference that counts, at least 0; with 0 any strict difference counts.
        min_agree: number of scorers that must prefer i; None asks all n. More than half are asked for, so no pair is kept both ways.

    Returns:
        bool (groups, k, k): image i is preferred over image j. A scorer that lacks one of the two does not agree.

    Raises:
        ConfigError: margins or a number of scorers that make no sense.
    """
    values, _, _ = _prepared(_grouped(scores), None)
    n = scores.shape[-1]
    needed = n if min_agree is None else min_agree
    if not n / 2 < needed <= n:
        raise ConfigError(
            "combine.min_agree",
            f"expected more than half of the {n} scorers and at most all, got {needed}",
        )
    margin = (
        values.new_zeros(n)
        if margins is None
        else torch.as_tensor(margins, dtype=values.dtype).to(values.device)
    )
    if margin.shape != (n,) or not bool((margin >= 0).all()):
        raise ConfigError(
            "combine.margins", f"expected {n} numbers of at least 0, got {margin.tolist()}"
        )
    difference = (
        values[:, :, None] - values[:, None]
    )  # NaN where a score is missing, and then neither comparison holds
    return ((difference >= margin) & (difference > 0)).sum(-1) >= needed


def conservative(
    scores: Tensor,
    kind: str = "mean",
    *,
    k: float = 1.0,
    ddof: int = 0,
    weights: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """An ensemble that over-optimisation cannot exploit through one member (Coste et al. 2023, arXiv 2310.02743).

    Args:
        scores: (..., n), members on one scale; NaN = missing.
        kind: ``mean``; ``min``, the worst case; ``mean_minus_std``, the mean minus `k` standard deviations across members.
        k: at least 0.
        ddof: of the standard deviation.
        weights: of the members in mean and standard deviation; a member of weight 0 is left out of the worst case too.

    Returns:
        (...); NaN where every member is missing. One present member has a standard deviation of 0.
    """
    if kind not in KINDS:
        raise ConfigError(
            "combine.method",
            f"expected {', '.join(KINDS)}, got {kind!r}{suggestion(str(kind), KINDS)}",
        )
    if not k >= 0:
        raise ConfigError("combine.k", f"expected a number of at least 0, got {k!r}")
    values, given, weight = _prepared(scores, weights)
    if kind == "min":
        found = values.masked_fill(~given, float("inf")).amin(-1)
        return _like(found.masked_fill(~given.any(-1), float("nan")), scores)
    mean = _average(values, given, weight)
    if kind == "mean":
        return _like(mean, scores)
    share = weight * given
    total = share.sum(-1)
    spread = (share * (values - mean[..., None]).masked_fill(~given, 0.0).square()).sum(-1)
    count = given.sum(-1)
    correction = count / (count - ddof).clamp(min=1) if ddof else torch.ones_like(total)
    return _like(mean - k * (spread / total * correction).sqrt(), scores)


def kendalls_w(scores: Tensor) -> Tensor:
    """Kendall's coefficient of concordance with the correction for ties: 1 when all scorers rank alike, near 0 when they do not.

    The cheapest sign of a broken scorer. Counted over the images that every scorer scored: with their ranks, equals sharing the mean
    rank, W = 12 S / (n^2 (k^3 - k) - n T), where S is the squared spread of the images' rank sums and T sums t^3 - t over the ties.

    Args:
        scores: (groups, k, n).

    Returns:
        float64 (groups,); NaN with fewer than two scorers or two common images, or when no scorer tells any two images apart.
    """
    n = _grouped(scores).shape[-1]
    common = ~scores.isnan().any(-1, keepdim=True)
    values = scores.double().masked_fill(~common, float("nan"))  # compares as False with everything
    less = (values[:, :, None] > values[:, None]).sum(2).double()
    equal = (values[:, :, None] == values[:, None]).sum(2).double()
    k = common.sum((1, 2)).double()
    sums = (less + (equal + 1) / 2).sum(-1)
    spread = (sums - n * (k[:, None] + 1) / 2).square().masked_fill(~common[..., 0], 0.0).sum(1)
    # Each of t tied images contributes t^2 - 1, so that a group of them adds t^3 - t.
    ties = (equal.square() - 1).masked_fill(~common, 0.0).sum((1, 2))
    denominator = n * n * (k**3 - k) - n * ties
    known = (denominator > 0) & (n >= 2)
    return torch.where(known, 12 * spread / denominator.clamp(min=1), float("nan"))


def pairwise_agreement(scores: Tensor) -> Tensor:
    """(n, n): of the image pairs of all groups that both scorers tell apart, the share that they order alike; NaN without any."""
    values, _, _ = _prepared(_grouped(scores), None)
    k = scores.shape[1]
    first, second = torch.triu_indices(k, k, 1)
    signs = _signs(values[:, first], values[:, second]).flatten(0, 1)
    told = signs.abs()
    agree = (told.T @ told + signs.T @ signs) / 2
    return agree / (told.T @ told)  # 0 / 0 is NaN


def best_worst_pairs(combined: Tensor) -> tuple[Tensor, Tensor]:
    """The best and the worst image of each group.

    Args:
        combined: (groups, k), NaN = missing.

    Returns:
        indices (groups, 2) int64, -1 where a group has fewer than two scored images; margins (groups,), NaN there. Of equal best ones
        the first is taken, of equal worst ones the last, so an image never meets itself; a margin of 0 is a tie.
    """
    given = ~combined.isnan()
    limits = torch.finfo(combined.dtype)
    finite = combined.clamp(limits.min, limits.max)  # below, infinity stands for a missing score
    best = finite.masked_fill(~given, float("-inf")).argmax(1)
    worst = combined.shape[1] - 1 - finite.masked_fill(~given, float("inf")).flip(1).argmin(1)
    indices = torch.stack([best, worst], 1)
    margins = combined.gather(1, best[:, None])[:, 0] - combined.gather(1, worst[:, None])[:, 0]
    few = given.sum(1) < 2
    return indices.masked_fill(few[:, None], -1), margins.masked_fill(few, float("nan"))


METHODS = (
    "winrate",
    "weighted_sum",
    "zscore",
    "majority",
    "mean",
    "min",
    "mean_minus_std",
    "minmax",
)


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
            "combine.method",
            f"unknown method {method!r}{suggestion(str(method), METHODS)}; there are {', '.join(METHODS)}",
        )
    scores = apply_missing(scores, missing, names)
    simple: dict[str, Any] = {"winrate": win_rates, "majority": majority_score, "minmax": minmax}
    if method in simple:
        return simple[method](scores, weights)
    if method == "zscore":
        return zscore(scores, weights, ddof=ddof)
    scales: Sequence[tuple[float, float] | None] | str = (
        [None] * scores.shape[-1] if affine is None else affine
    )
    if method == "weighted_sum":
        return weighted_sum(scores, weights, affine=scales, names=names)
    members = _scaled(_grouped(scores), scales, names)
    return _like(conservative(members, method, k=k, ddof=ddof, weights=weights), scores)


def _scaled(
    scores: Tensor, affine: Sequence[tuple[float, float] | None] | str, names: Sequence[str] | None
) -> Tensor:
    """float64 (s - mean) / std; `UserError` where a scale is not declared, see `weighted_sum`."""
    values, n = scores.double(), scores.shape[-1]
    if isinstance(affine, str):
        if affine != "none":
            raise ConfigError(
                "normalize",
                f"expected (mean, std) per scorer, or none to add raw scores, got {affine!r}",
            )
        return values
    if len(affine) != n:
        raise ConfigError(
            "normalize", f"expected a (mean, std) for each of {n} scorers, got {len(affine)}"
        )
    called = list(names) if names else [f"scorer {i}" for i in range(n)]
    undeclared = [name for name, scale in zip(called, affine, strict=True) if scale is None]
    if undeclared:
        raise UserError(
            "combine.method: this method adds or compares scores of different scorers, which takes a common scale, and "
            f"{', '.join(undeclared)} declares none; give each a normalize: {{kind: affine, mean: ..., std: ...}}, or "
            "normalize: none to take raw scores, or use winrate"
        )
    constants = torch.tensor(
        [tuple(scale) for scale in affine if scale is not None],
        dtype=torch.float64,
        device=values.device,
    )
    for name, (_, std) in zip(called, constants.tolist(), strict=True):
        if not std > 0:
            raise ConfigError("normalize.std", f"expected a number above 0 for {name}, got {std}")
    return (values - constants[:, 0]) / constants[:, 1]


def _grouped(scores: Tensor) -> Tensor:
    if scores.dim() != 3:
        raise UserError(
            f"scores: expected (groups, images of a group, scorers), got shape {tuple(scores.shape)}"
        )
    return scores


def _prepared(
    scores: Tensor, weights: Sequence[float] | Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(float64 scores, which are given, float64 weights); what weighs nothing counts as missing."""
    n = scores.shape[-1]
    weight = (
        torch.ones(n, dtype=torch.float64)
        if weights is None
        else torch.as_tensor(weights, dtype=torch.float64)
    )
    if (
        weight.shape != (n,)
        or not bool((weight >= 0).all() & weight.isfinite().all())
        or not float(weight.sum()) > 0
    ):
        raise ConfigError(
            "weights", f"expected {n} numbers of at least 0, not all 0, got {weight.tolist()}"
        )
    weight = weight.to(scores.device)
    values = scores.double().masked_fill(weight == 0, float("nan"))
    return values, ~values.isnan(), weight


def _extremes(values: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest given score of each group, (groups, 1, n)."""
    low = values.masked_fill(~given, float("inf")).amin(1, keepdim=True)
    return low, values.masked_fill(~given, float("-inf")).amax(1, keepdim=True)


def _signs(first: Tensor, second: Tensor) -> Tensor:
    """sign(first - second) as float64; 0 where one is NaN, or both are the same infinity."""
    return (first > second).double() - (first < second).double()


def _like(values: Tensor, scores: Tensor) -> Tensor:
    """In the scores' precision, at least float32: counts and half precisions must not round the result."""
    return values.to(torch.promote_types(scores.dtype, torch.float32))


def _average(values: Tensor, given: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over the last dimension of what is given; NaN where nothing of any weight is."""
    share = weight * given
    return (values.masked_fill(~given, 0.0) * share).sum(-1) / share.sum(-1)
