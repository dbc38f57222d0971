"""Denoising errors of single images, and what preference losses make of them.

An error is one term of the evidence lower bound (ELBO) of an image. Below, m is the
policy's error (the mean of squares over the N latent elements) and r is the reference's
error at the same noisy sample. The implicit reward is -(beta/2) (m - r).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _residuals(prediction: Tensor, target: Tensor) -> Tensor:
    """Subtract in float32, or wider if one of both is."""
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    return prediction.to(dtype) - target.to(dtype)


def denoising_errors(
    prediction: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    mask: Tensor | None = None,
) -> Tensor:
    """Compute the squared error of each sample.

    The result is float32 or wider, whatever the precision of the network.

    Args:
        prediction (`Tensor`): output of the network, (n, ...).
        target (`Tensor`): output of a perfect network, (n, ...).
        weight (`Tensor`, *optional*): factors of the samples' errors, (n,), such as
            `min_snr_weight`.
        reduction (`str`, *optional*, defaults to `"mean"`): ``mean`` or ``sum`` over
            the elements of a sample.
        mask (`Tensor`, *optional*): which elements count, broadcastable to (n, ...).
            With ``mean``, the sum is divided by the sum of the mask.

    Returns:
        `Tensor`: (n,).

    Raises:
        ValueError: unknown reduction, or unequal shapes.

    Example:
        ```python
        prediction, target = torch.zeros(2, 4, 8, 8), torch.ones(2, 4, 8, 8)
        assert denoising_errors(prediction, target).tolist() == [1.0, 1.0]
        ```
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected mean or sum, got {reduction!r}")
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction and target differ in shape: {tuple(prediction.shape)} and "
            f"{tuple(target.shape)}"
        )
    squares = _residuals(prediction, target).square()
    count: Tensor | int = squares[0].numel()
    if mask is not None:
        mask = mask.to(squares.dtype).expand_as(squares)
        squares, count = squares * mask, mask.flatten(1).sum(1)
    errors = squares.flatten(1).sum(1)
    if reduction == "mean":
        errors = errors / count
    return errors if weight is None else errors * weight.to(errors)


def implicit_rewards(policy_errors: Tensor, reference_errors: Tensor, beta: float) -> Tensor:
    """Compute how much better the policy denoises each image than the reference does.

    The reward is -(beta/2) (m - r), the argument of Diffusion-DPO's loss for one image
    (Wallace et al. 2023, arXiv 2311.12908, eq. 14). Every method of this package reads
    beta so, on mean errors. In the script of diffusers, which has no 1/2, the same
    strength is beta/2. In codes that sum over the N latent elements it is beta/N.

    Args:
        policy_errors (`Tensor`): m, any shape.
        reference_errors (`Tensor`): r, same shape.
        beta (`float`): strength of the pull to the reference.

    Returns:
        `Tensor`: same shape. Positive where the policy is better.

    Example:
        ```python
        policy, reference = torch.tensor([0.9]), torch.tensor([1.0])
        rewards = implicit_rewards(policy, reference, beta=2000.0)
        torch.testing.assert_close(rewards, torch.tensor([100.0]))
        ```
    """
    return -(beta / 2) * (policy_errors - reference_errors)


def effective_beta(beta: float, num_elements: int, reduction: str = "mean") -> float:
    """Compute the factor of the summed squared error of one image.

    It can be compared between models with latents of different sizes.

    Args:
        beta (`float`): as in `implicit_rewards`.
        num_elements (`int`): elements of one latent, N.
        reduction (`str`, *optional*, defaults to `"mean"`): that of `denoising_errors`.

    Returns:
        `float`: beta/(2N) with ``mean``, beta/2 with ``sum``.

    Example:
        ```python
        assert effective_beta(5000.0, num_elements=4 * 64 * 64) == 5000 / 2 / 16384
        ```
    """
    return beta / (2 * num_elements) if reduction == "mean" else beta / 2


