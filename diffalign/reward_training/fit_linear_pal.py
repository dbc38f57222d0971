"""Fit PAL's linear form to embeddings and judgements. The whole data are one batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..rewards.learned.heads import LinearPalHead
from ..runtime.progress import progress_bar
from ..training.guardian import change_interval
from .config import RewardConfig
from .fit_head import FOLDS, MOST_FOLDED, cross_validated_penalty, folds_of
from .fit_pal import judges, taste_logits
from .pair_loss import fit_scale, label_loss, nuisance_penalty, part_loss
from .pair_tensors import Pairs

TASTE_PENALTIES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)
_ROUNDS = 3
"""How often users and tastes are fitted in turns. More rounds changed little."""
_USER_PENALTY = 1.0
"""Pull of a user's logits to equal weights, as for new users."""
_FOLD_ITERATIONS, _ITERATIONS = 60, 500  # of L-BFGS, at most
_FEW_PROMPTS_PENALTY = 1.0
_ONE_ERROR = 0.6827
"""Coverage of one standard error."""
_SMALLEST_GAIN = 1e-3
"""Nats per pair. Tastes that gain less are not worth being read from votes."""


def fit_linear_pal(
    train: Pairs, users: int, config: RewardConfig, groups: Tensor | None = None
) -> tuple[LinearPalHead, dict[str, float]]:
    """Fit a reward for everybody, and the tastes of the users beside it.

    With the users fixed this is a logistic regression. With the tastes fixed every user
    is fitted alone. Both take turns. Fitted together, a few votes would give every user
    the taste of the noise. So users are fitted to margins by tastes that have not seen
    the prompt (cross-fitting), and a loss that neither tastes nor users have seen
    chooses the penalty. Tastes are left out unless they lower it by more than the
    standard error of that.

    Args:
        train (`Pairs`): Pairs with users.
        users (`int`): Number of users.
        config (`RewardConfig`): The settings.
        groups (`Tensor`, *optional*): See `fit_head`.

    Returns:
        `tuple[LinearPalHead, dict]`: The head, and what was chosen. `taste_gain` is by
        how much the tastes lower the loss of a pair on average, 0 without tastes.
    """
    head = LinearPalHead(train.first.shape[1], users, config.prototypes).double()
    head.standardise(torch.cat([train.first, train.second]), torch.cat([train.text, train.text]))
    shared = config.l2
    if shared is None:
        shared = cross_validated_penalty(train, config, None, groups)
    if shared is None:
        shared = _FEW_PROMPTS_PENALTY
    rows = _Rows.of(head, train)
    everybody = torch.zeros(users, config.prototypes, dtype=torch.float64)
    best = _Choice(float("inf"), everybody, shared, torch.zeros(len(train)))
    gain = 0.0
    if config.prototypes > 1:
        folds = _folds(train, config, groups)
        alone = torch.empty(len(train), dtype=torch.float64)
        for held_out in folds:
            only = rows.of_rows(~held_out).fit(everybody, (shared, None), config)
            alone[held_out] = rows.of_rows(held_out).by_prototype(only)[:, 0]
        start = taste_logits(train, users, config.prototypes, alone.sigmoid())
        penalties = TASTE_PENALTIES if config.l2 is None else (config.l2,)
        bar = progress_bar(total=len(penalties), desc="fitting PAL", unit="penalty", leave=False)
        for penalty in penalties:
            choice = _cross_fitted(rows, folds, start, (shared, penalty), config)
            best = min(best, choice, key=lambda each: each.loss)
            bar.update()
        bar.close()
        gain = _gain(train, train.weight * label_loss(alone, train.label, config) - best.losses)
    tastes = best.penalty if gain > 0 else None
    logits = best.logits if gain > 0 else everybody
    fitted = rows.fit(logits, (shared, tastes), config, iterations=_ITERATIONS)
    with torch.no_grad():
        head.log_factor.copy_(fitted.log_factor)
        head.shared.copy_(fitted.shared)
        head.tastes.copy_(fitted.tastes)
        head.logits.copy_(logits)
    chosen = {"l2": shared, "taste_gain": gain}
    return head, chosen | ({} if tastes is None else {"taste_l2": tastes})


@dataclass
class _Choice:
    """What a penalty and its users reach on prompts that were not fitted."""

    loss: float
    logits: Tensor
    penalty: float
    losses: Tensor


@dataclass
class _Weights:
    log_factor: Tensor
    shared: Tensor
    tastes: Tensor


