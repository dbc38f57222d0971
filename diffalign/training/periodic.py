"""What a run does beside its optimizer steps, in one fixed order: see `in_order`.

A step owes work after its checkpoint is written: the callbacks' `on_save`, an evaluation, a
validation. The checkpoint holds the list, and beside it stands what is done. A run that was killed
in between makes up for the rest when it resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from ..runtime.seeds import undisturbed
from .checkpoint import CheckpointManager
from .diagnostics import DivergenceGuard
from .loop import LoopCallback, Run
from .signals import StopSignals
from .tracking import MetricLog
from .validation import Validation

Call = Callable[..., None]
"""Calls a hook of the user's callbacks: (name, **keyword arguments)."""


class LogMetrics(LoopCallback):
    """Write the averages of the last steps every `logging_steps`.

    Args:
        log: file and trackers.
        call: of the users' hooks.
        undone: work of the first step that is done again; its rows of the log are dropped.
    """

    _PREFIXES: ClassVar[dict[str, str]] = {
        "evaluate": "eval/",
        "validate": "validation/",
    }  # work -> the names of its metrics

    def __init__(self, log: MetricLog, call: Call, undone: Sequence[str] = ()) -> None:
        self.log, self.call, self.undone = log, call, undone

    def on_train_begin(self, run: Run) -> None:
        prefixes = tuple(self._PREFIXES[name] for name in self.undone if name in self._PREFIXES)
        rows = self.log.start(run.state.global_step, prefixes)
        run.state.log_history = [
            row for row in rows if any(name.startswith("train/") for name in row)
        ]
        run.window.restore(run.state.window, run.accelerator)

    def on_step_end(self, run: Run) -> None:
        state = run.state
        run.logged = state.global_step % run.args.logging_steps == 0 or run.is_last
        if not run.logged:
            return
        metrics = run.window.reduce(run.accelerator)
        metrics |= {"train/lr": run.optimizer.param_groups[0]["lr"], "epoch": state.epoch}
        self.log.write(metrics, state.global_step)
        state.log_history.append({"step": state.global_step, **metrics})
        run.metrics = metrics
        self.call("on_log", logs=metrics)


class StopOnDivergence(LoopCallback):
    """Warn, and under `stop_on_divergence` stop, when the policy gets worse at what it should like."""

    def __init__(self, guard: DivergenceGuard) -> None:
        self.guard = guard

    def on_train_begin(self, run: Run) -> None:
        self.guard.replay(run.state.log_history)

    def on_step_end(self, run: Run) -> None:
        if (
            run.logged
            and self.guard.update(run.metrics, run.state.global_step)
            and run.args.stop_on_divergence
        ):
            run.control.should_training_stop = run.control.should_save = True


class UserCallbacks(LoopCallback):
    """The `TrainerCallback`s of the user, and the progress bar."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def on_train_begin(self, run: Run) -> None:
        self.call("on_train_begin")

    def on_step_end(self, run: Run) -> None:
        self.call("on_step_end")

    def on_train_end(self, run: Run) -> None:
        self.call("on_train_end")


class StopOnSignal(LoopCallback):
    """Stop with a checkpoint when one of the processes was told to."""

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals

    def on_step_end(self, run: Run) -> None:
        if self.interrupted(run):
            run.control.should_training_stop = run.control.should_save = True

    def interrupted(self, run: Run) -> bool:
        """Whether a process got a signal; the same answer on all of them."""
        accelerator = run.accelerator
        if accelerator.num_processes == 1:
            return self.signals.received is not None
        if self.signals.received is not None:
            accelerator.set_trigger()
        if not accelerator.check_trigger():
            return False
        self.signals.received = (
            self.signals.received or 15
        )  # another process was told to stop: so are we all
        return True


class Work(Protocol):
    """Work of a step that comes after its checkpoint."""

    name: str

    def is_due(self, run: Run) -> bool: ...

    def do(self, run: Run, checkpoint: Path | None) -> None: ...


class Evaluate:
    """The loss and metrics on the evaluation data, every `eval_steps`.

    Args:
        evaluate: computes them; None where there are no evaluation data.
        log: takes them.
    """

    name = "evaluate"

    def __init__(self, evaluate: Callable[[], dict[str, float]] | None, log: MetricLog) -> None:
        self.evaluate, self.log = evaluate, log

    def is_due(self, run: Run) -> bool:
        asked, run.control.should_evaluate = run.control.should_evaluate, False
        every = run.args.eval_steps
        return asked or (
            every is not None and run.state.global_step % every == 0 and self.evaluate is not None
        )

    def do(self, run: Run, checkpoint: Path | None) -> None:
        if self.evaluate is not None:
            with undisturbed():
                metrics = self.evaluate()
            self.log.write(metrics, run.state.global_step)


class Validate:
    """Images of the current weights beside those of the starting weights, every `validation_steps`."""

    name = "validate"

    def __init__(self, validation: Validation | None, log: MetricLog) -> None:
        self.validation, self.log = validation, log

    def is_due(self, run: Run) -> bool:
        return self.validation is not None and self.validation.due(
            run.state.global_step, run.is_last
        )

    def do(self, run: Run, checkpoint: Path | None) -> None:
        if self.validation is not None:
            with undisturbed():
                self.validation.run(run.state.global_step, self.log)


class AnnounceSave:
    """The `on_save` of the user's callbacks."""

    name = "on_save"

    def __init__(self, call: Call) -> None:
        self.call = call

    def is_due(self, run: Run) -> bool:
        return False  # a checkpoint that is written adds it

    def do(self, run: Run, checkpoint: Path | None) -> None:
        self.call("on_save", checkpoint=checkpoint)


