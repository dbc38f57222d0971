"""Noise schedules: how clean latents become noisy, and what networks predict.

Two families cover today's models. `VariancePreserving` (SD1, SD2, SDXL) is x_t =
alpha_t x0 + sigma_t eps on integer timesteps. `RectifiedFlow` (SD3, Flux) is x_s = (1 -
s) x0 + s eps on s in (0, 1]. Both have the methods of `NoiseSchedule`, so that no
trainer knows which of them it runs on.

A time below is an integer timestep (variance preserving) or a float sigma (flow). Times
have shape (n,) and broadcast over samples of shape (n, ...).
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def _over(coefficient: Tensor, sample: Tensor) -> Tensor:
    """Reshape (n,) to (n, 1, ...), in the sample's dtype but never below float32."""
    coefficient = coefficient.to(sample.device, torch.promote_types(sample.dtype, torch.float32))
    return coefficient.reshape(-1, *[1] * (sample.ndim - 1))


def implied_x0_eps(
    output: Tensor, sample: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """Compute the clean sample and the noise that a network's output implies.

    Args:
        output (`Tensor`): output of the network, (n, ...).
        sample (`Tensor`): noisy samples, (n, ...).
        alpha, sigma (`Tensor`): their shares of signal and noise, broadcastable to the
            samples.
        prediction_type (`str`): ``epsilon``, ``v_prediction`` or ``sample``.

    Returns:
        `tuple[Tensor, Tensor]`: x0 and eps, each (n, ...).

    Raises:
        ValueError: unknown prediction type.
    """
    if prediction_type == "epsilon":
        return (sample - sigma * output) / alpha, output
    if prediction_type == "v_prediction":
        return alpha * sample - sigma * output, sigma * sample + alpha * output
    if prediction_type == "sample":
        return output, (sample - alpha * output) / sigma
    raise ValueError(
        f"prediction_type: expected epsilon, v_prediction or sample, got {prediction_type!r}"
    )


class NoiseSchedule(Protocol):
    """A noise schedule, as the trainers and methods use it.

    Attributes:
        prediction_type (`str`): what the network outputs.
        num_timesteps (`int`): times of the training schedule.

    Example:
        ```python
        def loudest(schedule: NoiseSchedule, times: Tensor) -> Tensor:
            return schedule.snr(times).argmin()

        assert loudest(RectifiedFlow(), torch.tensor([0.1, 0.9])) == 1
        ```
    """

    prediction_type: str
    num_timesteps: int

    def alpha_sigma(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shares of signal and noise at `times`, each (n,)."""

    def model_times(self, times: Tensor) -> Tensor:
        """Convert `times` to what the network is given, (n,)."""

    def add_noise(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Mix clean samples with noise, (n, ...)."""

    def target(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return what a perfect network outputs, (n, ...)."""

    def to_x0(self, output: Tensor, sample: Tensor, times: Tensor) -> Tensor:
        """Compute the clean samples that an output implies, (n, ...)."""

    def to_eps(self, output: Tensor, sample: Tensor, times: Tensor) -> Tensor:
        """Compute the noise that an output implies, (n, ...)."""

    def snr(self, times: Tensor) -> Tensor:
        """Compute the signal-to-noise ratio, (n,)."""

    def fraction(self, times: Tensor) -> Tensor:
        """Convert `times` to shares of the schedule, (n,): 0 is clean, 1 is noise."""

    def renoise(self, sample: Tensor, times: Tensor, new_times: Tensor, noise: Tensor) -> Tensor:
        """Carry noisy samples to noisier times, (n, ...)."""


class _Schedule:
    """What both families compute from (alpha, sigma) alone."""

    def alpha_sigma(self, times: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def add_noise(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Mix clean samples with noise: x_t = alpha x0 + sigma noise.

        Args:
            x0 (`Tensor`): clean samples, (n, ...).
            noise (`Tensor`): standard normal, (n, ...).
            times (`Tensor`): (n,).

        Returns:
            `Tensor`: (n, ...) in the dtype of `x0`, computed in float32 or wider.
        """
        alpha, sigma = self.alpha_sigma(times)
        return (_over(alpha, x0) * x0 + _over(sigma, x0) * noise).to(x0.dtype)

    def snr(self, times: Tensor) -> Tensor:
        """Compute the signal-to-noise ratio alpha^2 / sigma^2, (n,)."""
        alpha, sigma = self.alpha_sigma(times)
        return (alpha / sigma).square()

    def renoise(self, sample: Tensor, times: Tensor, new_times: Tensor, noise: Tensor) -> Tensor:
        """Carry noisy samples to noisier times.

        The result has exactly the distribution of the schedule at the new times: x_s =
        k x_t + sqrt(sigma_s^2 - k^2 sigma_t^2) noise with k = alpha_s / alpha_t (Kingma
        et al. 2021, arXiv 2107.00630, appendix A.1).

        Args:
            sample (`Tensor`): samples at `times`, (n, ...).
            times (`Tensor`): (n,).
            new_times (`Tensor`): (n,), none of them less noisy than `times`.
            noise (`Tensor`): standard normal, (n, ...).

        Returns:
            `Tensor`: samples at `new_times`, (n, ...), float32 or wider.

        Raises:
            ValueError: a new time is less noisy than the old one.
        """
        (alpha, sigma), (new_alpha, new_sigma) = (
            self.alpha_sigma(times),
            self.alpha_sigma(new_times),
        )
        ratio = new_alpha / alpha
        variance = new_sigma.square() - (ratio * sigma).square()
        if (variance < -1e-12).any():
            raise ValueError("new_times: every time must be at least as noisy as the sample's own")
        return _over(ratio, sample) * sample + _over(variance.clamp(min=0).sqrt(), sample) * noise


class VariancePreserving(_Schedule):
    """The schedule of Stable Diffusion 1, 2 and XL: alpha_t^2 + sigma_t^2 = 1.

    alpha_t = sqrt(alpha_bar_t) and sigma_t = sqrt(1 - alpha_bar_t), at the timesteps t
    = 0, ..., T-1 (Ho et al. 2020, arXiv 2006.11239, eq. 4).

    Args:
        alphas_cumprod (`Tensor`): alpha_bar, (T,), decreasing, in (0, 1).
        prediction_type (`str`, *optional*, defaults to `"epsilon"`): what the network
            outputs: ``epsilon``, ``v_prediction`` or ``sample``.
        clip_range (`float`, *optional*): where the model's sampler clamps its clean
            estimates (`clip_sample` of diffusers).

    Raises:
        ValueError: unknown prediction type.

    Example:
        ```python
        schedule = VariancePreserving(torch.linspace(0.999, 0.005, 1000))
        x0, noise = torch.zeros(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
        times = torch.tensor([500])
        noisy = schedule.add_noise(x0, noise, times)
        again = schedule.to_x0(noise, noisy, times)
        torch.testing.assert_close(again, x0, atol=1e-5, rtol=0)
        ```
    """

    def __init__(
        self,
        alphas_cumprod: Tensor,
        prediction_type: str = "epsilon",
        clip_range: float | None = None,
    ) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                "prediction_type: expected epsilon, v_prediction or sample, got "
                f"{prediction_type!r}"
            )
        # In float64, as preference losses are made of small differences of errors,
        # which must not inherit the table's rounding.
        self.alphas_cumprod = alphas_cumprod.detach().to("cpu", torch.float64)
        self.prediction_type, self.clip_range = prediction_type, clip_range
        self.num_timesteps = len(alphas_cumprod)

    def alpha_sigma(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Look up the shares of signal and noise, each float64 (n,) on the CPU."""
        alpha_bar = self.alphas_cumprod[times.to(self.alphas_cumprod.device).long()]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def model_times(self, times: Tensor) -> Tensor:
        """Return the timesteps as int64, which the network is given."""
        return times.long()

    def fraction(self, times: Tensor) -> Tensor:
        """Convert timesteps to shares of the schedule in [0, 1), float64."""
        return times.double() / self.num_timesteps

    def target(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return what a perfect network outputs: eps, alpha eps - sigma x0, or x0.

        Args:
            x0 (`Tensor`): clean samples, (n, ...).
            noise (`Tensor`): the noise in the noisy samples, (n, ...).
            times (`Tensor`): (n,).
        """
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        alpha, sigma = self.alpha_sigma(times)
        return _over(alpha, x0) * noise - _over(sigma, x0) * x0

    def to_x0(self, output: Tensor, sample: Tensor, times: Tensor) -> Tensor:
        """Compute the clean samples that an output implies, (n, ...)."""
        alpha, sigma = (_over(c, sample) for c in self.alpha_sigma(times))
        return implied_x0_eps(output, sample, alpha, sigma, self.prediction_type)[0]

    def to_eps(self, output: Tensor, sample: Tensor, times: Tensor) -> Tensor:
        """Compute the noise that an output implies, (n, ...)."""
        alpha, sigma = (_over(c, sample) for c in self.alpha_sigma(times))
        return implied_x0_eps(output, sample, alpha, sigma, self.prediction_type)[1]


class RectifiedFlow(_Schedule):
    """The schedule of Stable Diffusion 3 and Flux: straight lines from images to noise.

    x_s = (1 - s) x0 + s eps at sigmas s in (0, 1], and the network predicts the
    velocity eps - x0 (Esser et al. 2024, arXiv 2403.03206, section 3).

    Args:
        num_train_timesteps (`int`, *optional*, defaults to `1000`): the network is
            given ``sigma * num_train_timesteps``.
        shift (`float`, *optional*, defaults to `1.0`): resolution shift of SD3, which
            `sample_times` applies to the sigmas it draws.

    Attributes:
        legacy_first_step (`bool`): how the flow SDE begins, see `flow_sde_step`.

    Example:
        ```python
        schedule = RectifiedFlow(shift=3.0)
        alpha, sigma = schedule.alpha_sigma(torch.tensor([0.25]))
        assert (alpha.item(), sigma.item()) == (0.75, 0.25)
        ```
    """

    prediction_type = "flow_matching"

    def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0) -> None:
        self.num_timesteps, self.shift = num_train_timesteps, shift
        self.legacy_first_step = False

    def alpha_sigma(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shares of signal and noise, each float64 (n,)."""
        sigma = times.to(torch.float64)
        return 1 - sigma, sigma

    def model_times(self, times: Tensor) -> Tensor:
        """Scale sigmas to what the network is given, float32."""
        return times.to(torch.float32) * self.num_timesteps

    def fraction(self, times: Tensor) -> Tensor:
        """Return the sigmas themselves as float64: 0 is clean."""
        return times.double()

    def target(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return what a perfect network outputs, the velocity eps - x0."""
        return noise - x0

    def to_x0(self, output: Tensor, sample: Tensor, times: Tensor) -> Tensor:
        """Compute the clean samples that a velocity implies, (n, ...)."""
        return sample - _over(times.double(), sample) * output

    def to_eps(self, output: Tensor, sample: Tensor, times: Tensor) -> Tensor:
        """Compute the noise that a velocity implies, (n, ...)."""
        return sample + _over(1 - times.double(), sample) * output


def with_zero_terminal_snr(schedule: VariancePreserving) -> VariancePreserving:
    """Rescale a schedule so that its last timestep is pure noise.

    sqrt(alpha_bar) is shifted and scaled such that its first value stays (Lin et al.
    2023, arXiv 2305.08891, algorithm 1).

    Args:
        schedule (`VariancePreserving`): the schedule, which stays as it is.

    Returns:
        `VariancePreserving`: the rescaled one.

    Example:
        ```python
        schedule = VariancePreserving(torch.linspace(0.999, 0.005, 1000))
        schedule = with_zero_terminal_snr(schedule)
        assert schedule.snr(torch.tensor([999])) == 0
        ```
    """
    root = schedule.alphas_cumprod.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return VariancePreserving(root.square(), schedule.prediction_type, schedule.clip_range)


def schedule_from_scheduler(scheduler: Any) -> NoiseSchedule:
    """Read the noise schedule from a diffusers scheduler.

    Its prediction type is the model's true one, which is never forced to epsilon.

    Args:
        scheduler: of diffusers, of the kind of DDPM or of flow matching.

    Returns:
        `NoiseSchedule`: a `VariancePreserving` or a `RectifiedFlow`.

    Raises:
        UserError: a scheduler of another formulation (EDM, consistency, ...), or an
            unknown prediction type.

    Example:
        ```python
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler(prediction_type="v_prediction")
        schedule = schedule_from_scheduler(scheduler)
        assert schedule.prediction_type == "v_prediction"
        ```
    """
    config = scheduler.config
    if (
        "FlowMatch" in type(scheduler).__name__
        or config.get("prediction_type") == "flow_prediction"
    ):
        # Solvers of the UniPC and DPM kind name their shift so.
        shift = (
            config.get("shift")
            if "FlowMatch" in type(scheduler).__name__
            else config.get("flow_shift")
        )
        return RectifiedFlow(config.get("num_train_timesteps", 1000), float(shift or 1.0))
    kind = config.get("prediction_type", "epsilon")
    if (
        not hasattr(scheduler, "alphas_cumprod")
        or config.get("timestep_type") == "continuous"
        or kind not in PREDICTION_TYPES
    ):
        name = type(scheduler).__name__
        what = f" with prediction_type {kind!r}" if kind not in PREDICTION_TYPES else ""
        raise UserError(
            f"model: the scheduler {name}{what} is of a formulation that is not supported; models "
            "of DDPM's kind (epsilon, v_prediction, "
            "sample) and flow-matching models are"
        )
    return VariancePreserving(scheduler.alphas_cumprod, kind, clip_range(scheduler))


def clip_range(scheduler: Any) -> float | None:
    """Read the range to which a scheduler clamps clean estimates.

    Args:
        scheduler: of diffusers.

    Returns:
        `float` or `None`: None where the scheduler's class does not clamp, whatever its
            config holds.
    """
    takes = inspect.signature(type(scheduler).__init__).parameters
    if "clip_sample" not in takes or not scheduler.config.get("clip_sample"):
        return None
    return float(scheduler.config.get("clip_sample_range") or 1.0)
