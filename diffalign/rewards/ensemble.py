"""Combine the scores of several scorers: pure functions of tensors (groups, k, n).

A group is the images of one prompt, k of them, each with n scores. NaN is a missing
score. Scores of different scorers have different scales: PickScore's standard deviation
is about 1, HPSv2's about 0.01. So nothing here averages them unless their scale is
declared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..config.section import suggestion
from ..errors import ConfigError, UserError

MISSING = ("renormalise", "drop", "fail")
KINDS = ("mean", "min", "mean_minus_std")
CENTERED = ("min", "mean_minus_std")
"""The methods that `center` changes. It moves no mean."""


def apply_missing(
    scores: Tensor, policy: str = "renormalise", names: Sequence[str] | None = None
) -> Tensor:
    """Decide what becomes of images that some scorers could not score.

    Args:
        scores (`Tensor`): (groups, k, n).
        policy (`str`, *optional*, defaults to "renormalise"): ``renormalise`` leaves
            them to the other scorers' weights, ``drop`` makes the whole image missing,
            ``fail`` refuses. An image without any score is padding, which never fails.
        names (list of `str`, *optional*): the scorers' names, for messages.

    Returns:
        `Tensor`: (groups, k, n).

    Raises:
        ConfigError: unknown policy.
        UserError: under ``fail``, how many are missing and of which scorers.
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
        f"combine.missing: scores are missing ({what}); "
        "score again, or set missing to renormalise or drop"
    )


def win_rates(
    scores: Tensor,
    weights: Sequence[float] | Tensor | None = None,
    *,
    calibrate: str = "wins",
) -> Tensor:
    """Compute how often an image beats the others of its group, averaged over scorers.

    This is RankDPO's phi (arXiv 2410.18013, section 3.2):
    phi_i = sum_r w_r b_ir / sum_r w_r over the scorers r that scored image i, where
    b_ir = sum_{j != i} (1[s_i > s_j] + 1/2 1[s_i = s_j]) / (k_r - 1) and k_r images of
    the group have a score of r. It does not depend on scales. Where nothing is missing
    it equals (mean rank - 1) / (k - 1).

    With `calibrate="sigmoid"`, b_ir = sum_{j != i} sigmoid(s_i - s_j) / (k_r - 1), the
    expected win rate of a Bradley-Terry model (CaPO, arXiv 2502.02588). It depends on
    the scale of the scores, which should be logits, as ImageReward's and HPSv3's are.

    Args:
        scores (`Tensor`): (groups, k, n), higher is better.
        weights (list of `float`, *optional*): (n,), at least 0. Defaults to equal ones.
        calibrate (`str`, *optional*, defaults to `"wins"`): `wins` or `sigmoid`.

    Returns:
        `Tensor`: phi (groups, k) in [0, 1]. NaN for an image without any score.
            Constant groups, and groups of one, give 1/2.

    Raises:
        ConfigError: weights of another number, negative, or all 0, or another value of
            `calibrate`.
        UserError: scores of another shape.

    Example:
        ```python
        scores = torch.tensor([[[0.9, 21.0], [0.5, 23.0], [0.1, 20.0]]])
        assert win_rates(scores).tolist() == [[0.75, 0.75, 0.0]]
        ```
    """
    values, present, weight = _prepared(_grouped(scores), weights)
    # A comparison with NaN is False, so missing scores neither win nor tie.
    if calibrate == "wins":
        wins = (values[:, :, None] > values[:, None]).sum(2).double()
        wins += 0.5 * (values[:, :, None] == values[:, None]).sum(2)
    elif calibrate == "sigmoid":
        expected = torch.sigmoid((values[:, :, None] - values[:, None]).double())
        wins = expected.nan_to_num(0.0).sum(2)
    else:
        raise ConfigError("calibrate", f"expected wins or sigmoid, got {calibrate!r}")
    wins = wins - 0.5  # an image ties with itself
    others = present.sum(1, keepdim=True) - 1
    rate = torch.where(others > 0, wins / others.clamp(min=1), torch.full_like(wins, 0.5))
    return _like(_average(rate, present, weight), scores)


