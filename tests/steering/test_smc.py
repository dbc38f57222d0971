"""Resampling vectors and variances, closed potentials and weights, invariances."""

from __future__ import annotations

import math

import pytest
import torch
from toys import Mixture

from diffalign.errors import ConfigError, UserError
from diffalign.steering.schedule import check_schedule, schedule
from diffalign.steering.smc import (
    POTENTIALS,
    SCHEMES,
    ParticleWeights,
    aggregate,
    ess,
    log_potential,
    resample,
    run,
)

W = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("u", "ancestors"),
    [
        (0.0, [0, 0, 1, 1]),
        (0.1, [0, 0, 1, 1]),
        (0.5, [0, 0, 1, 2]),
        (0.9, [0, 0, 1, 3]),
        (0.999, [0, 0, 1, 3]),
    ],
)
def test_systematic_vectors(u: float, ancestors: list[int]) -> None:
    assert resample(W, "systematic", uniforms=torch.tensor([u])).tolist() == [ancestors]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zero_weights_are_never_picked(scheme: str) -> None:
    weights = torch.tensor([[0.0, 0.6, 0.4, 0.0]], dtype=torch.float64)
    count = 1 if scheme == "systematic" else 4
    for u in (0.0, 0.25, 0.6, 1 - 2**-53):
        assert set(
            resample(weights, scheme, uniforms=torch.full((1, count), u, dtype=torch.float64))
            .flatten()
            .tolist()
        ) <= {
            1,
            2,
        }


@pytest.mark.parametrize(
    ("scheme", "variances"),
    [
        ("multinomial", [1.0, 0.84, 0.51, 0.19]),
        ("systematic", [0.0, 0.16, 0.24, 0.16]),
        ("stratified", [0.0, 0.16, 0.24, 0.16]),
        ("residual", [0.0, 0.16, 0.24, 0.16]),
    ],
)
def test_counts_are_unbiased_with_known_variances(scheme: str, variances: list[float]) -> None:
    draws = 100_000
    picks = resample(W.expand(draws, 4), scheme, generator=gen(0))
    counts = torch.nn.functional.one_hot(picks, 4).sum(1).double()
    expected = torch.tensor(variances, dtype=torch.float64)
    assert torch.all((counts.mean(0) - 4 * W[0]).abs() <= 4 * (expected / draws).sqrt() + 1e-12)
    # the fourth moment of counts in {0..4} bounds the error of a variance by
    # 4 / sqrt(draws) per standard error
    assert torch.all((counts.var(0) - expected).abs() < 4 * 2.0 / math.sqrt(draws))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7])
def test_flat_weights_are_the_identity_for_low_variance_schemes(k: int) -> None:
    flat = torch.full((50, k), 1 / k)
    own = torch.arange(k).expand(50, k)
    for scheme in ("systematic", "stratified", "residual"):
        assert torch.equal(resample(flat, scheme, generator=gen(3)), own)


def test_indices_are_a_function_of_weights_and_generator_state() -> None:
    weights = torch.rand(6, 5, generator=gen(1))
    for scheme in SCHEMES:
        assert torch.equal(
            resample(weights, scheme, generator=gen(2)), resample(weights, scheme, generator=gen(2))
        )
        each = resample(weights, scheme, generator=[gen(10 + g) for g in range(6)])
        alone = [resample(weights[g : g + 1], scheme, generator=gen(10 + g)) for g in range(6)]
        assert torch.equal(each, torch.cat(alone))


def test_bad_weights_are_refused() -> None:
    for weights in ([[0.5, -0.1]], [[0.0, 0.0]], [[math.nan, 1.0]], [[math.inf, 1.0]]):
        with pytest.raises(ConfigError, match="weights"):
            resample(torch.tensor(weights))
    with pytest.raises(ConfigError, match="scheme: expected one of"):
        resample(W, "bootstrap")
    with pytest.raises(ConfigError, match="uniforms"):
        resample(W, "stratified", uniforms=torch.tensor([0.5]))
    with pytest.raises(ConfigError, match="one per group"):
        resample(W, generator=[gen(0), gen(1)])


def test_effective_sample_size() -> None:
    assert ess(torch.zeros(2, 4)).tolist() == pytest.approx([4.0, 4.0])
    assert float(ess(W.log())[0]) == pytest.approx(1 / float(W.square().sum()))
    assert ess(torch.tensor([[-math.inf, 0.0]])).item() == 1.0
    assert ess(torch.full((1, 3), -math.inf)).item() == pytest.approx(3.0)


