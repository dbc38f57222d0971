"""The run file of a reward."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any

from ..config.section import config_section, suggestion
from ..config.yaml_text import expand_home, shown
from ..errors import ConfigError
from ..training.sections import LoraSection
from .config import RewardConfig


@config_section
class RewardRun:
    """A whole run file of `diffalign reward train`."""

    model: str
    """The base: clip-l14, clip-h14, pickscore, hpsv2.1, open_clip:NAME/TAG,
    imagereward or shapes-clip."""
    data: str
    """Pairs, ranked lists, likes and dislikes, or a folder of the demo's votes."""
    train: RewardConfig = field(default_factory=RewardConfig)
    model_path: str | None = None
    """Weights of the base. null takes the published ones."""
    eval_data: str | None = None
    """Judgements of other prompts, for the report. null holds out prompts of `data`."""
    columns: dict[str, str] | None = None
    """Other names of columns."""
    lora: LoraSection | None = None
    like_threshold: float | None = None
    """Ratings from here on are likes. null reads ratings as they are."""


TOP_LEVEL = tuple(each.name for each in dataclasses.fields(RewardRun))


def reward_run_from_dict(values: dict[str, Any]) -> RewardRun:
    """Read a `RewardRun` from nested plain values.

    Raises:
        ConfigError: Something is unknown, missing, of the wrong type or out of range.
    """
    for key in values:
        if key not in TOP_LEVEL:
            hint = suggestion(str(key), TOP_LEVEL)
            raise ConfigError(
                str(key), f"unknown key{hint}; a reward's run file takes {', '.join(TOP_LEVEL)}"
            )
    for key in ("model", "data"):
        if not isinstance(values.get(key), str):
            raise ConfigError(key, f"expected a name, got {shown(values.get(key))}")
    given = {key: expand_home(value) for key, value in values.items() if value is not None}
    return RewardRun(**given)
