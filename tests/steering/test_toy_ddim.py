"""Linear-Gaussian data through the real `DDIMScheduler`, under `smc.run` and under
`FKSteering` on a pipeline."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from toys import Estimate, unbiased

from diffalign.steering.fk_steering import FKSteering
from diffalign.steering.smc import run

pytestmark = pytest.mark.filterwarnings("ignore:.*prompts:UserWarning")
MEAN, VARIANCE = 0.5, 0.64


def scheduler(steps: int) -> DDIMScheduler:
    made = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        set_alpha_to_one=False, clip_sample=False
    )  # fmt: skip
    made.set_timesteps(steps)
    return made


def exact_eps(y: Tensor, bar: Tensor) -> Tensor:
    """E[eps | y] for x0 ~ N(MEAN, VARIANCE)."""
    return (1 - bar).sqrt() / (bar * VARIANCE + 1 - bar) * (y - bar.sqrt() * MEAN)


def terminal_moments(steps: int) -> tuple[float, float]:
    """Mean and variance of the chain's last state: every step is linear in y."""
    made = scheduler(steps)
    mean, variance = 0.0, 1.0
    for t in made.timesteps.tolist():
        a = float(made.alphas_cumprod[t])
        before = t - 1000 // steps
        b = float(made.alphas_cumprod[before] if before >= 0 else made.final_alpha_cumprod)
        noise = (1 - b) / (1 - a) * (1 - a / b)
        slope = math.sqrt(1 - a) / (a * VARIANCE + 1 - a)  # of eps in y
        offset = -slope * math.sqrt(a) * MEAN
        direction = math.sqrt(max(1 - b - noise, 0.0))
        gain = math.sqrt(b / a) * (1 - math.sqrt(1 - a) * slope) + direction * slope
        shift = -math.sqrt(b / a) * math.sqrt(1 - a) * offset + direction * offset
        mean, variance = gain * mean + shift, gain**2 * variance + noise
    return mean, variance


class LinearGaussian:
    """The chain as a particle model; `guidance` > 0 tilts the proposal along the reward
    r(x) = x and returns its log ratio."""

    def __init__(self, steps: int, guidance: float = 0.0, forget: bool = False) -> None:
        self.scheduler = scheduler(steps)
        self.num_steps, self.guidance, self.forget = steps, guidance, forget

    def init(self, groups: int, num_particles: int, generator: Any) -> Tensor:
        return torch.randn(groups, num_particles, generator=generator, dtype=torch.float64)

    def _eps(self, y: Tensor, i: int) -> tuple[Tensor, int]:
        t = int(self.scheduler.timesteps[i])
        return exact_eps(y, self.scheduler.alphas_cumprod[t].double()), t

    def predict_x0(self, y: Tensor, i: int) -> Tensor:
        eps, t = self._eps(y, i)
        bar = self.scheduler.alphas_cumprod[t].double()
        return (y - (1 - bar).sqrt() * eps) / bar.sqrt()

    def propose(self, y: Tensor, i: int, generator: Any) -> Any:
        eps, t = self._eps(y, i)
        moved = self.scheduler.step(
            eps.reshape(-1, 1), t, y.reshape(-1, 1), eta=1.0, generator=generator
        ).prev_sample
        moved = moved.reshape(y.shape)
        if not self.guidance:
            return moved
        before = t - 1000 // self.num_steps
        variance = float(self.scheduler._get_variance(t, before))
        mean = self.scheduler.step(
            eps.reshape(-1, 1),
            t,
            y.reshape(-1, 1),
            eta=1.0,
            variance_noise=torch.zeros(y.numel(), 1).double(),
        )
        z = (moved - mean.prev_sample.reshape(y.shape)) / math.sqrt(variance)
        delta = self.guidance * variance
        ratio = -delta * z / math.sqrt(variance) - delta**2 / (2 * variance)
        return moved + delta, torch.zeros_like(ratio) if self.forget else ratio

    def index(self, y: Tensor, ancestors: Tensor) -> Tensor:
        return y.gather(1, ancestors)

    def final(self, y: Tensor) -> Tensor:
        return y


@pytest.mark.parametrize(
    ("steps", "mean", "variance", "log_z"),
    [
        (10, 0.495279, 0.394698, 0.692628),
        (20, 0.497168, 0.484441, 0.739388),
        (50, 0.497934, 0.561476, 0.778672),
        (100, 0.498141, 0.595353, 0.795818),
    ],
)
def test_closed_form_of_the_chain(steps: int, mean: float, variance: float, log_z: float) -> None:
    found = terminal_moments(steps)
    assert found == pytest.approx((mean, variance), abs=2e-6)
    assert found[0] + found[1] / 2 == pytest.approx(log_z, abs=2e-6)


