"""Sampling steps' log-probabilities: golden G5 and G14, diffusers' DDIM, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler

from diffalign.likelihood import (
    cps_step,
    dance_sde_step,
    ddim_step,
    ddim_step_log_prob,
    flow_sde_step,
    flow_sde_step_log_prob,
    gaussian_log_prob,
    unscaled_log_prob,
)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
both_precisions = pytest.mark.parametrize("dtype", list(TOLERANCE))


def close(found: torch.Tensor, expected: object, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=dtype), rtol=0, atol=TOLERANCE[dtype]
    )


def g5(
    dtype: torch.dtype, output: list[float], **options: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return ddim_step_log_prob(
        model_output=torch.tensor([output], dtype=dtype),
        sample=torch.tensor([[1.0, -0.5]], dtype=dtype),
        prev_sample=torch.tensor([[1.2, -0.4]], dtype=dtype),
        alpha_bar=0.5,
        alpha_bar_prev=0.6,
        eta=1.0,
        **options,  # type: ignore[arg-type]
    )


@both_precisions
def test_g5_ddim_log_prob(dtype: torch.dtype) -> None:
    log_prob, mean, std = g5(dtype, [0.3, 0.1])
    close(mean, [[1.017985448086, -0.573542446480]], dtype)
    close(std, 0.365148371670, dtype)
    close(log_prob, [-0.030073793881], dtype)
    close(g5(dtype, [0.3, 0.1], reduce="sum")[0], [-0.060147587762], dtype)
    for index, element in enumerate((-0.03572188709, -0.02442570067)):
        part = slice(index, index + 1)
        one = gaussian_log_prob(
            torch.tensor([[1.2, -0.4]], dtype=dtype)[:, part], mean[:, part], std
        )
        close(one, [element], dtype)


@both_precisions
def test_g5_log_ratio_and_d3po_loss(dtype: torch.dtype) -> None:
    policy, policy_mean, std = g5(dtype, [0.3, 0.1])
    reference, reference_mean, _ = g5(dtype, [0.25, 0.15])
    close(reference, [-0.030288639840], dtype)
    close(policy - reference, [0.000214845959], dtype)
    x_prev = torch.tensor([[1.2, -0.4]], dtype=dtype)
    direct = ((x_prev - reference_mean).square() - (x_prev - policy_mean).square()).mean(1) / (
        2 * std.square()
    )
    torch.testing.assert_close(policy - reference, direct, rtol=0, atol=TOLERANCE[dtype])
    ratio = (policy - reference).exp().clamp(0.9, 1.1)
    close(torch.nn.functional.softplus(-0.1 * ratio.log()), [0.693136438320], dtype)


@both_precisions
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_g5_in_every_parameterisation(dtype: torch.dtype, prediction_type: str) -> None:
    """The same network, whatever it outputs."""
    x_t, eps, root = (
        torch.tensor([1.0, -0.5], dtype=torch.float64),
        torch.tensor([0.3, 0.1], dtype=torch.float64),
        math.sqrt(0.5),
    )
    x0 = (x_t - root * eps) / root
    close(x0, [1.114213562373, -0.807106781187], torch.float64)
    output = {"sample": x0, "v_prediction": root * eps - root * x0}[prediction_type]
    log_prob, mean, _ = g5(dtype, output.tolist(), prediction_type=prediction_type)
    close(log_prob, [-0.030073793881], dtype)
    close(mean, [[1.017985448086, -0.573542446480]], dtype)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_is_that_of_diffusers(prediction_type: str, eta: float) -> None:
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        steps_offset=1, prediction_type=prediction_type
    )  # fmt: skip
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(0)
    sample, output, noise = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(3))
    t = int(scheduler.timesteps[4])
    expected = scheduler.step(
        output, t, sample, eta=eta, variance_noise=noise if eta else None
    ).prev_sample
    bar, bar_prev = scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[t - 100]
    mean, std = ddim_step(
        model_output=output,
        sample=sample,
        alpha_bar=bar,
        alpha_bar_prev=bar_prev,
        eta=eta,
        prediction_type=prediction_type,
    )
    torch.testing.assert_close(mean + std * noise, expected, rtol=1e-4, atol=1e-5)


def test_one_step_per_sample() -> None:
    """Coefficients of shape (n,) give what separate calls with scalars give."""
    generator = torch.Generator().manual_seed(0)
    sample, output, prev = (
        torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    bars, previous = torch.tensor([0.5, 0.2]), torch.tensor([0.6, 0.4])
    together = ddim_step_log_prob(
        model_output=output,
        sample=sample,
        prev_sample=prev,
        alpha_bar=bars,
        alpha_bar_prev=previous,
        eta=0.7,
    )[0]
    for i in range(2):
        part = slice(i, i + 1)
        alone = ddim_step_log_prob(
            model_output=output[part],
            sample=sample[part],
            prev_sample=prev[part],
            alpha_bar=float(bars[i]),
            alpha_bar_prev=float(previous[i]),
            eta=0.7,
        )[0]
        torch.testing.assert_close(together[part], alone)


@both_precisions
def test_g14_flow_sde_log_prob(dtype: torch.dtype) -> None:
    log_prob, mean, std = flow_sde_step_log_prob(
        model_output=torch.tensor([[0.2, 0.4]], dtype=dtype),
        sample=torch.tensor([[1.0, -0.5]], dtype=dtype),
        prev_sample=torch.tensor([[0.9, -0.6]], dtype=dtype),
        sigma=0.8,
        sigma_prev=0.7,
        eta=0.7,
    )
    close(std, 0.442718872424, dtype)
    close(mean, [[0.8526, -0.48855]], dtype)
    close(log_prob, [-0.122827231620], dtype)
    for index, element in enumerate((-0.109849753941, -0.135804709298)):
        part = slice(index, index + 1)
        one = gaussian_log_prob(
            torch.tensor([[0.9, -0.6]], dtype=dtype)[:, part], mean[:, part], std
        )
        close(one, [element], dtype)


def test_flow_sde_takes_the_next_sigma_at_one() -> None:
    """In the denominator alone, as Flow-GRPO's code: 1 -> 0.9 at eta 0.7 has a
    diffusion of 2.213594. Earlier versions replaced both."""
    sample, velocity = torch.ones(1, 2, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    for legacy, diffusion in ((False, 2.2135943621), (True, 0.7 * math.sqrt(0.9 / 0.1))):
        mean, std = flow_sde_step(
            model_output=velocity,
            sample=sample,
            sigma=1.0,
            sigma_prev=0.9,
            eta=0.7,
            legacy_first_step=legacy,
        )
        assert torch.isfinite(mean).all()
        assert float(std) == pytest.approx(diffusion * math.sqrt(0.1))
        assert mean[0, 0].item() == pytest.approx(1 - 0.1 * diffusion**2 / 2)


def test_flow_sde_without_noise_is_the_euler_step() -> None:
    sample, velocity = torch.tensor([[1.0, -0.5]]), torch.tensor([[0.2, 0.4]])
    mean, std = flow_sde_step(
        model_output=velocity, sample=sample, sigma=0.8, sigma_prev=0.7, eta=0.0
    )
    torch.testing.assert_close(mean, sample - 0.1 * velocity)
    assert float(std) == 0


@pytest.mark.parametrize(("eta", "alpha_bar_prev"), [(0.0, 0.6), (1e-5, 0.6), (1.0, 0.5)])
def test_deterministic_steps_have_no_density(eta: float, alpha_bar_prev: float) -> None:
    sample = torch.ones(1, 2)
    with pytest.raises(ValueError, match="deterministic"):
        ddim_step_log_prob(
            model_output=sample,
            sample=sample,
            prev_sample=sample,
            alpha_bar=0.5,
            alpha_bar_prev=alpha_bar_prev,
            eta=eta,
        )
    with pytest.raises(ValueError, match="std.*deterministic"):
        gaussian_log_prob(sample, sample, torch.tensor(9.9e-5))


def test_unknown_options_are_refused() -> None:
    sample = torch.ones(1, 2)
    with pytest.raises(ValueError, match="reduce.*'max'"):
        gaussian_log_prob(sample, sample, torch.tensor(1.0), "max")
    with pytest.raises(ValueError, match="prediction_type.*'score'"):
        ddim_step(
            model_output=sample,
            sample=sample,
            alpha_bar=0.5,
            alpha_bar_prev=0.6,
            eta=1.0,
            prediction_type="score",
        )


def test_half_precision_inputs_give_float32_log_probs() -> None:
    half = torch.tensor([[1.0, -0.5]], dtype=torch.bfloat16)
    log_prob, mean, std = ddim_step_log_prob(
        model_output=half, sample=half, prev_sample=half, alpha_bar=0.5, alpha_bar_prev=0.6, eta=1.0
    )
    assert (log_prob.dtype, mean.dtype, std.dtype) == (torch.float32,) * 3
    flow = flow_sde_step_log_prob(
        model_output=half, sample=half, prev_sample=half, sigma=0.8, sigma_prev=0.7, eta=0.7
    )
    assert [value.dtype for value in flow] == [torch.float32] * 3


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_gradient_of_the_ddim_log_prob(prediction_type: str, reduce: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sample, output, prev = (
        torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(3)
    )

    def log_prob(value: torch.Tensor) -> torch.Tensor:
        return ddim_step_log_prob(
            model_output=value,
            sample=sample,
            prev_sample=prev,
            alpha_bar=0.5,
            alpha_bar_prev=0.6,
            eta=0.8,
            prediction_type=prediction_type,
            reduce=reduce,
        )[0]

    assert torch.autograd.gradcheck(log_prob, output.requires_grad_(True))


def test_gradient_of_the_flow_log_prob_and_constant_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    sample, output, prev = (
        torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    sigma, then = torch.tensor([0.8, 1.0]), torch.tensor([0.7, 0.9])

    def log_prob(value: torch.Tensor) -> torch.Tensor:
        return flow_sde_step_log_prob(
            model_output=value,
            sample=sample,
            prev_sample=prev,
            sigma=sigma,
            sigma_prev=then,
            eta=0.7,
        )[0]

    output.requires_grad_(True)
    prev.requires_grad_(True)
    assert torch.autograd.gradcheck(log_prob, output)
    log_prob(output).sum().backward()
    assert (
        prev.grad is None
    )  # x_prev was sampled; differentiating through it would be another estimator


def test_log_prob_is_the_density_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    sample, mean = (
        torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    expected = torch.distributions.Normal(mean, 0.3).log_prob(sample)
    std = torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(gaussian_log_prob(sample, mean, std), expected.mean((1, 2)))
    torch.testing.assert_close(gaussian_log_prob(sample, mean, std, "sum"), expected.sum((1, 2)))


H5B = {"sigma": 0.8, "sigma_prev": 0.7}


def h5b(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        "model_output": torch.tensor([[0.2, 0.4]], dtype=dtype),
        "sample": torch.tensor([[1.0, -0.5]], dtype=dtype),
    }


@both_precisions
def test_h5b_dance_sde(dtype: torch.dtype) -> None:
    mean, std = dance_sde_step(**h5b(dtype), **H5B, eta=0.3)
    close(mean, [[0.97415, -0.5376375]], dtype)
    close(std, 0.094868329805, dtype)
    log_prob = gaussian_log_prob(torch.tensor([[0.9, -0.6]], dtype=dtype), mean, std)
    close(log_prob, [1.175568375778], dtype)
    # With the flow SDE's diffusion at this sigma the steps are the same.
    mean, std = dance_sde_step(**h5b(dtype), **H5B, eta=1.4)
    close(mean, [[0.8526, -0.48855]], dtype)
    close(std, 0.442718872424, dtype)


@both_precisions
def test_h5b_cps(dtype: torch.dtype) -> None:
    mean, std = cps_step(**h5b(dtype), **H5B, eta=0.7)
    close(std, 0.623704566932, dtype)
    close(mean, [[0.582505083810, -0.379473206923]], dtype)
    sample = torch.tensor([[0.9, -0.6]], dtype=dtype)
    close(unscaled_log_prob(sample, mean), [-0.074717544145], dtype)


@both_precisions
def test_h5b_first_step(dtype: torch.dtype) -> None:
    mean, std = flow_sde_step(**h5b(dtype), sigma=1.0, sigma_prev=0.9, eta=0.7)
    close(mean, [[0.735, -0.4175]], dtype)
    close(std, 0.7, dtype)
    log_prob = gaussian_log_prob(torch.tensor([[0.9, -0.6]], dtype=dtype), mean, std)
    close(log_prob, [-0.593146880082], dtype)


def test_every_flow_step_without_noise_is_eulers() -> None:
    values = h5b(torch.float64)
    euler = values["sample"] - 0.1 * values["model_output"]
    for step in (flow_sde_step, dance_sde_step, cps_step):
        mean, std = step(**values, **H5B, eta=0.0)
        torch.testing.assert_close(mean, euler)
        assert float(std.max()) == 0.0


def test_cps_keeps_the_noise_that_the_network_expects() -> None:
    """A sample of noise sigma and signal 1 - sigma has those of sigma_prev after it."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.full((1, 200_000), 2.0, dtype=torch.float64)
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    sample = 0.2 * x0 + 0.8 * noise
    mean, std = cps_step(model_output=noise - x0, sample=sample, **H5B, eta=0.7)
    after = mean + std * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    assert float(after.mean()) == pytest.approx(0.3 * 2.0, abs=5e-3)
    assert float(after.std()) == pytest.approx(0.7, abs=5e-3)
