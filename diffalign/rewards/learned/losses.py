"""Losses of reward models, as pure functions of scores.

A score is higher for what people prefer, and P(a over b) = sigmoid(s_a - s_b): the
temperature is inside the score. z is the difference of two scores, and y = 1 says that
the first one is preferred.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from ...errors import ConfigError


def preference_loss(margins: Tensor, labels: Tensor | float = 1.0) -> Tensor:
    """Bradley-Terry's loss, y nls(z) + (1 - y) nls(-z) with nls(z) = -log sigmoid(z).

    Args:
        margins (`Tensor`): Score of the first item minus that of the second, (n,).
        labels (`Tensor` or `float`, *optional*, defaults to 1): Share of judges who
            prefer the first item, in [0, 1]. 1/2 is a tie.

    Returns:
        `Tensor`: (n,).
    """
    return labels * softplus(-margins) + (1 - labels) * softplus(margins)


def pickscore_loss(scores: Tensor, labels: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """PickScore's loss (Kirstain et al. 2023, arXiv 2305.01569).

    A tie is pulled to equal scores. Its constant log(1/2) makes the best value 0.

    Args:
        scores (`Tensor`): (n, 2).
        labels (`Tensor`): 1, 1/2 or 0 for the first image, (n,).
        counts (`Tensor`): Number of rows of each row's prompt, (n,). Every prompt
            counts the same.

    Returns:
        `tuple[Tensor, Tensor]`: The loss, and the loss of each row, (n,).
    """
    rows = preference_loss(scores[:, 0] - scores[:, 1], labels)
    rows = rows - (labels == 0.5).to(rows.dtype) * math.log(2)
    weights = 1 / counts
    return (rows * weights).sum() / weights.sum(), rows


def in_batch_loss(
    texts: Tensor, images: tuple[Tensor, Tensor], scale: Tensor | float, labels: Tensor
) -> Tensor:
    """PickScore's option with the other prompts and images of the batch as negatives.

    Args:
        texts (`Tensor`): Unit embeddings of the prompts, (n, d).
        images (`tuple[Tensor, Tensor]`): Unit embeddings of both images, (n, d) each.
        scale (`Tensor` or `float`): Factor of the cosines.
        labels (`Tensor`): As for `pickscore_loss`.

    Returns:
        `Tensor`: Mean of the image part and the text part, (n,).
    """
    own = torch.arange(len(texts), device=texts.device)
    by_image = [-(scale * image @ texts.T).log_softmax(1)[own, own] for image in images]
    both = scale * texts @ torch.cat(images).T
    by_text = both.log_softmax(1)
    picked = [-by_text[own, own], -by_text[own, own + len(texts)]]
    tie = (labels == 0.5).to(texts.dtype) * math.log(2)
    image_part = labels * by_image[0] + (1 - labels) * by_image[1]
    text_part = labels * picked[0] + (1 - labels) * picked[1] - tie
    return (image_part + text_part) / 2


def anchor_loss(
    texts: Tensor, images: Tensor, scale: Tensor | float, same: Tensor | None = None
) -> Tensor:
    """CLIP's contrastive loss, which keeps what the towers know of prompts.

    The analogue of the language-model loss of GRM (Yang et al. 2024).

    Args:
        texts (`Tensor`): Unit embeddings of prompts, (n, d).
        images (`Tensor`): Unit embeddings of an image of each, (n, d).
        scale (`Tensor` or `float`): Factor of the cosines, that of the start.
        same (`Tensor`, *optional*): Whether two rows have one prompt, (n, n) bool. Such
            rows are no negatives of each other.

    Returns:
        `Tensor`: Mean of both directions, (n,).
    """
    logits = scale * images @ texts.T
    own = torch.arange(len(texts), device=texts.device)
    if same is not None:
        others = same & ~torch.eye(len(texts), dtype=torch.bool, device=texts.device)
        logits = logits.masked_fill(others, -math.inf)
    return -(logits.log_softmax(1)[own, own] + logits.log_softmax(0)[own, own]) / 2


def ranked_pairs(ranks: Tensor) -> Tensor:
    """List the pairs of a list of which the first item is ranked better.

    Args:
        ranks (`Tensor`): 1 is the best, ties are allowed, (k,).

    Returns:
        `Tensor`: (pairs, 2).
    """
    better = ranks[:, None] < ranks[None, :]
    return better.nonzero()


def ranked_list_loss(scores: Tensor, ranks: Tensor) -> Tensor:
    """ImageReward's loss of a list (Xu et al. 2023, arXiv 2304.05977).

    Args:
        scores (`Tensor`): (k,).
        ranks (`Tensor`): 1 is the best, ties are allowed and give no pair, (k,).

    Returns:
        `Tensor`: Loss of each pair, (pairs,).
    """
    first, second = ranked_pairs(ranks).T
    return softplus(scores[second] - scores[first])


def plackett_luce_loss(scores: Tensor) -> Tensor:
    """Negative log-likelihood of an order, sum_i [log sum_{j >= i} exp(s_j) - s_i].

    With two items it is Bradley-Terry's loss.

    Args:
        scores (`Tensor`): Scores from the best item to the worst, (..., k).

    Returns:
        `Tensor`: (...).
    """
    tails = scores.flip(-1).logcumsumexp(-1).flip(-1)
    return (tails - scores).sum(-1)


def thumbs_loss(scores: Tensor, liked: Tensor, bias: Tensor | float) -> Tensor:
    """Logistic loss of thumbs up and down, with a bias per user.

    Args:
        scores (`Tensor`): (n,).
        liked (`Tensor`): 1 or 0, (n,).
        bias (`Tensor` or `float`): How easily the user likes something, (n,) or one.

    Returns:
        `Tensor`: (n,).
    """
    return preference_loss(scores + bias, liked)


def rating_probabilities(scores: Tensor, cuts: Tensor) -> Tensor:
    """Probability of each rating, by cumulative logits.

    Args:
        scores (`Tensor`): (n,).
        cuts (`Tensor`): Ascending cut points, (levels - 1,).

    Returns:
        `Tensor`: (n, levels).
    """
    below = torch.sigmoid(cuts - scores[:, None])
    ends = torch.zeros_like(below[:, :1]), torch.ones_like(below[:, :1])
    return torch.cat([ends[0], below, ends[1]], 1).diff(dim=1)


# Noisy labels -------------------------------------------------------------------------


def smoothed_loss(margins: Tensor, share: float) -> Tensor:
    """Label smoothing, (1 - e) nls(z) + e nls(-z).

    Args:
        margins (`Tensor`): z of the labelled winner, (n,).
        share (`float`): e, in [0, 0.5).

    Returns:
        `Tensor`: (n,).
    """
    return preference_loss(margins, 1 - check_share("smoothing", share))


def forward_corrected_loss(margins: Tensor, flip_rate: float) -> Tensor:
    """Likelihood of labels of which a share is wrong: -log((1 - e) sigmoid(z) + e
    sigmoid(-z)).

    Its gradient is bounded, so a wrong label does little harm.

    Args:
        margins (`Tensor`): z of the labelled winner, (n,).
        flip_rate (`float`): e, in [0, 0.5).

    Returns:
        `Tensor`: (n,).
    """
    share = check_share("flip_rate", flip_rate)
    if share == 0:
        return softplus(-margins)
    right, wrong = logsigmoid(margins), logsigmoid(-margins)
    return -torch.logaddexp(right + math.log1p(-share), wrong + math.log(share))


def margin_loss(margins: Tensor, margin: Tensor | float) -> Tensor:
    """nls(z - m): the winner must lead by more than a margin.

    Args:
        margins (`Tensor`): z of the labelled winner, (n,).
        margin (`Tensor` or `float`): m, at least 0.

    Raises:
        ConfigError: A margin is negative.
    """
    if bool((torch.as_tensor(margin) < 0).any()):
        raise ConfigError("margin", f"expected a number of at least 0, got {margin}")
    return softplus(-(margins - margin))


def rao_kupper_loss(margins: Tensor, labels: Tensor, threshold: Tensor | float) -> Tensor:
    """Bradley-Terry with ties (Rao and Kupper 1967): P(first) = e^z / (e^z + k).

    Args:
        margins (`Tensor`): z, (n,).
        labels (`Tensor`): 1, 1/2 or 0 for the first item, (n,). Others are shares of
            judges who prefer it.
        threshold (`Tensor` or `float`): k, above 1.

    Returns:
        `Tensor`: (n,).
    """
    log_k = torch.as_tensor(threshold, dtype=margins.dtype).log()
    first, second = softplus(log_k - margins), softplus(log_k + margins)
    tie = first + second - (torch.exp(2 * log_k) - 1).log()
    return torch.where(labels == 0.5, tie, labels * first + (1 - labels) * second)


def label_strength(margins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How sure an ensemble is of each label (Wang et al. 2024, arXiv 2401.06080).

    Args:
        margins (`Tensor`): z of the labelled winner by each member, (n, members). A
            member must not have trained on the pair.

    Returns:
        `tuple[Tensor, Tensor, Tensor]`: Mean, standard deviation over all members, and
        soft label sigmoid(mean), each (n,).
    """
    mean = margins.mean(1)
    return mean, margins.std(1, correction=0), torch.sigmoid(mean)


