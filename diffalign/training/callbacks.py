"""Hooks with the names of transformers: subclass `TrainerCallback` and override what you need."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

if TYPE_CHECKING:
    from .config import TrainingConfig


@dataclass
class TrainerState:
    """Where a run is. Saved in every checkpoint.

    Attributes:
        global_step: optimizer steps done.
        samples_seen: groups consumed over all processes: the position in the data.
        epoch: passes over the data so far, fractional.
        max_steps: when the run ends.
        window: sums and counts of the metrics since the last log, so that a run resumed between two logs logs the same.
    """

    global_step: int = 0
    samples_seen: int = 0
    epoch: float = 0.0
    max_steps: int = 0
    window: dict[str, list[float]] = field(default_factory=dict)
    log_history: list[dict[str, float]] = field(default_factory=list)
    due: list[str] = field(default_factory=list)


@dataclass
class TrainerControl:
    """Set a flag to make the loop act after the current step."""

    should_training_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False


@dataclass
class TrainOutput:
    """What `Trainer.train` returns.

    Attributes:
        global_step: optimizer steps done.
        metrics: the last log.
        interrupted_by: number of the signal that ended the run early, else None.
        waiting_for: folder in which people's votes are wanted before the run can go on, else None.
    """

    global_step: int
    metrics: dict[str, float] = field(default_factory=dict)
    interrupted_by: int | None = None
    waiting_for: Path | None = None


class TrainerCallback:
    """Does nothing; every hook takes (args, state, control) and keyword arguments such as `trainer`, `logs`, `metrics`."""

    def on_init_end(
        self, args: TrainingConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None: ...
    def on_train_begin(
        self, args: TrainingConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None: ...
    def on_step_end(
        self, args: TrainingConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None: ...
    def on_log(
        self, args: TrainingConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None: ...
    def on_evaluate(
        self, args: TrainingConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None: ...
    def on_save(
        self, args: TrainingConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None: ...
    def on_train_end(
        self, args: TrainingConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None: ...


class ProgressCallback(TrainerCallback):
    """The progress bar: loss, accuracy, margin, speed and time left."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(
        self, args: TrainingConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="training", unit="step"
        )

    def on_step_end(
        self, args: TrainingConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.update(1)

    def on_log(
        self, args: TrainingConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        logs, shown = kwargs["logs"], {}
        for key, name in (
            ("train/loss", "loss"),
            ("rewards/accuracies", "accuracy"),
            ("rewards/margins", "margin"),
        ):
            if key in logs:
                shown[name] = f"{logs[key]:.4f}" if name == "loss" else f"{logs[key]:.3g}"
        self.bar.set_postfix(shown, refresh=False)

    def on_train_end(
        self, args: TrainingConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.close()