def zscore(
    scores: Tensor,
    weights: Sequence[float] | Tensor | None = None,
    *,
    ddof: int = 0,
    eps: float = 1e-8,
) -> Tensor:
    """Average (s - mean) / (std + eps) over the scorers, within each group.

    Args:
        scores (`Tensor`): (groups, k, n).
        weights (list of `float`, *optional*): (n,). Defaults to equal ones.
        ddof (`int`, *optional*, defaults to 0): 0 divides the variance by k (numpy,
            Flow-Factory), 1 by k - 1 (TRL).
        eps (`float`, *optional*, defaults to 1e-8): added to the standard deviation, in
            the scores' own units.

    Returns:
        `Tensor`: (groups, k). 0 in a constant group, NaN for an image without any
            score.
    """
    values, present, weight = _prepared(_grouped(scores), weights)
    count = present.sum(1, keepdim=True)
    filled = values.masked_fill(~present, 0.0)
    mean = filled.sum(1, keepdim=True) / count.clamp(min=1)
    low, high = _extremes(values, present)
    # A mean of equals may be off by its rounding.
    centred = (filled - mean).masked_fill(~present | (low == high), 0.0)
    std = (centred.square().sum(1, keepdim=True) / (count - ddof).clamp(min=1)).sqrt()
    return _like(_average(centred / (std + eps), present, weight), scores)


def weighted_sum(
    scores: Tensor,
    weights: Sequence[float] | Tensor | None = None,
    *,
    affine: Sequence[tuple[float, float] | None] | str,
    names: Sequence[str] | None = None,
) -> Tensor:
    """Add up w_r (s_r - mean_r) / std_r over the scorers r, with declared scales.

    The sum is not divided by the sum of the weights. Where scores are missing, the
    present weights are scaled up to the full sum, so that rows stay comparable.

    Args:
        scores (`Tensor`): (groups, k, n).
        weights (list of `float`, *optional*): (n,). Defaults to equal ones.
        affine (list of pairs or "none"): (mean, std) per scorer, or ``"none"`` to add
            raw scores on purpose.
        names (list of `str`, *optional*): the scorers' names, for messages.

    Returns:
        `Tensor`: (groups, k). NaN for an image without any score.

    Raises:
        ConfigError: an unknown word, another number of scales, or a std that is not
            above 0.
        UserError: a scorer without a declared scale.
    """
    scaled = _scaled(scores, affine, names)
    values, present, weight = _prepared(_grouped(scaled), weights)
    return _like(_average(values, present, weight) * weight.sum(), scores)


def minmax(scores: Tensor, weights: Sequence[float] | Tensor | None = None) -> Tensor:
    """Average scores that are stretched to [0, 1] within each group.

    One outlier moves all others, so prefer `win_rates`. Arguments as there.
    """
    values, present, weight = _prepared(_grouped(scores), weights)
    low, high = _extremes(values, present)
    span = torch.where(high > low, high - low, 1.0)
    stretched = torch.where(high > low, (values - low) / span, 0.5)
    return _like(_average(stretched, present, weight), scores)


def majority(scores: Tensor, weights: Sequence[float] | Tensor | None = None) -> Tensor:
    """Find which of two images most of the weight prefers.

    Computes sign sum_r w_r sign(s_i - s_j). Scorers that lack one of the two abstain.
    Arguments as `win_rates`.

    Returns:
        `Tensor`: float64 (groups, k, k), antisymmetric, in {-1, 0, 1}. May be cyclic: a
            over b, b over c, c over a.
    """
    values, _, weight = _prepared(_grouped(scores), weights)
    votes = _signs(values[:, :, None], values[:, None]) @ weight
    # 0.1 + 0.2 against 0.3 is a tie, whatever the rounding of the sum.
    return torch.sign(votes).masked_fill(votes.abs() <= 1e-12 * weight.sum(), 0.0)


