"""Settings of the quickstart, apart from its code so that the command line can show them without loading anything."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..config.ranges import positive
from ..errors import ConfigError
from ..shapes.prompts import held_out_prompts, train_prompts


@dataclass
class QuickstartConfig:
    """Settings of `diffalign quickstart`; they are stored with the run, and a run goes on only under the same ones."""

    seed: int = 0
    """Seed of the training images, of training and of the comparison."""
    num_prompts: int = 320
    """Training prompts to make preferences for (of 600)."""
    images_per_prompt: int = 4
    """Images that compete for each prompt."""
    max_steps: int = 300
    """Optimizer steps."""
    batch_size: int = 16
    """Pairs per step."""
    beta: float = 500.0
    """Diffusion-DPO's beta; small, because this world's preferences are nearly free of noise."""
    learning_rate: float = 1e-3
    """Learning rate of the LoRA."""
    rank: int = 16
    """Rank of the LoRA."""
    eval_prompts: int = 120
    """Held-out prompts to compare on (of 120)."""
    eval_images: int = 4
    """Images per held-out prompt and model."""

    def __post_init__(self) -> None:
        limits = {"num_prompts": len(train_prompts()), "eval_prompts": len(held_out_prompts())}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            lowest = {"seed": 0, "images_per_prompt": 2, "eval_prompts": 2}.get(field.name, 1)
            if field.type == "int" and not lowest <= value <= limits.get(field.name, 10**9):
                raise ConfigError(
                    f"--{field.name}",
                    f"expected int in [{lowest}, {limits.get(field.name, 10**9)}], got {value}",
                )
            if field.type == "float":
                positive.check(f"--{field.name}", value)
