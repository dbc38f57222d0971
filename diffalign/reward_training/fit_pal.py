"""Fit PAL to embeddings and judgements. The whole data are one batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from ..rewards.learned.heads import PalHead, UserHead
from ..rewards.scorers.trained import EVERYBODY
from ..runtime.progress import progress_bar
from .config import RewardConfig
from .fit_head import LOOK_EVERY, STEPS
from .pair_loss import fit_scale, margins_of_scores, nuisance_penalty, part_loss, scale_of
from .pair_tensors import Pairs

PAL_PENALTIES = (0.3, 1.0)
_STARTS = 3


def fit_pal(
    train: Pairs, val: Pairs, users: int, config: RewardConfig
) -> tuple[PalHead, dict[str, float]]:
    """Fit PAL: prototypes and the weights of every user.

    There are local optima, so it starts several times, the first time from users
    grouped by what they prefer (`taste_logits`), and takes the lowest training
    objective. Linear networks are held by the penalty, and the last step counts. With a
    hidden layer the step with the best validation loss counts.

    Args:
        train (`Pairs`): Pairs with users.
        val (`Pairs`): Pairs that choose the step.
        users (`int`): Number of users.
        config (`RewardConfig`): The settings.

    Returns:
        `tuple[PalHead, dict]`: The head, and what was chosen.
    """
    best: tuple[float, PalHead, dict[str, float]] | None = None
    penalties = [config.l2] if config.l2 is not None else list(PAL_PENALTIES)
    bar = progress_bar(
        total=len(penalties) * _STARTS, desc="fitting PAL", unit="start", leave=False
    )
    for penalty in penalties:
        torch.manual_seed(config.seed)
        starts = []
        for number in range(_STARTS):
            logits = taste_logits(train, users, config.prototypes) if number == 0 else None
            starts.append(_fit_pal_once(train, val, users, penalty, config, logits))
            bar.update()
        _, head, chosen = min(starts, key=lambda start: start[0])
        with torch.no_grad():
            margins = pal_margins(head, val)
        # Heads of different penalties differ in scale, which is fitted at the end.
        scale = fit_scale(margins, val, config)
        loss = float(part_loss(scale * margins, val, config))
        if best is None or loss < best[0]:
            best = (loss, head, {"validation_loss": loss, "l2": penalty} | chosen)
    bar.close()
    assert best is not None
    return best[1:]


def taste_logits(
    pairs: Pairs, users: int, prototypes: int, expected: Tensor | None = None
) -> Tensor:
    """Group users by the mean difference of what they prefer and what they reject.

    The differences are whitened, since directions in which images of a prompt differ
    much would hide the others. Prototypes are the main directions in which users
    differ, each with its opposite.

    Args:
        pairs (`Pairs`): Pairs with users.
        users (`int`): Number of users.
        prototypes (`int`): K.
        expected (`Tensor`, *optional*): Probability that the first image is preferred,
            by what all users agree on, (n,). Only what departs from it counts. None is
            a half.

    Returns:
        `Tensor`: Logits of each user's prototypes, (users, K).
    """
    differences = pairs.first - pairs.second
    covariance = differences.T @ differences / len(differences)
    floor = 1e-2 * covariance.diagonal().mean()
    values, vectors = torch.linalg.eigh(covariance)
    white = differences @ vectors / (values + floor).sqrt()
    known = (pairs.user >= 0) & (pairs.label != 0.5)
    sign = torch.where(pairs.label > 0.5, 1.0, -1.0).to(white)
    if expected is not None:
        sign = sign - (2 * expected - 1)
    means = torch.zeros(users, white.shape[1], dtype=white.dtype)
    counts = torch.zeros(users, dtype=white.dtype)
    means.index_add_(0, pairs.user[known], (sign[:, None] * white)[known])
    counts.index_add_(0, pairs.user[known], torch.ones(int(known.sum()), dtype=white.dtype))
    means = means / counts.clamp(min=1)[:, None]
    left, scales, _ = torch.linalg.svd(means - means.mean(0), full_matrices=False)
    loadings = left * scales
    logits = torch.zeros(users, prototypes, dtype=white.dtype)
    for k in range(prototypes):
        if k // 2 < loadings.shape[1]:
            column = loadings[:, k // 2]
            # One user has no deviation, and a column of zeros.
            spread = column.std() if users > 1 else column.new_zeros(())
            logits[:, k] = (1 if k % 2 == 0 else -1) * column / spread.clamp(min=1e-9)
    return logits


def _fit_pal_once(
    train: Pairs,
    val: Pairs,
    users: int,
    penalty: float,
    config: RewardConfig,
    logits: Tensor | None,
) -> tuple[float, PalHead, dict[str, float]]:
    """Fit from these users, or the next random ones. Returns the objective too."""
    assert config.learning_rate is not None
    sizes = train.first.shape[1], users, config.prototypes, config.user_hidden
    head = PalHead(*sizes, config.pal_form).double()
    head.standardise(torch.cat([train.first, train.second]), train.text)
    if logits is not None:
        with torch.no_grad():
            head.logits.copy_(logits)
    weights = [p for name, p in head.named_parameters() if name.endswith("weight")]
    networks = [p for name, p in head.named_parameters() if name not in ("logits", "log_scale")]

    def objective() -> Tensor:
        margins = pal_margins(head, train)
        loss = part_loss(margins, train, config) + nuisance_penalty(margins, train, config)
        squares = torch.stack([weight.square().sum() for weight in weights]).sum()
        # The mean gives each user the same weight, however many pairs they judged.
        return loss + penalty * squares + 1e-3 * head.logits.square().sum(1).mean()

    adam = torch.optim.Adam(
        [
            {"params": networks, "lr": config.learning_rate},
            {"params": [head.logits], "lr": 5 * config.learning_rate},
            {"params": [head.log_scale], "lr": 5 * config.learning_rate},
        ]
    )
    steps = config.max_steps or STEPS
    decay = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / (steps + 1))
    best: tuple[float, dict[str, Tensor], int] | None = None
    for step in range(steps + 1):
        if step:
            adam.zero_grad()
            objective().backward()
            adam.step()
            decay.step()
        if step == steps or (config.user_hidden and step % LOOK_EVERY == 0):
            with torch.no_grad():
                value = float(part_loss(pal_margins(head, val), val, config))
            if best is None or value < best[0]:
                best = (value, copy.deepcopy(head.state_dict()), step)
    assert best is not None
    head.load_state_dict(best[1])
    with torch.no_grad():
        reached = float(objective())
    return reached, head, {"step": float(best[2])}


def pal_margins(head: UserHead, pairs: Pairs) -> Tensor:
    """Compute the margins of all pairs for their judges. Unknown judges get the mean
    user.
    """
    return margins_of_scores(_pal_scores(head, pairs, judges(pairs, head.logits)))


def judges(pairs: Pairs, logits: Tensor) -> Tensor:
    """Return the weights of each pair's judge, (n, K). Unknown ones are the mean user.

    Args:
        pairs (`Pairs`): n pairs.
        logits (`Tensor`): Of the users, (users, K).
    """
    shares = logits.softmax(1)
    return torch.cat([shares, shares.mean(0, keepdim=True)])[pairs.user]  # -1 is the last row


def mean_user_scores(head: UserHead, pairs: Pairs) -> Tensor:
    """Compute the scores of both images of all pairs by the mean user, (n, 2)."""
    everyone = head.logits.softmax(1).mean(0)
    return _pal_scores(head, pairs, everyone.expand(len(pairs), -1))


@torch.no_grad()
def user_scales(
    head: UserHead, pairs: Pairs, users: Sequence[str], temperature: float
) -> dict[str, list[float]]:
    """Return the scale of the reward for every user, and for the worst-off one.

    Args:
        head (`UserHead`): The trained head.
        pairs (`Pairs`): n pairs.
        users (`Sequence[str]`): Names, in the order of the head's weights.
        temperature (`float`): Multiplies the scores.
    """
    shares = head.logits.softmax(1)
    scales, worst = {}, None
    for number, name in enumerate(users):
        scores = _pal_scores(head, pairs, shares[number].expand(len(pairs), -1))
        scales[name] = scale_of(scores, temperature)
        worst = scores if worst is None else torch.minimum(worst, scores)
    if worst is not None:
        scales[EVERYBODY] = scale_of(worst, temperature)
    return scales


def _pal_scores(head: UserHead, pairs: Pairs, weights: Tensor) -> Tensor:
    both = (head.score(image, pairs.text, weights) for image in (pairs.first, pairs.second))
    return torch.stack(list(both), 1)
