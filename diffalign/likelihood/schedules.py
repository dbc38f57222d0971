"""Forward processes: how clean latents become noisy ones, and what a network is asked to predict.

Two families cover today's models. `VariancePreserving` (SD1, SD2, SDXL): x_t = alpha_t x0 + sigma_t eps on integer timesteps.
`RectifiedFlow` (SD3, Flux): x_s = (1 - s) x0 + s eps on s in (0, 1]. Both answer to the same methods, so that no trainer knows
which one it runs on. A *time* below is an integer timestep (VP) or a float sigma (flow); times have shape (n,) and broadcast over
the remaining dimensions of samples of shape (n, ...).
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def _over(coefficient: Tensor, sample: Tensor) -> Tensor:
    """(n,) -> (n, 1, ...) in the sample's dtype, but never below float32."""
    coefficient = coefficient.to(sample.device, torch.promote_types(sample.dtype, torch.float32))
    return coefficient.reshape(-1, *[1] * (sample.ndim - 1))


def implied_x0_eps(
    output: Tensor, sample: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """(x0, eps) that a variance-preserving network's output implies; `alpha` and `sigma` broadcast over the sample.

    Raises:
        ValueError: on an unknown prediction type.
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


class NoisingProcess(Protocol):
    """What the core asks of a process."""

    prediction_type: str
    num_timesteps: int

    def alpha_sigma(self, times: Tensor) -> tuple[Tensor, Tensor]: ...
    def model_times(self, times: Tensor) -> Tensor: ...
    def add_noise(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor: ...
    def target(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor: ...
    def to_x0(self, output: Tensor, sample: Tensor, times: Tensor) -> Tensor: ...
    def to_eps(self, output: Tensor, sample: Tensor, times: Tensor) -> Tensor: ...
    def snr(self, times: Tensor) -> Tensor: ...
    def fraction(self, times: Tensor) -> Tensor: ...
    def renoise(
        self, sample: Tensor, times: Tensor, new_times: Tensor, noise: Tensor
    ) -> Tensor: ...


class _Process:
    """What follows from (alpha, sigma) alone."""

    def alpha_sigma(self, times: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def add_noise(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma noise; computed in float32 or wider, returned in the dtype of `x0`."""
        alpha, sigma = self.alpha_sigma(times)
        return (_over(alpha, x0) * x0 + _over(sigma, x0) * noise).to(x0.dtype)

    def snr(self, times: Tensor) -> Tensor:
        """alpha^2 / sigma^2, (n,)."""
        alpha, sigma = self.alpha_sigma(times)
        return (alpha / sigma).square()

    def renoise(self, sample: Tensor, times: Tensor, new_times: Tensor, noise: Tensor) -> Tensor:
        """Carries samples at `times` to noisier `new_times` so that the marginal is exactly the process's (methods.md 13.8, G10).

        x_s = k x_t + sqrt(sigma_s^2 - k^2 sigma_t^2) noise with k = alpha_s / alpha_t.

        Raises:
            ValueError: when a new time is less noisy than the old one.
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


class VariancePreserving(_Process):
    """alpha_t = sqrt(alpha_bar_t), sigma_t = sqrt(1 - alpha_bar_t), t in {0, ..., T-1}.

    Args:
        alphas_cumprod (`Tensor`): alpha_bar, shape (T,), decreasing, in (0, 1).
        prediction_type (`str`): ``epsilon``, ``v_prediction`` or ``sample``: what the network outputs.
        clip_range (`float`, *optional*): to which the model's sampler clamps its clean estimates (`clip_sample`).
    """

    def __init__(
        self,
        alphas_cumprod: Tensor,
        prediction_type: str = "epsilon",
        clip_range: float | None = None,
    ) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type: expected epsilon, v_prediction or sample, got {prediction_type!r}"
            )
        # float64 once: the differences of errors that preference losses live on must not inherit the table's rounding.
        self.alphas_cumprod = alphas_cumprod.detach().to("cpu", torch.float64)
        self.prediction_type, self.clip_range = prediction_type, clip_range
        self.num_timesteps = len(alphas_cumprod)

    def alpha_sigma(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), each float64 (n,) on the CPU table's device."""
        alpha_bar = self.alphas_cumprod[times.to(self.alphas_cumprod.device).long()]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def model_times(self, times: Tensor) -> Tensor:
        return times.long()

    def fraction(self, times: Tensor) -> Tensor:
        """The time as a share of the process in [0, 1), float64: 0 is clean."""
        return times.double() / self.num_timesteps

    def target(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What a perfect network outputs: eps, alpha eps - sigma x0, or x0."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        alpha, sigma = self.alpha_sigma(times)
        return _over(alpha, x0) * noise - _over(sigma, x0) * x0

    def to_x0(self, output: Tensor, sample: Tensor, times: Tensor) -> Tensor:
        """The clean sample that an output implies."""
        alpha, sigma = (_over(c, sample) for c in self.alpha_sigma(times))
        return implied_x0_eps(output, sample, alpha, sigma, self.prediction_type)[0]

    def to_eps(self, output: Tensor, sample: Tensor, times: Tensor) -> Tensor:
        """The noise that an output implies."""
        alpha, sigma = (_over(c, sample) for c in self.alpha_sigma(times))
        return implied_x0_eps(output, sample, alpha, sigma, self.prediction_type)[1]


class RectifiedFlow(_Process):
    """x_s = (1 - s) x0 + s eps; the network predicts the velocity eps - x0. Times are sigmas in (0, 1].

    Args:
        num_train_timesteps (`int`, *optional*, defaults to `1000`): the network is given ``sigma * num_train_timesteps``.
        shift (`float`, *optional*, defaults to `1.0`): SD3's resolution shift, applied to *sampled* sigmas by `sample_times`.

    Attributes:
        legacy_first_step: how the flow SDE begins, see `diffalign.likelihood.transitions.flow_sde_step`.
    """

    prediction_type = "flow_matching"

    def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0) -> None:
        self.num_timesteps, self.shift = num_train_timesteps, shift
        self.legacy_first_step = False

    def alpha_sigma(self, times: Tensor) -> tuple[Tensor, Tensor]:
        sigma = times.to(torch.float64)
        return 1 - sigma, sigma

    def model_times(self, times: Tensor) -> Tensor:
        return times.to(torch.float32) * self.num_timesteps

    def fraction(self, times: Tensor) -> Tensor:
        """The sigma itself, float64."""
        return times.double()

    def target(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return noise - x0

    def to_x0(self, output: Tensor, sample: Tensor, times: Tensor) -> Tensor:
        return sample - _over(times.double(), sample) * output

    def to_eps(self, output: Tensor, sample: Tensor, times: Tensor) -> Tensor:
        return sample + _over(1 - times.double(), sample) * output


def with_zero_terminal_snr(process: VariancePreserving) -> VariancePreserving:
    """The process with its last signal share at zero: sqrt(alpha_bar) is shifted and scaled so that its first value stays.

    Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1.
    """
    root = process.alphas_cumprod.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return VariancePreserving(root.square(), process.prediction_type, process.clip_range)


def process_from_scheduler(scheduler: Any) -> NoisingProcess:
    """The process a diffusers scheduler belongs to, with the model's *true* prediction type (never forced to epsilon).

    Raises:
        UserError: a scheduler of another formulation (EDM, consistency, ...), or a prediction type of neither family.
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
            f"model: the scheduler {name}{what} is of a formulation that is not supported; models of DDPM's kind (epsilon, v_prediction, "
            "sample) and flow-matching models are"
        )
    return VariancePreserving(scheduler.alphas_cumprod, kind, clip_range(scheduler))


def clip_range(scheduler: Any) -> float | None:
    """The range to which a scheduler clamps clean estimates; None where it does not, whatever its config holds."""
    takes = inspect.signature(type(scheduler).__init__).parameters
    if "clip_sample" not in takes or not scheduler.config.get("clip_sample"):
        return None
    return float(scheduler.config.get("clip_sample_range") or 1.0)
