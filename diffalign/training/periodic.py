"""Everything periodic that a run does beside its optimizer steps. See `in_order`.

After its checkpoint a step may still have to announce the checkpoint, evaluate or
validate. The checkpoint lists this work, and a file beside it lists what is done. A run
that was killed in between does the rest when it resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from ..runtime.seeds import undisturbed
from .checkpoint import CheckpointManager
from .diagnostics import DivergenceGuard
from .loop import LoopCallback, Run
from .signals import StopSignals
from .tracking import MetricLog
from .validation import BEST, Validation

Call = Callable[..., None]
"""Calls a hook of the user's callbacks by its name, with keyword arguments."""


class LogMetrics(LoopCallback):
    """Logs the averages of the last steps every `logging_steps`.

    Args:
        log (`MetricLog`): File and trackers.
        call (`Callable`): Calls a hook of the user's callbacks.
        undone (`Sequence[str]`, *optional*, defaults to `()`): Work of the first step
            that is done again. Its rows of the log are dropped.
    """

    # Prefix of the metrics that each work logs.
    _PREFIXES: ClassVar[dict[str, str]] = {
        "evaluate": "eval/",
        "validate": "validation/",
    }

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
        run.logged = run.state.global_step % run.args.logging_steps == 0 or run.is_last
        if run.logged:
            self.write(run)

    def write(self, run: Run) -> None:
        """Log the averages since the last log.

        Args:
            run (`Run`): The run.
        """
        state, run.logged = run.state, True
        metrics = run.window.reduce(run.accelerator)
        metrics |= {"train/lr": run.optimizer.param_groups[0]["lr"], "epoch": state.epoch}
        self.log.write(metrics, state.global_step)
        state.log_history.append({"step": state.global_step, **metrics})
        run.metrics = metrics
        self.call("on_log", logs=metrics)


class StopOnDivergence(LoopCallback):
    """Warns when the policy diverges, and can stop the run.

    Args:
        guard (`DivergenceGuard`): Looks at the logs.
        stops (`bool`): Whether the run stops.
    """

    def __init__(self, guard: DivergenceGuard, stops: bool) -> None:
        self.guard, self.stops = guard, stops

    def on_train_begin(self, run: Run) -> None:
        self.guard.replay(run.state.log_history)

    def on_step_end(self, run: Run) -> None:
        if run.logged and self.guard.update(run.metrics, run.state.global_step) and self.stops:
            run.control.should_training_stop = run.control.should_save = True


class UserCallbacks(LoopCallback):
    """Calls the user's callbacks and the progress bar.

    Args:
        call (`Callable`): Calls a hook of the user's callbacks.
        log (`LogMetrics`): Logs the last step of a run that a callback ends.
    """

    def __init__(self, call: Call, log: LogMetrics) -> None:
        self.call, self.log = call, log

    def on_train_begin(self, run: Run) -> None:
        self.call("on_train_begin")

    def on_step_end(self, run: Run) -> None:
        stopped = run.control.should_training_stop
        self.call("on_step_end")
        self._agree(run)
        if run.control.should_training_stop and not stopped:
            run.control.should_save = True
            if not run.logged:
                self.log.write(run)

    @staticmethod
    def _agree(run: Run) -> None:
        """Do on all processes what the callbacks of any process ask for."""
        if run.accelerator.num_processes == 1:
            return
        control, names = run.control, ("should_training_stop", "should_save", "should_evaluate")
        flags = torch.tensor([int(getattr(control, name)) for name in names])
        asked = run.accelerator.reduce(flags.to(run.accelerator.device), "sum").tolist()
        for name, count in zip(names, asked, strict=True):
            setattr(control, name, count > 0)

    def on_train_end(self, run: Run) -> None:
        self.call("on_train_end")


class StopOnSignal(LoopCallback):
    """Stops with a checkpoint when any process received a signal.

    Args:
        signals (`StopSignals`): Signals of this process.
    """

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals

    def on_step_end(self, run: Run) -> None:
        if self.interrupted(run):
            run.control.should_training_stop = run.control.should_save = True

    def interrupted(self, run: Run) -> bool:
        """Return whether any process received a signal. All processes agree.

        Args:
            run (`Run`): The run.
        """
        accelerator = run.accelerator
        if accelerator.num_processes == 1:
            return self.signals.received is not None
        if self.signals.received is not None:
            accelerator.set_trigger()
        if not accelerator.check_trigger():
            return False
        # Another process was told to stop.
        self.signals.received = self.signals.received or 15
        return True


