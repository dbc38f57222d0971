"""Weights of a particle population: potentials, tempering, resampling and log Z.

By the Feynman-Kac identity (Singhal et al. 2025, arXiv 2501.06848, and
`docs/steering.md`), the terminal potential is ``lambda r(x) - A``. A is the sum of log
G over the intermediate potentials G along the lineage. Whatever these were, the product
of all potentials is exp(lambda r) of the returned sample.

All arithmetic is in float64 in the log domain on the CPU, vectorised over groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConfigError, UserError
from .resampling import SCHEMES, Generators, ess, resample

POTENTIALS = ("diff", "max", "sum", "rt", "max_inc", "tempered")
UNSCORED = ("error", "degenerate")
FLOOR_NATS = 10.0
"""How far an intermediate reward of -inf or NaN counts under the lowest finite one.

In nats, within its group. It is finite because an estimate must not remove support.
"""
MAX_CHOSEN_NATS = 10.0
"""Largest difference between best and worst for which `ess_target` chooses lambda."""


def log_potential(
    kind: str, rewards: Tensor, state: Tensor, lmbda: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Compute one intermediate potential.

    Args:
        kind (`str`): one of `POTENTIALS`.
        rewards (`Tensor`): r(x0hat) at this step, finite, (groups, k).
        state (`Tensor`): what the lineages remember, (groups, k). It begins as
            `initial_state`.
        lmbda (`Tensor`): the tilt, >= 0, broadcastable to (groups, k).
        scale (`float`, *optional*, defaults to `1.0`): the temperature c_i of
            ``tempered``, in [0, 1].

    Returns:
        `tuple[Tensor, Tensor]`: log G and the new state, each (groups, k).

    Raises:
        ConfigError: unknown potential.
    """
    if kind == "diff":
        return lmbda * (rewards - state), rewards
    if kind == "tempered":
        return lmbda * (scale * rewards - state), scale * rewards
    if kind == "max":
        state = torch.maximum(state, rewards)
        return lmbda * state, state
    if kind == "max_inc":
        new = torch.maximum(state, rewards)
        return lmbda * (
            new - torch.where(torch.isneginf(state), torch.zeros_like(state), state)
        ), new
    if kind == "sum":
        state = state + rewards
        return lmbda * state, state
    if kind == "rt":
        return lmbda * rewards, state
    raise ConfigError("potential", f"expected one of {', '.join(POTENTIALS)}, got {kind!r}")


def initial_state(kind: str, shape: tuple[int, int]) -> Tensor:
    """Return what a lineage remembers before anything was scored.

    Args:
        kind (`str`): one of `POTENTIALS`.
        shape (`tuple[int, int]`): (groups, k).

    Returns:
        `Tensor`: -inf for running maxima, so that rewards have no floor, and 0 for the
            others.
    """
    return torch.full(shape, -math.inf if kind in ("max", "max_inc") else 0.0, dtype=torch.float64)


def solve_exponent(log_weights: Tensor, values: Tensor, target: float, highest: Tensor) -> Tensor:
    """Find the largest exponent at which a population keeps its effective sample size.

    It is the largest c in [0, highest] with ESS(log_weights + c values) >= target,
    found by bisection.

    Args:
        log_weights (`Tensor`): (groups, k).
        values (`Tensor`): finite, (groups, k).
        target (`float`): effective sample size, in particles.
        highest (`Tensor`): (groups,).

    Returns:
        `Tensor`: c, (groups,).
    """
    low, high = torch.zeros_like(highest), highest.clone()
    fits = ess(log_weights + high[:, None] * values) >= target
    for _ in range(60):
        middle = (low + high) / 2
        good = ess(log_weights + middle[:, None] * values) >= target
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return torch.where(fits, highest, low)


