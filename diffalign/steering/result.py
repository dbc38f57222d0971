"""What a steering call returns: a weighted population per prompt, with its lineage."""

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
"""A population whose effective sample size ever fell under this has collapsed."""


@dataclass
class SteeringResult:
    """A weighted sample of p(x) exp(lmbda r(x)) / Z for every prompt.

    Attributes:
        prompts: P of them.
        images: [prompt][particle], as the pipeline returned them.
        rewards: (P, K) float64, of these images.
        log_weights: (P, K), normalised per prompt.
        log_z: (P,), the estimate of log E[exp(lmbda r)], unbiased as exp(log_z) for a given lmbda.
        lmbda: (P,), given or chosen by `ess_target`.
        roots: (P, K) int64, the initial noise each particle descends from.
        applied: (P, K), the product of all potentials along the lineage, logged: equals lmbda * rewards.
        degenerate: (P,) bool, every terminal reward was -inf.
        steps: the scored steps in order.
        final_ess: (P,), after the terminal weights.
        latents: (P, K, ...), the final latents.
        counts: model_rows, model_calls, decodes (intermediate), reward_calls, scored_images.
        seconds: total, decode, reward.
        nan_count: rewards that were NaN and counted as -inf.
        warnings: sentences about collapsed populations.
        seed: what the streams were made from, when no generator was given.
        kernel: what stepped: one of ours, or None for the pipeline's scheduler.
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
    seed: Any = None
    kernel: str | None = None

    @property
    def weights(self) -> Tensor:
        """(P, K), each row summing to 1."""
        return self.log_weights.exp()

    @property
    def best_index(self) -> Tensor:
        """(P,) int64: the particle of highest reward. A sample of the maximum, not of the tilted law: see `draw`."""
        return self.rewards.nan_to_num(nan=-math.inf, neginf=-math.inf).argmax(1)

    @property
    def best(self) -> list[Any]:
        """The image of highest reward of each prompt."""
        return [row[int(k)] for row, k in zip(self.images, self.best_index, strict=True)]

    @property
    def ancestors(self) -> Tensor:
        """(S, P, K) int64."""
        own = torch.zeros(0, *self.rewards.shape, dtype=torch.int64)
        return torch.stack([step.ancestors for step in self.steps]) if self.steps else own

    @property
    def ess(self) -> Tensor:
        """(S + 1, P): after each reweighting, the last one terminal."""
        return torch.stack([*(step.ess for step in self.steps), self.final_ess])

    @property
    def num_roots(self) -> Tensor:
        """(P,): how many initial noises still have descendants."""
        return count_roots(self.roots)

    def draw(self, generator: Generators = None) -> list[Any]:
        """One image per prompt, drawn by its weight: a sample of the tilted law up to O(1/K).

        Args:
            generator: one, or one per prompt.
        """
        chosen = resample(self.weights, "multinomial", generator=generator)[:, 0]
        return [row[int(k)] for row, k in zip(self.images, chosen, strict=True)]

    def resample(self, generator: Generators = None, scheme: str = "systematic") -> list[list[Any]]:
        """K equally weighted images per prompt, with repetitions, [prompt][slot]."""
        picks = resample(self.weights, scheme, generator=generator)
        return [
            [row[int(k)] for k in chosen] for row, chosen in zip(self.images, picks, strict=True)
        ]

    def plot(self, prompt: int = 0, path: str | Path | None = None) -> Image.Image:
        """The lineage tree of one prompt: predicted images at the scored steps, who descends from whom, rewards and weights.

        Args:
            prompt (`int`): its index.
            path (*optional*): also written there.
        """
        from .lineage import lineage_picture

        picture = lineage_picture(self, prompt)
        if path is not None:
            picture.save(path)
        return picture

    def find_collapse(self) -> list[str]:
        """Sentences about prompts whose population collapsed; empty for one particle."""
        if self.rewards.shape[1] == 1:
            return []
        said = []
        total = len(self.prompts)
        single = (
            int((self.num_roots == 1).sum())
            if any(bool(step.resampled.any()) for step in self.steps)
            else 0
        )
        if single:
            said.append(
                f"{single} of {total} prompts: all particles descend from one initial noise; they differ little, "
                "lower lmbda, resample later or give ess_target to keep more"
            )
        low = int((self.ess.min(0).values < MIN_ESS).sum())
        if low:
            said.append(
                f"{low} of {total} prompts: the effective sample size fell under {MIN_ESS} of {self.rewards.shape[1]}; "
                "lmbda is large for this scorer's spread, see docs/steering.md"
            )
        return said

    @classmethod
    def merged(cls, parts: list[SteeringResult]) -> SteeringResult:
        """The results of several calls, prompt after prompt."""
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
        return cls(
            prompts=[prompt for part in parts for prompt in part.prompts],
            images=[row for part in parts for row in part.images],
            **{name: joined(name) for name in _TENSORS},
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