@dataclass
class _Rows:
    """Differences between the two images of some pairs, of what scores are linear in.

    Attributes:
        pairs (`Pairs`): The n pairs.
        cosine (`Tensor`): (n,).
        features (`Tensor`): (n, 2 d + 1), which begin with the image.
        log_factor (`Tensor`): Logarithm of the factor by which the base multiplies it.
    """

    pairs: Pairs
    cosine: Tensor
    features: Tensor
    log_factor: Tensor

    @classmethod
    def of(cls, head: LinearPalHead, pairs: Pairs) -> _Rows:
        first, second = (head.parts(image, pairs.text) for image in (pairs.first, pairs.second))
        cosine = first[0] - second[0]
        lead = pairs.base[:, 0] - pairs.base[:, 1]  # the base is a factor times the cosine
        factor = (lead @ cosine) / (cosine @ cosine).clamp(min=1e-12)
        return cls(pairs, cosine, first[1] - second[1], factor.clamp(min=1e-6).log())

    def of_rows(self, rows: Tensor) -> _Rows:
        """Return some of the pairs, by a mask (n,)."""
        return _Rows(self.pairs.rows(rows), self.cosine[rows], self.features[rows], self.log_factor)

    def by_prototype(self, weights: _Weights) -> Tensor:
        """Return the margins by every prototype alone, (n, K)."""
        everybody = weights.log_factor.exp() * self.cosine + self.features @ weights.shared
        images = self.features[:, : weights.tastes.shape[1]]
        return everybody[:, None] + images @ weights.tastes.T

    def margins(self, weights: _Weights, logits: Tensor) -> Tensor:
        """Return the margins for the judges, (n,). Unknown judges are the mean user."""
        return (judges(self.pairs, logits) * self.by_prototype(weights)).sum(1)

    def fit(
        self,
        logits: Tensor,
        penalties: tuple[float, float | None],
        config: RewardConfig,
        start: _Weights | None = None,
        iterations: int = _FOLD_ITERATIONS,
    ) -> _Weights:
        """Fit everything but the users, by L-BFGS.

        Args:
            logits (`Tensor`): Of the users, (users, K).
            penalties (`tuple`): Of the shared weights and of the tastes. None for the
                second leaves tastes at 0.
            config (`RewardConfig`): The settings.
            start (`_Weights`, *optional*): Where to begin.
            iterations (`int`, *optional*, defaults to `60`): At most.
        """
        width = (self.features.shape[1] - 1) // 2
        if start is None:
            factor = fit_scale(self.log_factor.exp() * self.cosine, self.pairs, config)
            start = _Weights(
                self.log_factor + torch.tensor(factor, dtype=torch.float64).log(),
                torch.zeros(self.features.shape[1], dtype=torch.float64),
                torch.zeros(logits.shape[1], width, dtype=torch.float64),
            )
        weights = _Weights(*(value.clone() for value in vars(start).values()))
        parameters = [weights.log_factor, weights.shared]
        if penalties[1] is not None:
            parameters.append(weights.tastes)
        for parameter in parameters:
            parameter.requires_grad_()
        optimizer = torch.optim.LBFGS(
            parameters, max_iter=iterations, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            margins = self.margins(weights, logits)
            loss = part_loss(margins, self.pairs, config)
            loss = loss + nuisance_penalty(margins, self.pairs, config)
            loss = loss + penalties[0] * weights.shared.square().sum()
            loss = loss + (penalties[1] or 0.0) * weights.tastes.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        return _Weights(*(value.detach() for value in vars(weights).values()))


def _folds(train: Pairs, config: RewardConfig, groups: Tensor | None) -> list[Tensor]:
    """Return masks of the pairs that are held out in turns, (n,) each."""
    count = FOLDS if len(train) <= MOST_FOLDED else 2
    of_prompts = train.prompt if groups is None else groups[train.prompt]
    fold = folds_of(of_prompts, config.seed, count)
    if len(fold.unique()) < 2:  # all prompts are linked by images that they share
        fold = torch.arange(len(train)) % count
    return [fold == number for number in fold.unique().tolist()]


def _cross_fitted(
    rows: _Rows,
    folds: list[Tensor],
    logits: Tensor,
    penalties: tuple[float, float],
    config: RewardConfig,
) -> _Choice:
    """Fit tastes and users in turns. Returns the best turn."""
    pairs = rows.pairs
    starts: list[_Weights | None] = [None] * len(folds)
    best: _Choice | None = None
    by_prototype = torch.empty(len(pairs), logits.shape[1], dtype=torch.float64)
    for _ in range(_ROUNDS):
        for number, held_out in enumerate(folds):
            fitted = rows.of_rows(~held_out).fit(logits, penalties, config, starts[number])
            starts[number] = fitted
            by_prototype[held_out] = rows.of_rows(held_out).by_prototype(fitted)
        losses = torch.empty(len(pairs), dtype=torch.float64)
        for held_out in folds:
            others = _fit_users(by_prototype[~held_out], pairs.rows(~held_out), logits, config)
            tested = pairs.rows(held_out)
            margins = (judges(tested, others) * by_prototype[held_out]).sum(1)
            losses[held_out] = tested.weight * label_loss(margins, tested.label, config)
        logits = _fit_users(by_prototype, pairs, logits, config)
        loss = float(losses.mean())
        if best is None or loss < best.loss:
            best = _Choice(loss, logits, penalties[1], losses)
    assert best is not None
    return best


def _fit_users(by_prototype: Tensor, pairs: Pairs, like: Tensor, config: RewardConfig) -> Tensor:
    """Find the logits of all users for fixed margins by prototype, (users, K)."""
    logits = torch.zeros_like(like).requires_grad_()
    known = pairs.user >= 0
    user, margins, label = pairs.user[known], by_prototype[known], pairs.label[known]
    weight = pairs.weight[known]
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=100, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        own = (logits.softmax(1)[user] * margins).sum(1)
        loss = (weight * label_loss(own, label, config)).sum()
        loss = loss + _USER_PENALTY / 2 * logits.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return logits.detach()


def _gain(pairs: Pairs, gains: Tensor) -> float:
    """Return the mean gain per pair, or 0 if it is small or within its standard error.

    Args:
        pairs (`Pairs`): n pairs. Those of one prompt are not independent.
        gains (`Tensor`): By how much the loss of each falls, (n,).
    """
    prompts, place = pairs.prompt.unique(return_inverse=True)
    sums = torch.zeros(len(prompts), dtype=torch.float64).index_add_(0, place, gains)
    by_prompt = (sums / torch.bincount(place)).numpy()[:, None]
    _, low, _ = change_interval(np.zeros_like(by_prompt), by_prompt, level=_ONE_ERROR)
    mean = float(gains.mean())
    return mean if low > 0 and mean > _SMALLEST_GAIN else 0.0
