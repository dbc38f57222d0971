"""Callbacks of a training run, with the hook names of transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.progress import progress_bar

if TYPE_CHECKING:
    from .loop_config import LoopConfig


@dataclass
class TrainerState:
    """Position of a run. Saved in every checkpoint.

    Attributes:
        global_step (`int`, defaults to `0`): Optimizer steps done.
        samples_seen (`int`, defaults to `0`): Groups consumed over all processes, which
            is the position in the data.
        epoch (`float`, defaults to `0.0`): Passes over the data so far, with a
            fraction.
        max_steps (`int`, defaults to `0`): Optimizer steps of the whole run.
        window (`dict[str, list[float]]`): Sum and count of every metric since the last
            log. A resumed run logs the same averages with them.
        log_history (`list[dict[str, float]]`): Logged metrics, one entry per log.
        due (`list[str]`): Work that the last step still has to do after its checkpoint.
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
    """Flags that make the loop act after the current step.

    Attributes:
        should_training_stop (`bool`, defaults to `False`): End the run.
        should_save (`bool`, defaults to `False`): Write a checkpoint.
        should_evaluate (`bool`, defaults to `False`): Evaluate.
    """

    should_training_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False


@dataclass
class TrainOutput:
    """Result of `Trainer.train`.

    Attributes:
        global_step (`int`): Optimizer steps done.
        metrics (`dict[str, float]`): Metrics of the last log.
        interrupted_by (`int`, *optional*): Number of the signal that ended the run
            early.
        waiting_for (`Path`, *optional*): Folder in which people must vote before the
            run can go on.
        hacked_at (`int`, *optional*): Step at which the run ended because its reward
            was hacked. The weights are then those in `best/`, if there are any.
    """

    global_step: int
    metrics: dict[str, float] = field(default_factory=dict)
    interrupted_by: int | None = None
    waiting_for: Path | None = None
    hacked_at: int | None = None


class TrainerCallback:
    """Base class of callbacks. Every hook does nothing until a subclass overrides it.

    A hook receives the config, the state and the control flags of the run. Keyword
    arguments add `trainer`, and `logs`, `metrics` or `checkpoint` where they exist.

    Example:
        ```python
        from diffalign import TrainerCallback


        class StopWhenLearned(TrainerCallback):
            def on_log(self, args, state, control, **kwargs):
                if kwargs["logs"].get("rewards/accuracies", 0) > 0.9:
                    control.should_training_stop = True
        ```
    """

    def on_init_end(
        self, args: LoopConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Run at the end of the trainer's constructor."""

    def on_train_begin(
        self, args: LoopConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Run before the first optimizer step."""

    def on_step_end(
        self, args: LoopConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Run after every optimizer step."""

    def on_log(
        self, args: LoopConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Run after metrics were logged, with `logs`."""

    def on_evaluate(
        self, args: LoopConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Run after an evaluation, with `metrics`."""

    def on_save(
        self, args: LoopConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Run after a checkpoint was written, with `checkpoint`, its folder."""

    def on_train_end(
        self, args: LoopConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Run after the last step, also of an interrupted run."""


NO_SCORES = ("judge/advantage", "judge/equal_groups", "judge/ties")
"""Metrics under `judge/` that are no scorer's."""


class ProgressCallback(TrainerCallback):
    """Progress with loss, accuracy, margin and reward."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(
        self, args: LoopConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar = progress_bar(
            total=state.max_steps, initial=state.global_step, desc="training", unit="step"
        )

    def on_step_end(
        self, args: LoopConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.update(1)

    def on_log(
        self, args: LoopConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        logs, shown = kwargs["logs"], {}
        for key, name in (
            ("train/loss", "loss"),
            ("rewards/accuracies", "accuracy"),
            ("rewards/margins", "margin"),
        ):
            if key in logs:
                shown[name] = f"{logs[key]:.4f}" if name == "loss" else f"{logs[key]:.3g}"
        scores = [name for name in logs if name.startswith("judge/") and name not in NO_SCORES]
        for name in ("reward", *scores):
            if name in logs:
                shown[name.removeprefix("judge/")] = f"{logs[name]:.3g}"
                break
        self.bar.set_postfix(shown)

    def on_train_end(
        self, args: LoopConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.close()
