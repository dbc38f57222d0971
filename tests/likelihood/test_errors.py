"""Denoising errors, their weights and conversions, shared noise: golden values of
methods.md section 15 and analytic facts."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_snr

from diffalign.likelihood import (
    RectifiedFlow,
    VariancePreserving,
    convert_errors,
    denoising_errors,
    effective_beta,
    group_noise,
    implicit_rewards,
    min_snr_weight,
)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
both_precisions = pytest.mark.parametrize("dtype", list(TOLERANCE))


def close(found: torch.Tensor, expected: object, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=dtype), rtol=0, atol=TOLERANCE[dtype]
    )


def process(prediction_type: str = "epsilon") -> VariancePreserving:
    """Timestep 0 has alpha = .8 and sigma = .6; timestep 1 has alpha = .6 and
    sigma = .8."""
    return VariancePreserving(torch.tensor([0.64, 0.36], dtype=torch.float64), prediction_type)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def g1b(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x0 = torch.tensor([[1, 0, -1, 0.5], [0, 1, 0.5, -0.5]], dtype=dtype)
    noise = torch.tensor([[0.5, -0.5, 1, 0]], dtype=dtype).expand(2, 4)
    return x0, noise, torch.zeros(2, dtype=torch.long)


@both_precisions
def test_g1b_noisy_samples_and_errors(dtype: torch.dtype) -> None:
    x0, noise, times = g1b(dtype)
    noisy = process().add_noise(x0, noise, times)
    close(noisy, [[1.1, -0.3, -0.2, 0.4], [0.3, 0.5, 1.0, -0.4]], dtype)
    target = process().target(x0, noise, times)
    close(denoising_errors(0.5 * noisy, target), [0.34375, 0.24375], dtype)
    close(denoising_errors(0.4 * noisy, target), [0.335, 0.255], dtype)
    close(denoising_errors(0.5 * noisy, target, reduction="sum"), [1.375, 0.975], dtype)


@both_precisions
@pytest.mark.parametrize(
    ("reduction", "logit", "loss"), [("mean", -0.1, 0.744396660074), ("sum", -0.4, 0.913015252400)]
)
def test_g1b_implicit_rewards(
    dtype: torch.dtype, reduction: str, logit: float, loss: float
) -> None:
    x0, noise, times = g1b(dtype)
    noisy = process().add_noise(x0, noise, times)
    policy, reference = (
        denoising_errors(k * noisy, noise, reduction=reduction) for k in (0.5, 0.4)
    )
    rewards = implicit_rewards(policy, reference, beta=10)
    z = rewards[0] - rewards[1]
    close(z, logit, dtype)
    close(torch.nn.functional.softplus(-z), loss, dtype)


@both_precisions
def test_g1b_targets(dtype: torch.dtype) -> None:
    x0, noise, times = g1b(dtype)
    close(process("v_prediction").target(x0, noise, times)[0], [-0.2, -0.4, 1.4, -0.3], dtype)
    close(
        RectifiedFlow().target(x0, noise, torch.tensor([0.25, 0.25]))[0],
        [-0.5, -0.5, 2, -0.5],
        dtype,
    )
    assert process("sample").target(x0, noise, times) is x0


@both_precisions
def test_g13_flow_errors(dtype: torch.dtype) -> None:
    x0 = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=dtype)
    noise = torch.tensor([[0.5, -0.5]], dtype=dtype).expand(2, 2)
    times = torch.full((2,), 0.25, dtype=torch.float64)
    flow = RectifiedFlow()
    close(flow.add_noise(x0, noise, times), [[0.875, -0.125], [0.125, 0.625]], dtype)
    target = flow.target(x0, noise, times)
    close(target, [[-0.5, -0.5], [0.5, -1.5]], dtype)
    policy = denoising_errors(torch.tensor([[-0.4, -0.5], [0.4, -1.4]], dtype=dtype), target)
    reference = denoising_errors(torch.tensor([[-0.3, -0.4], [0.5, -1.5]], dtype=dtype), target)
    close(policy, [0.005, 0.010], dtype)
    close(reference, [0.025, 0.0], dtype)
    rewards = implicit_rewards(policy, reference, beta=100)
    close(rewards[0] - rewards[1], 1.5, dtype)


@both_precisions
def test_g15_conversions(dtype: torch.dtype) -> None:
    alpha, sigma = (
        torch.tensor([0.8], dtype=torch.float64),
        torch.tensor([0.6], dtype=torch.float64),
    )
    epsilon = denoising_errors(
        torch.tensor([[0.4, 0.35]], dtype=dtype), torch.tensor([[0.5, 0.25]], dtype=dtype)
    )
    close(epsilon, [0.01], dtype)
    close(convert_errors(epsilon, alpha, sigma, "epsilon", "sample"), [0.005625], dtype)
    close(convert_errors(epsilon, alpha, sigma, "epsilon", "v_prediction"), [0.015625], dtype)
    flow = denoising_errors(
        torch.tensor([[0.1, -0.2]], dtype=dtype), torch.zeros(1, 2, dtype=dtype)
    )
    close(flow, [0.025], dtype)
    close(
        convert_errors(
            flow, 1 - 0.25 * torch.ones(1), 0.25 * torch.ones(1), "flow_matching", "sample"
        ),
        [0.0015625],
        dtype,
    )
    close(
        convert_errors(
            flow, 1 - 0.25 * torch.ones(1), 0.25 * torch.ones(1), "flow_matching", "epsilon"
        ),
        [0.0140625],
        dtype,
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_conversions_agree_with_predictions_of_every_kind(prediction_type: str) -> None:
    """One imperfect network, read in its own space and by the x0 and noise implied."""
    generator = torch.Generator().manual_seed(0)
    x0, noise, output = (
        torch.randn(2, 3, 4, dtype=torch.float64, generator=generator) for _ in range(3)
    )
    vp, times = process(prediction_type), torch.tensor([0, 1])
    noisy = vp.add_noise(x0, noise, times)
    native = denoising_errors(output, vp.target(x0, noise, times))
    alpha, sigma = vp.alpha_sigma(times)
    through_x0 = denoising_errors(vp.to_x0(output, noisy, times), x0)
    through_eps = denoising_errors(vp.to_eps(output, noisy, times), noise)
    torch.testing.assert_close(
        convert_errors(native, alpha, sigma, prediction_type, "sample"), through_x0
    )
    torch.testing.assert_close(
        convert_errors(native, alpha, sigma, prediction_type, "epsilon"), through_eps
    )


def test_conversion_refuses_an_unknown_space() -> None:
    with pytest.raises(ValueError, match="error space.*'latent'"):
        convert_errors(torch.ones(1), torch.ones(1), torch.ones(1), "epsilon", "latent")


def test_half_precision_predictions_give_float32_errors() -> None:
    prediction = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    target = torch.tensor([[1.001, 2.001]])
    errors = denoising_errors(prediction, target)
    assert errors.dtype == torch.float32
    torch.testing.assert_close(errors, torch.tensor([1e-6]), rtol=1e-3, atol=0)
    halves = denoising_errors(prediction, target.to(torch.bfloat16))
    assert halves.dtype == torch.float32


def test_mask_weight_and_reduction() -> None:
    prediction, target = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]), torch.zeros(2, 3)
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(
        denoising_errors(prediction, target, mask=mask), torch.tensor([5.0, 1.0])
    )
    torch.testing.assert_close(
        denoising_errors(prediction, target, reduction="sum", mask=mask), torch.tensor([10.0, 1.0])
    )
    weight = torch.tensor([2.0, 0.5], dtype=torch.float64)
    weighted = denoising_errors(prediction, target, weight)
    assert weighted.dtype == torch.float32
    torch.testing.assert_close(weighted, torch.tensor([28 / 3, 0.5]))
    image_mask = torch.tensor([[[[1.0, 0.0]]], [[[1.0, 1.0]]]])
    wide = denoising_errors(torch.ones(2, 3, 1, 2) * 2, torch.zeros(2, 3, 1, 2), mask=image_mask)
    torch.testing.assert_close(wide, torch.tensor([4.0, 4.0]))


def test_errors_refuse_unequal_shapes_and_unknown_reductions() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        denoising_errors(torch.ones(2, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="reduction.*'max'"):
        denoising_errors(torch.ones(2, 3), torch.ones(2, 3), reduction="max")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_of_the_errors(reduction: str) -> None:
    generator = torch.Generator().manual_seed(1)
    prediction, target = (
        torch.randn(2, 3, 2, dtype=torch.float64, generator=generator) for _ in range(2)
    )
    prediction.requires_grad_(True)
    weight = torch.tensor([0.3, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda p: denoising_errors(p, target, weight, reduction), prediction
    )
    denoising_errors(prediction, target, weight, reduction).sum().backward()
    count = 6 if reduction == "mean" else 1
    torch.testing.assert_close(
        prediction.grad, 2 / count * weight[:, None, None] * (prediction.detach() - target)
    )


def test_effective_beta_is_the_table_of_the_conventions() -> None:
    table = {
        16_384: {100: 0.003052, 500: 0.015259, 2000: 0.061035, 2500: 0.076294, 5000: 0.152588},
        65_536: {100: 0.000763, 500: 0.003815, 2000: 0.015259, 2500: 0.019073, 5000: 0.038147},
        262_144: {100: 0.000191, 500: 0.000954, 2000: 0.003815, 2500: 0.004768, 5000: 0.009537},
    }
    for elements, row in table.items():
        for beta, expected in row.items():
            assert effective_beta(beta, elements) == pytest.approx(expected, abs=6e-7)
    assert effective_beta(10, 1024, "sum") == 5


@pytest.mark.parametrize("beta", [10.0, 5000.0])
def test_effective_beta_relates_mean_and_sum(beta: float) -> None:
    """Mean errors with beta and summed errors with beta / N are one loss."""
    policy, reference = (
        torch.tensor([3.0, 5.0], dtype=torch.float64),
        torch.tensor([4.0, 4.5], dtype=torch.float64),
    )
    mean = implicit_rewards(policy / 64, reference / 64, beta)
    torch.testing.assert_close(mean, -effective_beta(beta, 64) * (policy - reference))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_is_that_of_the_diffusers_scripts(prediction_type: str) -> None:
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
    )
    times = torch.tensor([0, 10, 200, 500, 999])
    snr = compute_snr(scheduler, times)
    expected = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    expected = expected / snr if prediction_type == "epsilon" else expected / (snr + 1)
    ours = VariancePreserving(scheduler.alphas_cumprod, prediction_type).snr(times)
    torch.testing.assert_close(ours.float(), snr, rtol=1e-4, atol=0)
    torch.testing.assert_close(
        min_snr_weight(ours, 5.0, prediction_type).float(), expected, rtol=1e-4, atol=0
    )


def test_min_snr_of_the_three_spaces_is_one_loss() -> None:
    """min(snr, gamma) on the x0 error, whatever the network outputs."""
    snr = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)
    alpha, sigma = (snr / (1 + snr)).sqrt(), (1 / (1 + snr)).sqrt()
    error = torch.ones(3, dtype=torch.float64)
    expected = min_snr_weight(snr, 5.0, "sample") * error
    for space in ("epsilon", "v_prediction"):
        native = convert_errors(error, alpha, sigma, "sample", space)
        torch.testing.assert_close(min_snr_weight(snr, 5.0, space) * native, expected)
    with pytest.raises(ValueError, match="snr_gamma.*flow_matching"):
        min_snr_weight(snr, 5.0, "flow_matching")


def test_group_noise_is_shared_or_independent() -> None:
    shared = group_noise((4, 3, 3), 2, seeded(0, 1))
    assert shared.shape == (2, 2, 4, 3, 3)
    assert torch.equal(shared[:, 0], shared[:, 1])
    assert not torch.equal(shared[0], shared[1])
    independent = group_noise((4, 3, 3), 2, seeded(0, 1), shared=False)
    assert not torch.equal(independent[:, 0], independent[:, 1])
    many = group_noise((4, 32, 32), 4, seeded(0), shared=False)
    assert abs(float(many.mean())) < 0.05 and abs(float(many.std()) - 1) < 0.05


def test_group_noise_does_not_depend_on_the_batch() -> None:
    together = group_noise((2, 4, 4), 3, seeded(5, 6, 7), shared=False, offset=0.1)
    alone = torch.cat(
        [group_noise((2, 4, 4), 3, seeded(seed), shared=False, offset=0.1) for seed in (5, 6, 7)]
    )
    assert torch.equal(together, alone)


@pytest.mark.parametrize("shared", [True, False])
def test_noise_offset_is_one_constant_per_channel(shared: bool) -> None:
    plain = group_noise((3, 8, 8), 2, seeded(0), shared=shared)
    offset = group_noise((3, 8, 8), 2, seeded(0), shared=shared, offset=0.5)
    difference = (offset - plain).double()
    torch.testing.assert_close(
        difference, difference.mean((3, 4), keepdim=True).expand_as(difference), rtol=0, atol=1e-6
    )
    assert (difference.mean((3, 4)).abs() > 1e-4).all()
    assert torch.equal(offset[:, 0], offset[:, 1]) is shared


def test_implicit_reward_is_positive_for_a_better_policy() -> None:
    rewards = implicit_rewards(torch.tensor([0.1, 0.3]), torch.tensor([0.2, 0.2]), beta=2000)
    torch.testing.assert_close(rewards, torch.tensor([100.0, -100.0]))
    assert math.isclose(float(implicit_rewards(torch.tensor(0.1), torch.tensor(0.1), 5000)), 0.0)
