"""From a run file to a finished run: what ``diffalign train`` does."""

from __future__ import annotations

from ..config import RunConfig
from ..methods import trainer_class
from ..processes import end_training


def build_trainer(run: RunConfig):  # type: ignore[no-untyped-def]  # the class depends on the method
    """The trainer that a run file describes; errors as its constructor."""
    return trainer_class(run.method)(
        model=run.model,
        args=run.train,
        peft_config=run.lora.to_peft() if run.lora is not None else None,
        data=run.data,
        validation=run.validation,
        hub=run.hub,
        revision=run.revision,
        variant=run.variant,
        vae=run.vae,
        ref_model=run.ref_model,
        scorers=run.rewards,
    )


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
            f"votes wanted: {output.waiting_for} (open index.html; write votes.json beside it), then go on with "
            "--train.resume_from_checkpoint latest"
        )
        return 0
    trainer.accelerator.print(f"done: {trainer.output_dir}")
    return 0
