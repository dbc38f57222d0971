"""Advantages of a round over all processes, and their settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ...config.ranges import Count, OneOf, Positive
from ...config.section import config_section
from ...errors import ConfigError
from .advantages import RULES, PromptHistory, equal_groups, group_advantages
from .on_policy import OnPolicyConfig
from .reward_function import RewardFunction

ADVANTAGES = (*RULES, "ddpo")


@config_section
class AdvantageConfig(OnPolicyConfig):
    """Options of methods that train on advantages."""

    images_per_prompt: Count = 8
    """Images drawn for each prompt, which are compared with each other. Source:
    Flow-GRPO, DiffusionNFT and AWM 24, DanceGRPO 12; ours is smaller."""
    shared_init: bool = False
    """One initial noise for all images of a prompt. Source: Flow-GRPO, no; DanceGRPO
    yes."""
    advantage: Annotated[str, OneOf(ADVANTAGES)] = "flow_grpo"
    """flow_grpo: by the deviation of the whole round | group: of the group | dance_grpo
    | mix_grpo and gdpo: each score by itself, weighted by the panel | ddpo: against the
    last rewards of the same prompt. Source: the papers of these names."""
    adv_clip: Positive[float] = 5.0
    """Advantages are clamped to this size. Source: official codes, 5."""
    drop_equal: bool = True
    """Leave out prompts whose images have equal scores, and count the others in full.
    Source: Flow-GRPO."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images_per_prompt == 1 and self.advantage != "ddpo":
            raise ConfigError(
                "images_per_prompt",
                f"1 has nothing to be compared with under advantage: {self.advantage}; give at "
                "least 2, or advantage: ddpo",
            )


@dataclass(frozen=True)
class GroupAdvantages:
    """What a round's scores say about the groups of this process.

    Attributes:
        advantages (`Tensor`): (g, k), float32.
        equal (`Tensor`): Whether all scores of a group are equal, (g,), bool.
        weights (`Tensor`): Weight of each group in the loss, (g,). They add up to the
            number of groups over all processes.
    """

    advantages: Tensor
    equal: Tensor
    weights: Tensor

    def part(self, start: int, stop: int) -> GroupAdvantages:
        """Return some of the groups."""
        part = slice(start, stop)
        return GroupAdvantages(self.advantages[part], self.equal[part], self.weights[part])


class AdvantageEstimator:
    """Computes the advantages of a round over all processes.

    Args:
        config (`AdvantageConfig`): Settings of the run.

    Attributes:
        history (`PromptHistory`, *optional*): Past rewards of each prompt, with
            `advantage: ddpo`. A part of checkpoints.
    """

    def __init__(self, config: AdvantageConfig) -> None:
        self.config = config
        self.history = PromptHistory() if config.advantage == "ddpo" else None

    def __call__(
        self, reward_function: RewardFunction, prompts: Sequence[str], scores: Tensor, rank: int
    ) -> GroupAdvantages:
        """Compute the advantages of the groups of this process. All must call this.

        Args:
            reward_function (`RewardFunction`): Combines the scores.
            prompts (`Sequence[str]`): g prompts.
            scores (`Tensor`): (g, k, m).
            rank (`int`): Number of this process.
        """
        everything = gather_object(list(zip(prompts, scores.tolist(), strict=True)))
        start = sum(gather_object([len(prompts)])[:rank])
        whole = torch.tensor([rows for _, rows in everything], dtype=torch.float64)
        advantages = self._advantages(reward_function, [prompt for prompt, _ in everything], whole)
        equal = equal_groups(whole[..., : reward_function.deciding])
        weights = torch.ones(len(equal))
        if self.config.drop_equal and bool(equal.any()) and not bool(equal.all()):
            weights = (~equal).float() * len(equal) / int((~equal).sum())
        every = GroupAdvantages(advantages.float(), equal, weights)
        return every.part(start, start + len(prompts))

    def _advantages(
        self, reward_function: RewardFunction, prompts: Sequence[str], scores: Tensor
    ) -> Tensor:
        rule = self.config.advantage
        if self.history is not None:
            return self.history(prompts, reward_function.combined(scores))
        if RULES[rule].columns == "combined":
            return group_advantages(reward_function.combined(scores), rule=rule)
        deciding = scores[..., : reward_function.deciding]
        weights = reward_function.weights(deciding.shape[-1])
        return group_advantages(deciding, rule=rule, weights=weights)