def test_schedules() -> None:
    assert schedule(None, 30) == [6, 10, 15, 19, 24]
    assert schedule((0.2, 0.2, 5, 0.0), 10) == [0, 2, 5]
    assert schedule((), 10) == []
    assert schedule((0.99,), 2) == [1]
    with pytest.raises(ConfigError, match=r"resample_steps: 10 lies outside the run of 10 steps"):
        schedule((10,), 10)
    for bad in ((-1,), (1.0,), (math.nan,), ("3",), 5, "3", (True,)):
        with pytest.raises(ConfigError, match="resample_steps"):
            check_schedule(bad)  # type: ignore[arg-type]


def test_potentials_in_closed_form() -> None:
    first, second = torch.tensor([[1.0, -2.0]]).double(), torch.tensor([[0.5, 3.0]]).double()
    lmbda = torch.tensor([[2.0]]).double()
    expected = {
        "diff": ([[2.0, -4.0]], [[-1.0, 10.0]]),
        "max": ([[2.0, -4.0]], [[2.0, 6.0]]),
        "sum": ([[2.0, -4.0]], [[3.0, 2.0]]),
        "rt": ([[2.0, -4.0]], [[1.0, 6.0]]),
        "max_inc": ([[2.0, -4.0]], [[0.0, 10.0]]),
    }
    for kind, steps in expected.items():
        weights = ParticleWeights(1, 2, lmbda=2.0, potential=kind)
        assert weights.update(first).tolist() == steps[0]
        assert weights.update(second).tolist() == steps[1]
    log_g, state = log_potential("tempered", first, torch.zeros(1, 2).double(), lmbda, 0.25)
    assert log_g.tolist() == [[0.5, -1.0]]
    assert log_potential("tempered", second, state, lmbda, 1.0)[0].tolist() == [[0.5, 7.0]]
    with pytest.raises(ConfigError, match="potential: expected one of"):
        log_potential("min", first, state, lmbda)


def steered(function=lambda x: x, groups: int = 40, **options):
    options = {
        "lmbda": 0.7,
        "num_particles": 4,
        "resample_steps": (2, 6, 10, 14),
        "ess_threshold": 0.9,
    } | options
    return run(
        Mixture(), function, groups=groups, generator=gen(5), resample_generator=gen(6), **options
    )


@pytest.mark.parametrize("potential", POTENTIALS)
def test_product_identity(potential: str) -> None:
    """Along every surviving lineage the potentials multiply to exp(lambda r): from the
    ancestor log, not from the running sum."""
    result = steered(potential=potential)
    slots = torch.arange(4).expand(40, 4)
    total = torch.zeros(40, 4).double()
    for j in reversed(range(len(result.steps))):
        slots = result.ancestors[j].gather(1, slots)
        total += result.log_potentials[j].gather(1, slots)
    assert torch.equal(slots, result.roots)
    terminal = 0.7 * result.rewards - total
    torch.testing.assert_close(total + terminal, result.applied, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.applied, 0.7 * result.rewards, rtol=0, atol=1e-12)
    if potential == "diff":
        slots, recomputed = torch.arange(4).expand(40, 4), torch.zeros(40, 4).double()
        for j in reversed(range(len(result.steps))):
            slots = result.ancestors[j].gather(1, slots)
            before = (
                result.step_rewards[j - 1].gather(1, result.ancestors[j - 1].gather(1, slots))
                if j
                else torch.zeros(40, 4).double()
            )
            recomputed += 0.7 * (result.step_rewards[j].gather(1, slots) - before)
        torch.testing.assert_close(recomputed, total, rtol=0, atol=1e-12)


@pytest.mark.parametrize("potential", POTENTIALS)
def test_shift_of_the_reward_changes_only_log_z(potential: str) -> None:
    plain, shifted = steered(potential=potential), steered(lambda x: x - 10.0, potential=potential)
    assert torch.equal(plain.ancestors, shifted.ancestors)
    assert torch.equal(plain.particles, shifted.particles)
    torch.testing.assert_close(plain.log_weights, shifted.log_weights, rtol=0, atol=1e-9)
    torch.testing.assert_close(plain.log_z - 7.0, shifted.log_z, rtol=0, atol=1e-9)