class SaveCheckpoint(LoopCallback):
    """Write a checkpoint when it is time, with the list of the work that its step owes.

    Attributes:
        written: the checkpoint of the step just taken; None where there is none.
    """

    def __init__(self, checkpoints: CheckpointManager, works: Sequence[Work]) -> None:
        self.checkpoints, self.works = checkpoints, works
        self.written: Path | None = None

    def on_step_end(self, run: Run) -> None:
        state, control, every = run.state, run.control, run.args.save_steps
        state.due = [work.name for work in self.works if work.is_due(run)]
        self.written = None
        if control.should_save or run.is_last or (every and state.global_step % every == 0):
            control.should_save = False
            state.window = run.window.dump(run.accelerator)
            state.due = [AnnounceSave.name, *state.due]
            self.written = self.checkpoints.save(state)

    def on_pause(self, run: Run) -> None:
        run.state.due = []
        if not (self.checkpoints.output_dir / f"checkpoint-{run.state.global_step}").is_dir():
            self.checkpoints.save(run.state)


class DoWork(LoopCallback):
    """Do what a step owes, and remember it beside the checkpoint.

    Args:
        saved: the callback that writes checkpoints.
        works: what there is to do, in order.
        signals: a run that was told to stop leaves the rest to the one that resumes.
        undone: work that a killed run still owes the step of its checkpoint.
        resumed (`Path`, *optional*): that checkpoint.
    """

    def __init__(
        self,
        saved: SaveCheckpoint,
        works: Sequence[Work],
        signals: StopOnSignal,
        undone: Sequence[str] = (),
        resumed: Path | None = None,
    ) -> None:
        self.saved, self.works, self.signals = saved, works, signals
        self.undone, self.resumed = undone, resumed

    def on_train_begin(self, run: Run) -> None:
        self._do(run, self.undone, self.resumed)

    def on_step_end(self, run: Run) -> None:
        self._do(run, run.state.due, self.saved.written)

    def _do(self, run: Run, due: Sequence[str], checkpoint: Path | None) -> None:
        works = {work.name: work for work in self.works}
        for name in due:
            if (
                name != AnnounceSave.name
                and checkpoint is not None
                and self.signals.interrupted(run)
            ):
                # So that this checkpoint, which knows what is owed, stays the newest.
                run.control.should_training_stop = True
                return
            if name in works:
                works[name].do(run, checkpoint)
            if checkpoint is not None:
                self.saved.checkpoints.mark_done(checkpoint, name)


def in_order(
    *,
    log: MetricLog,
    guard: DivergenceGuard,
    call: Call,
    signals: StopSignals,
    checkpoints: CheckpointManager,
    evaluate: Callable[[], dict[str, float]] | None,
    validation: Validation | None,
    undone: Sequence[str] = (),
    resumed: Path | None = None,
) -> list[LoopCallback]:
    """The callbacks of a run in the one order that makes a resumed run equal an uninterrupted one.

    Metrics are logged before the checkpoint is written, so that it holds the log's position; the
    checkpoint is written before anything is evaluated, so that a run killed meanwhile knows what it
    owes.
    """
    works: list[Any] = [AnnounceSave(call), Evaluate(evaluate, log), Validate(validation, log)]
    stop = StopOnSignal(signals)
    save = SaveCheckpoint(checkpoints, works)
    return [
        LogMetrics(log, call, undone),
        StopOnDivergence(guard),
        UserCallbacks(call),
        stop,
        save,
        DoWork(save, works, stop, undone, resumed),
    ]
