"""Diffusion-DPO: golden values of methods.md section 15, and facts for any errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from diffalign import DiffusionDPOConfig
from diffalign.errors import ConfigError
from diffalign.likelihood import RectifiedFlow, VariancePreserving, denoising_errors
from diffalign.methods.diffusion_dpo import LOSS_TYPES, diffusion_dpo_loss
from diffalign.training.diagnostics import pair_metrics

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def g1(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    policy = torch.tensor([[0.100, 0.102], [0.200, 0.100]], dtype=dtype)
    reference = torch.tensor([[0.1005, 0.1010], [0.1990, 0.1004]], dtype=dtype)
    return policy, reference


def random_errors(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(16, 2, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def test_g1_losses_mean_and_accuracy() -> None:
    policy, reference = g1()
    loss = diffusion_dpo_loss(policy, reference, beta=5000)
    assert loss.tolist() == pytest.approx([0.023245464372, 3.529750418273], abs=1e-9)
    assert float(loss.mean()) == pytest.approx(1.776497941323, abs=1e-9)
    metrics = pair_metrics(policy, reference, 5000, torch.tensor([0.1, 0.9]))
    assert metrics["rewards/margins"].tolist() == pytest.approx([3.75, -3.5], abs=1e-9)
    assert metrics["rewards/accuracies"].tolist() == [1.0, 0.0]
    assert metrics["gradient_factor"].tolist() == pytest.approx(
        [1 / (1 + math.exp(3.75)), 1 / (1 + math.exp(-3.5))]
    )


def test_g1_is_not_the_log_sigmoid_of_the_mean() -> None:
    """diffusers issue 6702."""
    policy, reference = g1()
    metrics = pair_metrics(policy, reference, 5000, torch.tensor([0.1, 0.9]))
    wrong = float(softplus(-metrics["rewards/margins"].mean()))
    assert wrong == pytest.approx(0.632599035317, abs=1e-9)
    assert abs(float(diffusion_dpo_loss(policy, reference, beta=5000).mean()) - wrong) > 1


def test_g1_in_float32() -> None:
    """Rounding the errors themselves to float32 moves z by beta * 1e-8; the arithmetic
    after that adds nothing that counts."""
    policy, reference = g1(torch.float32)
    loss = diffusion_dpo_loss(policy, reference, beta=5000)
    assert loss.dtype == torch.float32
    assert loss.tolist() == pytest.approx(
        diffusion_dpo_loss(policy.double(), reference.double(), beta=5000).tolist(), abs=1e-5
    )
    assert loss.tolist() == pytest.approx([0.023245464372, 3.529750418273], abs=2e-4)


def test_g1_gradient() -> None:
    policy, reference = g1()
    policy.requires_grad_(True)
    diffusion_dpo_loss(policy, reference, beta=5000).sum().backward()
    assert policy.grad is not None
    chosen = [57.443424775066, 2426.719423121609]
    assert policy.grad[:, 0].tolist() == pytest.approx(chosen, abs=1e-8)
    assert policy.grad[:, 1].tolist() == pytest.approx([-value for value in chosen], abs=1e-8)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("reduction", "expected"), [("mean", 0.744396660074), ("sum", 0.913015252400)]
)
def test_g1b_from_tensors_to_the_gradient(
    dtype: torch.dtype, reduction: str, expected: float
) -> None:
    x0 = torch.tensor([[1, 0, -1, 0.5], [0, 1, 0.5, -0.5]], dtype=dtype)
    noise = torch.tensor([[0.5, -0.5, 1, 0]], dtype=dtype).expand(2, 4)
    schedule, times = (
        VariancePreserving(torch.tensor([0.64], dtype=torch.float64)),
        torch.zeros(2, dtype=torch.long),
    )
    noisy, target = schedule.add_noise(x0, noise, times), schedule.target(x0, noise, times)
    k = torch.tensor(0.5, dtype=dtype, requires_grad=True)
    policy = denoising_errors(k * noisy, target, reduction=reduction)[None]
    reference = denoising_errors(0.4 * noisy, target, reduction=reduction)[None]
    loss = diffusion_dpo_loss(policy, reference, beta=10)
    assert loss.dtype == dtype
    assert float(loss.detach()) == pytest.approx(expected, abs=TOLERANCE[dtype])
    loss.sum().backward()
    if reduction == "mean":
        assert float(k.grad) == pytest.approx(0.524979187479, abs=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("sigmoid", [0.023245464372, 3.529750418273]),
        ("hinge", [0.0, 4.5]),
        ("ipo", [1.69e-6, 2.56e-6]),
    ],
)
def test_g2_variants_of_diffusers(loss_type: str, expected: list[float]) -> None:
    """diffusers' SD script has no 1/2: its beta 2500 is our 5000."""
    policy, reference = g1()
    y = (reference[:, 0] - reference[:, 1]) - (policy[:, 0] - policy[:, 1])
    theirs = {
        "sigmoid": softplus(-2500 * y),
        "hinge": torch.relu(1 - 2500 * y),
        "ipo": (y - 1 / (2 * 2500)).square(),
    }[loss_type]
    ours = diffusion_dpo_loss(policy, reference, beta=5000, loss_type=loss_type)
    assert theirs.tolist() == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.01, [0.373265917775, 3.198821479690]),
        (0.1, [0.031138796406, 1.370578705210]),
    ],
)
def test_h6c_dmpo(alpha: float, expected: list[float]) -> None:
    policy = torch.tensor([[0.100, 0.102], [0.200, 0.100]], dtype=torch.float64)
    reference = torch.tensor([[0.1005, 0.1010], [0.1990, 0.1004]], dtype=torch.float64)
    options: dict[str, Any] = {"beta": 2000, "loss_type": "dmpo", "dmpo_alpha": alpha}
    policy.requires_grad_(True)
    loss = diffusion_dpo_loss(policy, reference, **options)
    assert loss.tolist() == pytest.approx(expected, abs=1e-9)
    loss.sum().backward()
    # z = [1.5, -1.4], dL/dz = p (1 - p) (z - logit q), dz/dm_w = -beta/2
    z = torch.tensor([1.5, -1.4], dtype=torch.float64)
    p = torch.sigmoid(z)
    slope = p * (1 - p) * (z - math.log((1 - alpha) / alpha))
    assert policy.grad is not None
    torch.testing.assert_close(policy.grad, torch.stack([-1000 * slope, 1000 * slope], dim=1))


