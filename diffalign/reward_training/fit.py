"""Fit heads to embeddings and judgements. The whole data are one batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..rewards.learned.heads import PalHead, RewardHead, pair_features
from ..rewards.learned.losses import (
    forward_corrected_loss,
    margin_loss,
    nuisance_correlations,
    preference_loss,
    rao_kupper_loss,
    smoothed_loss,
)
from ..rewards.scorers.trained import EVERYBODY
from ..runtime.progress import progress_bar
from .config import RewardConfig
from .features import Features
from .item_losses import ItemLoss, item_loss
from .judgements import Judgements
from .opinions import Opinions

_PAL_STARTS = 3
PAL_PENALTIES = (0.3, 1.0)
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
_LOOK_EVERY = 20
STEPS = 400  # of PAL and of heads with a hidden layer, without max_steps
_WIDEST = 5.0  # of the logarithm of a factor


@dataclass
class Labels:
    """How some pairs were judged.

    Attributes:
        label (`Tensor`): Share of judges who prefer the first image, (n,).
        weight (`Tensor`): Weight of each pair, mean 1, (n,).
        user (`Tensor`): Index of the judge or -1, (n,).
        prompt (`Tensor`): Index of the prompt, (n,).
        margin (`Tensor`): Lead that the winner must have, beside the settings', (n,).
    """

    label: Tensor
    weight: Tensor
    user: Tensor
    prompt: Tensor
    margin: Tensor

    def __len__(self) -> int:
        return len(self.label)


_LABEL_FIELDS = tuple(field.name for field in fields(Labels))


@dataclass
class Pairs(Labels):
    """Tensors of some pairs.

    Attributes:
        first (`Tensor`): Embeddings of the first images, (n, d).
        second (`Tensor`): Those of the others, (n, d).
        text (`Tensor`): Embeddings of the prompts, (n, d).
        base (`Tensor`): Scores of both by the base, (n, 2).
        nuisances (`Tensor`): Difference of the nuisances, (n, 6).
    """

    first: Tensor
    second: Tensor
    text: Tensor
    base: Tensor
    nuisances: Tensor


@dataclass
class Items:
    """Tensors of some opinions on single images.

    Attributes:
        opinions (`Opinions`): The n opinions.
        image (`Tensor`): Embeddings of the images, (n, d).
        text (`Tensor`): Embeddings of the prompts, (n, d).
        base (`Tensor`): Scores by the base, (n,).
        weight (`Tensor`): Weight of each opinion, (n,).
        prompt (`Tensor`): Index of the prompt, (n,).
    """

    opinions: Opinions
    image: Tensor
    text: Tensor
    base: Tensor
    weight: Tensor
    prompt: Tensor


def make_items(
    opinions: Opinions,
    features: Features,
    base: Callable[[Tensor, Tensor], Tensor],
    by_prompt: bool,
) -> Items:
    """Gather the embeddings of some opinions. Arguments as `make_pairs`."""
    rows, prompt = torch.from_numpy(opinions.image), torch.from_numpy(opinions.prompt)
    image, text = features.of(rows, prompt)
    weight = torch.from_numpy(opinions.weight)
    if by_prompt and len(rows):
        weight = weight / torch.bincount(prompt, weight)[prompt].clamp(min=1e-12)
    return Items(opinions, image, text, base(image, text), weight, prompt)


def make_labels(part: Judgements, by_prompt: bool) -> Labels:
    """Gather the labels of some pairs.

    Args:
        part (`Judgements`): The pairs.
        by_prompt (`bool`): Whether every prompt counts the same.
    """
    prompt, weight = torch.from_numpy(part.prompt), torch.from_numpy(part.weight)
    if by_prompt:
        totals = torch.zeros(int(prompt.max()) + 1, dtype=torch.float64)
        totals.index_add_(0, prompt, weight)
        weight = weight / totals[prompt].clamp(min=1e-12)
    weight = weight / weight.mean().clamp(min=1e-12)
    label, user = torch.from_numpy(part.label), torch.from_numpy(part.user)
    return Labels(label, weight, user, prompt, torch.zeros_like(label))


def make_pairs(
    part: Judgements, features: Features, base: Callable[[Tensor, Tensor], Tensor], by_prompt: bool
) -> Pairs:
    """Gather the embeddings of some pairs.

    Args:
        part (`Judgements`): The pairs.
        features (`Features`): Embeddings of all images and prompts.
        base (`Callable`): Score of the base from both embeddings.
        by_prompt (`bool`): Whether every prompt counts the same.
    """
    first, second, prompt = map(torch.from_numpy, (part.first, part.second, part.prompt))
    (shown, text), (other, _) = features.of(first, prompt), features.of(second, prompt)
    labels = make_labels(part, by_prompt)
    return Pairs(
        **vars(labels),
        first=shown,
        second=other,
        text=text,
        base=torch.stack([base(image, text) for image in (shown, other)], 1),
        nuisances=features.nuisances[first] - features.nuisances[second],
    )


def label_loss(
    margins: Tensor, labels: Tensor, config: RewardConfig, lead: Tensor | float = 0.0
) -> Tensor:
    """Loss of pairs as the settings say. Ties and mixed votes keep their share.

    Args:
        margins (`Tensor`): Score of the first image minus that of the second, (n,).
        labels (`Tensor`): (n,).
        config (`RewardConfig`): The settings.
        lead (`Tensor` or `float`): See `Labels.margin`, (n,) or one.

    Returns:
        `Tensor`: (n,).
    """
    sign = torch.where(labels >= 0.5, 1.0, -1.0).to(margins.dtype)
    won = sign * margins
    if config.flip_rate:
        decided = forward_corrected_loss(won, config.flip_rate)
    elif config.smoothing:
        decided = smoothed_loss(won, config.smoothing)
    else:
        decided = margin_loss(won, config.margin + lead)
    mixed = (labels > 0) & (labels < 1)
    return torch.where(mixed, preference_loss(margins, labels), decided)


def part_loss(margins: Tensor, pairs: Labels, config: RewardConfig) -> Tensor:
    """Weighted mean of `label_loss` over some pairs."""
    rows = pairs.weight * label_loss(margins, pairs.label, config, pairs.margin)
    return rows.sum() / pairs.weight.sum()


def _nuisance_penalty(margins: Tensor, pairs: Pairs, config: RewardConfig) -> Tensor | float:
    if not config.nuisance:
        return 0.0
    correlations = nuisance_correlations(margins, pairs.nuisances)
    return config.nuisance * correlations.square().sum()


def fit_scale(margins: Tensor, pairs: Labels, config: RewardConfig) -> float:
    """Find the factor of the margins that fits the labels best.

    A prior, worth one pair, keeps it near 1 where the pairs say little: few pairs that
    are all right would ask for any large factor.

    Args:
        margins (`Tensor`): (n,).
        pairs (`Labels`): Their labels.
        config (`RewardConfig`): Its share of wrong labels counts here, too.
    """
    log_factor = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_factor], max_iter=100, line_search_fn="strong_wolfe")
    margins = margins.detach()

    def closure() -> Tensor:
        optimizer.zero_grad()
        prior = log_factor.square() / (2 * len(pairs))
        loss = part_loss(log_factor.exp() * margins, pairs, config) + prior
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return float(log_factor.detach().clamp(-_WIDEST, _WIDEST).exp())


def fit_temperature(margins: Tensor, pairs: Labels, config: RewardConfig) -> float:
    """Find the factor that makes the margins of a trained reward logits.

    It is judged by the likelihood of decided pairs, whatever the reward was trained
    with: a margin or label smoothing changes how confident the best factor is.

    Args:
        margins (`Tensor`): (n,).
        pairs (`Labels`): Their labels.
        config (`RewardConfig`): Its share of wrong labels counts here, too.
    """
    decided = pairs.label != 0.5
    if not bool(decided.any()):
        return fit_scale(margins, pairs, config)
    rows = {name: getattr(pairs, name)[decided] for name in _LABEL_FIELDS}
    plain = RewardConfig(flip_rate=config.flip_rate)
    return fit_scale(margins[decided], Labels(**rows), plain)


def spread_of(margins: Tensor) -> float:
    """Deviation of the scores of one prompt, from the margins of its pairs."""
    return float((margins.square().mean() / 2).sqrt())


def margins_of_scores(scores: Tensor) -> Tensor:
    """Return the margins of pairs from the scores of both images, (n, 2)."""
    return scores[:, 0] - scores[:, 1]


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
        loss = data_loss(margins) + _nuisance_penalty(margins, train, config)
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
            if step % _LOOK_EVERY == 0 or step == steps:
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
        total=len(penalties) * _PAL_STARTS, desc="fitting PAL", unit="start", leave=False
    )
    for penalty in penalties:
        torch.manual_seed(config.seed)
        starts = []
        for number in range(_PAL_STARTS):
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


def taste_logits(pairs: Pairs, users: int, prototypes: int) -> Tensor:
    """Group users by the mean difference of what they prefer and what they reject.

    The differences are whitened, since directions in which images of a prompt differ
    much would hide the others. Prototypes are the main directions in which users
    differ, each with its opposite.

    Args:
        pairs (`Pairs`): Pairs with users.
        users (`int`): Number of users.
        prototypes (`int`): K.

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
        loss = part_loss(margins, train, config) + _nuisance_penalty(margins, train, config)
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
        if step == steps or (config.user_hidden and step % _LOOK_EVERY == 0):
            with torch.no_grad():
                value = float(part_loss(pal_margins(head, val), val, config))
            if best is None or value < best[0]:
                best = (value, copy.deepcopy(head.state_dict()), step)
    assert best is not None
    head.load_state_dict(best[1])
    with torch.no_grad():
        reached = float(objective())
    return reached, head, {"step": float(best[2])}