def flip_rate_of(disagreement: float) -> float:
    """Estimate the share of wrong labels from pairs that were judged twice.

    D = 2 e (1 - e), so e = (1 - sqrt(1 - 2 D)) / 2. Where people differ in taste, it is
    an upper bound.

    Args:
        disagreement (`float`): Share of these pairs with different labels.
    """
    return (1 - math.sqrt(max(0.0, 1 - 2 * disagreement))) / 2


def check_share(name: str, share: float) -> float:
    """Check a share of wrong labels.

    Raises:
        ConfigError: It is not in [0, 0.5).
    """
    if not 0 <= share < 0.5:
        raise ConfigError(name, f"expected a share from 0 to below 0.5, got {share}")
    return share


# Distributions ------------------------------------------------------------------------


def pinball_loss(quantiles: Tensor, values: Tensor, levels: Tensor) -> Tensor:
    """max(tau u, (tau - 1) u) with u = value - quantile.

    Args:
        quantiles (`Tensor`): Predicted quantiles, (n, q) or (q,).
        values (`Tensor`): Ratings, (n,).
        levels (`Tensor`): tau of each quantile, in (0, 1), (q,).

    Returns:
        `Tensor`: (n, q).
    """
    rest = values[:, None] - quantiles
    return torch.maximum(levels * rest, (levels - 1) * rest)