@pytest.mark.parametrize("potential", POTENTIALS)
def test_scale_moves_between_lambda_and_reward(potential: str) -> None:
    plain, scaled = (
        steered(potential=potential),
        steered(lambda x: 2 * x, lmbda=0.35, potential=potential),
    )
    assert torch.equal(plain.ancestors, scaled.ancestors)
    torch.testing.assert_close(plain.log_z, scaled.log_z, rtol=0, atol=1e-12)


def test_a_group_does_not_depend_on_its_neighbours() -> None:
    rewards = torch.randn(3, 5, 4, generator=gen(9)).double()

    def weigh(order: list[int]):
        weights = ParticleWeights(
            len(order), 4, lmbda=2.0, ess_threshold=0.8, generator=[gen(g) for g in order]
        )
        drawn = []
        for step in rewards[:2]:
            weights.update(step[order])
            drawn.append(weights.resample())
        weights.finish(rewards[2][order])
        return weights, drawn

    straight, _ = weigh([0, 1, 2, 3, 4])
    turned, _ = weigh([3, 0, 4])
    for name in ("log_weights", "log_z"):
        torch.testing.assert_close(
            getattr(straight, name)[[3, 0, 4]], getattr(turned, name), rtol=0, atol=1e-12
        )
    assert torch.equal(straight.roots[[3, 0, 4]], turned.roots)


def test_lambda_per_group_equals_separate_runs() -> None:
    rewards = torch.randn(3, 2, 4, generator=gen(9)).double()

    def weigh(lmbda, groups):
        weights = ParticleWeights(len(groups), 4, lmbda=lmbda, generator=[gen(g) for g in groups])
        for step in rewards[:2]:
            weights.update(step[groups])
            weights.resample()
        weights.finish(rewards[2][groups])
        return weights.log_z

    both = weigh([0.5, 3.0], [0, 1])
    torch.testing.assert_close(
        both, torch.cat([weigh(0.5, [0]), weigh(3.0, [1])]), rtol=0, atol=1e-12
    )


def test_lambda_zero_keeps_everybody() -> None:
    for scheme in SCHEMES:
        result = steered(lmbda=0.0, scheme=scheme, ess_threshold=None)
        assert not result.resampled.any()
        assert torch.equal(result.log_z, torch.zeros(40).double())
        torch.testing.assert_close(
            result.weights, torch.full((40, 4), 0.25).double(), rtol=0, atol=1e-15
        )
    for k in range(2, 20):  # to the last bit for any k
        assert torch.equal(
            steered(lmbda=0.0, num_particles=k, groups=3).log_z, torch.zeros(3).double()
        )


def test_one_particle_is_weighed_exactly() -> None:
    for potential in POTENTIALS:
        result = steered(num_particles=1, potential=potential)
        torch.testing.assert_close(result.log_z, 0.7 * result.rewards[:, 0], rtol=0, atol=1e-12)


def test_same_generators_same_run_and_noise_is_not_touched_by_resampling() -> None:
    first, again = steered(), steered()
    assert torch.equal(first.particles, again.particles) and torch.equal(
        first.ancestors, again.ancestors
    )
    noise: dict[int, list[torch.Tensor]] = {}
    for seed in (6, 7):
        model, noise[seed] = Mixture(), []
        propose = model.propose
        model.propose = lambda y, i, g, propose=propose, seed=seed: (
            noise[seed].append(g.get_state()) or propose(y, i, g)
        )  # type: ignore[method-assign]
        run(
            model,
            lambda x: x,
            groups=40,
            num_particles=4,
            lmbda=2.0,
            generator=gen(5),
            resample_generator=gen(seed),
        )
    assert all(torch.equal(a, b) for a, b in zip(noise[6], noise[7], strict=True))


def test_the_resampling_stream_is_derived_without_advancing_the_noise() -> None:
    generator, untouched = gen(5), gen(5)
    model = Mixture(4)
    start = model.init(3, 4, untouched)
    seen = []
    model.init = lambda *a: seen.append(Mixture(4).init(*a)) or seen[-1]  # type: ignore[method-assign]
    run(model, lambda x: x, groups=3, num_particles=4, lmbda=1.0, generator=generator)
    assert torch.equal(seen[0], start)


