"""Stochastic sampler steps as Gaussian transitions with log-probabilities: the core of D3PO and every on-policy method.

DDIM with eta (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16) for variance-preserving models, the flow SDE (Flow-GRPO,
arXiv 2505.05470) for rectified flow. All in float32 or wider; a log-probability is the mean over the elements of a sample, as in the
published codes, or their sum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .schedules import implied_x0_eps

MIN_STD = 1e-4


def _wide(value: Tensor | float, like: Tensor) -> Tensor:
    """A scalar or (n,) coefficient as a tensor that broadcasts over `like` (n, ...), in float32 or wider."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    value = torch.as_tensor(value, dtype=torch.float64).to(like.device, dtype)
    return value.reshape(-1, *[1] * (like.ndim - 1)) if value.ndim else value


def gaussian_log_prob(sample: Tensor, mean: Tensor, std: Tensor, reduce: str = "mean") -> Tensor:
    """log N(sample; mean, std^2) over the elements of each sample, (n,); the sample is a constant (no gradient flows into it).

    Raises:
        ValueError: when a standard deviation is under 1e-4: the step is deterministic and has no density.
    """
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce: expected mean or sum, got {reduce!r}")
    if (std < MIN_STD).any():
        raise ValueError(
            f"std: a step with standard deviation {float(std.min()):.2g} is deterministic and has no log-probability; "
            "use eta > 0 and leave out the last step (t = 0)"
        )
    elements = (
        -(sample.detach().to(mean) - mean).square() / (2 * std.square())
        - std.log()
        - 0.5 * math.log(2 * math.pi)
    )
    return elements.flatten(1).mean(1) if reduce == "mean" else elements.flatten(1).sum(1)


def ddim_step(
    *,
    model_output: Tensor,
    sample: Tensor,
    alpha_bar: Tensor | float,
    alpha_bar_prev: Tensor | float,
    eta: float,
    prediction_type: str = "epsilon",
    clip_range: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x_prev given x_t (Song et al. 2021, eq. 12 and 16).

    Args:
        model_output, sample (`Tensor`): (n, ...).
        alpha_bar, alpha_bar_prev (`Tensor` or `float`): scalars or (n,).
        eta (`float`): 0 is deterministic, 1 ancestral.
        prediction_type (`str`): ``epsilon``, ``v_prediction`` or ``sample``.
        clip_range (`float`, *optional*): the clean estimate is clamped to it, the noise estimate is not, as diffusers' DDIM does
            under `clip_sample`.

    Returns:
        (mean (n, ...), std broadcastable to it).
    """
    bar, bar_prev = _wide(alpha_bar, sample), _wide(alpha_bar_prev, sample)
    output, x_t = model_output.to(bar.dtype), sample.to(bar.dtype)
    alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
    x0, eps = implied_x0_eps(output, x_t, alpha, sigma, prediction_type)
    if clip_range is not None:
        x0 = x0.clamp(-clip_range, clip_range)
    variance = (1 - bar_prev) / (1 - bar) * (1 - bar / bar_prev)
    std = eta * variance.clamp(min=0).sqrt()
    mean = bar_prev.sqrt() * x0 + (1 - bar_prev - std.square()).clamp(min=0).sqrt() * eps
    return mean, std


def ddim_step_log_prob(
    *,
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    alpha_bar: Tensor | float,
    alpha_bar_prev: Tensor | float,
    eta: float,
    prediction_type: str = "epsilon",
    reduce: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of the stored `prev_sample` under a DDIM step; arguments as `ddim_step`.

    Returns:
        (log_prob (n,), mean (n, ...), std broadcastable to mean).
    """
    mean, std = ddim_step(
        model_output=model_output,
        sample=sample,
        alpha_bar=alpha_bar,
        alpha_bar_prev=alpha_bar_prev,
        eta=eta,
        prediction_type=prediction_type,
    )
    return gaussian_log_prob(prev_sample, mean, std, reduce), mean, std


def flow_sde_step(
    *,
    model_output: Tensor,
    sample: Tensor,
    sigma: Tensor | float,
    sigma_prev: Tensor | float,
    eta: float,
    legacy_first_step: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of one Euler-Maruyama step of the flow SDE from `sigma` down to `sigma_prev` (Flow-GRPO's code).

    Args:
        model_output (`Tensor`): velocity, (n, ...).
        sample (`Tensor`): (n, ...).
        sigma, sigma_prev (`Tensor` or `float`): scalars or (n,), sigma_prev < sigma <= 1.
        eta (`float`): noise level; the diffusion is eta sqrt(sigma / (1 - sigma)), at sigma = 1 eta sqrt(1 / (1 - sigma_prev)).
        legacy_first_step: at sigma = 1 eta sqrt(sigma_prev / (1 - sigma_prev)), as runs of earlier versions began.
    """
    now, then = _wide(sigma, sample), _wide(sigma_prev, sample)
    velocity, x = model_output.to(now.dtype), sample.to(now.dtype)
    # At sigma = 1 the diffusion is infinite; the published code takes the next sigma there, in the denominator alone.
    bounded = torch.where(now >= 1, then, now)
    diffusion = eta * ((bounded if legacy_first_step else now) / (1 - bounded)).sqrt()
    dt = then - now
    drift = diffusion.square() / (2 * now)
    mean = x * (1 + drift * dt) + velocity * (1 + drift * (1 - now)) * dt
    return mean, diffusion * (-dt).sqrt()


def flow_sde_step_log_prob(
    *,
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    sigma: Tensor | float,
    sigma_prev: Tensor | float,
    eta: float,
    reduce: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of the stored `prev_sample` under a flow-SDE step; arguments as `flow_sde_step`.

    Returns:
        (log_prob (n,), mean (n, ...), std of the step, broadcastable to mean).
    """
    mean, std = flow_sde_step(
        model_output=model_output, sample=sample, sigma=sigma, sigma_prev=sigma_prev, eta=eta
    )
    return gaussian_log_prob(prev_sample, mean, std, reduce), mean, std