def quantile_preference(first: Tensor, second: Tensor) -> Tensor:
    """P(first over second) from the quantiles of both, by all pairs of them.

    Args:
        first (`Tensor`): (n, q).
        second (`Tensor`): (n, r).

    Returns:
        `Tensor`: Mean of sigmoid of all differences, (n,).
    """
    return torch.sigmoid(first[:, :, None] - second[:, None, :]).mean((1, 2))


# Nuisances ----------------------------------------------------------------------------


def nuisance_correlations(rewards: Tensor, nuisances: Tensor) -> Tensor:
    """Correlation of differences of a reward with differences of each nuisance.

    It is not centred, because the sign of a pair is arbitrary. So exchanging the items
    of a pair changes nothing.

    Args:
        rewards (`Tensor`): Differences of the reward within pairs, (n,).
        nuisances (`Tensor`): Differences of the nuisances, (n, m).

    Returns:
        `Tensor`: (m,), each in [-1, 1].
    """
    products = rewards @ nuisances
    lengths = rewards.norm() * nuisances.norm(dim=0)
    return products / lengths.clamp(min=1e-12)


def explained_share(rewards: Tensor, nuisances: Tensor) -> Tensor:
    """R^2: the share of a reward's differences that the nuisances explain together.

    Args:
        rewards (`Tensor`): (n,).
        nuisances (`Tensor`): (n, m).
    """
    solution = torch.linalg.lstsq(nuisances, rewards[:, None]).solution
    rest = rewards - (nuisances @ solution)[:, 0]
    return 1 - rest.square().sum() / rewards.square().sum().clamp(min=1e-12)