class Work(Protocol):
    """Work that is done after a step, once its checkpoint is written."""

    name: str

    def is_due(self, run: Run) -> bool:
        """Return whether the work is due after the last step."""

    def do(self, run: Run, checkpoint: Path | None) -> None:
        """Do the work. `checkpoint` is the checkpoint of the step, if there is one."""


class Evaluate:
    """Evaluates every `eval_steps`, or when a callback asks for it.

    Args:
        evaluate (`Callable`, *optional*): Returns the metrics. None without evaluation
            data.
        log (`MetricLog`): Receives the metrics.
    """

    name = "evaluate"

    def __init__(self, evaluate: Callable[[], dict[str, float]] | None, log: MetricLog) -> None:
        self.evaluate, self.log = evaluate, log

    def is_due(self, run: Run) -> bool:
        requested, run.control.should_evaluate = run.control.should_evaluate, False
        every = run.args.eval_steps
        return requested or (
            every is not None and run.state.global_step % every == 0 and self.evaluate is not None
        )

    def do(self, run: Run, checkpoint: Path | None) -> None:
        if self.evaluate is not None:
            with undisturbed():
                metrics = self.evaluate()
            self.log.write(metrics, run.state.global_step)


class Validate:
    """Draws and scores validation images every `validation_steps`.

    Args:
        validation (`Validation`, *optional*): None without validation.
        log (`MetricLog`): Receives images and metrics.
    """

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
    """Calls `on_save` of the user's callbacks.

    Args:
        call (`Callable`): Calls a hook of the user's callbacks.
    """

    name = "on_save"

    def __init__(self, call: Call) -> None:
        self.call = call

    def is_due(self, run: Run) -> bool:
        return False  # `SaveCheckpoint` adds it to the work

    def do(self, run: Run, checkpoint: Path | None) -> None:
        self.call("on_save", checkpoint=checkpoint)


class SaveCheckpoint(LoopCallback):
    """Writes checkpoints, each with the list of work that its step still has to do.

    Args:
        checkpoints (`CheckpointManager`): Writes them.
        works (`Sequence[Work]`): What a step may have to do.

    Attributes:
        written (`Path`, *optional*): Checkpoint of the step just taken.
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
            run.state.window = run.window.dump(run.accelerator)
            self.checkpoints.save(run.state)


class DoWork(LoopCallback):
    """Does the work of a step and notes beside the checkpoint what is done.

    Args:
        saved (`SaveCheckpoint`): Writes the checkpoints.
        works (`Sequence[Work]`): What a step may have to do, in order.
        signals (`StopOnSignal`): A run that was told to stop leaves the rest to the
            resumed run.
        undone (`Sequence[str]`, *optional*, defaults to `()`): Work that a killed run
            left at its checkpoint.
        resumed (`Path`, *optional*): That checkpoint.
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
                # This checkpoint lists the work, so it must stay the newest.
                run.control.should_training_stop = True
                return
            if name in works:
                works[name].do(run, checkpoint)
            if checkpoint is not None:
                self.saved.checkpoints.mark_done(checkpoint, name)


@dataclass(frozen=True)
class Rollback:
    """What the trainer does to go back.

    Attributes:
        go_back (`Callable`): Loads earlier weights from a folder and multiplies the
            learning rate by a factor.
        slow_down (`Callable`): Only multiplies the learning rate.
        factor (`float`): Factor of each rollback.
        most (`int`): Rollbacks of a run. After them it stops.
    """

    go_back: Callable[[Path, float], None]
    slow_down: Callable[[float], None]
    factor: float = 0.5
    most: int = 2


