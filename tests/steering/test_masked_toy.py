"""A masked chain small enough to enumerate, steered through `MaskedDiffusion`; and
uniform diffusion likewise."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import DiscreteDDIMScheduler
from tiers import by_default
from torch import Tensor
from toys import Estimate

from diffalign.steering import particle_weights as weights_module
from diffalign.steering.smc import run
from diffalign.steering.text import MaskedDiffusion, UniformDiffusion

V, L, N, MASK = 3, 4, 8, 3
STRINGS = torch.tensor(list(itertools.product(range(V), repeat=L)))
STATES = torch.tensor(list(itertools.product(range(V + 1), repeat=L)))


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reward(tokens: Tensor) -> Tensor:
    """Number of tokens 2, plus one where first and last are equal."""
    return (tokens == 2).sum(-1).double() + (tokens[..., 0] == tokens[..., -1]).double()


def joint() -> Tensor:
    """p(x) of the 81 strings: equal neighbours are likely, token 2 is rare."""
    energy = (
        0.8 * (STRINGS[:, 1:] == STRINGS[:, :-1]).sum(1).double()
        - 0.6 * (STRINGS == 2).sum(1).double()
    )
    return energy.softmax(0)


def conditionals() -> Tensor:
    """Exact p(x0_l | revealed tokens) for the 256 states, (256, L, V)."""
    p = joint()
    fits = ((STATES[:, None] == STRINGS[None]) | (STATES[:, None] == MASK)).all(-1).double() * p
    onehot = torch.nn.functional.one_hot(STRINGS, V).double()
    return torch.einsum("sx,xlv->slv", fits, onehot) / fits.sum(1)[:, None, None]


TABLE = conditionals()


def number(tokens: Tensor) -> Tensor:
    return (tokens * (V + 1) ** torch.arange(L - 1, -1, -1)).sum(-1)


def denoiser(tokens: Tensor) -> Tensor:
    return torch.cat(
        [TABLE[number(tokens)].log(), torch.full((*tokens.shape, 1), 5.0).double()], -1
    )  # a large logit of the mask: must be ignored


def chain_law() -> Tensor:
    """The law of the sampler over the 256 states, by its transition matrix."""
    law = torch.zeros(len(STATES)).double()
    law[number(torch.full((L,), MASK))] = 1.0
    for i in range(N):
        reveal = 1 / (N - i)
        kernel = torch.ones(len(STATES), len(STATES)).double()
        for position in range(L):
            now, then = STATES[:, position], STATES[:, position]
            masked = (now == MASK)[:, None]
            stays = (then == MASK)[None]
            token = TABLE[:, position][:, then.clamp(max=V - 1)]
            moved = torch.where(stays, torch.tensor(1 - reveal).double(), reveal * token)
            kernel *= torch.where(masked, moved, (now[:, None] == then[None]).double())
        law = law @ kernel
    return law


LAW = chain_law()
CLEAN = (STATES != MASK).all(1)


def tilted(lmbda: float) -> tuple[float, float, Tensor]:
    """(Z, mean reward, law over the states) of the chain's law tilted."""
    weights = LAW * (lmbda * reward(STATES)).exp()
    z = float(weights.sum())
    law = weights / z
    return z, float((law * reward(STATES)).sum()), law


def model(**options) -> MaskedDiffusion:
    return MaskedDiffusion(denoiser, mask_token_id=MASK, length=L, num_steps=N, **options)


def steer(k: int = 4, groups: int = 15_000, seed: int = 0, n: int = 1, **options):
    return run(
        model(num_x0_samples=n),
        reward,
        groups=groups,
        num_particles=k,
        lmbda=0.5,
        resample_steps=range(1, 8),
        generator=gen(seed),
        **options,
    )


def estimates(result, z: float) -> tuple[Estimate, Estimate]:
    scaled = result.log_z.exp() / z
    return Estimate.of(scaled), Estimate.of(scaled * (result.weights * result.rewards).sum(1))


