"""A training run in a process of its own:
`script.py <mode> <folder> [per_device_train_batch_size]`.

Modes: `plain`; `kill` dies by SIGKILL in the second save, just before the checkpoint
gets its name; `disk_full` cannot write files above 20 kB from step 2 on; `announce`
prints a line after every step, slowly enough to be signalled; `methods` trains every
method and `families` every transformer family, each in a folder of its own.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tiny import by_place, lora_config, make_trainer

from diffalign import TrainerCallback
from diffalign.methods import METHODS
from diffalign.training import checkpoint


class Announce(TrainerCallback):
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        print(f"did step {kwargs['trainer'].state.global_step}", flush=True)
        time.sleep(0.3)


class DiskFull(TrainerCallback):
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if kwargs["trainer"].state.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def kill_in_second_save() -> None:
    replace, calls = os.replace, []

    def deadly(source: Any, target: Any) -> None:
        if Path(target).name.startswith("checkpoint-"):
            calls.append(target)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    checkpoint.os.replace = deadly  # type: ignore[assignment]


def main() -> None:
    mode, folder = sys.argv[1:3]
    size = int(sys.argv[3]) if len(sys.argv) > 3 else 2
    if mode == "methods":
        for method in METHODS:
            config = lora_config(target_modules=["to_q", "conv_in"])
            steady = {"max_steps": 3, "adam_epsilon": 1e-3, "learning_rate": 1e-2}
            judged = {"options": {"scorers": [by_place]}} if method == "spo" else {}
            make_trainer(
                f"{folder}/{method}",
                method=method,
                peft_config=config,
                per_device_train_batch_size=size,
                **judged,
                **steady,
            ).train()
        return
    if mode == "families":
        from backbones.test_common_on_families import STEADY, WITH_LORA, ragged_pairs, size_of

        for family in WITH_LORA:
            make_trainer(
                f"{folder}/{family}",
                family,
                rows=ragged_pairs(family),
                peft_config=lora_config(),
                per_device_train_batch_size=size,
                data={"resolution": size_of(family)},
                **STEADY,
            ).train()
        return
    options: dict[str, Any] = {"max_steps": 6, "save_steps": 1, "save_total_limit": None}
    if mode == "kill":
        kill_in_second_save()
        options["adam_epsilon"] = 1e-3  # keeps Adam from magnifying rounding
    elif mode == "plain":
        # A full fine-tune with an epsilon that keeps Adam from magnifying rounding.
        options = {
            "max_steps": 3,
            "adam_epsilon": 1e-3,
            "use_ema": True,
            "ema_decay": 0.5,
            "overwrite_output_dir": True,
        }
    else:
        options["options"] = {"callbacks": [Announce() if mode == "announce" else DiskFull()]}
    if mode == "announce":
        options |= {"max_steps": 40, "save_steps": None}
    lora = None if mode in ("plain", "disk_full") else lora_config(dropout=0.1)
    trainer = make_trainer(folder, peft_config=lora, per_device_train_batch_size=size, **options)
    output = trainer.train()
    print(f"ended at step {output.global_step}, interrupted by {output.interrupted_by}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