def majority_score(scores: Tensor, weights: Sequence[float] | Tensor | None = None) -> Tensor:
    """Compute Copeland's score: the share of the group that an image beats by majority.

    A tie counts one half. Arguments as `win_rates`.

    Returns:
        `Tensor`: (groups, k). NaN for an image without any score.
    """
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
    """Find pairs on which enough scorers agree by a margin.

    Args:
        scores (`Tensor`): (groups, k, n).
        margins (list of `float`, *optional*): (n,), the least difference that counts,
            at least 0. With 0, the default, any strict difference counts.
        min_agree (`int`, *optional*): how many scorers must prefer i, more than half of
            them, so that no pair is kept both ways. Defaults to all n.

    Returns:
        `Tensor`: bool (groups, k, k), image i is preferred over image j. A scorer that
            lacks one of the two does not agree.

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
    # NaN where a score is missing, and then neither comparison holds.
    difference = values[:, :, None] - values[:, None]
    return ((difference >= margin) & (difference > 0)).sum(-1) >= needed


def conservative(
    scores: Tensor,
    kind: str = "mean",
    *,
    k: float = 1.0,
    ddof: int = 0,
    weights: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """Combine an ensemble so that over-optimisation cannot exploit a single member.

    After Coste et al. 2023 (arXiv 2310.02743).

    Args:
        scores (`Tensor`): (..., n), members on one scale.
        kind (`str`, *optional*, defaults to "mean"): ``mean``, ``min`` (the worst case)
            or ``mean_minus_std`` (the mean minus `k` standard deviations across
            members).
        k (`float`, *optional*, defaults to 1.0): at least 0.
        ddof (`int`, *optional*, defaults to 0): of the standard deviation.
        weights (list of `float`, *optional*): (n,), of mean and standard deviation. A
            member of weight 0 is left out of the worst case too.

    Returns:
        `Tensor`: (...). NaN where every member is missing. One present member has a
            standard deviation of 0.

    Raises:
        ConfigError: unknown kind, or a negative `k`.
    """
    if kind not in KINDS:
        raise ConfigError(
            "combine.method",
            f"expected {', '.join(KINDS)}, got {kind!r}{suggestion(str(kind), KINDS)}",
        )
    if not k >= 0:
        raise ConfigError("combine.k", f"expected a number of at least 0, got {k!r}")
    values, present, weight = _prepared(scores, weights)
    if kind == "min":
        worst = values.masked_fill(~present, float("inf")).amin(-1)
        return _like(worst.masked_fill(~present.any(-1), float("nan")), scores)
    mean = _average(values, present, weight)
    if kind == "mean":
        return _like(mean, scores)
    share = weight * present
    total = share.sum(-1)
    spread = (share * (values - mean[..., None]).masked_fill(~present, 0.0).square()).sum(-1)
    count = present.sum(-1)
    correction = count / (count - ddof).clamp(min=1) if ddof else torch.ones_like(total)
    variance = spread / total * correction
    # The root has no gradient at 0.
    deviation = torch.where(variance > 0, variance, 1.0).sqrt() * (variance > 0)
    return _like(mean - k * deviation, scores)


def align_levels(scores: Tensor, weights: Sequence[float] | Tensor | None = None) -> Tensor:
    """Move each scorer's level in a group of images to the mean level of all scorers.

    A level is the mean score of the images that all scorers of the group could score.
    Pairwise losses leave a reward an arbitrary level per prompt, so before this the
    spread across scorers is partly meaningless. The mean over the scorers stays as it
    is, unless scores are missing.

    Args:
        scores (`Tensor`): (groups, k, n), members on one scale.
        weights (list of `float`, *optional*): (n,), of the mean level. Scorers of
            weight 0 are neither counted nor moved.

    Returns:
        `Tensor`: (groups, k, n). Groups with fewer than two such images stay as they
            are, since their scorers' spread would be 0.

    Example:
        ```python
        scores = torch.tensor([[[1.0, 12.0], [3.0, 10.0]]])  # levels 2 and 11
        assert align_levels(scores).tolist() == [[[5.5, 7.5], [7.5, 5.5]]]
        ```
    """
    values, present, weight = _prepared(_grouped(scores), weights)
    judging = present.any(1, keepdim=True)  # a scorer that saw nothing of a group has no level
    common = (values.isfinite() | ~judging).all(-1, keepdim=True)
    count = common.sum(1, keepdim=True)
    total = values.masked_fill(~(present & common), 0.0).sum(1, keepdim=True)
    levels = total / count.clamp(min=1)
    mean = _average(levels, judging, weight)[..., None]
    moved = torch.where((count >= 2) & judging, values - levels + mean, scores.double())
    return moved.to(scores.dtype)


def kendalls_w(scores: Tensor) -> Tensor:
    """Compute Kendall's coefficient of concordance: do the scorers rank alike?

    It is 1 when all scorers rank alike and near 0 when they do not, which is the
    cheapest sign of a broken scorer. It counts the images that every scorer scored.
    With their ranks (equals share the mean rank) W = 12 S / (n^2 (k^3 - k) - n T). S is
    the squared spread of the images' rank sums, T sums t^3 - t over the ties.

    Args:
        scores (`Tensor`): (groups, k, n).

    Returns:
        `Tensor`: float64 (groups,). NaN with fewer than two scorers or two common
            images, or when no scorer tells any two images apart.

    Example:
        ```python
        scores = torch.tensor([[[0.9, 21.0], [0.5, 20.0], [0.1, 19.0]]])
        assert kendalls_w(scores).tolist() == [1.0]
        ```
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
    """Compute for every two scorers the share of image pairs that they order alike.

    It counts the pairs of all groups that both scorers tell apart.

    Args:
        scores (`Tensor`): (groups, k, n).

    Returns:
        `Tensor`: float64 (n, n). NaN where there is no such pair.
    """
    values, _, _ = _prepared(_grouped(scores), None)
    k = scores.shape[1]
    first, second = torch.triu_indices(k, k, 1)
    signs = _signs(values[:, first], values[:, second]).flatten(0, 1)
    told = signs.abs()
    agree = (told.T @ told + signs.T @ signs) / 2
    return agree / (told.T @ told)  # 0 / 0 is NaN


