"""Fit heads to embeddings and judgements. The whole data are one batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..rewards.learned.heads import RewardHead
from ..rewards.learned.information import label_information, posterior_covariance
from ..rewards.learned.losses import rao_kupper_loss
from .config import RewardConfig
from .item_losses import ItemLoss, check_opinions, item_loss
from .pair_loss import fit_scale, label_loss, nuisance_penalty, part_loss
from .pair_tensors import Items, Pairs

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""The strongest leave little more than the base, which is best where pairs are few."""
FOLDS = 5
FOLD_ITERATIONS = 100
"""Of L-BFGS, at most, to choose a penalty. The head that is kept takes up to 500."""
MOST_FOLDED = 5000
"""Most pairs whose penalty is chosen by cross-validation. With more of them the
validation pairs are enough."""
LOOK_EVERY = 20
"""Steps between two looks at the validation pairs."""
STEPS = 400
"""Steps of PAL and of heads with a hidden layer, without max_steps."""


def margins_of(head: RewardHead, pairs: Pairs) -> Tensor:
    """Margins of all pairs by every member, (n, members)."""
    first, second = _both(head, pairs)
    return first - second


def directions_of(head: RewardHead, pairs: Pairs) -> Tensor:
    """Gradient of each margin by the weights of a linear head, (n, weights).

    See `RewardHead.directions`.
    """
    first = head.directions(pairs.base[:, 0], pairs.first, pairs.text)
    return first - head.directions(pairs.base[:, 1], pairs.second, pairs.text)


def member_means(head: RewardHead, pairs: Pairs) -> Tensor:
    """Scores of both images of all pairs, means over the members, (n, 2)."""
    return torch.stack([scores.mean(1) for scores in _both(head, pairs)], 1)


