"""The base of methods that train on single steps of sampled trajectories."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import torch
from torch import Tensor

from ...config.ranges import Range
from ...config.section import config_section
from ...errors import ConfigError, UserError
from ...likelihood.transitions import MIN_STD
from ..batch import Batch
from ..denoiser import Denoiser
from .on_policy import DRAWN_PROMPTS_TRAIN, OnPolicyConfig, OnPolicyTrainer
from .rollout import Grid, Trajectories, guide, log_prob_of, transition


@config_section
class TrajectoryConfig(OnPolicyConfig):
    """Options of methods that train on single steps of trajectories."""

    reduce: Literal["mean", "sum"] = "mean"
    """mean (official code) | sum over the elements of a latent. With `sum`, divide
    `beta` by the number of elements. Source: official code."""
    timestep_fraction: Annotated[float, Range(0.0, 1.0, above=True)] = 1.0
    """Share of a trajectory's steps that is trained, drawn anew per row. Source:
    official code, all steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.proportion_empty_prompts:
            raise ConfigError("proportion_empty_prompts", DRAWN_PROMPTS_TRAIN)

    @property
    def reduction_of_log_probs(self) -> str:
        return self.reduce


@dataclass(frozen=True)
class StepStatistics:
    """What a network says about stored steps.

    Attributes:
        outputs (`Tensor`): Output of the network with guidance, (g k, C, h, w).
        means (`Tensor`): Mean of the step, (g k, C, h, w).
        std (`Tensor`): Deviation of the step, broadcastable to the means.
        log_probs (`Tensor`): Log-probability of the stored next state, (g, k).
    """

    outputs: Tensor
    means: Tensor
    std: Tensor
    log_probs: Tensor


