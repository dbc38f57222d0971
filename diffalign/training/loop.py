"""The training loop: optimizer steps, and callbacks that do everything periodic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Parameter

from .batch import Batch
from .callbacks import TrainerControl, TrainerState
from .config import TrainingConfig
from .diagnostics import FiniteCheck
from .tracking import MetricWindow


class RunPaused(Exception):
    """The next batch needs something from outside, such as people's votes.

    Attributes:
        folder: where it is wanted.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder


class Task(Protocol):
    """What a method adds to the loop."""

    def prepare(self, batch: Batch) -> Batch: ...

    def micro_batches(self, batch: Batch) -> Iterator[Batch]: ...

    def compute_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]: ...

    def on_optimizer_step(self, step: int) -> None: ...


@dataclass
class Run:
    """What the loop works on.

    Attributes:
        args, accelerator: of the run.
        network: the prepared network, through which gradients are accumulated.
        parameters: reads the trainable parameters anew: sharding replaces the objects.
        optimizer, learning_rate: the prepared optimizer and the schedule of its rate.
        batches: this process's batches, endless.
        state, control: where the run is, and what callbacks ask of it.
        samples_per_step: groups per optimizer step over all processes.
        rows: groups of the dataset; None where it has no length.
        after_update: called after every update of the weights, e.g. for their average.
        window: metrics since the last log.
        metrics: the last log.
        logged: whether it is of the step just taken.
        paused_for: folder in which something is wanted before the run can go on.
    """

    args: TrainingConfig
    accelerator: Accelerator
    network: Any
    parameters: Callable[[], list[Parameter]]
    optimizer: Any
    learning_rate: Any
    batches: Iterator[Batch]
    state: TrainerState
    control: TrainerControl
    samples_per_step: int
    rows: int | None
    after_update: Callable[[], None]
    window: MetricWindow
    metrics: dict[str, float] = field(default_factory=dict)
    logged: bool = False
    paused_for: Path | None = None

    @property
    def finished(self) -> bool:
        """Whether there is no further step to take."""
        return self.state.global_step >= self.state.max_steps or self.control.should_training_stop

    @property
    def is_last(self) -> bool:
        """Whether the step just taken is the last one of the run."""
        return self.state.global_step == self.state.max_steps

    def advance(self) -> None:
        """Count an optimizer step."""
        self.learning_rate.step()
        self.state.global_step += 1
        self.state.samples_seen += self.samples_per_step
        if self.rows is not None:
            self.state.epoch = self.state.samples_seen / self.rows
        self.after_update()


class LoopCallback:
    """Part of the loop's fixed order; does nothing by itself."""

    def on_train_begin(self, run: Run) -> None:
        """Before the first step."""

    def on_step_end(self, run: Run) -> None:
        """After an optimizer step."""

    def on_pause(self, run: Run) -> None:
        """When the next batch needs something from outside."""

    def on_train_end(self, run: Run) -> None:
        """After the last step, also of an interrupted run."""


def fit(task: Task, run: Run, callbacks: Sequence[LoopCallback]) -> None:
    """Take optimizer steps until the run is finished.

    Args:
        task: the method.
        run: changed in place.
        callbacks: called in this order after every step.

    Raises:
        NonFiniteLoss: before such a loss or gradient reaches the weights.
    """
    for callback in callbacks:
        callback.on_train_begin(run)
    while not run.finished:
        try:
            take_step(task, run)
        except RunPaused as pause:
            run.paused_for = pause.folder
            for callback in callbacks:
                callback.on_pause(run)
            break
        run.advance()
        task.on_optimizer_step(run.state.global_step)
        for callback in callbacks:
            callback.on_step_end(run)
    for callback in callbacks:
        callback.on_train_end(run)


def take_step(task: Task, run: Run) -> None:
    """Accumulate the gradients of one optimizer step and update the weights."""
    accelerator, check = run.accelerator, FiniteCheck(run.state.global_step + 1)
    for _ in range(run.args.gradient_accumulation_steps):
        for batch in task.micro_batches(task.prepare(next(run.batches))):
            with accelerator.accumulate(run.network):
                loss, metrics = task.compute_loss(batch)
                check.add(loss, batch)
                accelerator.backward((batch.weights * loss).mean())
                run.window.add({"train/loss": loss, **metrics})
                if accelerator.sync_gradients:
                    check.finish(_clip(run))
                run.optimizer.step()
                run.optimizer.zero_grad()


def _clip(run: Run) -> Tensor | None:
    """Clip the gradients; their norm where the step must not be taken if it is not finite."""
    if run.args.max_grad_norm is None:
        return None
    # A list: a generator would be exhausted after one use, and clipping would silently do nothing.
    norm = torch.as_tensor(
        run.accelerator.clip_grad_norm_(run.parameters(), run.args.max_grad_norm)
    )
    run.window.add({"train/grad_norm": norm})
    # Under fp16 the scaler leaves such a step out and scales less.
    return norm if run.accelerator.scaler is None else None
