"""Checks of a validation that need no weights: its prompts, scorers and guards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..data.prompt_sets import load_prompts
from ..errors import ConfigError, UserError
from ..evaluation.formatting import few_prompts
from ..evaluation.guidance_curves import check_prompts
from .sections import ValidationConfig

if TYPE_CHECKING:
    from ..rewards.panel_config import RewardEntry


def validation_prompts(config: ValidationConfig) -> list[str]:
    """Return the prompts of a validation: the given ones, or those of a prompt set.

    Args:
        config (`ValidationConfig`): Settings of the validation.
    """
    if config.validation_prompts:  # each once: equal prompts would be equal images
        return list(dict.fromkeys(config.validation_prompts))
    return load_prompts(config.prompts or "", limit=config.max_prompts).prompts


def check_validation(config: ValidationConfig, training_scorers: Any) -> list[str]:
    """Check everything about a validation that needs no weights.

    Args:
        config (`ValidationConfig`): Settings of the validation.
        training_scorers: Scorers that train the model, if it samples while it learns.

    Returns:
        `list[str]`: Notes for the user.

    Raises:
        UserError: The prompts or scorers do not exist, a scorer needs metadata, or a
            guard also trains.
    """
    from ..rewards.panel_config import parse_rewards
    from ..rewards.registry import get_spec

    prompts = validation_prompts(config)
    if config.guidance_scales:
        check_prompts(len(prompts), "validation.prompts")
    few = (
        [f"validation: {sentence}" for sentence in few_prompts(len(prompts))]
        if config.scorers
        else []
    )
    for entry in parse_rewards(config.scorers) if config.scorers else ():
        if "metadata" in get_spec(entry.scorer).requires:
            raise UserError(
                f"validation.scorers: {entry.name} needs metadata for every prompt, which "
                "prompts alone do not have"
            )
    training = scorers_that_train(config.scorers, training_scorers)
    for name in config.guard:
        if name in training:
            raise ConfigError(
                "validation.guard",
                f"{name} also trains the model, so it cannot detect reward hacking; name a scorer "
                "that does not train it",
            )
    if config.keep_best is None or config.keep_best not in training:
        return few
    return [
        *few,
        f"validation: {config.keep_best} also judges the training, so it cannot show "
        "over-optimisation; keep the best by another scorer",
    ]


def unguarded(validation: ValidationConfig | None, training_scorers: Any) -> str | None:
    """Return a note if no held-out scorer can detect reward hacking.

    Args:
        validation (`ValidationConfig`, *optional*): Settings of the validation.
        training_scorers: Scorers that train the model.
    """
    if validation is not None and validation.on_hacking == "off":
        return None
    scorers = validation.scorers if validation is not None else []
    if set(scorers) - scorers_that_train(scorers, training_scorers):
        return None
    return (
        "no guard against reward hacking: name a scorer that does not train in "
        "validation.scorers, and the run stops with the best weights when its score falls"
    )


def scorers_that_train(names: Sequence[str], training_scorers: Any) -> set[str]:
    """Return which scorers of a validation also decide in training.

    They are compared by what they load and not by how they are written: `pick_score` is
    `pickscore`, and a panel's entry of any name is the scorer that it loads.

    Args:
        names (`Sequence[str]`): Scorers of the validation.
        training_scorers: What a trainer takes as `scorers`. Functions have no names.
    """
    from ..rewards.panel_config import parse_rewards

    deciding = [_loaded(entry) for entry in _deciding_entries(training_scorers)]
    entries = parse_rewards(list(names)) if names else []
    return {
        entry.name
        for entry in entries
        for key, options in deciding
        if _loaded(entry)[0] == key and (options is None or _loaded(entry)[1] in (None, options))
    }


def _loaded(entry: RewardEntry) -> tuple[str, str | None]:
    """Registry key of what an entry loads, and its options (None if it is loaded)."""
    from ..rewards.registry import find_class

    if not isinstance(entry.scorer, str):
        return entry.scorer.spec.key, None
    scorer_class, named = find_class(entry.scorer)
    served = entry.args.get("scorer") if scorer_class.spec.key == "remote" else None
    if isinstance(served, str):  # how the server loads it is not known here
        try:
            return find_class(served)[0].spec.key, None
        except ConfigError:  # a scorer that the server alone knows
            return served, None
    options = {"model": entry.model, "config": entry.config, **entry.args, **named}
    settings = {name: value for name, value in options.items() if value is not None}
    return scorer_class.spec.key, json.dumps(settings, sort_keys=True, default=str)


def _deciding_entries(scorers: Any) -> list[RewardEntry]:
    """Entries that decide. What cannot be read is left to `RewardFunction`'s errors."""
    from ..rewards.base import Scorer
    from ..rewards.panel import Panel
    from ..rewards.panel_config import parse_rewards

    if isinstance(scorers, Panel):
        return [entry for entry in scorers.entries if entry.role == "train"]
    if isinstance(scorers, Mapping) and "rewards" in scorers:
        scorers = scorers["rewards"]
    if isinstance(scorers, (list, tuple)):
        scorers = [item for item in scorers if isinstance(item, Scorer) or not callable(item)]
    elif callable(scorers) and not isinstance(scorers, Scorer):
        return []
    try:
        entries = parse_rewards(scorers) if scorers else []
    except ConfigError:
        return []
    return [entry for entry in entries if entry.role == "train"]