def test_dmpo_has_a_target_and_ignores_hopeless_pairs() -> None:
    target = math.log(0.99 / 0.01)
    z = torch.tensor([target, -60.0, 60.0], dtype=torch.float64, requires_grad=True)
    errors = torch.stack([torch.zeros_like(z), z], dim=1)  # beta 2: the logit is m_l - m_w
    loss = diffusion_dpo_loss(errors, torch.zeros_like(errors), beta=2, loss_type="dmpo")
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0.0, -math.log(0.01), -math.log(0.99)], abs=1e-9)
    assert z.grad is not None and z.grad.tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-9)


def test_g13_flow_loss() -> None:
    x0 = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    noise = torch.tensor([[0.5, -0.5]], dtype=torch.float64).expand(2, 2)
    target = RectifiedFlow().target(x0, noise, torch.full((2,), 0.25))
    policy = denoising_errors(
        torch.tensor([[-0.4, -0.5], [0.4, -1.4]], dtype=torch.float64), target
    )[None]
    reference = denoising_errors(
        torch.tensor([[-0.3, -0.4], [0.5, -1.5]], dtype=torch.float64), target
    )[None]
    loss = diffusion_dpo_loss(policy, reference, beta=100)
    assert loss.dtype == torch.float64
    assert float(loss) == pytest.approx(0.201413277983, abs=1e-9)


@pytest.mark.parametrize("beta", [1.0, 500.0, 5000.0])
def test_policy_equal_to_reference(beta: float) -> None:
    policy, _ = random_errors()
    dmpo = math.log(0.5) - 0.5 * (math.log(0.99) + math.log(0.01))
    values = {"sigmoid": math.log(2), "hinge": 1.0, "ipo": beta**-2, "dmpo": dmpo}
    # linear starts at half the difference, regression at the square of its target.
    assert values.keys() == set(LOSS_TYPES) - {"linear", "regression"}
    for loss_type, value in values.items():
        for smoothing in (0.0, 0.2):
            loss = diffusion_dpo_loss(
                policy, policy, beta=beta, loss_type=loss_type, label_smoothing=smoothing
            )
            torch.testing.assert_close(loss, torch.full_like(loss, value), rtol=1e-12, atol=0)
    metrics = pair_metrics(policy, policy, beta, torch.zeros(16))
    assert metrics["rewards/accuracies"].tolist() == [0.5] * 16


