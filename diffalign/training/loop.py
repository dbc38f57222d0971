"""The training loop: batches, optimizer steps and callbacks for what is periodic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Module, Parameter

from ..runtime.distributed import whole
from .batch import Batch, LoopBatch
from .callbacks import TrainerControl, TrainerState
from .data_pipeline import DataPipeline, ReferenceErrors
from .diagnostics import FiniteCheck
from .loop_config import LoopConfig
from .tracking import MetricWindow


class RunPaused(Exception):
    """Raised when the next batch must wait for something, such as people's votes.

    Args:
        folder (`Path`): Folder in which it is expected.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder


class Task(Protocol):
    """The part of training that a method defines. See `Trainer` for the methods.

    Batches are those of the run's source.
    """

    def prepare(self, batch: Any) -> Any: ...

    def micro_batches(self, batch: Any) -> Iterator[Any]: ...

    def compute_loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]: ...

    def on_optimizer_step(self, step: int) -> None: ...


class BatchSource(Protocol):
    """Where the batches of a run come from.

    A source may also have `save(folder, rank)` and `load(folder, rank, device)`. Then
    it is saved in every checkpoint. It needs them if `samples_seen` alone does not give
    its position.
    """

    def batches(self, data: DataPipeline, samples_seen: int) -> Iterator[Batch]:
        """Yield the batches of this process without end.

        Args:
            data (`DataPipeline`): Reads the dataset.
            samples_seen (`int`): Groups consumed so far, over all processes.
        """
        ...


class DatasetSource:
    """Yields batches of the dataset's own images.

    Args:
        precomputed (`ReferenceErrors`, *optional*): Reference errors, set on every
            batch.
    """

    def __init__(self, precomputed: ReferenceErrors | None = None) -> None:
        self.precomputed = precomputed

    def batches(self, data: DataPipeline, samples_seen: int) -> Iterator[Batch]:
        """Yield batches of this process without end. See `BatchSource.batches`."""
        for examples in data.batches(samples_seen):
            batch = data.builder(examples)
            if self.precomputed is not None:
                self.precomputed.attach(batch, examples)
            yield batch


@dataclass
class Run:
    """Objects and counters of one training loop.

    Attributes:
        args (`LoopConfig`): Settings of the run.
        accelerator (`Accelerator`): Processes and precision.
        network: The prepared network, through which gradients are accumulated.
        parameters (`Callable`): Returns the trainable parameters. They are asked for
            anew because sharding replaces the objects.
        optimizer: The prepared optimizer.
        learning_rate: Schedule of the learning rate.
        batches (`Iterator[LoopBatch]`): Endless batches of this process.
        state (`TrainerState`): Position of the run.
        control (`TrainerControl`): Flags that callbacks set.
        samples_per_step (`int`): Groups per optimizer step over all processes.
        rows (`int`, *optional*): Groups that train in an epoch. None for a stream.
        passes (`int`): Forward passes per optimizer step.
        after_update (`Callable`): Called after every update of the weights.
        window (`MetricWindow`): Metrics since the last log.
        metrics (`dict[str, float]`): Metrics of the last log.
        logged (`bool`, defaults to `False`): Whether the step just taken was logged.
        paused_for (`Path`, *optional*): Folder that must be filled before the run can
            go on.
        hacked_at (`int`, *optional*): Step at which the run ended because its reward
            was hacked.
    """

    args: LoopConfig
    accelerator: Accelerator
    network: Module
    parameters: Callable[[], list[Parameter]]
    optimizer: Any
    learning_rate: Any
    batches: Iterator[LoopBatch]
    state: TrainerState
    control: TrainerControl
    samples_per_step: int
    rows: int | None
    passes: int
    after_update: Callable[[], None]
    window: MetricWindow
    metrics: dict[str, float] = field(default_factory=dict)
    logged: bool = False
    paused_for: Path | None = None
    hacked_at: int | None = None

    @property
    def finished(self) -> bool:
        """Whether the loop has no further step to take."""
        return self.state.global_step >= self.state.max_steps or self.control.should_training_stop

    @property
    def is_last(self) -> bool:
        """Whether the step just taken is the last one of the run."""
        return self.state.global_step == self.state.max_steps

    def advance(self) -> None:
        """Count one optimizer step and update the learning rate.

        A step that fp16's scaler skipped counts, but it changes no average.
        """
        self.learning_rate.step()
        self.state.global_step += 1
        self.state.samples_seen += self.samples_per_step
        if self.rows is not None:
            self.state.epoch = self.state.samples_seen / self.rows
        if not self.optimizer.step_was_skipped:
            self.after_update()


class LoopCallback:
    """One stage of the loop. Every hook does nothing until a subclass overrides it."""

    def on_train_begin(self, run: Run) -> None:
        """Run before the first step."""

    def on_step_end(self, run: Run) -> None:
        """Run after an optimizer step."""

    def on_pause(self, run: Run) -> None:
        """Run when the next batch must wait for something."""

    def on_train_end(self, run: Run) -> None:
        """Run after the last step, also of an interrupted run."""


def fit(task: Task, run: Run, callbacks: Sequence[LoopCallback]) -> None:
    """Take optimizer steps until the run is finished.

    Args:
        task (`Task`): The method.
        run (`Run`): Changed in place.
        callbacks (`Sequence[LoopCallback]`): Called in this order.

    Raises:
        NonFiniteLoss: A loss or gradient is not finite. The weights are unchanged.
    """
    for callback in callbacks:
        callback.on_train_begin(run)
    # A call that failed in the middle of a step may have left gradients.
    run.accelerator.gradient_state._set_sync_gradients(True)
    run.optimizer.zero_grad()
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
    """Accumulate the gradients of one optimizer step and update the weights.

    Args:
        task (`Task`): The method.
        run (`Run`): Changed in place.
    """
    accelerator, check = run.accelerator, FiniteCheck(run.state.global_step + 1)
    # accelerate counts passes for the whole process. Another trainer, or an Accelerator
    # of the user, may have set these.
    accelerator.gradient_accumulation_steps = run.passes
    accelerator.step = 0
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
    """Clip the gradients.

    Returns:
        The norm, if a step with a norm that is not finite must not be taken.
    """
    if run.args.max_grad_norm is None:
        return None
    # A list, because a generator is empty after its first use and nothing is clipped.
    norm = torch.as_tensor(
        whole(run.accelerator.clip_grad_norm_(run.parameters(), run.args.max_grad_norm))
    )
    if run.accelerator.scaler is None:
        run.window.add({"train/grad_norm": norm})
        return norm
    # Under fp16 the scaler skips a step with a norm that is not finite, and lowers its
    # scale. NaN is left out of the logged mean.
    run.window.add({"train/grad_norm": torch.where(norm.isfinite(), norm, math.nan)})
    return None