def test_the_enumeration_gives_the_known_numbers() -> None:
    assert float(LAW[~CLEAN].sum()) == 0.0 and float(LAW.sum()) == pytest.approx(1.0)
    p = torch.zeros(len(STATES)).double()
    p[number(STRINGS)] = joint()
    assert float((LAW - p).abs().sum() / 2) == pytest.approx(0.0336, abs=1e-4)
    z, mean, law = tilted(0.5)
    assert (z, math.log(z)) == pytest.approx((1.936080, 0.660665), abs=1e-6)
    assert float((LAW * reward(STATES)).sum()) == pytest.approx(1.070059, abs=1e-6)
    assert mean == pytest.approx(1.628738, abs=1e-6)
    assert float(law[number(torch.full((L,), 2))]) == pytest.approx(0.041135, abs=1e-6)
    assert tilted(1.5)[:2] == pytest.approx((26.967209, 3.735660), abs=1e-5)


@by_default(lambda k, n: (k, n) != (4, 4))
@pytest.mark.parametrize(
    ("k", "n", "options"),
    [
        (1, 1, {}),
        (4, 1, {}),
        (4, 4, {"aggregate": "lme"}),
        (4, 4, {"aggregate": "soft"}),
        (4, 4, {"aggregate": "mean", "ess_threshold": 0.9}),
        (4, 4, {"potential": "max", "ess_threshold": 0.5}),
        (4, 4, {"ess_threshold": None, "scheme": "multinomial"}),
        (4, 2, {"adaptive_tempering": 0.8, "ess_threshold": 0.9}),
        (16, 4, {"groups": 3000}),
    ],
)
def test_unbiased_for_all_draws_and_aggregates(k: int, n: int, options: dict) -> None:
    z, mean, _ = tilted(0.5)
    result = steer(k, n=n, **options)
    total, first = estimates(result, z)
    assert total.agrees(1.0)
    assert first.agrees(mean)


def test_the_weighted_histogram_is_the_tilted_law() -> None:
    z, _, law = tilted(0.5)
    result = steer(groups=40_000, n=2)
    mass = (result.log_z.exp()[:, None] / z * result.weights / len(result.log_z)).flatten()
    histogram = (
        torch.zeros(len(STATES)).double().index_add(0, number(result.particles).flatten(), mass)
    )
    assert float((histogram - law).abs().sum() / 2) < 0.02


def test_more_draws_and_the_soft_aggregate_lower_the_variance() -> None:
    z, _, _ = tilted(0.5)
    spread = {
        key: (steer(n=n, aggregate=key[1]).log_z.exp() / z).std()
        for key, n in (((1, "soft"), 1), ((4, "soft"), 4))
    }
    assert spread[(4, "soft")] < spread[(1, "soft")]


def test_weights_dropped_must_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    original = weights_module.ParticleWeights.resample

    def forgetful(self):
        ancestors = original(self)
        self._log = torch.zeros_like(self._log)
        return ancestors

    monkeypatch.setattr(weights_module.ParticleWeights, "resample", forgetful)
    _, first = estimates(steer(ess_threshold=0.5), tilted(0.5)[0])
    assert not first.agrees(tilted(0.5)[1], errors=6)


def guidance(strength: float, wrong: bool = False):
    """Extra logits towards token 2."""

    def extra(tokens: Tensor, log_probs: Tensor, i: int) -> Tensor:
        return torch.tensor([0.0, 0.0, strength, 0.0]).double().expand_as(log_probs)

    return extra


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_guided_proposals_are_unbiased(strength: float) -> None:
    z, mean, _ = tilted(0.5)
    result = run(
        model(guidance=guidance(strength)),
        reward,
        groups=15_000,
        num_particles=4,
        lmbda=0.5,
        resample_steps=range(1, 8),
        generator=gen(1),
    )
    total, first = estimates(result, z)
    assert total.agrees(1.0) and first.agrees(mean)


