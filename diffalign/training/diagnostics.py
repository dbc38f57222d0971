"""Metrics and warnings that show whether a preference run learns."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..likelihood import effective_beta, implicit_rewards
from .batch import LoopBatch

THIRDS = ("low_noise", "mid_noise", "high_noise")


def pair_metrics(
    policy_errors: Tensor, reference_errors: Tensor, beta: float, fraction: Tensor
) -> dict[str, Tensor]:
    """Compute the metrics of preference pairs.

    Args:
        policy_errors (`Tensor`): Errors of the policy, (g, 2), chosen first.
        reference_errors (`Tensor`): Errors of the reference, (g, 2), chosen first.
        beta (`float`): The run's beta.
        fraction (`Tensor`): Time of each pair as a share of the whole noising, (g,). 0
            is clean.

    Returns:
        `dict[str, Tensor]`: Metrics, each (g,), without gradient. NaN where a metric
        does not apply to a pair.

        - `rewards/*`: TRL's metrics. A margin of zero counts one half in
          `rewards/accuracies`.
        - `errors/*`: Errors of policy and reference.
        - `change/*`: Error of the policy minus that of the reference. Below 0 the
          policy is better.
        - `gradient_factor`: sigmoid(-z) of the logit z.
        - `saturated`: 1 where the logit is beyond 10.
        - `*/low_noise`, `*/mid_noise`, `*/high_noise`: A metric of the pairs in one
          third of the times.
    """
    policy, reference = policy_errors.detach(), reference_errors.detach()
    rewards = implicit_rewards(policy, reference, beta)
    z = rewards[:, 0] - rewards[:, 1]
    change = policy - reference
    metrics = {
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/margins": z,
        "rewards/accuracies": (z.sign() + 1) / 2,
        "errors/chosen": policy[:, 0],
        "errors/rejected": policy[:, 1],
        "errors/ref_chosen": reference[:, 0],
        "errors/ref_rejected": reference[:, 1],
        "change/chosen": change[:, 0],
        "change/rejected": change[:, 1],
        "gradient_factor": torch.sigmoid(-z),
        "saturated": (z.abs() > 10).to(z),
    }
    third = (fraction * 3).long().clamp(max=2).to(z.device)
    for index, name in enumerate(THIRDS):
        outside = third != index
        for key in ("change/chosen", "change/rejected", "rewards/accuracies"):
            metrics[f"{key}/{name}"] = metrics[key].masked_fill(outside, math.nan)
    return metrics


def beta_message(beta: float, shape: tuple[int, ...], reduction: str) -> str:
    """Return a sentence that says what beta means for this latent size.

    Args:
        beta (`float`): The run's beta.
        shape (`tuple[int, ...]`): Shape of a latent.
        reduction (`str`): `mean` or `sum` over the elements of a latent.
    """
    elements = math.prod(shape)
    return (
        f"beta {beta:g} on the {reduction} error of a {'x'.join(map(str, shape))} latent (N "
        f"= {elements}) is "
        f"{effective_beta(beta, elements, reduction):.4g} on the summed error"
    )


LOG2_MESSAGE = (
    "a preference loss starts where policy = reference, with the sigmoid at log 2 = 0.693, and "
    "moves slowly: 0.69 is not a fault. "
    "Watch rewards/accuracies (above 0.5), rewards/margins (rising) and change/chosen (below 0)"
)


class NonFiniteLoss(RuntimeError):
    """The loss is NaN or infinite. The message names rows and timesteps."""


_REMEDY = "look at these rows, lower train.learning_rate, or use train.mixed_precision: bf16 or no"


def check_finite(loss: Tensor, batch: LoopBatch, step: int) -> None:
    """Check the losses of a batch.

    Args:
        loss (`Tensor`): Loss of each group, (g,).
        batch (`LoopBatch`): The groups.
        step (`int`): Number of the optimizer step, for the message.

    Raises:
        NonFiniteLoss: A loss is not finite. The message names its dataset row.
    """
    bad = [i for i, value in enumerate(loss.detach().cpu()) if not torch.isfinite(value)]
    if not bad:
        return
    raise NonFiniteLoss(f"step {step}: the loss is not finite for {batch.place(bad)}; {_REMEDY}")


class FiniteCheck:
    """Checks that all losses of one optimizer step are finite.

    The check runs on the device. The host waits for its answer once, before the weights
    change.

    Args:
        step (`int`): Number of the optimizer step, for the message.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.losses: list[tuple[Tensor, LoopBatch]] = []
        self.finite: Tensor | None = None

    def add(self, loss: Tensor, batch: LoopBatch) -> None:
        """Add the losses of a micro-batch without waiting for the device.

        Args:
            loss (`Tensor`): Loss of each group, (g,).
            batch (`LoopBatch`): The groups.
        """
        loss = loss.detach()
        finite = torch.isfinite(loss).all()
        self.finite = finite if self.finite is None else self.finite & finite
        self.losses.append((loss, batch.without_tensors()))

    def finish(self, norm: Tensor | None = None) -> None:
        """Check everything that was added.

        Args:
            norm (`Tensor`, *optional*): Norm of the step's gradient. None is not
                checked.

        Raises:
            NonFiniteLoss: A loss or the gradient is not finite.
        """
        assert self.finite is not None
        finite = (
            self.finite
            if norm is None
            else self.finite & torch.isfinite(norm).all().to(self.finite.device)
        )
        if not finite:
            for loss, batch in self.losses:
                check_finite(loss, batch, self.step)
            raise NonFiniteLoss(
                f"step {self.step}: the gradient is not finite (last batch: dataset rows "
                f"{self.losses[-1][1].row_ids}), so the step was not "
                f"taken; {_REMEDY}"
            )
        self.losses, self.finite = [], None


DRIFT = 0.1
"""Share of the reference's error by which the policy's may be larger.

A policy that gets better at telling images apart gets a few percent worse at both.
"""


class DivergenceGuard:
    """Warns when the policy's error on chosen images stays above the reference's.

    Above means by more than a tenth.

    Args:
        patience (`int`): Logs above the reference, one after another, before the
            warning.
        warn (`Callable[[str], None]`): Receives the warning, once until the error falls
            again.
    """

    def __init__(self, patience: int, warn: Callable[[str], None]) -> None:
        self.patience, self.warn, self.count = patience, warn, 0

    def replay(self, history: list[dict[str, float]]) -> None:
        """Count the logs of a resumed run again, without warnings.

        Args:
            history (`list[dict[str, float]]`): Logged metrics.
        """
        for entry in history:
            self._count(entry)

    def update(self, metrics: dict[str, float], step: int) -> bool:
        """Count one log.

        Args:
            metrics (`dict[str, float]`): Metrics of the log.
            step (`int`): Optimizer step, for the warning.

        Returns:
            `bool`: Whether the run has diverged.
        """
        change = self._count(metrics)
        if math.isnan(change):
            return False
        if self.count == self.patience:
            self.warn(
                f"step {step}: the error of the chosen images has been more than a tenth "
                f"above the reference's for {self.patience} logs "
                f"(now +{change:.3g}): the model is drifting away from what it should "
                "prefer; lower the learning rate, raise beta "
                "or set train.sft_weight"
            )
        return self.count >= self.patience

    def _count(self, metrics: dict[str, float]) -> float:
        """Count a log, and return its change, NaN if it has none."""
        change = metrics.get("change/chosen", math.nan)
        if not math.isnan(change):
            is_above = change > DRIFT * metrics.get("errors/ref_chosen", 0.0)
            self.count = self.count + 1 if is_above else 0
        return change
