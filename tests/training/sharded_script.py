"""Runs that FSDP2 shards, under torchrun:
`sharded_script.py <folder> <groups per process> <method:family:lora|full> ...`.

Each run writes a checkpoint at step 2 of 4 and goes on. A second run resumes from that
checkpoint, in the folder `<run>-resumed`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tiny import make_trainer
from training.test_sharded_runs import sharded_options

from diffalign.runtime.distributed import sharded_modules


def main() -> None:
    arguments = [value for value in sys.argv[1:] if value != "--resume"]
    folder, size, kinds = Path(arguments[0]), int(arguments[1]), arguments[2:]
    for kind in kinds:
        name = kind.replace(":", "-")
        options: dict[str, Any] = sharded_options(kind, size)
        trainer = make_trainer(folder / name, **options)
        if "--resume" in sys.argv:
            trainer.train(resume_from_checkpoint=str(folder / name / "checkpoint-2"))
            continue
        trainer.train()
        assert len(sharded_modules(trainer.network)) > 1, "FSDP2 did not shard the blocks"
        resumed = folder / f"{name}-resumed"
        if trainer.accelerator.is_main_process:
            shutil.copytree(folder / name, resumed)  # a pool lies beside the checkpoints
            shutil.rmtree(resumed / "checkpoint-4")
        trainer.accelerator.wait_for_everyone()
        again = make_trainer(resumed, **options)
        again.train(resume_from_checkpoint=str(resumed / "checkpoint-2"))
    print("trained", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