@pytest.mark.parametrize("scheme", ["systematic", "multinomial"])
def test_the_core_over_ddim(scheme: str) -> None:
    mean, variance = terminal_moments(50)
    z, tilted = math.exp(mean + variance / 2), mean + variance
    result = run(
        LinearGaussian(50),
        lambda x: x,
        groups=50_000,
        num_particles=4,
        lmbda=1.0,
        resample_steps=(10, 20, 30, 40),
        scheme=scheme,
        generator=torch.Generator().manual_seed(1),
    )
    assert unbiased(result, torch.ones_like, z).agrees(1.0)
    assert unbiased(result, lambda x: x, z).agrees(tilted)
    assert unbiased(result, lambda x: (x - tilted).square(), z).agrees(variance)


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0])
def test_a_tilted_proposal_with_its_ratio_is_unbiased(guidance: float) -> None:
    mean, variance = terminal_moments(20)
    z = math.exp(mean + variance / 2)
    result = run(
        LinearGaussian(20, guidance), lambda x: x, groups=30_000, num_particles=4, lmbda=1.0,
        resample_steps=(4, 8, 12, 16),
        generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    assert unbiased(result, torch.ones_like, z).agrees(1.0)
    assert unbiased(result, lambda x: x, z).agrees(mean + variance)


def test_a_tilted_proposal_without_its_ratio_must_fail() -> None:
    mean, variance = terminal_moments(20)
    result = run(
        LinearGaussian(20, 1.0, forget=True), lambda x: x, groups=30_000, num_particles=4,
        lmbda=1.0, resample_steps=(4, 8, 12, 16),
        generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    estimate = unbiased(result, torch.ones_like, math.exp(mean + variance / 2))
    assert estimate.value > 1.2 and not estimate.agrees(1.0, errors=20)


class GaussianPipeline:
    """A pipeline as diffusers writes them, whose images are the latents' numbers."""

    def __init__(self, steps: int = 50) -> None:
        self.scheduler = scheduler(steps)

    def __call__(
        self,
        prompt,
        num_images_per_prompt=1,
        num_inference_steps=50,
        generator=None,
        eta=0.0,
        return_dict=True,
    ):
        self.scheduler.set_timesteps(num_inference_steps)
        y = torch.randn(
            len(prompt) * num_images_per_prompt, 1, generator=generator, dtype=torch.float64
        )
        for t in self.scheduler.timesteps:
            eps = exact_eps(y, self.scheduler.alphas_cumprod[int(t)].double())
            y = self.scheduler.step(eps, t, y, eta=eta, generator=generator, return_dict=False)[0]
        return SimpleNamespace(images=y[:, 0].tolist())


def steer_pipeline(
    groups: int = 20_000,
    lmbda: Any = 1.0,
    k: int = 4,
    seed: int = 4,
    steps: int = 50,
    **options: Any,
):
    options = {
        "resample_steps": (10, 20, 30, 40),
        "intermediate_reward": lambda x0, prompts: x0[:, 0],
    } | options
    steering = FKSteering(
        GaussianPipeline(),
        lambda images, prompts: torch.tensor(images, dtype=torch.float64),
        num_particles=k,
        lmbda=lmbda,
        **options,
    )
    return steering(
        ["x"] * groups,
        generator=torch.Generator().manual_seed(seed),
        num_inference_steps=steps,
        **({} if options.get("kernel") else {"eta": 1.0}),
    )


def estimates(result: Any, z: float) -> tuple[Estimate, Estimate]:
    images = torch.tensor(result.images, dtype=torch.float64)
    scaled = result.log_z.exp() / z
    return Estimate.of(scaled), Estimate.of(scaled * (result.weights * images).sum(1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"potential": "tempered"},
        {"kernel": "ddim"},
        {"scheme": "stratified", "ess_threshold": 1.0},
    ],
)
def test_steering_a_pipeline_is_exact(options: dict[str, Any]) -> None:
    """Patched scheduler, one group per prompt: the whole sampler, not only its core,
    has the tilted law of the chain."""
    mean, variance = terminal_moments(50)
    result = steer_pipeline(**options)
    total, first = estimates(result, math.exp(mean + variance / 2))
    assert total.agrees(1.0)
    assert first.agrees(mean + variance)
    assert (result.num_roots < 4).any()


def test_the_returned_latent_is_scored_and_not_its_prediction() -> None:
    """A last step with fresh noise: log Z of x0hat would be 2.116371, that of the
    returned sample is 2.118820."""
    result = steer_pipeline(200, lmbda=2.0)
    images = torch.tensor(result.images, dtype=torch.float64)
    assert torch.equal(result.rewards, images)
    assert torch.equal(images, result.latents[..., 0])
    torch.testing.assert_close(result.applied, 2.0 * images, rtol=0, atol=1e-12)


def test_lambda_per_prompt() -> None:
    groups = 10_000
    result = steer_pipeline(groups, lmbda=[0.0] * (groups // 2) + [1.0] * (groups // 2))
    mean, variance = terminal_moments(50)
    half = groups // 2
    assert torch.equal(result.log_z[:half], torch.zeros(half).double())
    scaled = result.log_z[half:].exp() / math.exp(mean + variance / 2)
    assert Estimate.of(scaled).agrees(1.0)
