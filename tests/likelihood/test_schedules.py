"""Noising processes and times against golden values, diffusers and closed forms."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffalign.likelihood import (
    RectifiedFlow,
    VariancePreserving,
    min_snr_weight,
    refiner_timesteps,
    sample_times,
    schedule_from_scheduler,
    turbo_timesteps,
    with_zero_terminal_snr,
)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
both_precisions = pytest.mark.parametrize("dtype", list(TOLERANCE))
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
    )


def samples(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 5, 5, generator=generator, dtype=dtype), torch.randn(
        4, 3, 5, 5, generator=generator, dtype=dtype
    )


@both_precisions
def test_g10_renoise(dtype: torch.dtype) -> None:
    vp = VariancePreserving(torch.tensor([0.64, 0.36], dtype=torch.float64))
    x_t, noise = torch.tensor([[1.0, -0.5]], dtype=dtype), torch.tensor([[0.2, -1.0]], dtype=dtype)
    x_s = vp.renoise(x_t, torch.tensor([0]), torch.tensor([1]), noise)
    expected = torch.tensor([[0.882287565553, -1.036437827766]], dtype=dtype)
    torch.testing.assert_close(x_s, expected, rtol=0, atol=TOLERANCE[dtype])
    zero, one = torch.zeros(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    kept = vp.renoise(one, torch.tensor([0]), torch.tensor([1]), zero)
    added = vp.renoise(zero, torch.tensor([0]), torch.tensor([1]), one)
    torch.testing.assert_close(kept, 0.75 * one, rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(added, 0.661437827766 * one, rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(
        1 / vp.snr(torch.tensor([0, 1])).sqrt(), torch.tensor([0.75, 4 / 3], dtype=torch.float64)
    )


@both_precisions
def test_renoise_of_the_flow(dtype: torch.dtype) -> None:
    zero, one = torch.zeros(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    t, s = torch.tensor([0.4], dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64)
    torch.testing.assert_close(
        RectifiedFlow().renoise(one, t, s, zero), 0.5 * one, rtol=0, atol=TOLERANCE[dtype]
    )
    torch.testing.assert_close(
        RectifiedFlow().renoise(zero, t, s, one),
        0.670820393250 * one,
        rtol=0,
        atol=TOLERANCE[dtype],
    )


def test_renoise_keeps_the_marginal_and_refuses_to_denoise() -> None:
    for process, t, s in (
        (schedule_from_scheduler(scheduler()), torch.tensor([100]), torch.tensor([700])),
        (RectifiedFlow(), torch.tensor([0.2]), torch.tensor([0.9])),
    ):
        (alpha, sigma), (new_alpha, new_sigma) = process.alpha_sigma(t), process.alpha_sigma(s)
        one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
        kept, added = process.renoise(one, t, s, zero), process.renoise(zero, t, s, one)
        torch.testing.assert_close(kept.flatten() * alpha, new_alpha)
        torch.testing.assert_close(
            (kept.flatten() * sigma).square() + added.flatten().square(), new_sigma.square()
        )
        torch.testing.assert_close(process.renoise(one, t, t, one), one)
        with pytest.raises(ValueError, match="new_times"):
            process.renoise(one, s, t, one)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_variance_preserving_is_diffusers_own(prediction_type: str) -> None:
    theirs = scheduler(prediction_type)
    vp = schedule_from_scheduler(theirs)
    assert isinstance(vp, VariancePreserving) and vp.prediction_type == prediction_type
    x0, noise = samples(torch.float32)
    times = torch.tensor([0, 20, 500, 999])
    noisy = vp.add_noise(x0, noise, times)
    torch.testing.assert_close(noisy, theirs.add_noise(x0, noise, times), rtol=1e-5, atol=1e-5)
    target = vp.target(x0, noise, times)
    expected = {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": theirs.get_velocity(x0, noise, times),
    }[prediction_type]
    torch.testing.assert_close(target, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_output_gives_back_sample_and_noise(prediction_type: str) -> None:
    vp = VariancePreserving(scheduler().alphas_cumprod, prediction_type)
    x0, noise = samples()
    times = torch.tensor([0, 20, 500, 999])
    noisy, target = vp.add_noise(x0, noise, times), vp.target(x0, noise, times)
    torch.testing.assert_close(vp.to_x0(target, noisy, times), x0)
    torch.testing.assert_close(vp.to_eps(target, noisy, times), noise)


def test_any_output_means_one_sample_and_one_noise() -> None:
    """to_x0 and to_eps of any output together make the noisy sample again."""
    x0, noise = samples()
    output = torch.randn(x0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    times = torch.tensor([1, 20, 500, 999])
    for prediction_type in PREDICTION_TYPES:
        vp = VariancePreserving(scheduler().alphas_cumprod, prediction_type)
        noisy = vp.add_noise(x0, noise, times)
        again = vp.add_noise(vp.to_x0(output, noisy, times), vp.to_eps(output, noisy, times), times)
        torch.testing.assert_close(again, noisy)


def test_flow_is_diffusers_own() -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow = schedule_from_scheduler(theirs)
    assert (
        isinstance(flow, RectifiedFlow)
        and flow.shift == 3.0
        and flow.prediction_type == "flow_matching"
    )
    x0, noise = samples(torch.float32)
    sigmas = theirs.sigmas[[0, 100, 500, 900]]
    expected = theirs.scale_noise(x0, theirs.timesteps[[0, 100, 500, 900]], noise)
    torch.testing.assert_close(flow.add_noise(x0, noise, sigmas), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(flow.model_times(sigmas), theirs.timesteps[[0, 100, 500, 900]])
    x0, noise = samples()
    sigmas = torch.tensor([0.01, 0.3, 0.9, 1.0], dtype=torch.float64)
    noisy, target = flow.add_noise(x0, noise, sigmas), flow.target(x0, noise, sigmas)
    torch.testing.assert_close(flow.to_x0(target, noisy, sigmas), x0)
    torch.testing.assert_close(flow.to_eps(target, noisy, sigmas), noise)


def test_zero_terminal_snr_stays_finite_where_it_can() -> None:
    theirs = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
    )
    vp = schedule_from_scheduler(theirs)
    x0, noise = samples()
    times = torch.full((4,), 999)
    target = vp.target(x0, noise, times)
    torch.testing.assert_close(vp.to_x0(target, vp.add_noise(x0, noise, times), times), x0)
    assert float(vp.snr(times)[0]) < 1e-6


def test_process_computes_in_float32_or_wider_and_returns_the_input_type() -> None:
    vp = schedule_from_scheduler(scheduler())
    x0, noise = samples(torch.float32)
    noisy = vp.add_noise(x0.bfloat16(), noise.bfloat16(), torch.tensor([20] * 4))
    assert noisy.dtype == torch.bfloat16
    exact = vp.add_noise(x0.bfloat16().double(), noise.bfloat16().double(), torch.tensor([20] * 4))
    assert torch.equal(noisy, exact.bfloat16())


def test_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(ValueError, match="prediction_type.*'score'"):
        VariancePreserving(torch.tensor([0.5]), "score")


def test_g17_timestep_maps() -> None:
    assert turbo_timesteps(torch.arange(5)).tolist() == [249, 499, 749, 999, 249]
    assert refiner_timesteps(torch.tensor([999, 200, 0, 199])).tolist() == [199, 0, 0, 199]
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    vp = schedule_from_scheduler(scheduler())
    assert set(sample_times(vp, grid, "turbo").tolist()) == {249, 499, 749, 999}
    assert set(sample_times(vp, grid, "refiner").tolist()) == set(range(200))


def test_uniform_timesteps_hit_every_timestep_equally_often() -> None:
    vp = schedule_from_scheduler(scheduler())
    grid = torch.arange(4000, dtype=torch.float64) / 4000
    times = sample_times(vp, grid)
    assert times.dtype == torch.int64
    assert torch.equal(times.bincount(minlength=1000), torch.full((1000,), 4))
    assert sample_times(vp, torch.tensor([1.0])).tolist() == [999]


def test_uniform_sigmas_with_shift() -> None:
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    torch.testing.assert_close(sample_times(RectifiedFlow(), grid)[1:], grid[1:])
    shifted = sample_times(RectifiedFlow(shift=3.0), grid)
    torch.testing.assert_close(shifted[1:], 3 * grid[1:] / (1 + 2 * grid[1:]))
    assert float(shifted.min()) > 0 and float(shifted.max()) <= 1
    assert float(sample_times(RectifiedFlow(), torch.zeros(1))) == pytest.approx(1e-3)


def test_logit_normal_quantiles() -> None:
    half = torch.tensor([0.5])
    assert float(sample_times(RectifiedFlow(), half, "logit_normal")) == pytest.approx(0.5)
    assert float(sample_times(RectifiedFlow(shift=3.0), half, "logit_normal")) == pytest.approx(
        0.75
    )
    one_sigma = torch.tensor([0.8413447460685429])
    found = sample_times(RectifiedFlow(), one_sigma.double(), "logit_normal", 0.5, 2.0)
    assert float(found) == pytest.approx(float(torch.sigmoid(torch.tensor(2.5))), abs=1e-6)
    edges = sample_times(RectifiedFlow(shift=3.0), torch.tensor([0.0, 1.0]), "logit_normal")
    assert torch.isfinite(edges).all() and float(edges.min()) > 0 and float(edges.max()) <= 1
    vp = schedule_from_scheduler(scheduler())
    assert sample_times(vp, half, "logit_normal").tolist() == [500]
    low, high = sample_times(vp, torch.tensor([0.0, 1.0]), "logit_normal").tolist()
    assert 0 <= low < 10 and 990 < high <= 999


@pytest.mark.parametrize("sampler", ["turbo", "refiner", "cosine"])
def test_samplers_that_a_flow_does_not_have(sampler: str) -> None:
    with pytest.raises(ValueError, match=f"timestep_sampling.*'{sampler}'"):
        sample_times(RectifiedFlow(), torch.tensor([0.5]), sampler)


def test_fraction_says_how_noisy_a_time_is() -> None:
    vp = schedule_from_scheduler(scheduler())
    torch.testing.assert_close(
        vp.fraction(torch.tensor([0, 500, 999])),
        torch.tensor([0.0, 0.5, 0.999], dtype=torch.float64),
    )
    torch.testing.assert_close(
        RectifiedFlow().fraction(torch.tensor([0.25])), torch.tensor([0.25], dtype=torch.float64)
    )


def test_zero_terminal_snr_is_that_of_the_official_turbo_code() -> None:
    """The audit's signal shares at the four timesteps, and diffusers' own rescaling."""
    from diffusers import DDIMScheduler

    options = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    plain, theirs = DDIMScheduler(**options), DDIMScheduler(**options, rescale_betas_zero_snr=True)
    process = schedule_from_scheduler(plain)
    rescaled = with_zero_terminal_snr(process)
    places = torch.tensor([249, 499, 749, 999])
    assert process.alpha_sigma(places)[0].tolist() == pytest.approx(
        [0.8218, 0.5269, 0.2380, 0.0683], abs=1e-4
    )
    assert rescaled.alpha_sigma(places)[0].tolist() == pytest.approx(
        [0.8088, 0.4923, 0.1821, 0.0], abs=1e-4
    )
    torch.testing.assert_close(
        rescaled.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=1e-4, atol=1e-6
    )
    again = with_zero_terminal_snr(rescaled)
    torch.testing.assert_close(again.alphas_cumprod, rescaled.alphas_cumprod)
    assert min_snr_weight(rescaled.snr(places), 5.0, "epsilon").isfinite().all()
