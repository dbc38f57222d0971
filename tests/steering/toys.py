"""Particle models whose tilted law is known in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MEANS = torch.tensor([-2.0, 3.0], dtype=torch.float64)
VARIANCES = torch.tensor([0.25, 0.25], dtype=torch.float64)
WEIGHTS = torch.tensor([0.7, 0.3], dtype=torch.float64)


class Mixture:
    """Exact reverse kernels of a two-component Gaussian mixture, so the chain's law is
    the mixture for any number of steps.

    Args:
        num_steps: steps.
        mode_noise: draws the component by its responsibility.
    """

    def __init__(self, num_steps: int = 20) -> None:
        self.num_steps = num_steps
        i = torch.arange(num_steps + 1, dtype=torch.float64)
        self.bar = torch.cos(math.pi / 2 * 0.995 * (1 - i / num_steps)).square()
        self.bar[-1] = 1.0
        self.calls: list[tuple[str, int]] = []

    def _moments(self, i: int) -> tuple[Tensor, Tensor]:
        return self.bar[i].sqrt() * MEANS, self.bar[i] * VARIANCES + 1 - self.bar[i]

    def _responsibility(self, y: Tensor, i: int) -> Tensor:
        mean, variance = self._moments(i)
        log = WEIGHTS.log() - 0.5 * variance.log() - (y[..., None] - mean).square() / (2 * variance)
        return log.softmax(-1)

    def init(self, groups: int, num_particles: int, generator: Any) -> Tensor:
        shape = (groups, num_particles)
        mean, variance = self._moments(0)
        which = (torch.rand(shape, generator=generator, dtype=torch.float64) > WEIGHTS[0]).long()
        return mean[which] + variance[which].sqrt() * torch.randn(
            shape, generator=generator, dtype=torch.float64
        )

    def predict_x0(self, y: Tensor, i: int) -> Tensor:
        mean, variance = self._moments(i)
        each = MEANS + self.bar[i].sqrt() * VARIANCES / variance * (y[..., None] - mean)
        return (self._responsibility(y, i) * each).sum(-1)

    def propose(self, y: Tensor, i: int, generator: Any) -> Any:
        first = self._responsibility(y, i)[..., 0]
        which = (torch.rand(y.shape, generator=generator, dtype=torch.float64) > first).long()
        mean_t, variance_t = (x[which] for x in self._moments(i))
        mean_s, variance_s = (x[which] for x in self._moments(i + 1))
        covariance = (self.bar[i] / self.bar[i + 1]).sqrt() * variance_s
        mean = mean_s + covariance / variance_t * (y - mean_t)
        variance = variance_s - covariance.square() / variance_t
        return mean + variance.clamp(min=0).sqrt() * torch.randn(
            y.shape, generator=generator, dtype=torch.float64
        )

    def index(self, y: Tensor, ancestors: Tensor) -> Tensor:
        return y.gather(1, ancestors)

    def final(self, y: Tensor) -> Tensor:
        return y


def mixture_moments(lmbda: float) -> tuple[float, float]:
    """(Z, mean) of the mixture tilted by exp(lmbda x)."""
    tilted = WEIGHTS * (lmbda * MEANS + lmbda**2 * VARIANCES / 2).exp()
    z = tilted.sum()
    return float(z), float((tilted / z * (MEANS + lmbda * VARIANCES)).sum())


@dataclass
class Estimate:
    """A mean over groups with its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        return cls(float(values.mean()), float(values.std() / math.sqrt(len(values))))

    def agrees(self, exact: float, errors: float = 4.0) -> bool:
        return abs(self.value - exact) <= errors * self.error + 1e-12


def unbiased(result: Any, function: Any, lmbda_z: float) -> Estimate:
    """Zhat * sum_k W_k f(x_k) / Z over groups: an unbiased tilted expectation of f."""
    per_group = result.log_z.exp() * (result.weights * function(result.particles)).sum(1)
    return Estimate.of(per_group / lmbda_z)
