"""Sampler steps as Gaussian transitions with log-probabilities, for on-policy methods.

DDIM with eta (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16) is for
variance-preserving models, the flow SDE (Flow-GRPO, Liu et al. 2025, arXiv 2505.05470)
for rectified flow. Other steps for rectified flow are DanceGRPO's SDE (Xue et al. 2025,
arXiv 2505.07818) and coefficient-preserving sampling (CPS, Wang and Yu 2025, arXiv
2509.05952). Everything is computed in float32 or wider. A log-probability is the
mean over the elements of a sample, as in the published codes, or their sum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .schedules import implied_x0_eps

MIN_STD = 1e-4


def _wide(value: Tensor | float, like: Tensor) -> Tensor:
    """Convert a scalar or (n,) coefficient so that it broadcasts over `like` (n, ...).

    The result is float32 or wider.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    value = torch.as_tensor(value, dtype=torch.float64).to(like.device, dtype)
    return value.reshape(-1, *[1] * (like.ndim - 1)) if value.ndim else value


def gaussian_log_prob(sample: Tensor, mean: Tensor, std: Tensor, reduce: str = "mean") -> Tensor:
    """Compute log N(sample; mean, std^2) over the elements of each sample.

    Args:
        sample (`Tensor`): (n, ...). No gradient flows into it.
        mean (`Tensor`): (n, ...).
        std (`Tensor`): broadcastable to (n, ...), at least 1e-4.
        reduce (`str`, *optional*, defaults to `"mean"`): ``mean`` or ``sum`` over the
            elements of a sample.

    Returns:
        `Tensor`: (n,).

    Raises:
        ValueError: a standard deviation under 1e-4, as the step is then deterministic
            and has no density; or an unknown reduction.

    Example:
        ```python
        sample = mean = torch.zeros(1, 4, 8, 8)
        log_prob = gaussian_log_prob(sample, mean, torch.tensor(1.0))
        torch.testing.assert_close(log_prob, torch.tensor([-0.918939]))
        ```
    """
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce: expected mean or sum, got {reduce!r}")
    if (std < MIN_STD).any():
        raise ValueError(
            f"std: a step with standard deviation {float(std.min()):.2g} is deterministic and has "
            "no log-probability; "
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
    """Compute mean and standard deviation of a DDIM step from x_t to x_prev.

    See Song et al. 2021, arXiv 2010.02502, eq. 12 (the step) and eq. 16 (its
    deviation).

    Args:
        model_output (`Tensor`): output of the network, (n, ...).
        sample (`Tensor`): x_t, (n, ...).
        alpha_bar, alpha_bar_prev (`Tensor` or `float`): at both ends of the step,
            scalars or (n,).
        eta (`float`): 0 is deterministic, 1 is ancestral.
        prediction_type (`str`, *optional*, defaults to `"epsilon"`): ``epsilon``,
            ``v_prediction`` or ``sample``.
        clip_range (`float`, *optional*): clamp the clean estimate to it, and leave the
            noise estimate as it is. diffusers' DDIM does so under `clip_sample`.

    Returns:
        `tuple[Tensor, Tensor]`: mean (n, ...), and a deviation that broadcasts to it.

    Example:
        ```python
        output, sample = torch.zeros(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
        mean, std = ddim_step(
            model_output=output,
            sample=sample,
            alpha_bar=0.5,
            alpha_bar_prev=0.6,
            eta=1.0,
        )
        x_prev = mean + std * torch.randn_like(mean)
        ```
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
    """Compute the log-probability of a stored sample under a DDIM step.

    Args:
        prev_sample (`Tensor`): the stored x_prev, (n, ...).
        reduce (`str`, *optional*, defaults to `"mean"`): ``mean`` or ``sum`` over the
            elements of a sample.
        model_output, sample, alpha_bar, alpha_bar_prev, eta, prediction_type: see
            `ddim_step`.

    Returns:
        `tuple[Tensor, Tensor, Tensor]`: log-probability (n,), mean (n, ...), and a
        deviation that broadcasts to the mean.

    Raises:
        ValueError: a step without noise, see `gaussian_log_prob`.

    Example:
        ```python
        output, sample, prev_sample = torch.randn(3, 1, 4, 8, 8)
        log_prob, mean, std = ddim_step_log_prob(
            model_output=output,
            sample=sample,
            prev_sample=prev_sample,
            alpha_bar=0.5,
            alpha_bar_prev=0.6,
            eta=1.0,
        )
        assert log_prob.shape == (1,)
        ```
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
    """Compute mean and standard deviation of one Euler-Maruyama step of the flow SDE.

    See Flow-GRPO, Liu et al. 2025, arXiv 2505.05470, section "From ODE to SDE", and
    its published code.

    Args:
        model_output (`Tensor`): velocity, (n, ...).
        sample (`Tensor`): (n, ...).
        sigma, sigma_prev (`Tensor` or `float`): at both ends of the step, scalars or
            (n,), with sigma_prev < sigma <= 1.
        eta (`float`): noise level. The diffusion is eta sqrt(sigma / (1 - sigma)), and
            eta sqrt(1 / (1 - sigma_prev)) at sigma = 1.
        legacy_first_step (`bool`, *optional*, defaults to `False`): take the diffusion
            eta sqrt(sigma_prev / (1 - sigma_prev)) at sigma = 1, as earlier versions
            did.

    Returns:
        `tuple[Tensor, Tensor]`: mean (n, ...), and a deviation that broadcasts to it.

    Example:
        ```python
        velocity, sample = torch.randn(2, 1, 16, 8, 8)
        mean, std = flow_sde_step(
            model_output=velocity, sample=sample, sigma=0.9, sigma_prev=0.8, eta=0.7
        )
        ```
    """
    now, then = _wide(sigma, sample), _wide(sigma_prev, sample)
    velocity, x = model_output.to(now.dtype), sample.to(now.dtype)
    # At sigma = 1 the diffusion is infinite. The published code takes the next sigma
    # there, in the denominator alone.
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
    """Compute the log-probability of a stored sample under a step of the flow SDE.

    Args:
        prev_sample (`Tensor`): the stored sample at `sigma_prev`, (n, ...).
        reduce (`str`, *optional*, defaults to `"mean"`): ``mean`` or ``sum`` over the
            elements of a sample.
        model_output, sample, sigma, sigma_prev, eta: see `flow_sde_step`.

    Returns:
        `tuple[Tensor, Tensor, Tensor]`: log-probability (n,), mean (n, ...), and a
        deviation that broadcasts to the mean.

    Raises:
        ValueError: a step without noise, see `gaussian_log_prob`.

    Example:
        ```python
        velocity, sample, prev_sample = torch.randn(3, 1, 16, 8, 8)
        log_prob, mean, std = flow_sde_step_log_prob(
            model_output=velocity,
            sample=sample,
            prev_sample=prev_sample,
            sigma=0.9,
            sigma_prev=0.8,
            eta=0.7,
        )
        assert log_prob.shape == (1,)
        ```
    """
    mean, std = flow_sde_step(
        model_output=model_output, sample=sample, sigma=sigma, sigma_prev=sigma_prev, eta=eta
    )
    return gaussian_log_prob(prev_sample, mean, std, reduce), mean, std


def dance_sde_step(
    *,
    model_output: Tensor,
    sample: Tensor,
    sigma: Tensor | float,
    sigma_prev: Tensor | float,
    eta: float,
) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation of one step of DanceGRPO's SDE.

    See DanceGRPO, Xue et al. 2025, arXiv 2505.07818, and its published code. The
    diffusion is constant, while that of `flow_sde_step` grows with sigma.

    Args:
        model_output (`Tensor`): velocity, (n, ...).
        sample (`Tensor`): (n, ...).
        sigma, sigma_prev (`Tensor` or `float`): at both ends of the step, scalars or
            (n,), with sigma_prev < sigma <= 1.
        eta (`float`): the diffusion.

    Returns:
        `tuple[Tensor, Tensor]`: mean (n, ...), and a deviation that broadcasts to it.

    Example:
        ```python
        velocity, sample = torch.randn(2, 1, 16, 8, 8)
        mean, std = dance_sde_step(
            model_output=velocity, sample=sample, sigma=0.9, sigma_prev=0.8, eta=0.3
        )
        ```
    """
    now, then = _wide(sigma, sample), _wide(sigma_prev, sample)
    velocity, x = model_output.to(now.dtype), sample.to(now.dtype)
    dt = then - now
    clean = x - now * velocity
    score = -(x - (1 - now) * clean) / now.square()
    mean = x + velocity * dt - 0.5 * eta**2 * score * dt
    return mean, eta * (-dt).sqrt()


def cps_step(
    *,
    model_output: Tensor,
    sample: Tensor,
    sigma: Tensor | float,
    sigma_prev: Tensor | float,
    eta: float,
) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation of one coefficient-preserving step.

    See CPS, Wang and Yu 2025, arXiv 2509.05952, and Flow-GRPO's published code. A
    share of the noise at `sigma_prev` is new, so that the sample has exactly the noise
    that the network expects there.

    Args:
        model_output (`Tensor`): velocity, (n, ...).
        sample (`Tensor`): (n, ...).
        sigma, sigma_prev (`Tensor` or `float`): at both ends of the step, scalars or
            (n,), with sigma_prev < sigma <= 1.
        eta (`float`): in [0, 1]. 0 is deterministic, and at 1 all noise is new.

    Returns:
        `tuple[Tensor, Tensor]`: mean (n, ...), and a deviation that broadcasts to it.

    Example:
        ```python
        velocity, sample = torch.randn(2, 1, 16, 8, 8)
        mean, std = cps_step(
            model_output=velocity, sample=sample, sigma=0.9, sigma_prev=0.8, eta=0.7
        )
        ```
    """
    now, then = _wide(sigma, sample), _wide(sigma_prev, sample)
    velocity, x = model_output.to(now.dtype), sample.to(now.dtype)
    std = then * math.sin(eta * math.pi / 2)
    clean, noise = x - now * velocity, x + (1 - now) * velocity
    mean = (1 - then) * clean + (then.square() - std.square()).clamp(min=0).sqrt() * noise
    return mean, std


def unscaled_log_prob(sample: Tensor, mean: Tensor) -> Tensor:
    """Compute the surrogate log-probability of a step of CPS.

    The published code leaves out the variance, so that all steps have gradients of one
    size.

    Args:
        sample (`Tensor`): (n, ...). No gradient flows into it.
        mean (`Tensor`): (n, ...).

    Returns:
        `Tensor`: minus the squared distance, averaged over the elements, (n,).

    Example:
        ```python
        sample, mean = torch.ones(1, 4, 8, 8), torch.zeros(1, 4, 8, 8)
        assert unscaled_log_prob(sample, mean).item() == -1.0
        ```
    """
    return -(sample.detach().to(mean) - mean).square().flatten(1).mean(1)
