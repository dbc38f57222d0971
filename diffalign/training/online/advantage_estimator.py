"""Advantages of a round over all processes, and their settings."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ...config.ranges import Count, NotNegative, OneOf, Positive
from ...config.section import config_section
from ...errors import ConfigError
from ..batch import Batch
from ..reference import Reference
from .advantages import RULES, PromptHistory, equal_groups, group_advantages
from .on_policy import OnPolicyConfig, OnPolicyTrainer
from .reward_function import RewardFunction
from .rollout import Trajectories
from .source import RolloutSource

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
    kl_weight: NotNegative[float] = 0.0
    """Pull to the starting weights. 0 runs no reference. Source: see the method."""
    drop_equal: bool = True
    """Leave out prompts whose images have equal scores, and count the others in full.
    Not with advantage: ddpo, which compares with earlier images. Source: Flow-GRPO."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images_per_prompt == 1 and self.advantage != "ddpo":
            raise ConfigError(
                "images_per_prompt",
                f"1 has nothing to be compared with under advantage: {self.advantage}; give at "
                "least 2, or advantage: ddpo",
            )

    @property
    def needs_every_score(self) -> bool:
        """Whether the rule takes each score by itself."""
        return self.advantage in RULES and RULES[self.advantage].columns != "combined"


@dataclass(frozen=True)
class GroupAdvantages:
    """What a round's scores say about the groups of this process.

    Attributes:
        advantages (`Tensor`): (g, k), float32.
        equal (`Tensor`): Whether all scores of a group are equal, (g,), bool.
        weights (`Tensor`): Weight of each group in the loss, (g,). They add up to the
            number of groups over all processes.
        judged (`Tensor`): Whether an image has a reward, (g, k), bool. Without one its
            advantage is 0.
    """

    advantages: Tensor
    equal: Tensor
    weights: Tensor
    judged: Tensor

    def part(self, start: int, stop: int) -> GroupAdvantages:
        """Return some of the groups."""
        part = slice(start, stop)
        return GroupAdvantages(
            self.advantages[part], self.equal[part], self.weights[part], self.judged[part]
        )


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
        if self.config.needs_every_score:
            rewards = whole[..., : reward_function.deciding]
            factors = reward_function.weights(rewards.shape[-1])
        else:
            rewards, factors = reward_function.combined(whole), None
        if self.history is not None:
            advantages = self.history([prompt for prompt, _ in everything], rewards)
        else:
            advantages = group_advantages(rewards, rule=self.config.advantage, weights=factors)
        equal = equal_groups(rewards)
        weights = torch.ones(len(equal))
        # A group of equal rewards still differs from past rewards of its prompt.
        drop = self.config.drop_equal and self.history is None
        if drop and bool(equal.any()) and not bool(equal.all()):
            weights = (~equal).float() * len(equal) / int((~equal).sum())
        judged = ~torch.isnan(rewards)
        judged = judged if judged.ndim == 2 else judged.all(-1)
        every = GroupAdvantages(advantages.float(), equal, weights, judged)
        return every.part(start, start + len(prompts))


class AdvantageTrainer(OnPolicyTrainer):
    """Base class of methods that train on advantages."""

    args: AdvantageConfig
    start_message = ""
    estimator: AdvantageEstimator

    def validate(self) -> None:
        """Check the scorers, and that a given reference is used.

        Raises:
            ConfigError: There is no scorer, a reference without a KL term, or a rule of
                rewards that the advantages cannot use.
        """
        super().validate()
        function = self.reward_function
        single = self.args.advantage == "ddpo" and self.args.images_per_prompt == 1
        if single and function is not None and function.compares_images:
            raise ConfigError(
                "train.images_per_prompt",
                "ddpo compares one image with earlier ones of its prompt, and these rewards are "
                "combined by comparing images of one round; use 2 or more, one scorer without "
                "combine, or combine: {method: weighted_sum}",
            )
        if self.ref_backbone is not None and not self.args.kl_weight:
            raise ConfigError(
                "ref_model", "train.kl_weight is 0, so it would not be used; leave it out"
            )

    def build_reference(self) -> Reference | None:
        """Build the starting weights as the reference, if there is a KL term."""
        return super().build_reference() if self.args.kl_weight else None

    def build_source(self) -> RolloutSource:
        """Build the source of batches, and what computes advantages."""
        self.estimator = AdvantageEstimator(self.args)
        if self.estimator.history is not None:
            self.checkpoints.parts.append(self.estimator.history)
        return super().build_source()

    def kept(self, batch: Batch, trajectories: Trajectories) -> dict[str, Tensor]:
        """Return what is kept of drawn trajectories for training.

        Args:
            batch (`Batch`): g prompts.
            trajectories (`Trajectories`): k of each.

        Returns:
            `dict[str, Tensor]`: Parts of the batch's `extra`, g rows each.
        """
        raise NotImplementedError

    def finish_round(
        self, reward_function: RewardFunction, drawn: list[tuple[Batch, Trajectories, Tensor]]
    ) -> list[Batch]:
        """Compute the advantages over all processes, and build the batches.

        See `OnPolicyTrainer.finish_round`.
        """
        prompts = [prompt for batch, _, _ in drawn for prompt in batch.prompts]
        scores = torch.cat([scores for _, _, scores in drawn])
        # A dry run leaves the past rewards of the prompts as they are.
        estimator = copy.deepcopy(self.estimator) if self.is_dry else self.estimator
        judged = estimator(reward_function, prompts, scores, self.accelerator.process_index)
        batches, place = [], 0
        for batch, trajectories, batch_scores in drawn:
            part = judged.part(place, place + len(batch))
            place += len(batch)
            extra = {
                **self.kept(batch, trajectories),
                "advantages": part.advantages,
                "equal": part.equal.float(),
                "judged": part.judged.float(),
                "scores": batch_scores.float(),
            }
            weights = batch.weights * part.weights.to(batch.weights)
            batches.append(replace(batch, extra=extra, weights=weights))
        return batches

    def round_metrics(self, batch: Batch) -> dict[str, Tensor]:
        """Return what the judge said about a micro-batch, (g,) each.

        Args:
            batch (`Batch`): A micro-batch.
        """
        return {
            "judge/advantage": batch.extra["advantages"].abs().mean(1),
            "judge/equal_groups": batch.extra["equal"],
            **{f"judge/{name}": column.nanmean(1) for name, column in self.judged(batch)},
        }