def convert_errors(errors: Tensor, alpha: Tensor, sigma: Tensor, source: str, space: str) -> Tensor:
    """Convert errors from one prediction space to another.

    A prediction of x0 with the error e has, in the other spaces, e times a ratio of
    alpha and sigma, because x_t = alpha x0 + sigma eps is given (Salimans & Ho 2022,
    arXiv 2202.00512, section 4).

    Args:
        errors (`Tensor`): errors in the space `source`, (n,).
        alpha, sigma (`Tensor`): share of signal and of noise in each sample, (n,).
        source, space (`str`): ``epsilon``, ``sample`` (x0), ``v_prediction`` (variance
            preserving) or ``flow_matching`` (velocity).

    Returns:
        `Tensor`: errors in the space `space`, (n,).

    Raises:
        ValueError: unknown space.

    Example:
        ```python
        alpha, sigma = torch.tensor([0.8]), torch.tensor([0.6])
        errors = convert_errors(torch.tensor([16.0]), alpha, sigma, "epsilon", "sample")
        torch.testing.assert_close(errors, torch.tensor([9.0]))
        ```
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
    """Compute Min-SNR-gamma weights of errors in the model's own prediction space.

    Policy and reference get the same weights (Hang et al. 2023, arXiv 2303.09556,
    section 3.4).

    Args:
        snr (`Tensor`): signal-to-noise ratios alpha^2 / sigma^2, (n,).
        gamma (`float`): where the ratio is clamped. The paper takes 5.
        prediction_type (`str`): ``epsilon``, ``v_prediction`` or ``sample``.

    Returns:
        `Tensor`: (n,).

    Raises:
        ValueError: other prediction types, for which the weights are not defined.

    Example:
        ```python
        snr = torch.tensor([1.0, 10.0])
        weights = min_snr_weight(snr, gamma=5.0, prediction_type="epsilon")
        assert weights.tolist() == [1.0, 0.5]
        ```
    """
    clipped = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        # min(snr, gamma) / snr, which is 1 also at an SNR of zero.
        return gamma / snr.clamp(min=gamma)
    if prediction_type == "v_prediction":
        return clipped / (snr + 1)
    if prediction_type == "sample":
        return clipped
    raise ValueError(
        f"snr_gamma: min-SNR weights are not defined for {prediction_type!r} models; leave "
        "snr_gamma unset"
    )


def group_noise(
    shape: Sequence[int],
    k: int,
    generators: Sequence[torch.Generator],
    *,
    shared: bool = True,
    offset: float = 0.0,
) -> Tensor:
    """Draw Gaussian noise for groups of k images.

    Each group has its own generator. Its noise therefore does not depend on how groups
    are spread over batches and processes.

    Args:
        shape (`Sequence[int]`): of one latent, (C, H, W).
        k (`int`): images per group.
        generators (`Sequence[torch.Generator]`): one per group, on the CPU.
        shared (`bool`, *optional*, defaults to `True`): draw once for all images of a
            group, as all published pair codes do.
        offset (`float`, *optional*, defaults to `0.0`): add ``offset * randn(C, 1, 1)``
            before the noise is shared.

    Returns:
        `Tensor`: (groups, k, *shape), float32 on the CPU.

    Example:
        ```python
        noise = group_noise((4, 8, 8), 2, [torch.Generator().manual_seed(0)])
        assert noise.shape == (1, 2, 4, 8, 8)
        assert torch.equal(noise[0, 0], noise[0, 1])
        ```
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


def winner_safeguard(
    prediction: Tensor, target: Tensor, strength: float, winner: Tensor | None = None
) -> Tensor:
    """Compute how much of a rejected image's gradient lets no chosen error rise.

    lambda = (1 - mu) <E_w, E_w> / <E_w, E_l> within [0, 1], and 1 where the residuals
    E of the chosen (w) and the rejected (l) image do not point the same way. To first
    order, a step along grad m_w - lambda grad m_l then lowers m_w. Fu et al. 2025,
    arXiv 2511.03317; its code has one lambda for all pairs of a micro-batch.

    Args:
        prediction (`Tensor`): output of the network, (2 g, ...), chosen and rejected in
            turns.
        target (`Tensor`): output of a perfect network, (2 g, ...).
        strength (`float`): mu in [0, 1]. 0 leaves most gradients as they are, 1 takes
            away every one that could raise a chosen error.
        winner (`Tensor`, *optional*): index of the image to protect, (g,). Defaults to
            the chosen one of every pair.

    Returns:
        `Tensor`: lambda per pair, (g,), without gradient.

    Example:
        ```python
        chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0])
        prediction, target = torch.stack([chosen, rejected]), torch.zeros(2, 2)
        assert winner_safeguard(prediction, target, strength=0.0).tolist() == [0.5]
        ```
    """
    residuals = _residuals(prediction.detach(), target).flatten(1)
    chosen, rejected = residuals.unflatten(0, (-1, 2)).unbind(1)
    own, shared = chosen.square().sum(1), (chosen * rejected).sum(1)
    if winner is not None:
        own = torch.where(winner == 0, own, rejected.square().sum(1))
    share = (1 - strength) * own / torch.where(shared > 0, shared, 1.0)
    return torch.where(shared > 0, share.clamp(0, 1), 1.0)
