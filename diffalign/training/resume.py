"""What a resumed run takes from its settings, and what from the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

_SETTINGS = ("weight_decay", "betas", "eps")
SCHEDULE_FILE = "lr_scheduler.pt"


def group_settings(optimizer: Any) -> list[dict[str, Any]]:
    """Copy the settings of an optimizer that has not taken a step.

    Args:
        optimizer: The optimizer, plain or as accelerate prepared it.

    Returns:
        `list[dict]`: Of each parameter group, what it has of the first learning rate,
        weight decay, betas and epsilon.
    """
    names = ("initial_lr", *_SETTINGS)
    return [{name: g[name] for name in names if name in g} for g in optimizer.param_groups]


def resume_settings(
    optimizer: Any, schedule: Any, settings: list[dict[str, Any]], step: int
) -> list[str]:
    """Give a loaded optimizer the settings of this run, from its next step on.

    Args:
        optimizer: The optimizer with the state of the checkpoint.
        schedule: Learning-rate schedule. One that is not a function of the step keeps
            the learning rate of the checkpoint.
        settings (`list[dict]`): What `group_settings` returned before loading.
        step (`int`): Optimizer steps done.

    Returns:
        `list[str]`: Sentences about settings that differ from the checkpoint's.
    """
    if not isinstance(schedule, LambdaLR):
        return []
    schedule.last_epoch = step
    groups, changes = optimizer.param_groups, {}
    for group, mine, base, rate in zip(
        groups, settings, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        for name, value in mine.items():
            before = group.get(name, value)
            if _plain(before) != _plain(value):
                label = "learning_rate" if name == "initial_lr" else name
                changes[label] = f"{label} is {_plain(value)}, it was {_plain(before)}"
            group[name] = value
        group["lr"] = base * rate(step)
    return [f"resumed with other settings: {'; '.join(changes.values())}"] if changes else []


def _plain(value: Any) -> Any:
    """Return floats, so that lists, tuples and tensors compare equal."""
    if isinstance(value, (list, tuple)):
        return [float(each) for each in value]
    return float(value)


class ScheduleState:
    """Saves a learning-rate schedule of the user with every checkpoint.

    The schedules of `lr_scheduler` are functions of the step and need no state.

    Args:
        schedule: The schedule.
        say: Prints a sentence.
    """

    def __init__(self, schedule: Any, say: Any) -> None:
        self.schedule, self.say = schedule, say

    def save(self, folder: Path, rank: int) -> None:
        """Write the state of the schedule, which is the same on all processes."""
        if rank == 0:
            torch.save(self.schedule.state_dict(), folder / SCHEDULE_FILE)

    def load(self, folder: Path, rank: int, device: torch.device) -> None:
        """Read the state. Checkpoints of earlier versions have none."""
        file = folder / SCHEDULE_FILE
        if file.is_file():
            self.schedule.load_state_dict(torch.load(file, weights_only=True))
        else:
            self.say(f"{folder} holds no state of your learning-rate schedule; it starts anew")
