"""Advantages: how much better than the others an image of a round is.

The published rules differ in what the standard deviation is taken over, in its
estimator, and in the constant that keeps it from zero. `RULES` lists them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ...errors import UserError


@dataclass(frozen=True)
class AdvantageRule:
    """How scores become advantages.

    Attributes:
        scope (`str`): What the deviation is taken over: `group` is the images of a
            prompt, `round` all images. The mean is that of the group.
        ddof (`int`): 1 for the unbiased estimator of the variance.
        eps (`float`): Added to the deviation, or its least value.
        floor (`bool`): Whether `eps` is the least value.
        columns (`str`): `combined` takes the combined score. `sum` normalises each
            score and adds them. `standardised` also normalises the sum, over the round.
    """

    scope: Literal["group", "round"]
    ddof: int
    eps: float
    floor: bool = False
    columns: Literal["combined", "sum", "standardised"] = "combined"


RULES: dict[str, AdvantageRule] = {
    "flow_grpo": AdvantageRule("round", 0, 1e-4),
    "group": AdvantageRule("group", 0, 1e-4),
    "dance_grpo": AdvantageRule("group", 1, 1e-8),
    "mix_grpo": AdvantageRule("group", 1, 1e-8, columns="sum"),
    "gdpo": AdvantageRule("group", 0, 1e-6, floor=True, columns="standardised"),
}
"""Rules by name.

Flow-GRPO (arXiv 2505.05470) divides by the deviation of the whole round, or of the
`group` if so configured. DanceGRPO is arXiv 2505.07818. MixGRPO (arXiv 2507.21802)
normalises each score by itself. GDPO is as in Flow-Factory. The fifth published rule,
that of DDPO, is `PromptHistory`.
"""


def _moments(values: Tensor, ddof: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation over the last dimension, without missing values."""
    known = ~values.isnan()
    count = known.sum(-1, keepdim=True)
    filled = values.nan_to_num(0.0)
    mean = filled.sum(-1, keepdim=True) / count.clamp(min=1)
    squares = torch.where(known, (filled - mean).square(), torch.zeros_like(filled))
    return mean, (squares.sum(-1, keepdim=True) / (count - ddof).clamp(min=1)).sqrt()


def _divided(values: Tensor, std: Tensor, rule: AdvantageRule) -> Tensor:
    return values / (std.clamp(min=rule.eps) if rule.floor else std + rule.eps)


def _of_groups(scores: Tensor, rule: AdvantageRule) -> Tensor:
    """Advantages of one score, (g, k), NaN where it is missing."""
    mean, std = _moments(scores, rule.ddof)
    if rule.scope == "round":
        _, std = _moments(scores.flatten(), rule.ddof)
    return _divided(scores - mean, std, rule)


def group_advantages(
    scores: Tensor, *, rule: str = "flow_grpo", weights: Sequence[float] | None = None
) -> Tensor:
    """Compute the advantages of a round.

    Args:
        scores (`Tensor`): Scores of k images of each of g prompts, (g, k), or (g, k, m)
            for m scores of an image, higher is better. NaN is missing.
        rule (`str`, *optional*, defaults to `"flow_grpo"`): A key of `RULES`.
        weights (`Sequence[float]`, *optional*): Weight of each score, for the rules
            that normalise each by itself. Defaults to 1.

    Returns:
        `Tensor`: (g, k), float64. 0 for images with a missing score, which are also
        left out of means and deviations. 0 in a group whose scores are all equal.

    Raises:
        ValueError: An unknown rule, other shapes, or several scores where the rule
            takes one.

    Example:
        ```python
        import torch

        scores = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
        advantages = group_advantages(scores, rule="group")
        assert torch.allclose(advantages.sum(), torch.tensor(0.0, dtype=torch.float64))
        ```
    """
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    if scores.ndim not in (2, 3):
        raise ValueError(f"scores: expected (g, k) or (g, k, m), got {tuple(scores.shape)}")
    chosen, columns = RULES[rule], scores.double()
    columns = columns[..., None] if columns.ndim == 2 else columns
    count = columns.shape[-1]
    if chosen.columns == "combined" and count != 1:
        raise ValueError(f"scores: rule {rule} takes one combined score, got {count}")
    if weights is not None and len(weights) != count:
        raise ValueError(f"weights: expected {count}, one per score, got {len(weights)}")
    factors = [1.0] * count if weights is None else list(weights)
    # An image that lacks one of its scores counts in none of them.
    columns = columns.masked_fill(columns.isnan().any(-1, keepdim=True), torch.nan)
    parts = zip(factors, columns.unbind(-1), strict=True)
    advantages = sum(
        (factor * _of_groups(column, chosen) for factor, column in parts),
        start=torch.zeros(scores.shape[:2], dtype=torch.float64),
    )
    if chosen.columns == "standardised":
        mean, std = _moments(advantages.flatten(), chosen.ddof)
        advantages = _divided(advantages - mean, std, chosen)
    return advantages.nan_to_num(0.0)


