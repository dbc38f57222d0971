"""WARM: one reward whose weights are the mean of several (arXiv 2401.12187)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, UserError
from ..rewards.learned.heads import FactorHead
from ..rewards.learned.tower_weights import TOWERS, tower_list
from ..rewards.scorers.trained import WEIGHTS, TrainedReward, read_facts, write_facts
from ..runtime.files import check_replaceable, replacing_folder, save_tensors
from ..runtime.versions import versions
from .categories import pair_categories
from .config import RewardConfig
from .features import pair_nuisances
from .judgements import Judgements, read_judgements, read_options, split
from .pair_loss import fit_temperature, margins_of_scores, part_loss, scale_of
from .pair_tensors import make_labels
from .report import decided_accuracy, measure, write_report

BETWEEN = (0.25, 0.5, 0.75)
TOLERANCE = 0.02
"""Loss, in nats, by which an interpolation may be worse than its ends."""
_BATCH = 32


def average_rewards(
    folders: Sequence[str | Path],
    output_dir: str | Path,
    train_dataset: Any,
    eval_dataset: Any = None,
    *,
    force: bool = False,
    device: str | None = None,
) -> Path:
    """Average rewards whose towers were trained from one base, and test that it helps.

    The mean of weights is a good reward only where the loss along the line between any
    two members is no worse than between their losses. This is measured on the
    validation prompts.

    Args:
        folders (`Sequence[str | Path]`): Two or more rewards with trained towers, which
            differ in seed, data order or learning rate.
        output_dir (`str` or `Path`): A new folder.
        train_dataset: What the members were trained on. Its validation prompts are
            used, and its test prompts if they had no `eval_dataset`.
        eval_dataset (*optional*): As they had.
        force (`bool`, *optional*, defaults to `False`): Write an average that fails the
            test, too.
        device (`str`, *optional*): Where it is measured.

    Returns:
        `Path`: The folder, for `load_scorer`. Its `reward.json` has every barrier.

    Raises:
        UserError: The members cannot be averaged, or the average is worse than its
            worst member.
    """
    target = Path(output_dir)
    check_replaceable(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--output_dir: {str(target)!r} is not empty; choose another folder")
    places = [Path(folder) for folder in folders]
    facts = [read_facts(place) for place in places]
    try:
        _check_members(places, facts)
        val, test = _parts(facts[0], train_dataset, eval_dataset)
    except (KeyError, TypeError) as error:
        raise UserError(f"a reward.json of these folders is damaged ({error})") from error
    labels = make_labels(val, facts[0]["settings"].get("prompt_weights", True))
    members = [TrainedReward(place, device=device) for place in places]
    states = [_state(member) for member in members]
    scorer = members[0]  # carries the weights that are measured
    before = _base_margins(facts[0], test, device)
    noise = {name: facts[0]["settings"][name] for name in ("flip_rate", "smoothing", "margin")}
    config = RewardConfig(**noise)

    def scores(weights: Sequence[float]) -> Tensor:
        put(scorer, mixed(states, weights))
        return score_pairs(scorer, val)

    def loss(values: Tensor) -> float:
        return float(part_loss(margins_of_scores(values), labels, config))

    count = len(members)
    names = _distinct_names(places)
    alone = [[float(i == j) for j in range(count)] for i in range(count)]
    by_member = [scores(each) for each in alone]
    losses = [loss(values) for values in by_member]
    barriers = _barriers(names, losses, lambda weights: loss(scores(weights)))
    own = [decided_accuracy(margins_of_scores(each), labels) for each in by_member]
    values = scores([1 / count] * count)  # from here on, the scorer is the average
    averaged = margins_of_scores(values)
    reached = decided_accuracy(averaged, labels)
    verdict = _verdict(barriers, own, reached)
    if verdict and not force:
        raise UserError(f"{verdict}; train the members from one start, or pass --force")
    factor = fit_temperature(averaged, labels, config)
    report = measure(
        factor * margins_of_scores(score_pairs(scorer, test)),
        before,
        torch.from_numpy(test.label),
        torch.from_numpy(test.prompt),
        torch.from_numpy(test.user),
        test.users,
        pair_nuisances(test),
        pair_categories(test),
        config.flip_rate,
    )
    written = facts[0] | {
        "name": target.resolve().name,
        "summary": f"the mean of the weights of {count} rewards",
        "temperature": factor,
        "affine": scale_of(values, factor),
        "towers": {"kind": "full"},
        "versions": versions(),
        "chosen": {},
        "average": {
            "members": names,
            "validation_accuracies": own,
            "validation_accuracy": reached,
            "barriers": barriers,
            "warning": verdict,
        },
    }
    _write(target, _state(scorer), written, report)
    return target


def _distinct_names(places: Sequence[Path]) -> list[str]:
    names = [place.name for place in places]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
    return names


def _barriers(
    names: Sequence[str], losses: Sequence[float], loss_of: Callable[[Sequence[float]], float]
) -> dict[str, float]:
    """Measure how far the loss rises between any two members.

    Args:
        names (`Sequence[str]`): Names of the members.
        losses (`Sequence[float]`): Their losses.
        loss_of (`Callable`): Shares of the members -> loss of the mixed weights.

    Returns:
        `dict[str, float]`: Pair -> highest rise above the line between both losses.
    """
    barriers: dict[str, float] = {}
    for i, j in combinations(range(len(names)), 2):
        rises = []
        for share in BETWEEN:
            weights = [0.0] * len(names)
            weights[i], weights[j] = 1 - share, share
            rises.append(loss_of(weights) - (1 - share) * losses[i] - share * losses[j])
        barriers[f"{names[i]} - {names[j]}"] = max(rises)
    return barriers


def _write(
    target: Path, state: dict[str, Tensor], facts: dict[str, Any], report: dict[str, Any]
) -> None:
    """Write the average as a reward that `load_scorer` reads."""
    with replacing_folder(target) as temporary:
        save_tensors({"log_factor": state.pop("factor")}, temporary / WEIGHTS)
        save_tensors(state, temporary / TOWERS)
        write_facts(temporary, facts)
        write_report(temporary, report, facts)


def _check_members(places: list[Path], facts: list[dict[str, Any]]) -> None:
    if len(places) < 2:
        raise UserError(f"folders: expected at least 2 rewards, got {len(places)}")
    for place, each in zip(places, facts, strict=True):
        if "towers" not in each:
            raise UserError(
                f"{place} has frozen towers; heads are combined by train.members, and only rewards "
                "with trained towers are averaged"
            )
        if each["base"]["fingerprint"] != facts[0]["base"]["fingerprint"]:
            raise UserError(
                f"{place} and {places[0]} were trained from different bases, so they cannot be "
                "averaged"
            )
        if _split_of(each) != _split_of(facts[0]):
            raise UserError(
                f"{place} and {places[0]} were trained on other data or splits, so no prompts are "
                "left to measure both on; take equal data, val, test and split_seed"
            )


def _split_of(facts: dict[str, Any]) -> list[Any]:
    """What decides the prompts that were not trained on."""
    settings, data = facts["settings"], facts["data"]
    named = [settings[name] for name in ("val", "test", "split_seed")]
    return [data["fingerprint"], data["eval_fingerprint"], *named]


def _parts(
    facts: dict[str, Any], train_dataset: Any, eval_dataset: Any
) -> tuple[Judgements, Judgements]:
    """Validation and test pairs of the members."""
    settings, known = facts["settings"], facts["data"]
    options = read_options(known["reading"])
    data = read_judgements(train_dataset, **options)
    if data.fingerprint() != known["fingerprint"]:
        raise UserError("--data: these are not the judgements that the members were trained on")
    test = settings["test"] if known["eval_fingerprint"] is None else 0.0
    parts = split(data, settings["val"], test, settings["split_seed"])
    if settings.get("ties") == "drop":
        parts["val"] = parts["val"].without_ties()
    if known["eval_fingerprint"] is None and eval_dataset is None:
        return parts["val"], parts["test"]
    evaluation = None if eval_dataset is None else read_judgements(eval_dataset, **options)
    if evaluation is None or evaluation.fingerprint() != known["eval_fingerprint"]:
        raise UserError(
            "--eval_data: give the evaluation data of the members; leave it out if they had none"
        )
    return parts["val"], evaluation


def _base_margins(facts: dict[str, Any], part: Judgements, device: str | None) -> Tensor:
    from ..rewards.registry import load_scorer

    base = facts["base"]
    scorer = load_scorer(base["scorer"], model=base.get("model"), device=device)
    return margins_of_scores(score_pairs(scorer, part))


@torch.no_grad()
def score_pairs(scorer: Any, part: Judgements) -> Tensor:
    """Score both images of pairs, (n, 2), float64.

    Args:
        scorer: Any scorer.
        part (`Judgements`): The pairs.
    """
    rows = [*zip(part.first.tolist(), part.prompt.tolist(), strict=True)]
    rows += [*zip(part.second.tolist(), part.prompt.tolist(), strict=True)]
    distinct = list(dict.fromkeys(rows))
    values: dict[tuple[int, int], float] = {}
    for start in range(0, len(distinct), _BATCH):
        batch = distinct[start : start + _BATCH]
        images = [part.open(image) for image, _ in batch]
        scores = scorer(images, [part.prompts[prompt] for _, prompt in batch])
        values |= dict(zip(batch, scores.tolist(), strict=True))
    flat = torch.tensor([values[row] for row in rows], dtype=torch.float64)
    return flat.view(2, -1).T


def _state(member: TrainedReward) -> dict[str, Tensor]:
    """The weights of a member by name, a LoRA merged, and its factor."""
    head = member.head
    if not isinstance(head, FactorHead):
        raise ConfigError(
            "folders",
            f"{member.folder} has a head that cannot be averaged; give rewards with train.towers: "
            "lora or full",
        )
    state = {
        name: parameter.detach().cpu().clone().contiguous()
        for name, parameter in tower_list(member.base).named_parameters()
    }
    # Members are averaged on the scale of their final scores.
    temperature = torch.tensor(member.temperature)
    return state | {"factor": head.log_factor.detach().cpu() + temperature.log()}


def mixed(states: Sequence[dict[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted sum of states.

    Args:
        states (`Sequence[dict[str, Tensor]]`): Equal names and shapes.
        weights (`Sequence[float]`): One for each, with sum 1.
    """
    return {
        name: torch.stack(
            [w * state[name].double() for w, state in zip(weights, states, strict=True)]
        )
        .sum(0)
        .to(states[0][name].dtype)
        for name in states[0]
    }


@torch.no_grad()
def put(scorer: TrainedReward, state: dict[str, Tensor]) -> None:
    """Load a mixed state into a reward, which then has no temperature."""
    for name, parameter in tower_list(scorer.base).named_parameters():
        parameter.copy_(state[name])
    head = scorer.head
    assert isinstance(head, FactorHead)
    head.log_factor.copy_(state["factor"])
    scorer.temperature = 1.0
    scorer.forget_prompts()


def _verdict(barriers: dict[str, float], own: list[float], reached: float) -> str | None:
    """Return why the average should not be used, None if nothing is wrong with it."""
    worst = max(barriers, key=lambda pair: barriers[pair])
    if barriers[worst] > TOLERANCE:
        return (
            f"between {worst} the loss rises by {barriers[worst]:.3f} above its ends (at most "
            f"{TOLERANCE} is allowed), so the members are not linearly connected"
        )
    if reached < min(own):
        return f"the average is right in {reached:.1%}, its worst member in {min(own):.1%}"
    return None