def pal_margins(head: PalHead, pairs: Pairs) -> Tensor:
    """Compute the margins of all pairs for their judges. Unknown judges get the mean
    user.
    """
    shares = head.logits.softmax(1)
    everyone = shares.mean(0, keepdim=True)
    table = torch.cat([shares, everyone])  # -1 is the last row
    return margins_of_scores(_pal_scores(head, pairs, table[pairs.user]))


def mean_user_scores(head: PalHead, pairs: Pairs) -> Tensor:
    """Compute the scores of both images of all pairs by the mean user, (n, 2)."""
    everyone = head.logits.softmax(1).mean(0)
    return _pal_scores(head, pairs, everyone.expand(len(pairs), -1))


def scale_of(scores: Tensor, temperature: float) -> list[float]:
    """Return mean and spread of a reward's scores of both images of pairs.

    Args:
        scores (`Tensor`): (n, 2), without the temperature.
        temperature (`float`): Multiplies them.
    """
    spread = temperature * spread_of(margins_of_scores(scores))
    return [temperature * float(scores.mean()), max(spread, 1e-6)]


@torch.no_grad()
def user_scales(
    head: PalHead, pairs: Pairs, users: Sequence[str], temperature: float
) -> dict[str, list[float]]:
    """Return the scale of the reward for every user, and for the worst-off one.

    Args:
        head (`PalHead`): The trained head.
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


def _pal_scores(head: PalHead, pairs: Pairs, weights: Tensor) -> Tensor:
    both = (head.score(image, pairs.text, weights) for image in (pairs.first, pairs.second))
    return torch.stack(list(both), 1)
