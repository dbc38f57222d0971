"""`diffalign train`: from a run file to a finished run."""

from __future__ import annotations

from ..recipe import RunConfig, build_trainer
from ..runtime.distributed import end_training


def train_run(run: RunConfig, dry_run: bool = False) -> int:
    """Trains (or tries one batch); returns the exit code."""
    trainer = build_trainer(run)
    if dry_run:
        trainer.dry_run()
        return 0
    output = trainer.train()
    end_training(trainer.accelerator)
    if output.interrupted_by is not None:
        trainer.accelerator.print(
            f"interrupted at step {output.global_step}: saved checkpoint-{output.global_step}; "
            "continue with --train.resume_from_checkpoint latest"
        )
        return 128 + output.interrupted_by
    if output.waiting_for is not None:
        trainer.accelerator.print(
            f"votes wanted: {output.waiting_for} (open index.html; write votes.json beside it), "
            "then go on with --train.resume_from_checkpoint latest"
        )
        return 0
    trainer.accelerator.print(f"done: {trainer.output_dir}")
    return 0
