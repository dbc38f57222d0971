"""Train offline methods on images that the policy draws.

The dataset gives the prompts. Rounds of drawn and scored images become pairs, lists or
single images. This makes online Diffusion-DPO, RankDPO, MaPO and others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...data.config import OnlineConfig
from ...errors import ConfigError
from ...likelihood import NoiseSchedule, RectifiedFlow, group_noise
from ..batch import Batch
from .policy_sampler import PolicySampler, RoundCheck
from .remote_sampler import RemoteSampler
from .reward_function import RewardFunction
from .rollout import SamplerConfig

if TYPE_CHECKING:
    from ...backbones.guidance_rules import GuidanceRule


def online_sampler(
    config: OnlineConfig, rule: GuidanceRule, schedule: NoiseSchedule
) -> SamplerConfig:
    """Return the sampler settings of `data.online`.

    Args:
        config (`OnlineConfig`): The section.
        rule (`GuidanceRule`): Of the model's family.
        schedule (`NoiseSchedule`): Of the model, which decides the default of `eta`.
    """
    default = 0.0 if isinstance(schedule, RectifiedFlow) else 1.0
    return SamplerConfig(
        config.num_inference_steps,
        rule.of_run(config.guidance_scale),
        default if config.eta is None else config.eta,
        config.rollout_batch_size,
        shared_init=False,
        keep="final",
    )


def online_reward_function(config: OnlineConfig, scorers: object) -> RewardFunction:
    """Build the reward function of `data.online`.

    Args:
        config (`OnlineConfig`): The section.
        scorers: Scorers of the trainer. None takes those of the section.

    Raises:
        ConfigError: There is no scorer.
    """
    names = scorers if scorers is not None else config.scorers
    if not names:
        raise ConfigError(
            "data.online.scorers", "name at least one scorer, or give a rewards section"
        )
    return RewardFunction(names)


class OnlineData:
    """Makes the groups of a round from images of the policy.

    Args:
        config (`OnlineConfig`): The section.
        reward_function (`RewardFunction`): Scores the images.
        sampler (`PolicySampler` or `RemoteSampler`): Draws the images.
        kind (`str`): Kind of the method's groups: `pair`, `ranked` or `single`.
        inverted (`bool`): Whether the method prefers the rejected images.
        shared_noise (`bool`): Whether the images of a group share their noise in
            training.
        noise_offset (`float`): Of the noise in training, see `group_noise`.
        log (`Callable`): Receives metrics of a round, each (g,).
    """

    def __init__(
        self,
        config: OnlineConfig,
        reward_function: RewardFunction,
        sampler: PolicySampler | RemoteSampler,
        kind: str,
        inverted: bool,
        shared_noise: bool,
        noise_offset: float,
        log: Callable[[dict[str, Tensor]], None],
    ) -> None:
        self.config, self.reward_function, self.sampler = config, reward_function, sampler
        self.kind, self.inverted, self.shared_noise = kind, inverted, shared_noise
        self.noise_offset, self.log = noise_offset, log

    def round(self, number: int, batches: list[Batch]) -> list[Batch]:
        """Draw and score the groups of a round.

        Args:
            number (`int`): Number of the round.
            batches (`list[Batch]`): Batches of prompts.

        Returns:
            `list[Batch]`: Batches to train on.
        """
        if isinstance(self.sampler, RemoteSampler):
            self.sampler.push()
        check, groups = RoundCheck(self.sampler.accelerator, self.reward_function), []
        drawn = [
            (batch, self.sampler(batch, self.config.k, self.reward_function, "online"))
            for batch in batches
        ]
        for batch, (trajectories, late) in drawn:
            scores = late.wait()
            check.add(batch, chain.from_iterable(trajectories.images), scores)
            groups.append(self._judged(batch, trajectories.final, scores))
        check.finish()
        return groups

    def _judged(self, batch: Batch, latents: Tensor, scores: Tensor) -> Batch:
        """Build pairs, lists or single images from scored latents."""
        combined = self.reward_function.combined(scores)
        if self.inverted:
            combined = -combined
        low = torch.where(torch.isnan(combined), torch.full_like(combined, math.inf), combined)
        high = torch.where(torch.isnan(combined), torch.full_like(combined, -math.inf), combined)
        best, worst = high.argmax(1), low.argmin(1)
        if self.kind == "ranked":
            chosen = torch.arange(latents.shape[1]).expand(len(batch), -1)
        else:
            chosen = torch.stack([best, worst], 1)[:, : 2 if self.kind == "pair" else 1]
        rows = torch.arange(len(batch))[:, None]
        decided = (high.amax(1) > low.amin(1)).float()
        scored = torch.isfinite(combined).any(1).float()
        k = chosen.shape[1]
        device = batch.x0.device
        columns = zip(self.reward_function.names(scores.shape[-1]), scores.unbind(-1), strict=True)
        means = {f"online/{name}": column.float().nanmean(1) for name, column in columns}
        self.log({**means, "online/ties": 1 - decided})
        return dataclasses.replace(
            batch,
            x0=latents[rows, chosen].to(device),
            noise=self._noise(batch, k),
            condition={
                name: value.repeat_interleave(k, 0) for name, value in batch.condition.items()
            },
            scores=None if self.kind == "single" else combined[rows, chosen].float().to(device),
            # A single image cannot tie.
            weights=batch.weights * (scored if self.kind == "single" else decided).to(device),
        )

    def _noise(self, batch: Batch, k: int) -> Tensor:
        if self.shared_noise:
            return batch.noise.expand(-1, k, *batch.noise.shape[2:])
        noise = group_noise(
            batch.noise.shape[2:],
            k,
            batch.generators("online-noise"),
            shared=False,
            offset=self.noise_offset,
        )
        return noise.to(batch.noise.device)