def _both(head: RewardHead, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Scores of both images of all pairs by every member, (n, members) each."""
    first = head(pairs.base[:, 0], pairs.first, pairs.text)
    return first, head(pairs.base[:, 1], pairs.second, pairs.text)


def fit_head(
    train: Pairs,
    val: Pairs,
    config: RewardConfig,
    items: Items | None = None,
    groups: Tensor | None = None,
) -> tuple[RewardHead, dict[str, float]]:
    """Fit heads.

    A linear head is fitted by L-BFGS, which is exact and needs no seed. Few pairs
    choose its penalty by cross-validation over prompts, since a tenth of them says
    nothing. A head with a hidden layer takes Adam's steps, and the step with the best
    validation loss counts.

    Args:
        train (`Pairs`): Pairs to fit.
        val (`Pairs`): Pairs that choose the step, and the penalty where there are many.
        config (`RewardConfig`): The settings.
        items (`Items`, *optional*): Opinions to fit in place of `train`, with a
            `config.loss` of theirs.
        groups (`Tensor`, *optional*): Group of each prompt, (prompts,). Prompts of one
            group are equal or share an image, see `connected`. None takes each prompt
            for a group.

    Returns:
        `tuple[RewardHead, dict]`: The head, and what was chosen.
    """
    candidates = [config.l2] if config.l2 is not None else list(PENALTIES)
    if len(candidates) > 1 and not config.hidden and len(train) <= MOST_FOLDED:
        folded = cross_validated_penalty(train, config, items, groups)
        candidates = candidates if folded is None else [folded]
    best: tuple[float, RewardHead, float, list[float]] | None = None
    for penalty in candidates:
        head, thresholds = _fit(train, val, penalty, config, items)
        loss = _held_out_loss(head, val, config)
        if best is None or loss < best[0]:
            best = loss, head, penalty, thresholds
    assert best is not None
    chosen = {"validation_loss": best[0], "l2": best[2]}
    if config.ties == "rao_kupper":
        chosen["tie_threshold"] = sum(best[3]) / len(best[3])
    return best[1], chosen


def _fit(
    train: Pairs,
    val: Pairs,
    penalty: float,
    config: RewardConfig,
    items: Items | None,
    iterations: int = 500,
) -> tuple[RewardHead, list[float]]:
    """Fit a head by one penalty. Returns the thresholds of ties of its members, too."""
    torch.manual_seed(config.seed)
    quantiles = config.loss == "quantiles"
    joint = not train.text.shape[1]
    head = RewardHead(
        train.first.shape[1], config.members, config.hidden, quantiles, joint
    ).double()
    _standardise(head, train)
    thresholds = [
        _fit_member(head, member, train, val, penalty, config, items, iterations)
        for member in range(config.members)
    ]
    return head, thresholds


@torch.no_grad()
def weight_covariance(
    head: RewardHead, train: Pairs, config: RewardConfig, penalty: float
) -> Tensor | None:
    """Return how uncertain the weights of a head are, by the curvature of its loss.

    Args:
        head (`RewardHead`): The fitted head.
        train (`Pairs`): The pairs that it was fitted to.
        config (`RewardConfig`): The settings.
        penalty (`float`): The pull that was chosen.

    Returns:
        `Tensor`: Of the weights that `RewardHead.directions` is about, (1 + width, 1 +
        width). None for hidden layers and for losses of single images.
    """
    if config.hidden or config.loss != "pairs":
        return None
    directions = directions_of(head, train)
    margins = margins_of(head, train).mean(1)
    information = train.weight * label_information(margins, config.flip_rate)
    # The loss is a mean, the penalty is not. The factor has the prior of `fit_scale`.
    prior = torch.full_like(directions[0], max(2 * penalty * len(train), 1e-6))
    prior[0] = 1.0
    return posterior_covariance(directions, information, prior)


def folds_of(groups: Tensor, seed: int, count: int = FOLDS) -> Tensor:
    """Spread groups over folds.

    Args:
        groups (`Tensor`): Group of each pair, (n,).
        seed (`int`): Seed of the order.
        count (`int`, *optional*, defaults to `FOLDS`): Number of folds.

    Returns:
        `Tensor`: Fold of each pair, (n,). Fewer groups make fewer folds.
    """
    names, place = groups.unique(return_inverse=True)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    fold_of = torch.empty(len(names), dtype=torch.long)
    fold_of[order] = torch.arange(len(names)) % count
    return fold_of[place]


def cross_validated_penalty(
    train: Pairs, config: RewardConfig, items: Items | None, groups: Tensor | None
) -> float | None:
    """Return the penalty of a linear head that suits prompts it has not seen best.

    None if there are too few prompts. Arguments as `fit_head`.
    """
    one = dataclasses.replace(config, members=1)
    if groups is None:
        prompts = train.prompt if items is None else torch.cat([train.prompt, items.prompt])
        groups = torch.arange(int(prompts.max()) + 1)
    fold = folds_of(groups[train.prompt], config.seed)
    losses, weight = torch.zeros(len(PENALTIES), dtype=torch.float64), 0.0
    for number in fold.unique().tolist():
        held_out = fold == number
        left = None
        if items is not None:
            apart = groups[train.prompt[held_out]].unique()
            left = items.rows(~torch.isin(groups[items.prompt], apart))
        if bool(held_out.all()) or not _can_fit(config.loss, left):
            continue
        fitted, tested = train.rows(~held_out), train.rows(held_out)
        share = float(tested.weight.sum())
        for i, penalty in enumerate(PENALTIES):
            head, _ = _fit(fitted, tested, penalty, one, left, FOLD_ITERATIONS)
            losses[i] += share * _held_out_loss(head, tested, config)
        weight += share
    return PENALTIES[int(losses.argmin())] if weight else None


def _can_fit(kind: str, items: Items | None) -> bool:
    """Whether the opinions of a fold, if there are any, suit a loss."""
    try:
        if items is not None:
            check_opinions(kind, items.opinions)
    except UserError:
        return False
    return True


def _held_out_loss(head: RewardHead, pairs: Pairs, config: RewardConfig) -> float:
    with torch.no_grad():
        return _validation_loss(margins_of(head, pairs).mean(1), pairs, config)


def _validation_loss(margins: Tensor, val: Pairs, config: RewardConfig) -> float:
    # Only plain losses of pairs give logits. Scores by other losses are scaled first.
    in_logits = config.loss == "pairs" and config.ties != "rao_kupper" and not config.label_strength
    scale = 1.0 if in_logits else fit_scale(margins, val, config)
    return float(part_loss(scale * margins, val, config))


def _standardise(head: RewardHead, train: Pairs) -> None:
    head.standardise(torch.cat([train.first, train.second]), torch.cat([train.text, train.text]))
    head.get_buffer("base_mean").copy_(train.base.mean())


def _drawn(prompt: Tensor, config: RewardConfig, member: int) -> Tensor:
    """How often each pair is in a member's draw of prompts. One member takes all."""
    if config.members == 1:
        return torch.ones(len(prompt), dtype=torch.float64)
    generator = torch.Generator().manual_seed(config.seed * 1000 + member)
    distinct = prompt.unique()
    draws = torch.randint(len(distinct), (len(distinct),), generator=generator)
    counts = torch.zeros(int(prompt.max()) + 1, dtype=torch.float64)
    counts.index_add_(0, distinct[draws], torch.ones(len(draws), dtype=torch.float64))
    return counts[prompt]


def _fit_member(
    head: RewardHead,
    member: int,
    train: Pairs,
    val: Pairs,
    penalty: float,
    config: RewardConfig,
    items: Items | None,
    iterations: int,
) -> float:
    """Fit one member. Returns the threshold of ties, for margins before calibration."""
    network = head.networks[member]
    features = [head.scaled(image, train.text) for image in (train.first, train.second)]
    leads = train.base[:, 0] - train.base[:, 1]
    start = torch.tensor(fit_scale(leads, train, config), dtype=torch.float64).log()
    factor = start.requires_grad_()
    fitted = [factor, *network.parameters()]
    weight = train.weight * _drawn(train.prompt, config, member)
    of_items: ItemLoss | None = None
    # Logarithm of the threshold of ties less 1. It starts where equal images tie as
    # often as all pairs do.
    share = float((train.label == 0.5).double().mean().clamp(1e-3, 0.99))
    ratio = torch.tensor(2 * share / (1 - share), dtype=torch.float64)
    excess = ratio.log().requires_grad_()
    with_ties = config.ties == "rao_kupper"
    parameters = [*fitted, excess] if with_ties else fitted
    if items is not None:
        drawn = items.weight * _drawn(items.prompt, config, member)
        of_items, more = item_loss(config.loss, items.opinions, drawn)
        parameters = fitted + more
        shown = head.scaled(items.image, items.text)
        centred = items.base - head.get_buffer("base_mean")

    def data_loss(margins: Tensor) -> Tensor:
        if of_items is None:
            if with_ties:
                rows = rao_kupper_loss(margins, train.label, 1 + excess.exp())
            else:
                rows = label_loss(margins, train.label, config, train.margin)
            return (weight * rows).sum() / weight.sum()
        scores = (factor.exp() * centred)[:, None] + network(shown)
        return of_items(scores if config.loss == "quantiles" else scores[:, 0])

    def objective() -> Tensor:
        added = (network(features[0]) - network(features[1])).mean(1)
        margins = factor.exp() * leads + added
        loss = data_loss(margins) + nuisance_penalty(margins, train, config)
        squares = sum(
            p.square().sum() for name, p in network.named_parameters() if "weight" in name
        )
        return loss + penalty * squares

    if not config.hidden:
        optimizer = torch.optim.LBFGS(
            parameters, max_iter=iterations, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = objective()
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
    else:
        assert config.learning_rate is not None
        groups: list[dict[str, Any]] = [{"params": [p for p in parameters if p is not excess]}]
        if with_ties:  # one number, which has far to go
            groups.append({"params": [excess], "lr": 50 * config.learning_rate})
        adam = torch.optim.Adam(groups, lr=config.learning_rate)
        best: tuple[float, list[Tensor]] | None = None
        steps = config.max_steps or STEPS
        for step in range(steps + 1):
            if step:
                adam.zero_grad()
                objective().backward()
                adam.step()
            if step % LOOK_EVERY == 0 or step == steps:
                with torch.no_grad():
                    sides = [network(head.scaled(i, val.text)) for i in (val.first, val.second)]
                    leads_val = factor.exp() * (val.base[:, 0] - val.base[:, 1])
                    margins = leads_val + (sides[0] - sides[1]).mean(1)
                loss = _validation_loss(margins, val, config)
                if best is None or loss < best[0]:
                    best = (loss, [p.detach().clone() for p in (*fitted, excess)])
        assert best is not None
        with torch.no_grad():
            for parameter, value in zip((*fitted, excess), best[1], strict=True):
                parameter.copy_(value)
            if config.loss in ("pairs", "plackett_luce"):
                # Such losses see differences alone. Without this, members would differ
                # by arbitrary constants, and so would their minimum and their spread.
                network[-1].bias -= torch.cat([network(each) for each in features]).mean(0)  # type: ignore[index]
    with torch.no_grad():
        head.log_factor[member] = factor.detach()
    return float(1 + excess.detach().exp())