def best_worst_pairs(combined: Tensor) -> tuple[Tensor, Tensor]:
    """Find the best and the worst image of each group.

    Of equal best images the first is taken, of equal worst ones the last, so an image
    never meets itself. A margin of 0 is a tie.

    Args:
        combined (`Tensor`): (groups, k), NaN = missing.

    Returns:
        indices (groups, 2) int64, -1 where a group has fewer than two scored images,
        and margins (groups,), NaN there.
    """
    present = ~combined.isnan()
    limits = torch.finfo(combined.dtype)
    finite = combined.clamp(limits.min, limits.max)  # below, infinity stands for a missing score
    best = finite.masked_fill(~present, float("-inf")).argmax(1)
    worst = combined.shape[1] - 1 - finite.masked_fill(~present, float("inf")).flip(1).argmin(1)
    indices = torch.stack([best, worst], 1)
    margins = combined.gather(1, best[:, None])[:, 0] - combined.gather(1, worst[:, None])[:, 0]
    few = present.sum(1) < 2
    return indices.masked_fill(few[:, None], -1), margins.masked_fill(few, float("nan"))


METHODS = (
    "winrate",
    "calibrated",
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
    center: bool = False,
) -> Tensor:
    """Combine the scores of each image by one of `METHODS`.

    Args:
        scores (`Tensor`): (groups, k, n), higher is better, NaN = missing.
        method (`str`, *optional*, defaults to "winrate"): one of `METHODS`.
        weights (list of `float`, *optional*): (n,). Defaults to equal ones.
        affine (list of pairs or "none", *optional*): (mean, std) per scorer. The
            methods ``weighted_sum``, ``mean``, ``min`` and ``mean_minus_std`` need it,
            since they compare members on one scale.
        missing (`str`, *optional*, defaults to "renormalise"): see `apply_missing`.
        names (list of `str`, *optional*): the scorers' names, for messages.
        k (`float`, *optional*, defaults to 1.0): of ``mean_minus_std``.
        ddof (`int`, *optional*, defaults to 0): of standard deviations.
        center (`bool`, *optional*, defaults to False): of ``min`` and
            ``mean_minus_std``: first move all scorers to one level per group, see
            `align_levels`.

    Returns:
        `Tensor`: (groups, k). NaN for an image without a score.

    Raises:
        ConfigError: unknown method, or `center` with another one.
        UserError: undeclared scales, or missing scores under ``missing="fail"``.

    Example:
        ```python
        scores = torch.tensor([[[1.0, 21.0], [0.0, 23.0]]])  # one prompt, two images
        assert combine(scores, "winrate", weights=[3.0, 1.0]).tolist() == [[0.75, 0.25]]
        ```
    """
    if method not in METHODS:
        raise ConfigError(
            "combine.method",
            f"unknown method {method!r}{suggestion(str(method), METHODS)}; "
            f"there are {', '.join(METHODS)}",
        )
    if center and method not in CENTERED:
        raise ConfigError(
            "combine.center", f"has an effect with {' and '.join(CENTERED)} alone, got {method}"
        )
    scores = apply_missing(scores, missing, names)
    simple: dict[str, Callable[..., Tensor]] = {
        "winrate": win_rates,
        "calibrated": functools.partial(win_rates, calibrate="sigmoid"),
        "majority": majority_score,
        "minmax": minmax,
    }
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
    if center:
        members = align_levels(members, weights)
    return _like(conservative(members, method, k=k, ddof=ddof, weights=weights), scores)


