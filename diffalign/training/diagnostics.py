"""What a preference run is doing, in numbers a person can act on: is it learning or breaking?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..likelihood import effective_beta, implicit_rewards
from .batch import Batch

THIRDS = ("low_noise", "mid_noise", "high_noise")


def pair_metrics(
    policy_errors: Tensor, reference_errors: Tensor, beta: float, fraction: Tensor
) -> dict[str, Tensor]:
    """Diagnostics of pairs, each (g,) and detached; NaN where a metric does not apply to a pair.

    Args:
        policy_errors, reference_errors (`Tensor`): (g, 2), chosen first.
        beta (`float`): the run's beta.
        fraction (`Tensor`): (g,) time of each pair as a share of the process, 0 = clean: decides the timestep third.

    Returns:
        TRL's names (`rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies`; a zero margin counts one half),
        the errors, the errors *relative to the reference* (`change/chosen`, `change/rejected`: below 0 is better than the
        reference), the gradient factor sigmoid(-z), the share of saturated logits, and change and accuracy by timestep third.
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
    """One line that says what beta means for this latent size, comparable with other codes."""
    elements = math.prod(shape)
    return (
        f"beta {beta:g} on the {reduction} error of a {'x'.join(map(str, shape))} latent (N "
        f"= {elements}) is "
        f"{effective_beta(beta, elements, reduction):.4g} on the summed error"
    )


LOG2_MESSAGE = (
    "a preference loss starts at log 2 = 0.693 (policy = reference) and moves slowly: 0.69 "
    "is not a fault. "
    "Watch rewards/accuracies (above 0.5), rewards/margins (rising) and change/chosen (below 0)"
)


_EMPTY = torch.empty(0)
_WITHOUT_TENSORS = {"x0": _EMPTY, "noise": _EMPTY, "condition": {}, "noisy": None, "extra": {}}
"""A batch whose images need not be kept until the step is judged."""


class NonFiniteLoss(RuntimeError):
    """The loss is NaN or infinite; the message names rows and timesteps."""


_REMEDY = "look at these rows, lower train.learning_rate, or use train.mixed_precision: bf16 or no"


def check_finite(loss: Tensor, batch: Batch, step: int) -> None:
    """Raise `NonFiniteLoss` with the dataset rows and timesteps of the groups whose loss (g,) is not finite."""
    bad = [i for i, value in enumerate(loss.detach().cpu()) if not torch.isfinite(value)]
    if not bad:
        return
    rows, times = [batch.row_ids[i] for i in bad], [float(batch.times[i]) for i in bad]
    raise NonFiniteLoss(
        f"step {step}: the loss is not finite for dataset rows {rows} at timesteps {times}; "
        f"{_REMEDY}"
    )


class FiniteCheck:
    """The losses of one optimizer step, judged on the device and asked for once, before the weights change.

    Args:
        step (`int`): number of the optimizer step, for the message.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.seen: list[tuple[Tensor, Batch]] = []
        self.finite: Tensor | None = None

    def add(self, loss: Tensor, batch: Batch) -> None:
        """Note the losses (g,) of a micro-batch; nothing waits for the device."""
        loss = loss.detach()
        finite = torch.isfinite(loss).all()
        self.finite = finite if self.finite is None else self.finite & finite
        self.seen.append((loss, dataclasses.replace(batch, **_WITHOUT_TENSORS)))

    def finish(self, norm: Tensor | None = None) -> None:
        """Look at the whole step.

        Args:
            norm (`Tensor`, *optional*): of its gradient; None is not judged.

        Raises:
            NonFiniteLoss: a loss or the gradient is not finite; rows and timesteps are named.
        """
        assert self.finite is not None
        finite = (
            self.finite
            if norm is None
            else self.finite & torch.isfinite(norm).all().to(self.finite.device)
        )
        if not finite:
            for loss, batch in self.seen:
                check_finite(loss, batch, self.step)
            raise NonFiniteLoss(
                f"step {self.step}: the gradient is not finite (last batch: dataset rows "
                f"{self.seen[-1][1].row_ids}), so the step was not "
                f"taken; {_REMEDY}"
            )
        self.seen, self.finite = [], None


class DivergenceGuard:
    """Notices when the chosen images' error stays above the reference's: the policy is getting worse at what it should like.

    Args:
        patience (`int`): consecutive logs above the reference before the guard speaks.
        warn (`Callable[[str], None]`): receives the sentence, once per episode.
    """

    def __init__(self, patience: int, warn: Callable[[str], None]) -> None:
        self.patience, self.warn, self.count = patience, warn, 0

    def replay(self, history: list[dict[str, float]]) -> None:
        """Counts the logs of a resumed run again, silently."""
        for entry in history:
            change = entry.get("change/chosen", math.nan)
            self.count = self.count if math.isnan(change) else self.count + 1 if change > 0 else 0

    def update(self, metrics: dict[str, float], step: int) -> bool:
        """Feeds one log; True when the run has diverged by now."""
        change = metrics.get("change/chosen")
        if change is None or math.isnan(change):
            return False
        self.count = self.count + 1 if change > 0 else 0
        if self.count == self.patience:
            self.warn(
                f"step {step}: the error of the chosen images has been above the reference's "
                f"for {self.patience} logs "
                f"(now +{change:.3g}): the model is drifting away from what it should "
                "prefer; lower the learning rate, raise beta "
                "or set train.sft_weight"
            )
        return self.count >= self.patience
