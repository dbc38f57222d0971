"""MaPO and Diffusion-ORPO: golden values, gradients, limits."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign import DiffusionORPOConfig, MaPOConfig
from diffalign.errors import ConfigError
from diffalign.methods.diffusion_orpo import diffusion_orpo_loss
from diffalign.methods.mapo import mapo_code_loss, mapo_link, mapo_loss


def errors(*pairs: tuple[float, float], grad: bool = False) -> torch.Tensor:
    return torch.tensor(pairs, dtype=torch.float64, requires_grad=grad)


def test_code_form_golden_values() -> None:
    found = mapo_code_loss(errors((0.10, 0.12), (0.12, 0.10), (0.1, 0.1)))
    assert found.tolist() == pytest.approx(
        [0.100735758372, 0.611570023547, 0.169314718056], abs=1e-9
    )
    assert mapo_link(errors((0.10, 0.12)), 0.5)[0].tolist() == pytest.approx(
        [0.975208324653, 0.970299982002], abs=1e-9
    )
    policy = errors((0.10, 0.12), grad=True)
    mapo_code_loss(policy).sum().backward()
    assert policy.grad[0].tolist() == pytest.approx([1.180210421, -0.179599724], abs=1e-8)
    single = mapo_code_loss(errors((0.10, 0.12)).float())
    assert float(single) == pytest.approx(0.100735758372, abs=1e-5)


@pytest.mark.parametrize(
    ("beta", "form", "total"),
    [
        (8, "scale", 0.1819194374),
        (8, "power", 0.1834192778),
        (64, "scale", 0.1067446460),
        (64, "power", 0.1106826483),
    ],
)
def test_paper_form_golden_values(beta: float, form: str, total: float) -> None:
    assert float(mapo_loss(errors((0.10, 0.12)), beta=beta, link_form=form)) == pytest.approx(
        total, abs=1e-9
    )


def test_both_readings_agree_at_beta_one() -> None:
    policy = torch.rand(20, 2, dtype=torch.float64)
    torch.testing.assert_close(
        mapo_loss(policy, beta=1.0), mapo_loss(policy, beta=1.0, link_form="power")
    )


def test_the_link_at_zero_and_its_derivative() -> None:
    for dtype in (torch.float32, torch.float64):
        q = torch.tensor(
            [0.0, 1e-12, 1e-6, 9.99e-4, 1.001e-3, 0.3, 20.0], dtype=dtype, requires_grad=True
        )
        u = mapo_link(q)
        u.sum().backward()
        assert u.isfinite().all() and q.grad.isfinite().all() and float(u[0]) == 1.0
        x = q.detach().double()
        exact = torch.where(x > 1e-2, (x.expm1() - x * x.exp()) / x.expm1().square(), -0.5 + x / 6)
        torch.testing.assert_close(q.grad.double(), exact, rtol=1e-3, atol=2e-5)
    assert torch.autograd.gradcheck(
        mapo_link, torch.tensor([1e-4, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    )


@pytest.mark.parametrize(
    "loss",
    [
        mapo_code_loss,
        lambda e: mapo_loss(e, beta=8.0),
        lambda e: mapo_loss(e, beta=8.0, link_form="power"),
    ],
)
def test_rising_in_the_chosen_and_falling_in_the_rejected_error(loss) -> None:
    policy = torch.rand(
        200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    loss(policy).sum().backward()
    assert (policy.grad[:, 0] > 0).all() and (policy.grad[:, 1] <= 0).all()
    small = (policy.detach() * 0.02).requires_grad_()
    assert torch.autograd.gradcheck(loss, small)


def test_orpo_golden_values_and_signs() -> None:
    pair = errors((0.10, 0.12))
    assert float(diffusion_orpo_loss(pair)) == pytest.approx(0.168319717973, abs=1e-9)
    assert float(diffusion_orpo_loss(pair, sign="legacy")) == pytest.approx(
        0.170319717973, abs=1e-9
    )
    policy = errors((0.10, 0.12), grad=True)
    diffusion_orpo_loss(policy).sum().backward()
    legacy = errors((0.10, 0.12), grad=True)
    diffusion_orpo_loss(legacy, sign="legacy").sum().backward()
    assert (
        policy.grad[0, 0] > 1 > legacy.grad[0, 0]
    )  # the published sign rewards a larger error of the chosen image
    assert policy.grad[0, 1] < 0 < legacy.grad[0, 1]
    assert math.isfinite(float(diffusion_orpo_loss(errors((0.0, 1e6)))))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MaPOConfig(form="v3"), "form: expected one of code, paper"),
        (lambda: MaPOConfig(link_form="log"), "link_form: expected one of scale, power"),
        (lambda: MaPOConfig(beta=0.0), "beta"),
        (lambda: MaPOConfig(reduction="sum"), "reduction: the link of MaPO is 0"),
        (lambda: MaPOConfig(margin_scale=-1.0), "margin_scale"),
        (lambda: DiffusionORPOConfig(sign="plus"), "sign: expected one of correct, legacy"),
    ],
)
def test_mistakes(make, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()
    with pytest.raises(ValueError, match="link_form"):
        mapo_loss(errors((0.1, 0.2)), beta=1.0, link_form="log")
    with pytest.raises(ValueError, match="sign"):
        diffusion_orpo_loss(errors((0.1, 0.2)), sign="plus")


@pytest.mark.parametrize("value", [50.0, 200.0, 2000.0])
def test_the_link_has_a_finite_gradient_at_large_errors(value: float) -> None:
    q = torch.tensor(value, requires_grad=True)
    mapo_link(q).backward()
    assert q.grad is not None and torch.isfinite(q.grad) and float(q.grad) <= 0


def test_a_beta_that_multiplies_no_errors_is_not_explained_as_one() -> None:
    assert MaPOConfig().error_beta is None and DiffusionORPOConfig().error_beta is None
