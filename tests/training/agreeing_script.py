"""What two processes must agree on though they have seen different things:
`agreeing_script.py <folder>`, under torchrun."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
from tiny import brightness, lora_config, make_trainer, pair_rows

from diffalign import TrainerCallback
from diffalign.errors import UserError
from diffalign.training import trainer as trainer_module
from diffalign.training.auto_beta import RATE, AutoBeta
from diffalign.training.online import feedback
from diffalign.training.tracking import MetricLog, MetricWindow


def window(trainer: Any, folder: Path) -> None:
    """A name that one process has, and a process that has none."""
    accelerator = trainer.accelerator
    rank, found = accelerator.process_index, MetricWindow()
    found.add(
        {"both": torch.tensor([1.0 + rank])} | ({"one": torch.tensor([5.0])} if rank == 0 else {})
    )
    assert found.reduce(accelerator) == {"both": 1.5, "one": 5.0}
    if rank == 1:
        found.add({"late": torch.tensor([2.0, 4.0])})
    assert found.reduce(accelerator) == {"late": 3.0}
    assert found.reduce(accelerator) == {}


def history(trainer: Any, folder: Path) -> None:
    """What was logged before, which decides when a run has diverged."""
    accelerator = trainer.accelerator
    if accelerator.is_main_process:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        (folder / "logs" / "metrics.jsonl").write_text(
            "".join(json.dumps({"step": s, "loss": 0.5}) + "\n" for s in (1, 2, 3))
        )
    accelerator.wait_for_everyone()
    assert [entry["step"] for entry in MetricLog(accelerator, folder).start(2)] == [1, 2]


def upload(trainer: Any, folder: Path) -> None:
    """Of the model, once."""
    trainer_module.push_to_hub = lambda *arguments: "address"  # type: ignore[assignment]
    assert trainer.push_to_hub() == ("address" if trainer.accelerator.is_main_process else None)


def beta(trainer: Any, folder: Path) -> None:
    """beta that moves by the pairs of both processes, also where one has none."""
    accelerator, moved = trainer.accelerator, AutoBeta(100.0, 0.5)
    if accelerator.is_main_process:
        moved.add(torch.tensor([0.1, 0.2]), torch.ones(2))
    moved.step(accelerator)
    assert moved.value == pytest.approx(100 * math.exp(RATE * (0.15 - 0.5))), moved.value


def main() -> None:
    folder = Path(sys.argv[1])
    trainer = make_trainer(folder / "plain", peft_config=lora_config())
    trainer.setup()
    for check in (window, history, upload, beta):
        check(trainer, folder / check.__name__)
    # Fewer rows to evaluate on than processes.
    found = trainer.evaluate(pair_rows(1))
    assert found["eval/rewards/accuracies"] == 0.5, found
    online(folder)
    callbacks(folder)
    votes(folder)
    print(f"process {trainer.accelerator.process_index} agrees", flush=True)


def online(folder: Path) -> None:
    """Interrupted between two logs, a round's scores not yet logged, and resumed."""
    data = {
        "online": {
            "every": 4,
            "k": 2,
            "num_inference_steps": 2,
            "guidance_scale": 2.0,
            "rollout_batch_size": 4,
        }
    }
    options = {
        "peft_config": lora_config(),
        "rows": [{"prompt": row["prompt"]} for row in pair_rows()],
        "data": data,
    }
    options |= {
        "max_steps": 3,
        "logging_steps": 3,
        "save_steps": 1,
        "save_total_limit": None,
        "options": {"scorers": brightness},
    }
    make_trainer(folder / "online", **options).train()
    resumed = make_trainer(
        folder / "online", **options, resume_from_checkpoint=str(folder / "online" / "checkpoint-1")
    )
    resumed.train()
    assert "online/score_0" in resumed.state.log_history[-1]


def callbacks(folder: Path) -> None:
    """A callback that stops the run on one process."""

    class Stops(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2 and kwargs["trainer"].accelerator.process_index == 1:
                control.should_training_stop = True

    options = {"peft_config": lora_config(), "max_steps": 5, "options": {"callbacks": [Stops()]}}
    trainer = make_trainer(folder / "stopped", **options)
    assert trainer.train().global_step == 2
    assert (folder / "stopped" / "checkpoint-2").is_dir()


def votes(folder: Path) -> None:
    """Votes that come while the processes ask for them, and unreadable votes."""
    options = {"method": "d3po", "peft_config": lora_config(), "max_steps": 1, "feedback": "people"}
    options["options"] = {"scorers": None}
    trainer = make_trainer(folder / "votes", **options)
    output = trainer.train()
    there = output.waiting_for
    assert there is not None
    rank, wait = trainer.accelerator.process_index, trainer.accelerator.wait_for_everyone
    wait()
    if rank == 1:  # has them before the first process, which then decides
        (there / "votes-a.json").write_text("[]")
    main_sees = feedback.find_votes
    if rank == 0:
        feedback.find_votes = lambda folder: []
    again = make_trainer(folder / "votes", **options, resume_from_checkpoint="latest").train()
    assert again.waiting_for == there
    feedback.find_votes = main_sees
    wait()
    if rank == 0:
        (there / "votes-a.json").write_text('[{"chosen": "nobody", "rejected": "no one"}]')
    wait()
    with pytest.raises(UserError, match="there is no image 'nobody' in this round"):
        make_trainer(folder / "votes", **options, resume_from_checkpoint="latest").train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