def test_swapping_the_pair_flips_the_logit() -> None:
    policy, reference = random_errors()
    margins = pair_metrics(policy, reference, 10, torch.zeros(16))["rewards/margins"]
    swapped = pair_metrics(policy.flip(1), reference.flip(1), 10, torch.zeros(16))[
        "rewards/margins"
    ]
    torch.testing.assert_close(swapped, -margins)
    difference = diffusion_dpo_loss(policy, reference, beta=10) - diffusion_dpo_loss(
        policy.flip(1), reference.flip(1), beta=10
    )
    torch.testing.assert_close(difference, -margins)  # softplus(-z) - softplus(z) = -z


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_label_smoothing_mixes_in_the_swapped_pair(loss_type: str) -> None:
    policy, reference = random_errors()
    options: dict[str, Any] = {"beta": 3.0, "loss_type": loss_type}
    options["targets"] = torch.linspace(-1, 2, 16).double()  # of regression
    plain = diffusion_dpo_loss(policy, reference, **options)
    swapped = diffusion_dpo_loss(policy.flip(1), reference.flip(1), **options)
    smooth = diffusion_dpo_loss(policy, reference, label_smoothing=0.1, **options)
    torch.testing.assert_close(smooth, 0.9 * plain + 0.1 * swapped)


@pytest.mark.parametrize(
    ("beta", "weights", "expected"),
    [(500, [0.35, 0.64], [-0.0007, 0.064]), (2000, [0.0, 1.0], [0.0, 0.1])],
)
def test_h6d_linear(beta: float, weights: list[float], expected: list[float]) -> None:
    policy = torch.tensor([[0.100, 0.102], [0.200, 0.100]], dtype=torch.float64)
    reference = torch.tensor([[0.1005, 0.1010], [0.1990, 0.1004]], dtype=torch.float64)
    policy.requires_grad_(True)
    loss = diffusion_dpo_loss(policy, reference, beta=beta, loss_type="linear")
    assert loss.tolist() == pytest.approx(expected, abs=1e-9)
    loss.sum().backward()
    assert policy.grad is not None
    assert policy.grad[:, 0].tolist() == pytest.approx(weights, abs=1e-9)
    assert policy.grad[:, 1].tolist() == pytest.approx([-w for w in weights], abs=1e-9)
    floored = diffusion_dpo_loss(policy, reference, beta=2000, loss_type="linear", linear_floor=0.1)
    assert floored.tolist() == pytest.approx([0.1 * -0.002, 0.9 * 0.1], abs=1e-9)


# The weight of `linear` is a constant, which finite differences do not know.
@pytest.mark.parametrize("loss_type", [x for x in LOSS_TYPES if x != "linear"])
def test_gradient_of_the_loss(loss_type: str) -> None:
    policy, reference = random_errors(3)
    policy.requires_grad_(True)
    options: dict[str, Any] = {"beta": 3.0, "loss_type": loss_type, "label_smoothing": 0.1}
    options |= {"factors": torch.rand(16).double(), "targets": torch.rand(16).double()}
    assert torch.autograd.gradcheck(lambda p: diffusion_dpo_loss(p, reference, **options), policy)


def test_extreme_logits_stay_finite() -> None:
    policy = torch.tensor([[0.0, 10.0], [10.0, 0.0]], requires_grad=True)
    loss = diffusion_dpo_loss(policy, torch.zeros(2, 2), beta=5000)
    assert loss.tolist() == [0.0, 25_000.0]
    loss.sum().backward()
    assert policy.grad is not None and torch.isfinite(policy.grad).all()


def test_unknown_loss_type_is_refused() -> None:
    with pytest.raises(ValueError, match="loss_type.*'kto'"):
        diffusion_dpo_loss(*g1(), beta=1.0, loss_type="kto")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta", 0),
        ("beta", -1.0),
        ("beta", "five"),
        ("beta", float("nan")),
        ("beta", True),
        ("label_smoothing", 0.5),
        ("label_smoothing", -0.1),
        ("dmpo_alpha", 0.0),
        ("dmpo_alpha", 0.5),
        ("linear_slope", 0.0),
        ("linear_floor", 0.5),
        ("reference_decay", 1.1),
        ("sft_weight", -1),
        ("loss_type", "kto"),
        ("learning_rate", "fast"),
        ("max_steps", 1.5),
        ("max_steps", 0),
        ("optim", "sgd"),
        ("proportion_empty_prompts", 1.5),
    ],
)
def test_config_errors_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        DiffusionDPOConfig(**{field: value})  # type: ignore[arg-type]
    assert error.value.field == field
    assert str(error.value).startswith(f"{field}: expected")
    assert repr(value) in str(error.value)


def test_numbers_that_yaml_reads_as_text_are_numbers() -> None:
    config = DiffusionDPOConfig(beta="1e-5", learning_rate="2e-6", max_steps=10.0)  # type: ignore[arg-type]
    assert (config.beta, config.learning_rate, config.max_steps) == (1e-5, 2e-6, 10)
    assert isinstance(config.max_steps, int)


def test_steps_and_epochs_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="either max_steps or num_train_epochs"):
        DiffusionDPOConfig(max_steps=5, num_train_epochs=1)
