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
        return self.errors_of(batch, *self.outputs(batch))

    def outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run the network on a batch at its own noise and times.

        Args:
            batch (`Batch`): g groups of k images.

        Returns:
            `tuple[Tensor, Tensor]`: What the network predicts, and what a perfect one
            would, each (g k, C, H, W).
        """
        x0, noise = batch.x0.flatten(0, 1), batch.noise.flatten(0, 1)
        times = batch.times.repeat_interleave(batch.k)
        schedule = self.schedule
        noisy = schedule.add_noise(x0, noise, times)
        with self.autocast():
            prediction = self.predict(
                noisy, schedule.model_times(times).to(noisy.device), batch.condition
            )
        return prediction, schedule.target(x0, noise, times)

    def errors_of(self, batch: Batch, prediction: Tensor, target: Tensor) -> Tensor:
        """Measure the errors of `outputs`.

        Args:
            batch (`Batch`): g groups of k images.
            prediction (`Tensor`): (g k, C, H, W).
            target (`Tensor`): (g k, C, H, W).

        Returns:
            `Tensor`: One error per image, (g, k).
        """
        weight = None
        if self.snr_gamma is not None:
            times, schedule = batch.times.repeat_interleave(batch.k), self.schedule
            weight = min_snr_weight(schedule.snr(times), self.snr_gamma, schedule.prediction_type)
            weight = weight.to(prediction.device)
        errors = denoising_errors(prediction, target, weight, self.reduction)
        return errors.unflatten(0, (len(batch), batch.k))
