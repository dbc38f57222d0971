"""Settings of the quickstart, in a file that `--help` can import without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from ..config.ranges import Count, Positive, Range, count
from ..config.section import config_section
from ..shapes.prompts import held_out_prompts, train_prompts

_CHOICE_PROMPTS = 60
_TRAIN_PROMPTS = Range(1, len(train_prompts()) - _CHOICE_PROMPTS)
_EVAL_PROMPTS = Range(2, len(held_out_prompts()))


@config_section
class QuickstartConfig:
    """Settings of `diffalign quickstart`.

    They are stored with the run. A run goes on only under the same ones.
    """

    model: Literal["shapes", "shapes-flow"] = "shapes"
    """The embedded model to align."""
    seed: Annotated[int, count(0)] = 0
    """Seed of the training images, of training and of the comparison."""
    num_prompts: Annotated[int, _TRAIN_PROMPTS] = 240
    """Training prompts to make preferences for (of 540)."""
    images_per_prompt: Annotated[int, count(2)] = 4
    """Images that compete for each prompt."""
    max_steps: Count = 300
    """Optimizer steps."""
    batch_size: Count = 16
    """Pairs per step."""
    beta: Positive[float] | None = None
    """Diffusion-DPO's beta; null: 500 for shapes, 50 for shapes-flow. It is small,
    because these preferences are nearly free of noise."""
    learning_rate: Positive[float] = 1e-3
    """Learning rate of the LoRA."""
    rank: Count = 16
    """Rank of the LoRA."""
    choice_prompts: Annotated[int, Range(1, _CHOICE_PROMPTS)] = 60
    """Training prompts without preferences that choose the guidance (of 60)."""
    eval_prompts: Annotated[int, _EVAL_PROMPTS] = 120
    """Held-out prompts to compare on (of 120)."""
    eval_images: Count = 3
    """Images per held-out prompt and model."""
