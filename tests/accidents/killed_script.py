"""A run that is killed again and again: `killed_script.py <folder> <batch size>`.

It goes on from its last checkpoint, if there is one, and says its steps.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tiny import lora_config, make_trainer

from diffalign import TrainerCallback
from diffalign.runtime.distributed import end_training, process_rank
from diffalign.training.checkpoint import list_checkpoints

STEPS, EVERY = 60, 3


class Announce(TrainerCallback):
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        step = kwargs["trainer"].state.global_step
        print(f"step {step} of process {process_rank()} {os.getpid()}", flush=True)
        time.sleep(0.05)


def main() -> None:
    folder, size = Path(sys.argv[1]), int(sys.argv[2])
    trainer = make_trainer(
        folder,
        peft_config=lora_config(dropout=0.1),
        max_steps=STEPS,
        save_steps=EVERY,
        save_total_limit=2,
        per_device_train_batch_size=size,
        use_ema=True,
        options={"callbacks": [Announce()]},
    )
    resume = "latest" if list_checkpoints(folder) else None
    trainer.train(resume_from_checkpoint=resume)
    end_training(trainer.accelerator)
    print("ended", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
