"""What a label of a pair would teach a linear reward.

The posterior of the head's weights is taken as normal around the fit (Laplace). A label
of a pair tells most where the margin is uncertain and the label itself is not: the
expected gain is that of D-optimal designs for logistic regression (Chaloner and
Verdinelli 1995, Bayesian experimental design, section 5).
"""

from __future__ import annotations

import torch
from torch import Tensor


def label_information(margins: Tensor, flip_rate: float = 0.0) -> Tensor:
    """Fisher information of a label about its margin.

    With p = sigmoid(margin) and q = e + (1 - 2 e) p it is
    (1 - 2 e)^2 p^2 (1 - p)^2 / (q (1 - q)), which is p (1 - p) without flips.

    Args:
        margins (`Tensor`): Score of the first image minus that of the second, (n,).
        flip_rate (`float`, *optional*, defaults to `0.0`): e, the share of labels that
            are wrong, below 1/2.

    Returns:
        `Tensor`: In 0 to 1/4, (n,).
    """
    p = torch.sigmoid(margins)
    slope = p * torch.sigmoid(-margins)
    if not flip_rate:
        return slope
    q = flip_rate + (1 - 2 * flip_rate) * p
    return ((1 - 2 * flip_rate) * slope).square() / (q * (1 - q))


def posterior_covariance(directions: Tensor, information: Tensor, prior: Tensor) -> Tensor:
    """Covariance of the weights after some labels.

    Args:
        directions (`Tensor`): Gradient of each margin by the weights, (n, d).
        information (`Tensor`): Of each label about its margin, (n,).
        prior (`Tensor`): Precision of each weight without labels, above 0, (d,).

    Returns:
        `Tensor`: (d, d).
    """
    precision = directions.T @ (information[:, None] * directions) + torch.diag(prior)
    return torch.cholesky_inverse(torch.linalg.cholesky(precision))


def information_gain(directions: Tensor, information: Tensor, covariance: Tensor) -> Tensor:
    """Expected gain of a label about the weights, log(1 + I g' C g) / 2 in nats.

    Args:
        directions (`Tensor`): g of each pair, (n, d).
        information (`Tensor`): I of each label, (n,).
        covariance (`Tensor`): C, (d, d).

    Returns:
        `Tensor`: (n,).
    """
    variance = ((directions @ covariance) * directions).sum(-1)
    return torch.log1p(information * variance) / 2


def after_label(covariance: Tensor, direction: Tensor, information: Tensor) -> Tensor:
    """Covariance of the weights after one more label, by Sherman and Morrison.

    Args:
        covariance (`Tensor`): (d, d).
        direction (`Tensor`): Of the labelled pair, (d,).
        information (`Tensor`): Of the label, a number.

    Returns:
        `Tensor`: (d, d).
    """
    moved = covariance @ direction
    return covariance - information / (1 + information * (direction @ moved)) * moved.outer(moved)
