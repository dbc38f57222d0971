"""Judged pairs and rewards trained on them, for the tests of trained rewards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import picture

from diffalign.reward_training import RewardConfig, RewardTrainer


def rows(count: int, likes_bright: bool = True, user: str | None = None, first: int = 0) -> Any:
    """Pairs of a bright and a dark image, each with a prompt of its own."""
    result = []
    for i in range(first, first + count):
        bright, dark = picture(200 - i % 20, i, 64), picture(60 + i % 20, 5000 + i, 64)
        chosen, rejected = (bright, dark) if likes_bright else (dark, bright)
        row = {"prompt": f"a small red circle number {i}", "chosen": chosen, "rejected": rejected}
        result.append(row | ({"user_id": user} if user else {}))
    return result


def config(folder: Path, **values: Any) -> RewardConfig:
    return RewardConfig(output_dir=str(folder), val=0.2, test=0.25, **values)


def report_of(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text())


def train_towers(folder: Path, towers: str, callbacks: Any = (), **values: Any) -> RewardTrainer:
    """A short training of all weights or of a LoRA."""
    settings: dict[str, Any] = {"max_steps": 12, "per_device_train_batch_size": 8}
    settings |= {"learning_rate": 3e-4, "save_steps": 4, "eval_steps": 6} | values
    args = config(folder, towers=towers, **settings)
    trainer = RewardTrainer("shapes-clip", args, rows(40), callbacks=callbacks)
    trainer.train()
    return trainer
