"""Per-image denoising errors - the ELBO terms - and what every preference loss makes of them.

Notation: m is the policy's error of one image (mean of squares over its N latent elements), r the reference's at the *identical*
noisy sample, m - r the error change; the implicit reward is minus that, times beta/2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def denoising_errors(
    prediction: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    mask: Tensor | None = None,
) -> Tensor:
    """Squared errors of each sample, in float32 or wider whatever the network's precision.

    Args:
        prediction (`Tensor`): (n, ...).
        target (`Tensor`): (n, ...).
        weight (`Tensor`, *optional*): (n,), multiplies each sample's error (e.g. `min_snr_weight`).
        reduction (`str`, *optional*, defaults to `"mean"`): ``mean`` or ``sum`` over the elements of one sample.
        mask (`Tensor`, *optional*): broadcastable to (n, ...); ``mean`` divides by the mask's sum, not by N.

    Returns:
        `Tensor`: (n,).

    Raises:
        ValueError: on an unknown reduction or unequal shapes.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected mean or sum, got {reduction!r}")
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction and target differ in shape: {tuple(prediction.shape)} and {tuple(target.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    squares = (prediction.to(dtype) - target.to(dtype)).square()
    count: Tensor | int = squares[0].numel()
    if mask is not None:
        mask = mask.to(dtype).expand_as(squares)
        squares, count = squares * mask, mask.flatten(1).sum(1)
    errors = squares.flatten(1).sum(1)
    if reduction == "mean":
        errors = errors / count
    return errors if weight is None else errors * weight.to(errors)


def implicit_rewards(policy_errors: Tensor, reference_errors: Tensor, beta: float) -> Tensor:
    """-(beta/2) (m - r): how much better than the reference the policy denoises each image (methods.md 13.2). Any shape.

    This is the package's one beta convention, on per-image *mean* errors: ours is 2 x the beta of diffusers' SD script (which has
    no 1/2) and N x the beta of sum-of-squares codes.
    """
    return -(beta / 2) * (policy_errors - reference_errors)


def effective_beta(beta: float, num_elements: int, reduction: str = "mean") -> float:
    """The coefficient that multiplies the *summed* squared error of one image, beta/(2N): comparable across latent sizes."""
    return beta / (2 * num_elements) if reduction == "mean" else beta / 2


def convert_errors(errors: Tensor, alpha: Tensor, sigma: Tensor, source: str, space: str) -> Tensor:
    """Re-expresses errors of one space in another (methods.md 13.1).

    Args:
        errors (`Tensor`): (n,) errors in `source` space.
        alpha, sigma (`Tensor`): (n,) coefficients of x_t = alpha x0 + sigma eps.
        source, space (`str`): ``epsilon``, ``sample`` (x0), ``v_prediction`` (variance preserving) or ``flow_matching`` (velocity).
    """
    alpha, sigma = alpha.to(errors), sigma.to(errors)
    # Each entry turns an error of that space into the error of x0.
    to_x0 = {
        "epsilon": (sigma / alpha).square(),
        "sample": torch.ones_like(sigma),
        "v_prediction": sigma.square(),
        "flow_matching": sigma.square(),
    }
    for name in (source, space):
        if name not in to_x0:
            raise ValueError(f"error space: expected one of {', '.join(to_x0)}, got {name!r}")
    return errors * to_x0[source] / to_x0[space]


def min_snr_weight(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Min-SNR-gamma weights (Hang et al. 2023, arXiv 2303.09556) of the native error, (n,); the same for policy and reference."""
    clipped = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        return gamma / snr.clamp(
            min=gamma
        )  # min(snr, gamma) / snr, which is 1 also at an SNR of zero
    if prediction_type == "v_prediction":
        return clipped / (snr + 1)
    if prediction_type == "sample":
        return clipped
    raise ValueError(
        f"snr_gamma: min-SNR weights are not defined for {prediction_type!r} models; leave snr_gamma unset"
    )


def group_noise(
    shape: Sequence[int],
    k: int,
    generators: Sequence[torch.Generator],
    *,
    shared: bool = True,
    offset: float = 0.0,
) -> Tensor:
    """Gaussian noise for groups of k images, (g, k, *shape) float32 on the CPU, one generator per group.

    Because each group owns its generator, the noise does not depend on how groups are spread over batches and processes.

    Args:
        shape (`Sequence[int]`): of one latent, (C, H, W).
        k (`int`): images per group.
        generators (`Sequence[torch.Generator]`): one per group.
        shared (`bool`, *optional*, defaults to `True`): one draw for all images of the group, as all published pair codes do.
        offset (`float`, *optional*, defaults to `0.0`): adds ``offset * randn(C, 1, 1)``, *before* the noise is shared.
    """
    draws = []
    for generator in generators:
        noise = torch.randn((1 if shared else k, *shape), generator=generator)
        if offset:
            noise = noise + offset * torch.randn(
                (len(noise), shape[0], *[1] * (len(shape) - 1)), generator=generator
            )
        draws.append(noise.expand(k, *shape))
    return torch.stack(draws)
