"""Stochastic steps over a scheduler's time grid, for samplers that have none.

One formula covers DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12), Euler ancestral
and their counterpart in flow matching. It is the posterior of ``y' = alpha' x0 + sigma'
eps'`` given ``y = alpha x0 + sigma eps``, with its standard deviation scaled by eta.
The flow SDE is the other kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError, UserError
from ..likelihood.transitions import flow_sde_step
from .noise_levels import Coordinates

KERNELS = ("ddim", "ancestral", "euler_maruyama")
AUTO = "auto"
DEFAULT_ETA = {"ddim": 1.0, "ancestral": 1.0, "euler_maruyama": 0.7}


def check_kernel(kernel: str | None, eta: float | None) -> float | None:
    """Check a kernel and its eta, and return the eta to use.

    Args:
        kernel (`str`, *optional*): one of `KERNELS`, or ``auto``.
        eta (`float`, *optional*): None takes the kernel's default.

    Returns:
        `float` or `None`: None without a kernel.

    Raises:
        ConfigError: an unknown kernel; an eta without a kernel, not above 0, above 1
            for ``ddim``, or other than 1 for ``ancestral``.
    """
    if kernel is None:
        if eta is not None:
            raise ConfigError(
                "eta",
                f"it belongs to kernel=, got eta={eta} without one; for the pipeline's own DDIM "
                f"write pipe_kwargs eta={eta}",
            )
        return None
    if kernel not in (*KERNELS, AUTO):
        raise ConfigError(
            "kernel",
            f"expected one of {', '.join(KERNELS)}, {AUTO} or None (the pipeline's scheduler), "
            f"got {kernel!r}",
        )
    kernel = "ddim" if kernel == AUTO else kernel
    value = DEFAULT_ETA[kernel] if eta is None else eta
    if (
        not 0 < value < float("inf")
        or (kernel == "ddim" and value > 1)
        or (kernel == "ancestral" and value != 1)
    ):
        limits = {"ddim": "in (0, 1]", "ancestral": "of 1", "euler_maruyama": "above 0"}[kernel]
        raise ConfigError(
            "eta",
            f"expected a number {limits} for kernel={kernel!r}, got {eta!r}; at 0 particles would "
            "never separate",
        )
    return value


def ddim_transition(
    x0: Tensor,
    sample: Tensor,
    now: Coordinates,
    then: Coordinates,
    eta: float,
    raw_x0: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Compute mean and standard deviation of a generalised DDIM step.

    It leads from any (alpha, sigma) to any other: ``std = eta (sigma'/sigma)
    sqrt(sigma^2 - (alpha/alpha')^2 sigma'^2)`` and ``mean = alpha' x0 + sqrt(sigma'^2 -
    std^2) eps``.

    Args:
        x0 (`Tensor`): clean predictions, (n, ...).
        sample (`Tensor`): y, (n, ...).
        now, then (`Coordinates`): of y and of the result.
        eta (`float`): 0 is deterministic, 1 is ancestral.
        raw_x0 (`Tensor`, *optional*): clean predictions before clipping, from which the
            noise estimate follows. None takes `x0`.

    Returns:
        `tuple[Tensor, float]`: mean (n, ...) and deviation.
    """
    if then.sigma == 0 or now.sigma == 0:
        return then.alpha * x0, 0.0
    eps = (sample.to(x0.dtype) - now.alpha * (x0 if raw_x0 is None else raw_x0)) / now.sigma
    ratio = now.alpha / then.alpha
    std = eta * then.sigma / now.sigma * max(now.sigma**2 - ratio**2 * then.sigma**2, 0.0) ** 0.5
    return then.alpha * x0 + max(then.sigma**2 - std**2, 0.0) ** 0.5 * eps, std


def transition(
    kernel: str,
    eta: float,
    model_output: Tensor,
    sample: Tensor,
    x0: Tensor,
    now: Coordinates,
    then: Coordinates,
    raw_x0: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Compute mean and standard deviation of one step of a kernel.

    Args:
        kernel (`str`): one of `KERNELS`.
        eta (`float`): of the kernel.
        model_output (`Tensor`): output of the network, (n, ...).
        sample, x0, now, then, raw_x0: see `ddim_transition`.

    Returns:
        `tuple[Tensor, float]`: mean (n, ...) and deviation.

    Raises:
        UserError: ``euler_maruyama`` on a scheduler that is not flow matching.
    """
    if kernel != "euler_maruyama":
        return ddim_transition(x0, sample, now, then, eta, raw_x0)
    if now.kind != "flow" or now.prediction != "flow":
        raise UserError(
            "kernel: euler_maruyama is for flow-matching models; use kernel='ddim' for this "
            "scheduler"
        )
    if then.sigma == 0:
        return x0, 0.0  # noise on the returned sample would only blur it
    mean, std = flow_sde_step(
        model_output=model_output, sample=sample, sigma=now.sigma, sigma_prev=then.sigma, eta=eta
    )
    return mean, float(std)


def draw(
    mean: Tensor,
    std: float,
    generator: torch.Generator | list[torch.Generator] | None,
    dtype: torch.dtype,
) -> Tensor:
    """Draw a sample of N(mean, std^2).

    Args:
        mean (`Tensor`): (n, ...).
        std (`float`): at 0 no number is drawn.
        generator (`torch.Generator` or one per row, *optional*): source of the noise.
        dtype (`torch.dtype`): of the result.

    Returns:
        `Tensor`: (n, ...).
    """
    if std == 0:
        return mean.to(dtype)
    from diffusers.utils.torch_utils import randn_tensor

    noise = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=torch.float32)
    return (mean + std * noise).to(dtype)
