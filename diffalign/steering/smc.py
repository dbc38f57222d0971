"""Sequential Monte Carlo over any particle model.

At each step the clean sample of every particle is predicted and scored, the particles
are reweighted and, where the effective sample size is low, resampled. Only then is the
next state proposed (Singhal et al. 2025, arXiv 2501.06848, algorithm 1, with carried
weights and an exact terminal correction). The same core runs under images
(`fk_steering.py`) and text (`text.py`).

The estimate exp(log_z) of E[exp(lambda r)] is unbiased for fixed lambda, with any
potential and schedule, adaptive or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError, UserError
from .particle_weights import POTENTIALS, ParticleWeights, check_options, log_potential
from .resampling import SCHEMES, Generators, ess, resample
from .schedule import check_schedule, check_temperatures, schedule
from .streams import resampling_stream

__all__ = [
    "AGGREGATES",
    "POTENTIALS",
    "SCHEMES",
    "ParticleModel",
    "ParticleWeights",
    "SMCResult",
    "aggregate",
    "check_options",
    "check_schedule",
    "ess",
    "log_potential",
    "resample",
    "run",
    "schedule",
]

AGGREGATES = ("soft", "lme", "mean")


class ParticleModel(Protocol):
    """A sampler that `run` can steer.

    A method `prepare(state, i) -> state` may be added. It is called once per step,
    before `predict_x0` and `propose`, for example to run a network whose output both
    need.

    Attributes:
        num_steps (`int`): of the sampler.
    """

    num_steps: int

    def init(self, groups: int, num_particles: int, generator: Generators) -> Any:
        """Draw the initial state of groups x num_particles particles."""

    def predict_x0(self, state: Any, i: int) -> Any:
        """Predict the clean samples at step i."""

    def propose(self, state: Any, i: int, generator: Generators) -> Any:
        """Draw the next state, or the next state and log p - log tau (groups, k)."""

    def index(self, state: Any, ancestors: Tensor) -> Any:
        """Reorder the particles: slot k continues slot ``ancestors[g, k]``."""

    def final(self, state: Any) -> Any:
        """Return the finished samples."""


@dataclass
class SMCResult:
    """A weighted population per group, and the trace of its run.

    Attributes:
        particles: what the model's `final` returned.
        rewards (`Tensor`): of those particles, float64 (groups, k).
        log_weights (`Tensor`): normalised, float64 (groups, k). ``sum_k W_k f(x_k)``
            estimates E[f] under p(x) exp(lmbda r(x)) / Z.
        log_z (`Tensor`): estimate of log Z, (groups,).
        lmbda (`Tensor`): the tilt, (groups,).
        steps (`list[int]`): the S scored steps.
        step_rewards (`Tensor`): after aggregation, before resampling, (S, groups, k).
        log_potentials (`Tensor`): log G as applied, before resampling, (S, groups, k).
        ancestors (`Tensor`): int64 (S, groups, k), the identity where a group was not
            resampled.
        resampled (`Tensor`): bool (S, groups).
        ess (`Tensor`): effective sample size after each reweighting, (S + 1, groups).
            The last is terminal.
        roots (`Tensor`): the initial particle that each one descends from, int64
            (groups, k).
        applied (`Tensor`): sum of all log potentials along the lineage, (groups, k). It
            equals lmbda * rewards.
        degenerate (`Tensor`): whether all terminal rewards were -inf, bool (groups,).
        nan_count (`int`): rewards that were NaN and counted as -inf.
    """

    particles: Any
    rewards: Tensor
    log_weights: Tensor
    log_z: Tensor
    lmbda: Tensor
    steps: list[int]
    step_rewards: Tensor
    log_potentials: Tensor
    ancestors: Tensor
    resampled: Tensor
    ess: Tensor
    roots: Tensor
    applied: Tensor
    degenerate: Tensor
    nan_count: int

    @property
    def weights(self) -> Tensor:
        """Normalised weights, (groups, k). Each group sums to 1."""
        return self.log_weights.exp()

    @property
    def num_roots(self) -> Tensor:
        """How many initial particles still have descendants, (groups,)."""
        return count_roots(self.roots)


def count_roots(roots: Tensor) -> Tensor:
    """Count the distinct entries of each row.

    Args:
        roots (`Tensor`): (groups, k).

    Returns:
        `Tensor`: int64 (groups,).
    """
    ordered = roots.sort(1).values
    return 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)


def aggregate(rewards: Tensor, how: str, lmbda: float | Tensor) -> Tensor:
    """Combine the rewards of n draws x0 ~ p(x0 | x_t) into one.

    All ways leave the target unchanged. NaN draws are left out.

    Args:
        rewards (`Tensor`): (groups, k, n).
        how (`str`): ``mean``; ``lme``, log mean exp(r), as in the paper; or ``soft``,
            (1/lmbda) log mean exp(lmbda r), whose limit for large n is the potential of
            least variance.
        lmbda (`float` or `Tensor`): one or (groups,). ``soft`` takes the mean where it
            is 0 or NaN.

    Returns:
        `Tensor`: float64 (groups, k).

    Raises:
        ConfigError: another name.
    """
    if how not in AGGREGATES:
        raise ConfigError("aggregate", f"expected one of {', '.join(AGGREGATES)}, got {how!r}")
    rewards = torch.as_tensor(rewards).detach().to("cpu", torch.float64)
    missing = torch.isnan(rewards)
    count = (~missing).sum(-1)
    mean = torch.where(missing, torch.zeros_like(rewards), rewards).sum(-1) / count
    if how == "mean":
        return mean
    present = torch.where(missing, torch.full_like(rewards, -math.inf), rewards)
    if how == "lme":
        return torch.where(
            count > 0, present.logsumexp(-1) - count.log(), torch.full_like(mean, math.nan)
        )
    tilt = torch.as_tensor(lmbda, dtype=torch.float64).reshape(-1, 1)
    usable = (tilt > 0).expand_as(mean)
    tilt = torch.where(tilt > 0, tilt, torch.ones_like(tilt))
    soft = ((tilt[..., None] * present).logsumexp(-1) - count.log()) / tilt
    return torch.where(count > 0, torch.where(usable, soft, mean), torch.full_like(mean, math.nan))


def run(
    model: ParticleModel,
    reward: Callable[[Any], Tensor],
    *,
    groups: int,
    num_particles: int,
    lmbda: float | Sequence[float] | Tensor | None = None,
    ess_target: float | None = None,
    potential: str = "diff",
    resample_steps: Sequence[int | float] | None = None,
    scheme: str = "systematic",
    ess_threshold: float | None = 0.5,
    adaptive_tempering: float | None = None,
    temperatures: Sequence[float] | None = None,
    aggregate: str = "soft",
    generator: Generators = None,
    resample_generator: Generators = None,
) -> SMCResult:
    """Steer independent populations towards p(x) exp(lmbda r(x)) / Z.

    Args:
        model (`ParticleModel`): the sampler.
        reward: maps what `predict_x0` or `final` returns to (groups, k), or to
            (groups, k, n) for n draws of the clean sample.
        groups (`int`): populations.
        num_particles (`int`): particles of each.
        resample_steps (sequence, *optional*): see `schedule`.
        aggregate (`str`, *optional*, defaults to `"soft"`): for n draws, see
            `aggregate`.
        generator (*optional*): for the model's `init` and `propose`: one, one per
            group, or whatever the model reads.
        resample_generator (`torch.Generator` or one per group, *optional*): None
            derives it from `generator`, without advancing that one.
        lmbda, ess_target, potential, scheme, ess_threshold, adaptive_tempering,
            temperatures: see `ParticleWeights`.

    Returns:
        `SMCResult`: the weighted populations.

    Raises:
        ConfigError: an option out of range.
        UserError: rewards of the wrong shape, +inf, or a group of NaN only.
    """
    if aggregate not in AGGREGATES:
        raise ConfigError(
            "aggregate", f"expected one of {', '.join(AGGREGATES)}, got {aggregate!r}"
        )
    check_options(
        num_particles=num_particles,
        lmbda=lmbda,
        ess_target=ess_target,
        potential=potential,
        scheme=scheme,
        ess_threshold=ess_threshold,
        adaptive_tempering=adaptive_tempering,
        temperatures=temperatures,
    )
    steps = schedule(resample_steps, model.num_steps)
    weights = ParticleWeights(
        groups,
        num_particles,
        lmbda=lmbda,
        ess_target=ess_target,
        potential=potential,
        scheme=scheme,
        ess_threshold=ess_threshold,
        adaptive_tempering=adaptive_tempering,
        temperatures=check_temperatures(potential, temperatures, len(steps)),
        generator=resample_generator
        if resample_generator is not None
        else resampling_stream(generator),
    )
    state = model.init(groups, num_particles, generator)
    prepare = getattr(model, "prepare", None)
    trace = _Trace([], [], [], [], [])
    for i in range(model.num_steps):
        state = prepare(state, i) if prepare is not None else state
        if i in steps:
            ancestors = trace.score(
                weights, _collect(reward(model.predict_x0(state, i)), aggregate, weights)
            )
            state = state if ancestors is None else model.index(state, ancestors)
        before, state = state, model.propose(state, i, generator)
        if _is_tilted(before, state):
            state, ratio = state
            weights.add_log_ratio(ratio)
    particles = model.final(state)
    final = _collect(reward(particles), aggregate, weights)
    weights.finish(final)
    return trace.result(particles, final, weights, steps)


def _is_tilted(before: object, proposed: object) -> bool:
    """Tell a proposal of (state, log ratio) from a state that is itself a tuple."""
    if not isinstance(proposed, tuple) or len(proposed) != 2:
        return False
    return not isinstance(before, tuple) or isinstance(proposed[0], tuple)


@dataclass
class _Trace:
    """Collects what happens at the scored steps."""

    rewards: list[Tensor]
    log_g: list[Tensor]
    ancestors: list[Tensor]
    resampled: list[Tensor]
    ess: list[Tensor]

    def score(self, weights: ParticleWeights, rewards: Tensor) -> Tensor | None:
        """Reweight and resample. Return the ancestors, or None where nothing moves."""
        self.rewards.append(rewards)
        self.log_g.append(weights.update(rewards))
        self.ess.append(ess(weights.log_weights))
        ancestors = weights.resample()
        groups, k = weights.shape
        self.ancestors.append(
            torch.arange(k).expand(groups, -1) if ancestors is None else ancestors
        )
        self.resampled.append(weights.resampled)
        return ancestors

    def result(
        self, particles: Any, rewards: Tensor, weights: ParticleWeights, steps: list[int]
    ) -> SMCResult:
        groups, k = weights.shape
        empty = torch.zeros(0, groups, k, dtype=torch.float64)
        return SMCResult(
            particles=particles,
            rewards=rewards,
            log_weights=weights.log_weights,
            log_z=weights.log_z,
            lmbda=weights.lmbda,
            steps=steps,
            step_rewards=torch.stack(self.rewards) if steps else empty,
            log_potentials=torch.stack(self.log_g) if steps else empty,
            ancestors=torch.stack(self.ancestors) if steps else empty.long(),
            resampled=torch.stack(self.resampled)
            if steps
            else torch.zeros(0, groups, dtype=torch.bool),
            ess=torch.stack([*self.ess, ess(weights.log_weights)]),
            roots=weights.roots,
            applied=weights.applied,
            degenerate=weights.degenerate,
            nan_count=weights.nan_count,
        )


def _collect(rewards: Tensor, how: str, weights: ParticleWeights) -> Tensor:
    rewards = torch.as_tensor(rewards).detach().to("cpu", torch.float64)
    if rewards.ndim == 3:
        if torch.isposinf(rewards).any():
            raise UserError(
                "reward: the scorer returned +inf; rewards must be finite, or -inf to reject a "
                "particle"
            )
        rewards = aggregate(rewards, how, weights.lmbda)
    if rewards.shape != weights.shape:
        raise UserError(
            f"reward: expected {weights.shape} numbers (groups, particles), got shape "
            f"{tuple(rewards.shape)}"
        )
    return rewards
