"""A Gaussian mixture with exact kernels, tilted in closed form; and the controls that
must fail."""

from __future__ import annotations

import math

import pytest
import torch
from tiers import by_default
from toys import Estimate, Mixture, mixture_moments, unbiased

from diffalign.steering import particle_weights as weights_module
from diffalign.steering.smc import run

SIX, THREE = (2, 5, 8, 11, 14, 17), (5, 10, 15)


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def steer(lmbda: float, steps, groups: int = 50_000, k: int = 4, seed: int = 0, **options):
    return run(
        Mixture(),
        lambda x: x,
        groups=groups,
        num_particles=k,
        lmbda=lmbda,
        resample_steps=steps,
        generator=gen(seed),
        **options,
    )


@pytest.mark.parametrize(
    ("lmbda", "z", "mean"),
    [
        (0.1, 0.979293, 0.095189),
        (0.2, 1.020952, 0.740508),
        (0.5, 1.652876, 2.321280),
        (1.0, 6.935317, 3.172607),
    ],
)
def test_closed_form(lmbda: float, z: float, mean: float) -> None:
    assert mixture_moments(lmbda) == pytest.approx((z, mean), abs=1e-6)


@by_default(lambda k: k in (1, 4))
@pytest.mark.parametrize(
    ("k", "groups", "spread"),
    [(1, 100_000, 1.241), (2, 50_000, 0.877), (4, 50_000, 0.631), (16, 20_000, 0.318)],
)
def test_unbiased_for_every_population_size(k: int, groups: int, spread: float) -> None:
    z, mean = mixture_moments(0.5)
    result = steer(0.5, SIX, groups, k)
    estimate = unbiased(result, torch.ones_like, z)
    assert estimate.agrees(1.0)
    assert unbiased(result, lambda x: x, z).agrees(mean)
    assert estimate.error * math.sqrt(groups) == pytest.approx(spread, rel=0.03)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("k", "groups", "spread"),
    [
        (1, 800_000, 1.241),
        (2, 400_000, 0.877),
        (4, 2_400_000, 0.631),
        (8, 100_000, 0.448),
        (16, 600_000, 0.318),
        (64, 4000, 0.161),
        (1000, 50, 0.040),
    ],
)
def test_the_full_table_of_sizes(k: int, groups: int, spread: float) -> None:
    """The full table of population sizes, in parts that fit into memory."""
    z, mean = mixture_moments(0.5)
    part = min(groups, 200_000 // max(1, k // 4))
    totals, firsts = [], []
    for seed in range(groups // part):
        result = steer(0.5, SIX, part, k, seed)
        totals.append(result.log_z.exp() / z)
        firsts.append(totals[-1] * (result.weights * result.particles).sum(1))
    assert Estimate.of(torch.cat(totals)).agrees(1.0)
    assert Estimate.of(torch.cat(firsts)).agrees(mean)
    assert float(torch.cat(totals).std()) == pytest.approx(
        spread, rel=0.03 if groups > 1000 else 0.35
    )


@by_default()
@pytest.mark.parametrize("potential", ["diff", "max", "sum", "rt", "max_inc", "tempered"])
@pytest.mark.parametrize("threshold", [0.5, None])
def test_all_potentials_share_one_target(potential: str, threshold: float | None) -> None:
    z, mean = mixture_moments(0.1)
    result = steer(0.1, THREE, potential=potential, ess_threshold=threshold)
    assert unbiased(result, torch.ones_like, z).agrees(1.0)
    assert unbiased(result, lambda x: x, z).agrees(mean)


@pytest.mark.parametrize("scheme", ["systematic", "stratified", "residual", "multinomial"])
def test_all_schemes_when_always_resampling(scheme: str) -> None:
    z, mean = mixture_moments(0.5)
    result = steer(0.5, SIX, scheme=scheme, ess_threshold=1.0)
    assert unbiased(result, torch.ones_like, z).agrees(1.0)
    assert unbiased(result, lambda x: x, z).agrees(mean)


@by_default(values=1)
@pytest.mark.parametrize(
    ("potential", "target", "threshold", "lmbda"),
    [
        ("max", 0.6, 0.5, 0.5),
        ("sum", 0.7, 0.5, 0.5),
        ("diff", 0.4, 0.5, 0.5),
        ("rt", 0.9, 1.0, 0.1),
    ],
)
def test_adaptive_tempering_is_unbiased(
    potential: str, target: float, threshold: float, lmbda: float
) -> None:
    z, mean = mixture_moments(lmbda)
    result = steer(
        lmbda, SIX, potential=potential, adaptive_tempering=target, ess_threshold=threshold
    )
    assert unbiased(result, torch.ones_like, z).agrees(1.0)
    assert unbiased(result, lambda x: x, z).agrees(mean)


@pytest.mark.parametrize("potential", ["diff", "max", "sum", "rt"])
def test_large_populations_agree_on_the_tilted_mean(potential: str) -> None:
    _, mean = mixture_moments(0.2)
    result = steer(0.2, THREE, groups=20, k=5000, potential=potential)
    assert Estimate.of((result.weights * result.particles).sum(1)).agrees(mean)


def test_a_floor_under_intermediate_rewards_does_not_move_the_target() -> None:
    """Noisy or clipped intermediate rewards change variance only: the terminal weight
    closes the product."""
    z, mean = mixture_moments(0.5)
    noise = gen(77)

    class Clipped(Mixture):
        def predict_x0(self, y, i):
            return super().predict_x0(y, i).clamp(min=-1.0) + 0.3 * torch.randn(
                y.shape, generator=noise, dtype=y.dtype
            )

    result = run(
        Clipped(),
        lambda x: x,
        groups=50_000,
        num_particles=4,
        lmbda=0.5,
        resample_steps=SIX,
        generator=gen(3),
    )
    assert unbiased(result, torch.ones_like, z).agrees(1.0)
    assert unbiased(result, lambda x: x, z).agrees(mean)


def test_weights_dropped_when_not_resampling_must_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published code's fault: a step without resampling throws its weights away."""
    original = weights_module.ParticleWeights.resample

    def forgetful(self):
        ancestors = original(self)
        self._log = torch.zeros_like(self._log)
        return ancestors

    monkeypatch.setattr(weights_module.ParticleWeights, "resample", forgetful)
    z, mean = mixture_moments(0.5)
    result = steer(0.5, SIX)
    assert not unbiased(result, lambda x: x, z).agrees(mean, errors=10)
    assert unbiased(result, lambda x: x, z).value == pytest.approx(0.775, abs=0.1)


def test_ess_target_gives_the_law_of_the_lambda_it_chose() -> None:
    """With many particles the chosen lambda hardly varies, and the weighted population
    follows it."""
    result = run(
        Mixture(),
        lambda x: x,
        groups=40,
        num_particles=4000,
        ess_target=0.5,
        resample_steps=THREE,
        generator=gen(1),
    )
    expected = torch.tensor([mixture_moments(float(value))[1] for value in result.lmbda])
    assert Estimate.of((result.weights * result.particles).sum(1) - expected).agrees(0.0)


def test_roots_predicted_from_the_stored_weights() -> None:
    """Replaying the scheme on the stored weights gives the observed number of roots."""
    from diffalign.steering.smc import resample

    groups = 4000
    result = steer(1.0, (10,), groups=groups, ess_threshold=1.0)
    log_weights = result.log_potentials[0].log_softmax(1)
    replayed = resample(log_weights.exp(), "systematic", generator=gen(99))
    expected = Estimate.of(torch.tensor([len(set(row)) for row in replayed.tolist()]).double())
    observed = Estimate.of(result.num_roots.double())
    assert abs(expected.value - observed.value) < 4 * math.hypot(expected.error, observed.error)