class ParticleWeights:
    """The weights of several independent populations, from start to end.

    Call `update` and then `resample` at every scored step, `add_log_ratio` for every
    tilted proposal, and `finish` at the end.

    Args:
        groups (`int`): populations, at least 1.
        num_particles (`int`): particles of each, k, at least 1.
        lmbda (`float`, sequence or `Tensor`, *optional*): the tilt, >= 0, one or one
            per group. The target is p(x) exp(lmbda r(x)) / Z.
        ess_target (`float`, *optional*): in place of `lmbda`: each group takes the
            lmbda at which the effective sample size is this share of its particles, at
            the first scored step where their rewards differ. From there on lmbda is
            fixed.
        potential (`str`, *optional*, defaults to `"diff"`): one of `POTENTIALS`.
        scheme (`str`, *optional*, defaults to `"systematic"`): of resampling, one of
            `SCHEMES`.
        ess_threshold (`float`, *optional*, defaults to `0.5`): resample where the
            effective sample size is under this share of k. 1 or None resamples always
            (unless weights are flat), 0 never.
        adaptive_tempering (`float`, *optional*): take the largest c <= 1 at which the
            effective sample size is at least this share of k, and apply G^c. Above
            `ess_threshold`, the population is never resampled. At or under it, every
            step at which tempering acts is resampled.
        temperatures (sequence of `float`, *optional*): c_i of ``tempered``, one per
            scored step.
        generator (`torch.Generator` or one per group, *optional*): of resampling.
        unscored (`str`, *optional*, defaults to `"error"`): what a group whose rewards
            are all NaN is: an ``error``, or ``degenerate``.
        names (sequence of `str`, *optional*): of the groups, for messages.

    Attributes:
        log_z (`Tensor`): estimate of log E[exp(lmbda r)], (groups,).
        applied (`Tensor`): A, the sum of log G along each lineage, (groups, k).
        roots (`Tensor`): the initial particle that each one descends from, int64
            (groups, k).
        lmbda (`Tensor`): (groups,). NaN where `ess_target` has not chosen yet.
        degenerate (`Tensor`): whether every terminal reward was -inf, bool (groups,).
            Weights are then flat and log_z is -inf.
        nan_count (`int`): rewards that were NaN.
        resampled (`Tensor`): whether the last call of `resample` resampled the group,
            bool (groups,).

    Raises:
        ConfigError: an option out of range.
    """

    def __init__(
        self,
        groups: int,
        num_particles: int,
        *,
        lmbda: float | Sequence[float] | Tensor | None = None,
        ess_target: float | None = None,
        potential: str = "diff",
        scheme: str = "systematic",
        ess_threshold: float | None = 0.5,
        adaptive_tempering: float | None = None,
        temperatures: Sequence[float] | None = None,
        generator: Generators = None,
        unscored: str = "error",
        names: Sequence[str] | None = None,
    ) -> None:
        check_options(
            num_particles=num_particles,
            lmbda=lmbda,
            ess_target=ess_target,
            potential=potential,
            scheme=scheme,
            ess_threshold=ess_threshold,
            adaptive_tempering=adaptive_tempering,
            temperatures=temperatures,
            unscored=unscored,
        )
        if groups < 1:
            raise ConfigError("groups", f"expected int >= 1, got {groups}")
        self.unscored, self.names = unscored, names
        shape = (groups, num_particles)
        self.shape, self.potential, self.scheme, self.generator = (
            shape,
            potential,
            scheme,
            generator,
        )
        self.threshold = math.inf if ess_threshold is None else ess_threshold
        self.ess_target, self.adaptive = ess_target, adaptive_tempering
        self.temperatures = None if temperatures is None else list(temperatures)
        self.lmbda = _per_group(lmbda, groups)
        # Weights up to a factor: equal weights are exact zeros.
        self._log = torch.zeros(shape, dtype=torch.float64)
        self.log_z = torch.zeros(groups, dtype=torch.float64)
        self.applied = torch.zeros(shape, dtype=torch.float64)
        self.state = initial_state(potential, shape)
        self.roots = torch.arange(num_particles).repeat(groups, 1)
        self.degenerate = torch.zeros(groups, dtype=torch.bool)
        self.nan_count = self.updates = 0
        self.resampled = torch.zeros(groups, dtype=torch.bool)
        self._pending = torch.zeros(shape, dtype=torch.float64)

    @property
    def log_weights(self) -> Tensor:
        """Normalised log weights, float64 (groups, k)."""
        return self._log - self._log.logsumexp(1, keepdim=True)

    @property
    def weights(self) -> Tensor:
        """Normalised weights, (groups, k). Each group sums to 1."""
        return self.log_weights.exp()

    def update(self, rewards: Tensor, blank: Tensor | None = None) -> Tensor:
        """Apply the potential of one scored step.

        Args:
            rewards (`Tensor`): at x0hat, (groups, k). NaN counts as -inf, and -inf as a
                finite floor.
            blank (`Tensor`, *optional*): where there is no image, bool (groups, k).

        Returns:
            `Tensor`: log G as it was applied, (groups, k).

        Raises:
            UserError: a reward of +inf, a group of NaN only, or a wrong shape.
        """
        rewards, alive = self._floored(self._read(rewards, blank))
        active = torch.where(alive, self._lambda(rewards, alive), torch.zeros(()).double())
        chosen = ~torch.isnan(active)
        active = torch.nan_to_num(active)[:, None]
        scale = self.temperatures[self.updates] if self.temperatures is not None else 1.0
        log_g, state = log_potential(self.potential, rewards, self.state, active, scale)
        on = (alive & chosen)[:, None]
        log_g = torch.where(on, log_g, torch.zeros_like(log_g))
        if self.potential in ("diff", "tempered"):
            state = torch.where(on, state, self.state)
        else:
            state = torch.where(alive[:, None], state, self.state)
        if self.adaptive is not None:
            c = solve_exponent(
                self.log_weights + self._pending,
                log_g,
                self.adaptive * self.shape[1],
                torch.ones_like(self.log_z),
            )[:, None]
            log_g = c * log_g
            if self.potential in ("diff", "tempered"):
                # What was not applied is asked for again at the next step.
                state = self.state + c * (state - self.state)
        self._reweight(log_g)
        self.applied = self.applied + log_g
        self.state = state
        self.updates += 1
        return log_g

    def add_log_ratio(self, log_ratio: Tensor) -> None:
        """Correct the weights for a step that was drawn from a tilted proposal.

        Call it at every such step.

        Args:
            log_ratio (`Tensor`): log p - log tau, (groups, k), where tau is the
                proposal.
        """
        self._pending = self._pending + torch.as_tensor(log_ratio).detach().to("cpu", torch.float64)

    def resample(self) -> Tensor | None:
        """Resample the groups whose effective sample size is under the threshold.

        The state of the weights follows the ancestors. The caller must reorder its
        particles.

        Returns:
            `Tensor` or `None`: ancestors, int64 (groups, k), the identity for the other
                groups. None where no group is resampled.
        """
        size = ess(self.log_weights)
        k = self.shape[1]
        # Flat weights are never resampled: it could only lose lineages.
        self.resampled = needed = (size < self.threshold * k) & (size < k * (1 - 1e-9))
        if not needed.any():
            return None
        generator = self.generator
        if generator is None or isinstance(generator, torch.Generator):
            drawn = resample(self.weights, self.scheme, generator=generator)
        else:
            # Only the groups concerned draw numbers, so that a group's stream does not
            # depend on the others.
            drawn = torch.zeros(self.shape, dtype=torch.int64)
            picked = needed.nonzero().flatten().tolist()
            drawn[needed] = resample(
                self.weights[needed], self.scheme, generator=[generator[g] for g in picked]
            )
        ancestors = torch.where(needed[:, None], drawn, torch.arange(k).expand(self.shape))
        self.applied, self.state, self.roots = (
            x.gather(1, ancestors) for x in (self.applied, self.state, self.roots)
        )
        self._log = torch.where(needed[:, None], torch.zeros_like(self._log), self._log)
        # The update before has folded a pending ratio into the weights. It is zero here
        # unless the caller skipped that.
        self._pending = self._pending.gather(1, ancestors)
        return ancestors

    def finish(self, rewards: Tensor, blank: Tensor | None = None) -> Tensor:
        """Apply the terminal potential, from the rewards of the returned samples.

        Args:
            rewards (`Tensor`): (groups, k). -inf is allowed here, as a hard constraint.
            blank (`Tensor`, *optional*): where there is no image, bool (groups, k).
                Such particles get weight 0.

        Returns:
            `Tensor`: the terminal log G, (groups, k).

        Raises:
            UserError: a reward of +inf, a group of NaN only, or a wrong shape.
        """
        rewards = self._read(rewards, blank)
        alive = torch.isfinite(rewards).any(1)
        finite = torch.where(torch.isfinite(rewards), rewards, self._lowest(rewards))
        self._lambda(finite, alive)
        # Where rewards never differed, there is nothing to tilt.
        self.lmbda = torch.nan_to_num(self.lmbda)
        lmbda = self.lmbda[:, None]
        tilt = torch.where(lmbda > 0, lmbda * rewards, torch.zeros_like(rewards))
        if blank is not None:  # also without a tilt: there is no image to return
            tilt = torch.where(blank, torch.full_like(tilt, -math.inf), tilt)
        log_g = tilt - self.applied
        self._reweight(log_g)
        self.applied = self.applied + log_g
        return log_g

    def _reweight(self, log_g: Tensor) -> None:
        total = self._log + self._pending + log_g
        top = total.amax(1, keepdim=True)
        dead = torch.isneginf(top)
        shifted = torch.where(dead, torch.zeros_like(total), total - top)
        # Where nothing was weighed, this difference of sums is exactly zero.
        self.log_z = self.log_z + top[:, 0] + shifted.logsumexp(1) - self._log.logsumexp(1)
        self.degenerate |= dead[:, 0]
        self._log = shifted
        self._pending = torch.zeros_like(total)

    def _read(self, rewards: Tensor, blank: Tensor | None = None) -> Tensor:
        rewards = torch.as_tensor(rewards).detach().to("cpu", torch.float64)
        if rewards.shape != self.shape:
            raise UserError(
                f"reward: expected {self.shape} numbers (groups, particles), got shape "
                f"{tuple(rewards.shape)}"
            )
        if torch.isposinf(rewards).any():
            raise UserError(
                "reward: the scorer returned +inf; rewards must be finite, or -inf to reject a "
                "particle"
            )
        missing = torch.isnan(rewards)
        blank = torch.zeros_like(missing) if blank is None else blank
        # A group without images is degenerate, one without scores is an error.
        silent = missing.all(1) & ~blank.any(1)
        if silent.any() and self.unscored == "error":
            group = int(silent.nonzero()[0])
            name = f"group {group}" if self.names is None else f"{self.names[group]!r:.100}"
            raise UserError(
                f"reward: the scorer returned NaN for every particle of {name}; check its "
                "inputs, or return -inf for 'impossible'"
            )
        self.nan_count += int(missing.sum())
        return torch.where(missing, torch.full_like(rewards, -math.inf), rewards)

    def _lowest(self, rewards: Tensor) -> Tensor:
        finite = torch.where(torch.isfinite(rewards), rewards, torch.full_like(rewards, math.inf))
        return torch.nan_to_num(finite.amin(1, keepdim=True), posinf=0.0)

    def _floored(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Return finite rewards, and which groups have at least one finite reward."""
        finite = torch.isfinite(rewards)
        known = torch.nan_to_num(self.lmbda)[:, None]
        gap = torch.where(known > 0, FLOOR_NATS / known.clamp(min=1e-300), torch.zeros_like(known))
        return torch.where(finite, rewards, self._lowest(rewards) - gap), finite.any(1)

    def _lambda(self, rewards: Tensor, alive: Tensor) -> Tensor:
        """Return lmbda (groups,), chosen now where it is open and the rewards differ.

        It is NaN where it stays open.
        """
        if self.ess_target is None:
            return self.lmbda
        spread = rewards.amax(1) - rewards.amin(1)
        now = torch.isnan(self.lmbda) & alive & (spread > 0)
        if now.any():
            highest = torch.where(
                now,
                MAX_CHOSEN_NATS / torch.where(spread > 0, spread, torch.ones_like(spread)),
                spread,
            )
            centred = rewards - rewards.amax(1, keepdim=True)
            exponents = solve_exponent(
                self.log_weights + self._pending, centred, self.ess_target * self.shape[1], highest
            )
            self.lmbda = torch.where(now, exponents, self.lmbda)
        return self.lmbda


def check_options(
    *,
    num_particles: int,
    lmbda: float | Sequence[float] | Tensor | None = None,
    ess_target: float | None = None,
    potential: str = "diff",
    scheme: str = "systematic",
    ess_threshold: float | None = 0.5,
    adaptive_tempering: float | None = None,
    temperatures: Sequence[float] | None = None,
    unscored: str = "error",
) -> None:
    """Check the options of `ParticleWeights`, which explains them.

    Raises:
        ConfigError: names the first option that is out of range.
    """
    if isinstance(num_particles, bool) or not isinstance(num_particles, int) or num_particles < 1:
        raise ConfigError("num_particles", f"expected int >= 1, got {num_particles!r}")
    if (lmbda is None) == (ess_target is None):
        both = "both" if lmbda is not None else "neither"
        raise ConfigError(
            "lmbda",
            f"give lmbda or ess_target, not {both}; lmbda is the tilt, ess_target chooses it",
        )
    if lmbda is not None:
        try:
            values = torch.as_tensor(lmbda, dtype=torch.float64)
        except (TypeError, ValueError):
            raise ConfigError("lmbda", f"expected a number >= 0, got {lmbda!r}") from None
        if values.ndim > 1 or not torch.isfinite(values).all() or (values < 0).any():
            raise ConfigError(
                "lmbda",
                f"expected a finite number >= 0 (or one per group), got {lmbda!r}; negate the "
                "reward to lower it",
            )
    if potential not in POTENTIALS:
        raise ConfigError(
            "potential", f"expected one of {', '.join(POTENTIALS)}, got {potential!r}"
        )
    if unscored not in UNSCORED:
        raise ConfigError("unscored", f"expected one of {', '.join(UNSCORED)}, got {unscored!r}")
    if scheme not in SCHEMES:
        raise ConfigError("scheme", f"expected one of {', '.join(SCHEMES)}, got {scheme!r}")
    if ess_target is not None and not (num_particles > 1 and 1 / num_particles < ess_target < 1):
        raise ConfigError(
            "ess_target",
            f"expected a share of the particles in (1/{num_particles}, 1), got {ess_target!r}",
        )
    if ess_threshold is not None and not 0 <= ess_threshold <= 1:
        raise ConfigError(
            "ess_threshold",
            "expected a share of the particles from 0 to 1 (0 never resamples, 1 almost always, "
            f"null always), got {ess_threshold!r}",
        )
    if adaptive_tempering is not None and not 0 < adaptive_tempering < 1:
        raise ConfigError(
            "adaptive_tempering",
            f"expected a share of the particles in (0, 1), got {adaptive_tempering!r}",
        )
    if temperatures is not None:
        if potential != "tempered":
            raise ConfigError(
                "temperatures", f"only potential='tempered' reads them, got potential={potential!r}"
            )
        if not all(0 <= c <= 1 for c in temperatures):
            raise ConfigError(
                "temperatures", f"expected numbers in [0, 1], got {list(temperatures)!r}"
            )


def _per_group(lmbda: float | Sequence[float] | Tensor | None, groups: int) -> Tensor:
    if lmbda is None:
        return torch.full((groups,), math.nan, dtype=torch.float64)
    values = torch.as_tensor(lmbda, dtype=torch.float64).cpu()
    if values.ndim and values.shape != (groups,):
        raise ConfigError(
            "lmbda", f"expected one number or one per group ({groups}), got {values.numel()}"
        )
    return values.expand(groups).clone()
