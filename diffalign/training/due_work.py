"""What a step owes after its checkpoint is written: the callbacks' `on_save`, an evaluation, a validation.

The checkpoint holds the list, and beside it stands what is done. A run that was killed in between makes up for the rest when it resumes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .rng import undisturbed

if TYPE_CHECKING:
    from .signals import StopSignals
    from .tracking import MetricLog
    from .trainer import Trainer
    from .validation import Validation

_PREFIXES = {"evaluate": "eval/", "validate": "validation/"}  # work -> the names of its metrics


def undone_work(trainer: Trainer, checkpoint: Path | None) -> list[str]:
    """What a killed run still owes the step of its checkpoint; later checkpoints of its output folder are put aside."""
    if checkpoint is None or checkpoint.resolve().parent != trainer.output_dir.resolve():
        return []
    undone = trainer.checkpoints.undone(checkpoint, trainer.state.due)
    trainer.checkpoints.retire_later(trainer.state.global_step)
    return undone


def start_log(log: MetricLog, step: int, undone: list[str]) -> list[dict[str, float]]:
    """Opens the log at a step, without rows of work that is done again; returns the rows of training."""
    rows = log.start(step, tuple(_PREFIXES[name] for name in undone if name in _PREFIXES))
    return [row for row in rows if any(name.startswith("train/") for name in row)]


def due_work(trainer: Trainer, watch: Validation | None, last: bool) -> list[str]:
    """The work of this step that comes after its checkpoint."""
    args, step = trainer.args, trainer.state.global_step
    asked, trainer.control.should_evaluate = trainer.control.should_evaluate, False
    due = args.eval_steps is not None and step % args.eval_steps == 0 and trainer.eval_dataset is not None
    return ["evaluate"] * (asked or due) + ["validate"] * (watch is not None and watch.due(step, last))


def do_work(
    trainer: Trainer,
    due: list[str],
    checkpoint: Path | None,
    log: MetricLog,
    watch: Validation | None,
    progress: Any,
    signals: StopSignals,
) -> None:
    """Does the work and remembers it beside the checkpoint. A run that was told to stop leaves it to the one that resumes."""
    step = trainer.state.global_step
    for name in due:
        if name == "on_save":
            trainer._call("on_save", progress, checkpoint=checkpoint)
        elif checkpoint is not None and trainer._interrupted(signals):  # all processes decide alike
            trainer.control.should_training_stop = True  # so that this checkpoint, which knows what is owed, stays the newest
            return
        elif name == "evaluate" and trainer.eval_dataset is not None:
            with undisturbed():
                metrics = trainer.evaluate()
            log.write(metrics, step)
        elif name == "validate" and watch is not None:
            with undisturbed():
                watch.run(step, log)
        if checkpoint is not None:
            trainer.checkpoints.mark_done(checkpoint, name)