def equal_groups(scores: Tensor) -> Tensor:
    """Find the groups whose known scores are all equal, so that nothing can be learned.

    Args:
        scores (`Tensor`): (g, k), or (g, k, m). NaN is missing.

    Returns:
        `Tensor`: (g,), bool.
    """
    columns = (scores if scores.ndim == 3 else scores[..., None]).double()
    missing = columns.isnan().any(-1, keepdim=True)
    high = columns.masked_fill(missing, -torch.inf).amax(1)
    low = columns.masked_fill(missing, torch.inf).amin(1)
    return (high <= low).all(-1)


class PromptHistory:
    """Advantages of DDPO: against the last rewards of the same prompt.

    See Black et al. 2023, arXiv 2305.13301, and its published code. A prompt with too
    few rewards so far is compared with the whole round.

    Args:
        size (`int`): Rewards kept per prompt.
        least (`int`): Rewards that a prompt needs.
    """

    field = "train.advantage"
    file = "reward_history.json"

    def __init__(self, size: int = 32, least: int = 16) -> None:
        self.size, self.least = size, least
        self.rewards: dict[str, list[float]] = {}

    def __call__(self, prompts: Sequence[str], scores: Tensor) -> Tensor:
        """Add the rewards of a round, and compute its advantages.

        Args:
            prompts (`Sequence[str]`): g prompts. Several groups may share one.
            scores (`Tensor`): (g, k). NaN is missing.

        Returns:
            `Tensor`: (g, k), float64. 0 for missing scores.
        """
        scores = scores.double()
        for prompt, row in zip(prompts, scores, strict=True):
            history = self.rewards.setdefault(prompt, [])
            history += row[~row.isnan()].tolist()
            del history[: -self.size]
        whole = _moments(scores.flatten(), 0)
        advantages = []
        for prompt, row in zip(prompts, scores, strict=True):
            history = self.rewards[prompt]
            enough = len(history) >= self.least
            past = torch.tensor(history, dtype=torch.float64)
            mean, std = _moments(past, 0) if enough else whole
            advantages.append((row - mean) / (std + 1e-6))
        return torch.stack(advantages).nan_to_num(0.0)

    def save(self, folder: Path, rank: int) -> None:
        """Write the rewards into a checkpoint. All processes hold the same.

        Args:
            folder (`Path`): Folder of the checkpoint.
            rank (`int`): Number of this process. The first one writes.
        """
        if rank == 0:
            (folder / self.file).write_text(json.dumps(self.rewards))

    def load(self, folder: Path, rank: int, device: torch.device) -> None:
        """Read the rewards from a checkpoint.

        Args:
            folder (`Path`): Folder of the checkpoint.
            rank (`int`): Number of this process.
            device (`torch.device`): Not used.

        Raises:
            UserError: The checkpoint holds none.
        """
        if not (folder / self.file).is_file():
            raise UserError(
                f"{self.field}: {folder} holds no past rewards; it was saved by a run with "
                "another setting"
            )
        self.rewards = json.loads((folder / self.file).read_text())