class TrajectoryTrainer(OnPolicyTrainer):
    """Base class of methods that train on single steps of sampled trajectories."""

    args: TrajectoryConfig

    def validate(self) -> None:
        """Check the scorers, and that the sampler has a stochastic step.

        Raises:
            ConfigError: There is no scorer, one cannot be used, or eta is too small.
            UserError: No step of the sampler is stochastic.
        """
        super().validate()
        grid = self.sampling_grid()
        steps = self.usable_steps(grid)
        if not len(steps):
            raise UserError("train.eta: no step of this sampler is stochastic; give eta > 0")
        zeros = torch.zeros(len(steps), 1, 1, 1)
        times, next_times = grid.times[steps], grid.next_times[steps]
        eta, dynamics = self.args.eta, self.sampler_config().dynamics
        _, std = transition(self.schedule, zeros, zeros, times, next_times, eta, dynamics)
        least = float(std.min())
        if least < MIN_STD:
            raise ConfigError(
                "train.eta",
                f"at {eta:g} a step has a standard deviation of {least:.2g}, "
                f"and its log-probability needs {MIN_STD:g}; raise it",
            )

    @cached_property
    def trained_steps(self) -> int:
        """Number of trained steps per trajectory."""
        usable = len(self.usable_steps(self.sampling_grid()))
        return max(1, math.ceil(self.args.timestep_fraction * usable))

    @property
    def passes_per_batch(self) -> int:
        """One forward pass per trained step."""
        return self.trained_steps

    def usable_steps(self, grid: Grid) -> Tensor:
        """Return the indices of the steps that have a density, (u,).

        Args:
            grid (`Grid`): Times of the sampler.
        """
        return grid.trainable.nonzero()[:, 0]

    def step_order(self, batch: Batch, usable: Tensor) -> Tensor:
        """Draw the steps that each group trains, at random, (g, trained steps).

        Args:
            batch (`Batch`): g groups.
            usable (`Tensor`): Indices of steps to choose from, (u,).
        """
        orders = [
            usable[torch.randperm(len(usable), generator=g)] for g in batch.generators("step-order")
        ]
        return torch.stack(orders)[:, : self.trained_steps]

    def finish(
        self, batch: Batch, trajectories: Trajectories, preference: Tensor, scores: Tensor
    ) -> Batch:
        """Add states, log-probabilities, preferences and the order of steps to a batch.

        See `OnPolicyTrainer.finish`.
        """
        extra = {
            "states": trajectories.states,
            "log_probs": trajectories.log_probs,
            "preference": preference.float(),
            "order": self.step_order(batch, self.usable_steps(self.rollout.grid)),
            "scores": scores.float(),
        }
        return dataclasses.replace(batch, extra=extra)

    def micro_batches(self, batch: Batch) -> Iterator[Batch]:
        """Yield one step of every trajectory at a time.

        Each group has its own order of steps, which its images share.

        Args:
            batch (`Batch`): What `finish` returned.
        """
        grid = self.rollout.grid
        device, rows = batch.x0.device, torch.arange(len(batch))
        of_steps = ("states", "log_probs", "means", "order", "state_numbers", "mean_numbers")
        others = {name: value for name, value in batch.extra.items() if name not in of_steps}
        for number in range(batch.extra["order"].shape[1]):
            step = batch.extra["order"][:, number]
            extra = {
                **others,
                "next_times": grid.next_times[step],
                "recorded": batch.extra["log_probs"][rows, :, step],
            }
            if "means" in batch.extra:
                mean = _places(batch, "mean_numbers", step)
                extra["recorded_means"] = batch.extra["means"][rows, :, mean]
            before, after = (_places(batch, "state_numbers", step + i) for i in (0, 1))
            yield dataclasses.replace(
                batch,
                times=grid.times[step],
                noisy=batch.extra["states"][rows, :, before].to(device),
                x0=batch.extra["states"][rows, :, after].to(device),
                extra=extra,
            )

    def step_statistics(
        self, batch: Batch, denoiser: Denoiser, unconditional_gradient: bool = True
    ) -> StepStatistics:
        """Run a network on stored steps.

        Args:
            batch (`Batch`): A micro-batch. Its `noisy` holds one state per image or one
                per group.
            denoiser (`Denoiser`): Policy or reference.
            unconditional_gradient (`bool`, *optional*, defaults to `True`): Whether a
                gradient flows through the unconditional branch of guidance.

        Returns:
            `StepStatistics`: Output, Gaussian and log-probabilities.
        """
        assert batch.noisy is not None
        (g, k), states = batch.x0.shape[:2], batch.noisy.shape[1]

        def rows(value: Tensor, count: int) -> Tensor:
            return value.repeat_interleave(count, 0)

        condition = {name: rows(value, states) for name, value in batch.condition.items()}
        empty = {
            name: rows(value, states)
            for name, value in self.data_pipeline.builder.unconditional(batch.condition).items()
        }
        sample, times = batch.noisy.flatten(0, 1), batch.times
        with self.accelerator.autocast():
            output = guide(
                denoiser.predict,
                self.schedule,
                sample,
                rows(times, states),
                condition,
                empty,
                self.guidance_scale,
                self.backbone.guidance_rule,
                unconditional_gradient,
            )
        output, sample = rows(output, k // states), rows(sample, k // states)
        dynamics = self.sampler_config().dynamics
        mean, std = transition(
            self.schedule,
            output,
            sample,
            rows(times, k),
            rows(batch.extra["next_times"], k),
            self.args.eta,
            dynamics,
        )
        log_probs = log_prob_of(batch.x0.flatten(0, 1), mean, std, self.args.reduce, dynamics)
        return StepStatistics(output, mean, std, log_probs.unflatten(0, (g, k)))

    def step_log_probs(self, batch: Batch, denoiser: Denoiser) -> Tensor:
        """Compute the log-probabilities of the stored next states.

        Args:
            batch (`Batch`): A micro-batch, see `step_statistics`.
            denoiser (`Denoiser`): Policy or reference.

        Returns:
            `Tensor`: (g, k).
        """
        return self.step_statistics(batch, denoiser).log_probs


def _places(batch: Batch, name: str, numbers: Tensor) -> Tensor:
    """Return where states or means of these numbers are held, one per group.

    Args:
        batch (`Batch`): Its extra `name` has the numbers that are held. Without it all
            are.
        name (`str`): `state_numbers` or `mean_numbers`.
        numbers (`Tensor`): (g,).
    """
    held = batch.extra.get(name)
    return numbers if held is None else (held == numbers[:, None]).int().argmax(1)