def _scaled(
    scores: Tensor, affine: Sequence[tuple[float, float] | None] | str, names: Sequence[str] | None
) -> Tensor:
    """Return (s - mean) / std in float64. Errors as `weighted_sum`."""
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
            "combine.method: this method adds or compares scores of different scorers, "
            f"which takes a common scale, and {', '.join(undeclared)} declares none; "
            "give each a normalize: {kind: affine, mean: ..., std: ...}, or "
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
            "scores: expected (groups, images of a group, scorers), got shape "
            f"{tuple(scores.shape)}"
        )
    return scores


def _prepared(
    scores: Tensor, weights: Sequence[float] | Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return float64 scores, which of them are present, and float64 weights.

    Scores of weight 0 count as missing.
    """
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


def _extremes(values: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the largest present score of each group, (groups, 1, n)."""
    low = values.masked_fill(~present, float("inf")).amin(1, keepdim=True)
    return low, values.masked_fill(~present, float("-inf")).amax(1, keepdim=True)


def _signs(first: Tensor, second: Tensor) -> Tensor:
    """Return sign(first - second) in float64.

    It is 0 where one is NaN, or both are the same infinity.
    """
    return (first > second).double() - (first < second).double()


def _like(values: Tensor, scores: Tensor) -> Tensor:
    """Return values in the scores' precision, but at least float32.

    Counts and half precisions must not round the result.
    """
    return values.to(torch.promote_types(scores.dtype, torch.float32))


def _average(values: Tensor, present: Tensor, weight: Tensor) -> Tensor:
    """Average what is present over the last dimension, NaN where nothing weighs."""
    share = weight * present
    return (values.masked_fill(~present, 0.0) * share).sum(-1) / share.sum(-1)
