"""Sequential Monte Carlo over any particle model: Feynman-Kac steering without knowing what a particle is.

Step order (Singhal et al. 2025, arXiv 2501.06848, Algorithm 1, with carried weights and an exact terminal correction): predict the clean sample
of every particle, score it, reweight, resample where the effective sample size is low, only then propose. The same core runs under images
(`sampler.py`) and text (`text.py`). The estimate exp(log_z) of E[exp(lambda r)] is unbiased for fixed lambda, any potential, schedule and adaptivity.
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
    """What `run` steers. `prepare(state, i) -> state` may be added: it is called once per step, before `predict_x0` and `propose`, for example to run
    a network whose output both of them need."""

    num_steps: int

    def init(self, groups: int, num_particles: int, generator: Any) -> Any: ...
    def predict_x0(self, state: Any, i: int) -> Any: ...
    def propose(self, state: Any, i: int, generator: Any) -> Any: ...
    def index(self, state: Any, ancestors: Tensor) -> Any: ...
    def final(self, state: Any) -> Any: ...


@dataclass
class SMCResult:
    """A weighted population.

    Attributes:
        particles: what the model's `final` returned.
        rewards: (groups, k) float64, of those particles.
        log_weights: (groups, k) float64, normalised: ``sum_k W_k f(x_k)`` estimates E[f] under p(x) exp(lmbda r(x)) / Z.
        log_z: (groups,), the estimate of log Z.
        lmbda: (groups,).
        steps: the scored step indices, S of them.
        step_rewards: (S, groups, k), after aggregation, before resampling.
        log_potentials: (S, groups, k), log G as applied, before resampling.
        ancestors: (S, groups, k) int64, identity where a group was not resampled.
        resampled: (S, groups) bool.
        ess: (S + 1, groups): after each reweighting, the last one terminal.
        roots: (groups, k) int64, the initial particle each one descends from.
        applied: (groups, k), the sum of all log potentials along the lineage; equals lmbda * rewards.
        degenerate: (groups,) bool, all terminal rewards were -inf.
        nan_count: rewards that were NaN and counted as -inf.
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
        """(groups, k), each group summing to 1."""
        return self.log_weights.exp()

    @property
    def num_roots(self) -> Tensor:
        """(groups,): how many initial particles still have descendants."""
        return count_roots(self.roots)


def count_roots(roots: Tensor) -> Tensor:
    """Distinct entries per row of (groups, k), (groups,) int64."""
    ordered = roots.sort(1).values
    return 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)


def aggregate(rewards: Tensor, how: str, lmbda: float | Tensor) -> Tensor:
    """Rewards of n draws x0 ~ p(x0 | x_t) as one, (groups, k, n) -> (groups, k) float64; NaN draws are left out.

    Args:
        rewards (`Tensor`): (groups, k, n).
        how (`str`): ``mean``; ``lme``, log mean exp(r), as in the paper; ``soft``, (1/lmbda) log mean exp(lmbda r), whose large-n limit is the
            potential of least variance. All of them leave the target unchanged.
        lmbda (`float` or `Tensor`): one or (groups,); ``soft`` falls back to the mean where it is 0 or NaN.

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
    kept = torch.where(missing, torch.full_like(rewards, -math.inf), rewards)
    if how == "lme":
        return torch.where(
            count > 0, kept.logsumexp(-1) - count.log(), torch.full_like(mean, math.nan)
        )
    tilt = torch.as_tensor(lmbda, dtype=torch.float64).reshape(-1, 1)
    usable = (tilt > 0).expand_as(mean)
    tilt = torch.where(tilt > 0, tilt, torch.ones_like(tilt))
    soft = ((tilt[..., None] * kept).logsumexp(-1) - count.log()) / tilt
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
    """Steers `groups` independent populations through `model` towards p(x) exp(lmbda r(x)) / Z.

    Args:
        model (`ParticleModel`): see there.
        reward: maps what `predict_x0` or `final` returns to (groups, k), or to (groups, k, n) for n draws of the clean sample.
        groups, num_particles (`int`): populations and their size.
        resample_steps: see `schedule`.
        aggregate (`str`): for n draws, see `aggregate`.
        generator: handed to the model's `init` and `propose`; one, one per group, or whatever the model reads.
        resample_generator: one, or one per group; None derives it from `generator` without advancing that one.
        lmbda, ess_target, potential, scheme, ess_threshold, adaptive_tempering, temperatures: see `ParticleWeights`.

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


def _is_tilted(before: Any, proposed: Any) -> bool:
    """Whether a proposal is (state, log ratio) and not a state that is itself a tuple."""
    if not isinstance(proposed, tuple) or len(proposed) != 2:
        return False
    return not isinstance(before, tuple) or isinstance(proposed[0], tuple)


@dataclass
class _Trace:
    """What happened at the scored steps."""

    rewards: list[Tensor]
    log_g: list[Tensor]
    ancestors: list[Tensor]
    resampled: list[Tensor]
    ess: list[Tensor]

    def score(self, weights: ParticleWeights, rewards: Tensor) -> Tensor | None:
        """Reweights and resamples; the ancestors, or None where nobody moves."""
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


def _collect(rewards: Any, how: str, weights: ParticleWeights) -> Tensor:
    rewards = torch.as_tensor(rewards).detach().to("cpu", torch.float64)
    if rewards.ndim == 3:
        if torch.isposinf(rewards).any():
            raise UserError(
                "reward: the scorer returned +inf, which no finite weight can follow; return a finite number"
            )
        rewards = aggregate(rewards, how, weights.lmbda)
    if rewards.shape != weights.shape:
        raise UserError(
            f"reward: expected {weights.shape} numbers (groups, particles), got shape {tuple(rewards.shape)}"
        )
    return rewards