def test_a_guided_proposal_without_its_ratio_must_fail() -> None:
    class Forgetful(MaskedDiffusion):
        def propose(self, state, i, generator):
            return super().propose(state, i, generator)[0]

    forgetful = Forgetful(
        denoiser, mask_token_id=MASK, length=L, num_steps=N, guidance=guidance(0.5)
    )
    result = run(
        forgetful,
        reward,
        groups=15_000,
        num_particles=4,
        lmbda=0.5,
        resample_steps=range(1, 8),
        generator=gen(1),
    )
    total, _ = estimates(result, tilted(0.5)[0])
    assert total.value > 1.1 and not total.agrees(1.0, errors=10)


# Uniform corruption through diffusers' scheduler

UV, UL, UN = 3, 2, 4
USTATES = torch.tensor(list(itertools.product(range(UV), repeat=UL)))
ULOGITS = torch.randn(UV**UL, UL, UV, generator=gen(3)).double()


def uniform_number(tokens: Tensor) -> Tensor:
    return (tokens * UV ** torch.arange(UL - 1, -1, -1)).sum(-1)


def uniform_law() -> Tensor:
    """Enumerates the scheduler's kernel: draw x0, then go to it, stay, or jump at
    random, independently per position."""
    law = torch.full((UV**UL,), 1 / UV**UL).double()
    probabilities = ULOGITS.softmax(-1)
    for i in range(UN):
        alpha_t, alpha_s = i / UN, (i + 1) / UN
        survival = alpha_t / alpha_s
        kernel = torch.ones(UV**UL, UV**UL).double()
        for position in range(UL):
            one = torch.zeros(UV**UL, UV).double()
            for state, x0 in itertools.product(range(UV**UL), range(UV)):
                now = int(USTATES[state, position])
                clean = alpha_s * (1 - survival) / UV + survival * alpha_s * (now == x0)
                stay, jump = survival * (1 - alpha_s) / UV, (1 - survival) * (1 - alpha_s) / UV
                routes = torch.zeros(UV).double()
                routes[x0] += clean
                routes[now] += stay
                routes += jump / UV
                one[state] += probabilities[state, position, x0] * routes / (clean + stay + jump)
            kernel *= one[:, USTATES[:, position]]
        law = law @ kernel
    return law


def uniform_reward(tokens: Tensor) -> Tensor:
    return (tokens == 2).sum(-1).double()


@pytest.mark.parametrize("n", [1, 3])
def test_uniform_diffusion_is_unbiased(n: int) -> None:
    law = uniform_law()
    assert float(law.sum()) == pytest.approx(1.0)
    sampler = UniformDiffusion(
        lambda tokens: ULOGITS[uniform_number(tokens)],
        DiscreteDDIMScheduler(),
        vocab_size=UV,
        length=UL,
        num_steps=UN,
        num_x0_samples=n,
    )
    weights = law * (0.8 * uniform_reward(USTATES)).exp()
    z, mean = float(weights.sum()), float((weights / weights.sum() * uniform_reward(USTATES)).sum())
    result = run(
        sampler,
        uniform_reward,
        groups=20_000,
        num_particles=4,
        lmbda=0.8,
        resample_steps=(1, 2, 3),
        ess_threshold=0.9,
        generator=gen(2),
    )
    total, first = estimates(result, z)
    assert total.agrees(1.0) and first.agrees(mean)
    assert result.resampled.any()


def test_corrector_sweeps_are_part_of_the_sampler() -> None:
    scheduler = DiscreteDDIMScheduler(
        corrector_steps=2, corrector_k=1, corrector_selection="random"
    )
    sampler = UniformDiffusion(
        lambda tokens: ULOGITS[uniform_number(tokens)],
        scheduler,
        vocab_size=UV,
        length=UL,
        num_steps=UN,
    )
    plain = run(sampler, uniform_reward, groups=200, num_particles=4, lmbda=0.0, generator=gen(2))
    assert sampler.network_rows == 800 * (UN + 2 * (UN - 1))
    again = run(sampler, uniform_reward, groups=200, num_particles=4, lmbda=0.0, generator=gen(2))
    assert torch.equal(plain.particles, again.particles)
