"""A network that predicts at noisy latents: the policy, or the model it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..likelihood import NoisingProcess, denoising_errors, min_snr_weight
from .batch import Batch

Forward = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]


class Denoiser:
    """Predict at noisy latents, and measure the denoising errors of a batch.

    Args:
        forward: (noisy latents (n, ...), model times (n,), condition) -> output (n, ...).
        dtype (`torch.dtype`): what latents and condition are cast to before the forward pass.
        process (`NoisingProcess`): noises the training images.
        autocast: makes the context in which `errors` runs the forward pass.
        snr_gamma (`float`, *optional*): min-SNR weighting of the errors; None means none.
        reduction (`str`): `mean` or `sum` over the elements of a latent.
    """

    def __init__(
        self,
        forward: Forward,
        dtype: torch.dtype,
        process: NoisingProcess,
        autocast: Callable[[], AbstractContextManager[None]],
        *,
        snr_gamma: float | None = None,
        reduction: str = "mean",
    ) -> None:
        self.forward, self.dtype, self.process, self.autocast = forward, dtype, process, autocast
        self.snr_gamma, self.reduction = snr_gamma, reduction

    def predict(self, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """The network's output (n, ...), in the run's precision.

        Args:
            noisy (`Tensor`): (n, C, H, W).
            times (`Tensor`): (n,), as the network expects them.
            condition (`dict[str, Tensor]`): n rows each.
        """
        cast = {name: value.to(self.dtype) for name, value in condition.items()}
        return self.forward(noisy.to(self.dtype), times, cast)

    def errors(self, batch: Batch) -> Tensor:
        """Denoising errors (g, k) at the batch's own noise and times."""
        g, k = len(batch), batch.k
        x0, noise = batch.x0.flatten(0, 1), batch.noise.flatten(0, 1)
        times = batch.times.repeat_interleave(k)
        process = self.process
        noisy = process.add_noise(x0, noise, times)
        with self.autocast():
            prediction = self.predict(
                noisy, process.model_times(times).to(noisy.device), batch.condition
            )
        weight = None
        if self.snr_gamma is not None:
            weight = min_snr_weight(process.snr(times), self.snr_gamma, process.prediction_type)
            weight = weight.to(noisy.device)
        target = process.target(x0, noise, times)
        return denoising_errors(prediction, target, weight, self.reduction).unflatten(0, (g, k))
