"""The result of a steering call: a weighted population per prompt, with its lineage."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .resampling import Generators, resample
from .smc import count_roots
from .step_trace import StepTrace

MIN_ESS = 1.5
"""A population has collapsed when its effective sample size ever fell under this."""


@dataclass
class SteeringResult:
    """A weighted sample of p(x) exp(lmbda r(x)) / Z for every prompt.

    Attributes:
        prompts (`list[str]`): P of them.
        images: [prompt][particle], as the pipeline returned them.
        rewards (`Tensor`): of these images, float64 (P, K).
        log_weights (`Tensor`): normalised per prompt, (P, K).
        log_z (`Tensor`): estimate of log E[exp(lmbda r)], (P,). For a given lmbda,
            exp(log_z) is unbiased.
        lmbda (`Tensor`): given, or chosen by `ess_target`, (P,).
        roots (`Tensor`): the initial noise that each particle descends from, int64
            (P, K).
        applied (`Tensor`): sum of all log potentials along the lineage, (P, K). It
            equals lmbda * rewards.
        degenerate (`Tensor`): whether every terminal reward was -inf, bool (P,).
        steps (`list[StepTrace]`): the scored steps in order.
        final_ess (`Tensor`): effective sample size after the terminal weights, (P,).
        latents (`Tensor`): the final latents, (P, K, ...).
        counts (`dict[str, int]`): model_rows, model_calls, decodes (intermediate),
            reward_calls, scored_images.
        seconds (`dict[str, float]`): total, decode, reward.
        nan_count (`int`): rewards that were NaN and counted as -inf.
        warnings (`list[str]`): sentences about collapsed populations.
        seed: what the streams were made from. None where a generator was given.
        kernel (`str`, *optional*): what stepped. None is the pipeline's scheduler.
    """

    prompts: list[str]
    images: list[list[Any]]
    rewards: Tensor
    log_weights: Tensor
    log_z: Tensor
    lmbda: Tensor
    roots: Tensor
    applied: Tensor
    degenerate: Tensor
    steps: list[StepTrace]
    final_ess: Tensor
    latents: Tensor
    counts: dict[str, int]
    seconds: dict[str, float]
    nan_count: int = 0
    warnings: list[str] = field(default_factory=list)
    seed: list[int] | None = None
    kernel: str | None = None

    @property
    def weights(self) -> Tensor:
        """Normalised weights, (P, K). Each row sums to 1."""
        return self.log_weights.exp()

    @property
    def best_index(self) -> Tensor:
        """The particle of highest reward of each prompt, int64 (P,).

        It is the maximum of the sample. `draw` samples the tilted distribution.
        """
        return self.rewards.nan_to_num(nan=-math.inf, neginf=-math.inf).argmax(1)

    @property
    def best(self) -> list[Any]:
        """The image of highest reward of each prompt."""
        return [row[int(k)] for row, k in zip(self.images, self.best_index, strict=True)]

    @property
    def ancestors(self) -> Tensor:
        """The ancestors at all S scored steps, int64 (S, P, K)."""
        empty = torch.zeros(0, *self.rewards.shape, dtype=torch.int64)
        return torch.stack([step.ancestors for step in self.steps]) if self.steps else empty

    @property
    def ess(self) -> Tensor:
        """The effective sample size after each reweighting, (S + 1, P)."""
        return torch.stack([*(step.ess for step in self.steps), self.final_ess])

    @property
    def num_roots(self) -> Tensor:
        """How many initial noises still have descendants, (P,)."""
        return count_roots(self.roots)

    def draw(self, generator: Generators = None) -> list[Any]:
        """Draw one image per prompt by its weight.

        It is a sample of the tilted distribution up to O(1/K).

        Args:
            generator (`torch.Generator` or one per prompt, *optional*): None is torch's
                global one.

        Returns:
            `list`: one image per prompt.
        """
        chosen = resample(self.weights, "multinomial", generator=generator)[:, 0]
        return [row[int(k)] for row, k in zip(self.images, chosen, strict=True)]

    def resample(self, generator: Generators = None, scheme: str = "systematic") -> list[list[Any]]:
        """Draw K equally weighted images per prompt, with repetitions.

        Args:
            generator (`torch.Generator` or one per prompt, *optional*): None is torch's
                global one.
            scheme (`str`, *optional*, defaults to `"systematic"`): one of `SCHEMES`.

        Returns:
            `list[list]`: [prompt][slot].
        """
        picks = resample(self.weights, scheme, generator=generator)
        return [
            [row[int(k)] for k in chosen] for row, chosen in zip(self.images, picks, strict=True)
        ]

    def plot(self, prompt: int = 0, path: str | Path | None = None) -> Image.Image:
        """Draw the resampling genealogy of one prompt, see `lineage_picture`.

        Args:
            prompt (`int`, *optional*, defaults to `0`): index of the prompt.
            path (`str` or `Path`, *optional*): a file that the picture is written to.

        Returns:
            `Image.Image`: the picture.
        """
        from .lineage import lineage_picture

        picture = lineage_picture(self, prompt)
        if path is not None:
            picture.save(path)
        return picture

    def find_collapse(self) -> list[str]:
        """Describe the prompts whose population collapsed.

        Returns:
            `list[str]`: sentences. Empty where none collapsed, and for one particle.
        """
        if self.rewards.shape[1] == 1:
            return []
        sentences = []
        total = len(self.prompts)
        single = (
            int((self.num_roots == 1).sum())
            if any(bool(step.resampled.any()) for step in self.steps)
            else 0
        )
        if single:
            sentences.append(
                f"{single} of {total} prompts: all particles descend from one initial noise; they "
                "differ little, "
                "lower lmbda, resample later or give ess_target to keep more"
            )
        low = int((self.ess.min(0).values < MIN_ESS).sum())
        if low:
            sentences.append(
                f"{low} of {total} prompts: the effective sample size fell under {MIN_ESS} of "
                f"{self.rewards.shape[1]}; "
                "lmbda is large for this scorer's spread, see docs/steering.md"
            )
        return sentences

    @classmethod
    def merged(cls, parts: list[SteeringResult]) -> SteeringResult:
        """Join the results of several calls, prompt after prompt.

        Args:
            parts (`list[SteeringResult]`): at least one, with equal scored steps.
        """
        if len(parts) == 1:
            return parts[0]

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts])

        steps = []
        for rows in zip(*(part.steps for part in parts), strict=True):
            values = {n: torch.cat([getattr(row, n) for row in rows]) for n in _STEP_TENSORS}
            pictures = (
                None
                if rows[0].thumbnails is None
                else [line for row in rows for line in row.thumbnails or []]
            )
            steps.append(
                StepTrace(
                    index=rows[0].index, timestep=rows[0].timestep, thumbnails=pictures, **values
                )
            )
        tensors: dict[str, Any] = {name: joined(name) for name in _TENSORS}
        return cls(
            prompts=[prompt for part in parts for prompt in part.prompts],
            images=[row for part in parts for row in part.images],
            **tensors,
            steps=steps,
            counts={key: sum(part.counts[key] for part in parts) for key in parts[0].counts},
            seconds={key: sum(part.seconds[key] for part in parts) for key in parts[0].seconds},
            nan_count=sum(part.nan_count for part in parts),
            seed=parts[0].seed,
            kernel=parts[0].kernel,
        )


_STEP_TENSORS = ("rewards", "log_potentials", "log_weights", "ess", "ancestors", "resampled")
_TENSORS = (
    "rewards",
    "log_weights",
    "log_z",
    "lmbda",
    "roots",
    "applied",
    "degenerate",
    "final_ess",
    "latents",
)
