"""PAL: rewards of people with different tastes (Chen et al. 2024, arXiv 2406.08469).

A user's taste is a mixture of K prototypes, with weights on the simplex. In PAL-A a
user has an ideal point, and what is near it is better. In PAL-B the point depends on
the prompt, and the score is a product or a cosine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from ...errors import UserError

Margins: TypeAlias = Tensor | Callable[[Tensor], Tensor]
"""Margins of a user's pairs. A tensor (pairs, K) has those by each prototype, which the
weights of a user mix. A function returns those of weights (K,), for scores that are not
linear in them, such as a cosine."""


def user_weights(logits: Tensor) -> Tensor:
    """Map logits of users to weights of the prototypes.

    Args:
        logits (`Tensor`): (..., K).

    Returns:
        `Tensor`: (..., K), each row sums to 1.
    """
    return logits.softmax(-1)


def pal_a_distances(items: Tensor, points: Tensor) -> Tensor:
    """Distance of items from users' ideal points. The score is its negative.

    Args:
        items (`Tensor`): f(x), (n, d).
        points (`Tensor`): Ideal points, (n, d), such as `weights @ prototypes`.

    Returns:
        `Tensor`: (n,).
    """
    return (items - points).norm(dim=-1)


def pal_a_hinge(winner: Tensor, loser: Tensor) -> Tensor:
    """max(0, 1 - (d_loser - d_winner)).

    Args:
        winner (`Tensor`): Distances of the preferred items, (n,).
        loser (`Tensor`): Distances of the others, (n,).
    """
    return (1 - (loser - winner)).clamp(min=0)


def pal_b_points(prototypes: Tensor, weights: Tensor) -> Tensor:
    """Points of users for prompts, sum_k w_uk g_k(c).

    Args:
        prototypes (`Tensor`): g_k(c), (n, K, d).
        weights (`Tensor`): (n, K).

    Returns:
        `Tensor`: (n, d).
    """
    return (weights[..., None] * prototypes).sum(-2)


def pal_b_scores(
    items: Tensor, points: Tensor, form: str = "angle", scale: Tensor | float = 1 / 0.07
) -> Tensor:
    """Score items at users' points.

    Args:
        items (`Tensor`): f(x), (n, d).
        points (`Tensor`): (n, d).
        form (`str`, *optional*, defaults to `"angle"`): `angle` (scale times the
            cosine), `dot` or `distance` (its negative).
        scale (`Tensor` or `float`, *optional*): Factor of the cosine.

    Returns:
        `Tensor`: (n,).
    """
    if form == "distance":
        return -pal_a_distances(items, points)
    if form == "dot":
        return (items * points).sum(-1)
    return scale * (normalize(items, dim=-1) * normalize(points, dim=-1)).sum(-1)


def margins_by(margins: Margins, weights: Tensor) -> Tensor:
    """Return the margins of pairs for a user's weights of the prototypes, (pairs,).

    Args:
        margins (`Margins`): See there.
        weights (`Tensor`): (K,).
    """
    if isinstance(margins, Tensor):
        return margins.to(weights) @ weights
    return margins(weights)


def fit_user(
    margins: Margins,
    labels: Tensor,
    penalty: float = 1.0,
    start: Tensor | None = None,
    weight: Tensor | float = 1.0,
) -> Tensor:
    """Find the logits of a new user from a few pairs, with the prototypes fixed.

    Minimises sum nls(y z(w)) + penalty / 2 |v - start|^2 from v = start, w =
    softmax(v), by L-BFGS.

    Args:
        margins (`Margins`): Of the pairs.
        labels (`Tensor`): 1 if the user prefers the first item, -1 otherwise, (pairs,).
        penalty (`float`, *optional*, defaults to `1.0`): Pull towards `start`.
        start (`Tensor`, *optional*): Logits of a user without pairs, (K,). Defaults to
            equal weights, which a function of margins cannot count. See `likely_user`.
        weight (`Tensor` or `float`, *optional*, defaults to `1.0`): How much each pair
            counts, (pairs,) or one.

    Returns:
        `Tensor`: (K,), float64.

    Raises:
        UserError: There are no pairs.
    """
    if not len(labels):
        raise UserError("a new user needs at least one decided pair; add votes that are no ties")
    if start is None:
        assert isinstance(margins, Tensor)
        start = torch.zeros(margins.shape[1])
    begin, y = start.double(), labels.double()
    logits = begin.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=200,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        value = user_objective(logits, margins, y, penalty, begin, weight)
        value.backward()
        return value

    optimizer.step(objective)  # type: ignore[arg-type]
    return logits.detach()


def user_objective(
    logits: Tensor,
    margins: Margins,
    labels: Tensor,
    penalty: float,
    start: Tensor | float = 0.0,
    weight: Tensor | float = 1.0,
) -> Tensor:
    """What `fit_user` minimises. Arguments as there."""
    fits = weight * softplus(-labels * margins_by(margins, logits.softmax(0)))
    return fits.sum() + penalty / 2 * (logits - start).square().sum()


def likely_user(
    margins: Margins, labels: Tensor, logits: Tensor, weight: Tensor | float = 1.0
) -> Tensor:
    """Average the known users' logits by how well each explains a new user's pairs.

    Args:
        margins (`Margins`): Of the pairs.
        labels (`Tensor`): 1 or -1, (pairs,).
        logits (`Tensor`): Of the known users, (users, K).
        weight (`Tensor` or `float`, *optional*, defaults to `1.0`): How much each pair
            counts, (pairs,) or one.

    Returns:
        `Tensor`: (K,).
    """
    by_user = torch.stack([margins_by(margins, row) for row in logits.double().softmax(1)], 1)
    return prototype_posterior(by_user, labels, weight=weight) @ logits.to(by_user)


def fit_new_user(
    margins: Margins,
    labels: Tensor,
    known: Tensor,
    penalty: float = 1.0,
    weight: Tensor | float = 1.0,
) -> Tensor:
    """Find the logits of a new user, who is first taken to be like the known ones.

    A few pairs fix little, so `fit_user` starts from `likely_user`. Arguments as there.

    Args:
        known (`Tensor`): Logits of the known users, (users, K).

    Returns:
        `Tensor`: (K,), float64.
    """
    start = likely_user(margins, labels, known, weight)
    return fit_user(margins, labels, penalty, start, weight)


def prototype_posterior(
    margins: Tensor,
    labels: Tensor,
    prior: Tensor | None = None,
    weight: Tensor | float = 1.0,
) -> Tensor:
    """Posterior over the prototypes of a user who is one of them.

    Args:
        margins (`Tensor`): (pairs, K).
        labels (`Tensor`): 1 or -1, (pairs,).
        prior (`Tensor`, *optional*): (K,). Defaults to equal shares.
        weight (`Tensor` or `float`, *optional*, defaults to `1.0`): How much each pair
            counts, (pairs,) or one.

    Returns:
        `Tensor`: (K,), sums to 1.
    """
    weight = torch.as_tensor(weight, dtype=margins.dtype).expand(len(margins))
    likelihoods = -weight @ softplus(-labels[:, None] * margins)
    if prior is not None:
        likelihoods = likelihoods + prior.log()
    return likelihoods.softmax(0)
