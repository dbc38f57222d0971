"""The policy and the reference model: networks that predict at noisy latents."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..backbones.conditions import cast
from ..likelihood import NoiseSchedule, denoising_errors, min_snr_weight
from .batch import Batch

Forward = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]


class Denoiser:
    """A network that predicts at noisy latents.

    The policy and the frozen reference are both denoisers.

    Args:
        forward (`Callable`): Runs the network on noisy latents (n, C, H, W), model
            times (n,) and the condition. Returns (n, C, H, W).
        dtype (`torch.dtype`): Latents and condition are cast to it.
        schedule (`NoiseSchedule`): Adds noise to training images.
        autocast (`Callable`): Returns the context in which `errors` runs the network.
        snr_gamma (`float`, *optional*): Min-SNR weighting of the errors (Hang et al.
            2023, arXiv 2303.09556). None means no weighting.
        reduction (`str`, *optional*, defaults to `"mean"`): `mean` or `sum` over the
            elements of a latent.
    """

    def __init__(
        self,
        forward: Forward,
        dtype: torch.dtype,
        schedule: NoiseSchedule,
        autocast: Callable[[], AbstractContextManager[None]],
        *,
        snr_gamma: float | None = None,
        reduction: str = "mean",
    ) -> None:
        self.forward, self.dtype, self.schedule, self.autocast = forward, dtype, schedule, autocast
        self.snr_gamma, self.reduction = snr_gamma, reduction

    def predict(self, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Run the network in the run's precision.

        Args:
            noisy (`Tensor`): Noisy latents, (n, C, H, W).
            times (`Tensor`): Times as the network expects them, (n,).
            condition (`dict[str, Tensor]`): n rows each.

        Returns:
            `Tensor`: The output of the network, (n, C, H, W).
        """
        return self.forward(noisy.to(self.dtype), times, cast(condition, self.dtype))

    def errors(self, batch: Batch) -> Tensor:
        """Measure the denoising errors of a batch at its own noise and times.

        Args:
            batch (`Batch`): g groups of k images.

        Returns:
            `Tensor`: One error per image, (g, k).
        """
        g, k = len(batch), batch.k
        x0, noise = batch.x0.flatten(0, 1), batch.noise.flatten(0, 1)
        times = batch.times.repeat_interleave(k)
        schedule = self.schedule
        noisy = schedule.add_noise(x0, noise, times)
        with self.autocast():
            prediction = self.predict(
                noisy, schedule.model_times(times).to(noisy.device), batch.condition
            )
        weight = None
        if self.snr_gamma is not None:
            weight = min_snr_weight(schedule.snr(times), self.snr_gamma, schedule.prediction_type)
            weight = weight.to(noisy.device)
        target = schedule.target(x0, noise, times)
        return denoising_errors(prediction, target, weight, self.reduction).unflatten(0, (g, k))