def test_states_that_are_tuples_are_no_log_ratios() -> None:
    class Pairs(Mixture):
        def init(self, groups, k, generator):
            return super().init(groups, k, generator), torch.zeros(groups, k)

        def predict_x0(self, state, i):
            return super().predict_x0(state[0], i)

        def propose(self, state, i, generator):
            return super().propose(state[0], i, generator), state[1] + 1

        def index(self, state, ancestors):
            return tuple(part.gather(1, ancestors) for part in state)

        def final(self, state):
            assert (state[1] == self.num_steps).all()
            return state[0]

    class Tilted(Pairs):
        def propose(self, state, i, generator):
            return super().propose(state, i, generator), torch.zeros(40, 4)

    def of(model):
        return run(
            model,
            lambda x: x,
            groups=40,
            num_particles=4,
            lmbda=0.7,
            generator=gen(5),
            resample_generator=gen(6),
        )

    plain, pairs, tilted = of(Mixture()), of(Pairs()), of(Tilted())
    assert torch.equal(plain.particles, pairs.particles) and torch.equal(plain.log_z, pairs.log_z)
    assert torch.equal(plain.particles, tilted.particles) and torch.equal(plain.log_z, tilted.log_z)


def test_missing_and_impossible_rewards() -> None:
    weights = ParticleWeights(2, 3, lmbda=2.0)
    weights.update(torch.tensor([[math.nan, 1.0, 2.0], [-math.inf, 0.0, 0.0]]))
    assert weights.nan_count == 1
    assert weights.log_weights[0].isfinite().all()  # an estimate of -inf must not remove support
    assert float(weights.applied[0, 0]) == pytest.approx(2.0 * 1.0 - 10.0)
    weights.finish(torch.tensor([[-math.inf, 1.0, 2.0], [-math.inf] * 3]))
    assert weights.weights[0, 0] == 0 and weights.degenerate.tolist() == [False, True]
    assert weights.log_z[1] == -math.inf and torch.allclose(
        weights.weights[1], torch.full((3,), 1 / 3).double()
    )
    for bad, words in ((math.inf, r"\+inf"), (math.nan, "NaN for every particle of group 0")):
        with pytest.raises(UserError, match=words):
            ParticleWeights(1, 2, lmbda=1.0).update(torch.full((1, 2), bad))
        with pytest.raises(UserError, match=words):
            ParticleWeights(1, 2, lmbda=1.0).finish(torch.full((1, 2), bad))
    with pytest.raises(UserError, match=r"expected \(1, 2\) numbers"):
        ParticleWeights(1, 2, lmbda=1.0).update(torch.zeros(2, 1))


def test_a_group_of_impossible_intermediate_rewards_is_left_alone() -> None:
    for potential in POTENTIALS:
        options = {"temperatures": [0.5, 1.0]} if potential == "tempered" else {}
        weights = ParticleWeights(1, 2, lmbda=2.0, potential=potential, **options)
        weights.update(torch.full((1, 2), -math.inf))
        assert weights.applied.tolist() == [[0.0, 0.0]] and weights.log_z.tolist() == [0.0]
        weights.update(torch.tensor([[0.0, 1.0]]))
        weights.finish(torch.tensor([[0.0, 1.0]]))
        assert float(weights.log_z[0]) == pytest.approx(math.log((1 + math.exp(2.0)) / 2))


def test_huge_log_weights_do_not_overflow() -> None:
    weights = ParticleWeights(1, 3, lmbda=1e4, potential="sum")
    for _ in range(5):
        weights.update(torch.tensor([[10.0, 9.0, 8.0]]))
    weights.finish(torch.tensor([[10.0, 9.0, 8.0]]))
    assert float(weights.log_z[0]) == pytest.approx(1e5 - math.log(3), rel=1e-12)


def test_ess_target_chooses_lambda_at_the_first_difference() -> None:
    weights = ParticleWeights(3, 4, ess_target=0.5)
    flat, spread = [0.3] * 4, [0.0, 1.0, 2.0, 4.0]
    weights.update(torch.tensor([flat, spread, flat]))
    assert weights.lmbda.isnan().tolist() == [True, False, True]
    assert float(ess(weights.log_weights)[1]) == pytest.approx(2.0, abs=1e-6)
    assert weights.applied[0].tolist() == [0.0] * 4
    chosen = float(weights.lmbda[1])
    weights.update(torch.tensor([spread, flat, flat]))
    assert float(weights.lmbda[1]) == chosen and float(weights.lmbda[0]) == pytest.approx(chosen)
    weights.finish(torch.tensor([spread, spread, flat]))
    assert weights.lmbda[2] == 0.0
    torch.testing.assert_close(
        weights.applied, weights.lmbda[:, None] * torch.tensor([spread, spread, flat]).double()
    )


