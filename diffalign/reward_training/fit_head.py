"""Fit heads to embeddings and judgements. The whole data are one batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..rewards.learned.heads import RewardHead, pair_features
from ..rewards.learned.losses import rao_kupper_loss
from .config import RewardConfig
from .item_losses import ItemLoss, item_loss
from .pair_loss import fit_scale, label_loss, nuisance_penalty, part_loss
from .pair_tensors import Items, Pairs

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
LOOK_EVERY = 20
"""Steps between two looks at the validation pairs."""
STEPS = 400
"""Steps of PAL and of heads with a hidden layer, without max_steps."""


def margins_of(head: RewardHead, pairs: Pairs) -> Tensor:
    """Margins of all pairs by every member, (n, members)."""
    first, second = _both(head, pairs)
    return first - second


def member_means(head: RewardHead, pairs: Pairs) -> Tensor:
    """Scores of both images of all pairs, means over the members, (n, 2)."""
    return torch.stack([scores.mean(1) for scores in _both(head, pairs)], 1)


def _both(head: RewardHead, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Scores of both images of all pairs by every member, (n, members) each."""
    first = head(pairs.base[:, 0], pairs.first, pairs.text)
    return first, head(pairs.base[:, 1], pairs.second, pairs.text)


def fit_head(
    train: Pairs, val: Pairs, config: RewardConfig, items: Items | None = None
) -> tuple[RewardHead, dict[str, float]]:
    """Fit heads.

    A linear head is fitted by L-BFGS, which is exact and needs no seed. One with a
    hidden layer takes Adam's steps, and the step with the best validation loss counts.

    Args:
        train (`Pairs`): Pairs to fit.
        val (`Pairs`): Pairs that choose penalty and step.
        config (`RewardConfig`): The settings.
        items (`Items`, *optional*): Opinions to fit in place of `train`, with a
            `config.loss` of theirs.

    Returns:
        `tuple[RewardHead, dict]`: The head, and what was chosen.
    """
    dim = train.first.shape[1]
    thresholds: list[float] = []
    candidates = [config.l2] if config.l2 is not None else list(PENALTIES)
    best: tuple[float, RewardHead, float] | None = None
    for penalty in candidates:
        torch.manual_seed(config.seed)
        quantiles = config.loss == "quantiles"
        joint = not train.text.shape[1]
        head = RewardHead(dim, config.members, config.hidden, quantiles, joint).double()
        _standardise(head, train)
        tried = [
            _fit_member(head, member, train, val, penalty, config, items)
            for member in range(config.members)
        ]
        with torch.no_grad():
            margins = margins_of(head, val).mean(1)
        loss = _validation_loss(margins, val, config)
        if best is None or loss < best[0]:
            best, thresholds = (loss, head, penalty), tried
    assert best is not None
    chosen = {"validation_loss": best[0], "l2": best[2]}
    if config.ties == "rao_kupper":
        chosen["tie_threshold"] = sum(thresholds) / len(thresholds)
    return best[1], chosen


def _validation_loss(margins: Tensor, val: Pairs, config: RewardConfig) -> float:
    # Only plain losses of pairs give logits. Scores by other losses are scaled first.
    in_logits = config.loss == "pairs" and config.ties != "rao_kupper" and not config.label_strength
    scale = 1.0 if in_logits else fit_scale(margins, val, config)
    return float(part_loss(scale * margins, val, config))


def _standardise(head: RewardHead, train: Pairs) -> None:
    both = torch.cat(
        [pair_features(train.first, train.text), pair_features(train.second, train.text)]
    )
    head.get_buffer("mean").copy_(both.mean(0))
    head.get_buffer("deviation").copy_(both.std(0, correction=0).clamp(min=1e-6))
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
            parameters, max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
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