class ActOnHacking(LoopCallback):
    """Stops, warns or goes back when a validation says that the reward is hacked.

    What it did is not stored. A resumed run repeats the verdicts of its validations.

    Args:
        validation (`Validation`): Its guardian watches the reward.
        checkpoints (`CheckpointManager`): Writes a last checkpoint.
        rollback (`Rollback`): What the trainer does to go back.
        say (`Callable[[str], None]`): Prints a sentence.
        resumed (`bool`): Whether the run goes on from a checkpoint.
    """

    def __init__(
        self,
        validation: Validation,
        checkpoints: CheckpointManager,
        rollback: Rollback,
        say: Callable[[str], None],
        resumed: bool,
    ) -> None:
        self.validation, self.checkpoints, self.rollback = validation, checkpoints, rollback
        self.say, self.resumed = say, resumed
        self.rollbacks = 0
        self.handled = -1

    def on_train_begin(self, run: Run) -> None:
        validation = self.validation
        if not self.resumed:
            return
        if validation.config.on_hacking != "rollback":
            # Only a validation that was repeated now: someone who resumes a stopped run
            # wants to go on.
            if not validation.restored:
                self._act(run)
            return
        step = run.state.global_step
        steps = validation.hacked_steps()
        self.rollbacks = min(len([past for past in steps if past < step]), self.rollback.most)
        if self.rollbacks:
            self.rollback.slow_down(self.rollback.factor**self.rollbacks)
        self._act(run)

    def on_step_end(self, run: Run) -> None:
        self._act(run)

    def _act(self, run: Run) -> None:
        validation, step = self.validation, run.state.global_step
        if not validation.verdict.hacked or self.handled == step:
            return
        if validation.validated_at != step:
            return
        self.handled = step
        best = validation.shared_best_step()
        kept = (
            f"the best weights are those of step {best}"
            if best
            else "no validation was better than the start, and no earlier weights are kept"
        )
        action = validation.config.on_hacking
        if action == "rollback" and best and self.rollbacks < self.rollback.most:
            self.rollbacks += 1
            factor = self.rollback.factor**self.rollbacks
            self.say(
                f"{validation.verdict.sentence}; going back to step {best}, at {factor:g} times "
                "the learning rate (validation.on_hacking: rollback)"
            )
            self.rollback.go_back(validation.output_dir / BEST, factor)
        elif action == "warn":
            self.say(
                f"WARNING: {validation.verdict.sentence}; {kept} (validation.on_hacking: warn)"
            )
        else:
            ending = ", and the run ends with them" if best else "; the run ends"
            self.say(
                f"{validation.verdict.sentence}; {kept}{ending} (validation.on_hacking: warn "
                "goes on)"
            )
            run.hacked_at = step
            run.control.should_training_stop = True
            if not (self.checkpoints.output_dir / f"checkpoint-{step}").is_dir():
                run.state.due = []
                self.checkpoints.save(run.state)


def in_order(
    *,
    log: MetricLog,
    call: Call,
    signals: StopSignals,
    checkpoints: CheckpointManager,
    evaluate: Callable[[], dict[str, float]] | None,
    divergence: LoopCallback | None = None,
    validation: Validation | None = None,
    hacking: LoopCallback | None = None,
    undone: Sequence[str] = (),
    resumed: Path | None = None,
) -> list[LoopCallback]:
    """Return the callbacks of the loop in their fixed order.

    A resumed run equals an uninterrupted one only in this order. Metrics are logged
    before the checkpoint is written, so that it holds the log's position. The
    checkpoint is written before an evaluation, so that a run killed meanwhile does it
    again.

    Args:
        log (`MetricLog`): File and trackers.
        call (`Callable`): Calls a hook of the user's callbacks.
        signals (`StopSignals`): Signals of this process.
        checkpoints (`CheckpointManager`): Writes checkpoints.
        evaluate (`Callable`, *optional*): Returns the metrics of an evaluation.
        divergence (`LoopCallback`, *optional*): Looks at the logs.
        validation (`Validation`, *optional*): Draws and scores images.
        hacking (`LoopCallback`, *optional*): Acts when the reward is hacked.
        undone (`Sequence[str]`, *optional*, defaults to `()`): Work that a killed run
            left at its checkpoint.
        resumed (`Path`, *optional*): That checkpoint.
    """
    works: list[Any] = [AnnounceSave(call), Evaluate(evaluate, log), Validate(validation, log)]
    stop = StopOnSignal(signals)
    save = SaveCheckpoint(checkpoints, works)
    metrics = LogMetrics(log, call, undone)
    stages = [
        metrics,
        divergence,
        UserCallbacks(call, metrics),
        stop,
        save,
        DoWork(save, works, stop, undone, resumed),
        hacking,
    ]
    return [stage for stage in stages if stage is not None]