def test_ess_target_is_invariant_and_bounded() -> None:
    rewards = torch.tensor([[0.0, 1.0, 1.0, 1.0]])  # no lambda brings ESS under 3
    weights = ParticleWeights(1, 4, ess_target=0.5)
    weights.update(rewards)
    assert float(weights.lmbda[0]) == 10.0
    small = ParticleWeights(1, 4, ess_target=0.5)
    small.update(torch.tensor([[0.0, 1e-3, 2e-3, 4e-3]]) + 7)
    big = ParticleWeights(1, 4, ess_target=0.5)
    big.update(torch.tensor([[0.0, 1.0, 2.0, 4.0]]))
    assert float(small.lmbda[0]) == pytest.approx(1e3 * float(big.lmbda[0]), rel=1e-3)


def test_adaptive_tempering_holds_the_effective_sample_size() -> None:
    rewards = torch.randn(20, 4, generator=gen(1)).double() * 10
    for potential in POTENTIALS:
        options = {"temperatures": [1.0]} if potential == "tempered" else {}
        weights = ParticleWeights(
            20, 4, lmbda=1.0, potential=potential, adaptive_tempering=0.6, **options
        )
        weights.update(rewards)
        assert (ess(weights.log_weights) >= 0.6 * 4 - 1e-6).all()
        weights.finish(rewards)
        torch.testing.assert_close(weights.applied, rewards, rtol=0, atol=1e-10)


def test_aggregates() -> None:
    draws = torch.tensor([[[0.0, 2.0], [1.0, math.nan]]]).double()
    assert aggregate(draws, "mean", 3.0).tolist() == [[1.0, 1.0]]
    assert aggregate(draws, "lme", 3.0)[0, 0] == pytest.approx(math.log((1 + math.exp(2)) / 2))
    assert aggregate(draws, "soft", 3.0)[0, 0] == pytest.approx(math.log((1 + math.exp(6)) / 2) / 3)
    assert aggregate(draws, "soft", 3.0)[0, 1] == pytest.approx(1.0)
    assert aggregate(draws, "soft", 0.0).tolist() == [[1.0, 1.0]]
    assert aggregate(torch.full((1, 1, 2), math.nan), "soft", 1.0).isnan().all()
    with pytest.raises(ConfigError, match="aggregate: expected one of"):
        aggregate(draws, "median", 1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lmbda": -1.0}, "lmbda: expected a finite number >= 0"),
        ({"lmbda": math.nan}, "lmbda: expected a finite number >= 0"),
        ({"lmbda": [1.0, 2.0, 3.0]}, "one per group"),
        ({"lmbda": "five"}, "lmbda: expected a number"),
        ({"lmbda": 1.0, "ess_target": 0.5}, "not both"),
        ({}, "not neither"),
        ({"ess_target": 0.1}, r"ess_target: expected a share of the particles in \(1/4, 1\)"),
        ({"lmbda": 1.0, "potential": "difference"}, "potential: expected one of diff"),
        ({"lmbda": 1.0, "scheme": "ssp"}, "scheme: expected one of systematic"),
        ({"lmbda": 1.0, "ess_threshold": -0.5}, "ess_threshold"),
        ({"lmbda": 1.0, "adaptive_tempering": 1.5}, "adaptive_tempering"),
        ({"lmbda": 1.0, "temperatures": [0.5]}, "only potential='tempered'"),
        ({"lmbda": 1.0, "potential": "tempered", "temperatures": [2.0]}, r"in \[0, 1\]"),
        ({"lmbda": 1.0, "num_particles": 0}, "num_particles: expected int >= 1"),
        ({"lmbda": 1.0, "aggregate": "max"}, "aggregate: expected one of"),
        ({"lmbda": 1.0, "resample_steps": (20,)}, "lies outside the run"),
    ],
)
def test_bad_options_are_one_sentence(options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        run(
            Mixture(),
            lambda x: x,
            **{"groups": 2, "num_particles": 4, "generator": gen(0)} | options,
        )
    assert "\n" not in str(caught.value)
