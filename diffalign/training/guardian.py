"""Notice when a model learns to please its reward and nothing else.

At every validation the same prompts and seeds are drawn and scored by what trains and
by scorers that do not. A reward is hacked when it has risen since the validation at
which a held-out scorer was highest, while that scorer has fallen beyond the interval of
the difference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.statistics import Array, clustered_bootstrap, nanmean
from ..runtime.files import write_atomically

FILE = "guardian.json"


@dataclass(frozen=True)
class Look:
    """Scores of one validation.

    Attributes:
        step (`int`): Optimizer step. 0 is before training.
        reward (`ndarray`): The training reward, (prompts, images). Higher is better.
        held_out (`dict[str, ndarray]`): Scores that do not train, of the same shape.
        members (`dict[str, ndarray]`): Single scores of the reward, if it has several.
    """

    step: int
    reward: Array
    held_out: dict[str, Array]
    members: dict[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What a validation says about the reward.

    Attributes:
        hacked (`bool`): Whether the reward rose while a held-out scorer fell.
        best_step (`int`): Step at which that scorer was highest.
        sentence (`str`): What happened, for the user. Empty if nothing did.
        metrics (`dict[str, float]`): Metrics to log.
    """

    hacked: bool = False
    best_step: int = 0
    sentence: str = ""
    metrics: dict[str, float] = field(default_factory=dict)


def change_interval(before: Array, after: Array, level: float) -> tuple[float, float, float]:
    """Compute the mean change of paired scores with its interval, clustered by prompt.

    Args:
        before (`ndarray`): (prompts, images). Pairs with a NaN are left out.
        after (`ndarray`): Of the same shape.
        level (`float`): Coverage of the interval.

    Returns:
        `tuple[float, float, float]`: Mean, lower and upper end. NaN without two
        prompts.
    """
    change = after - before
    known = change[~np.isnan(change).all(1)]
    if len(known) < 2:
        return math.nan, math.nan, math.nan
    low, high = clustered_bootstrap(known, level=level, samples=2000)
    return float(nanmean(nanmean(known)[None])[0]), low, high


def disagreement(before: dict[str, Array], after: dict[str, Array]) -> float:
    """Measure how much the scorers of a reward differ about a change.

    Args:
        before (`dict[str, ndarray]`): Scores (prompts, images) of each scorer.
        after (`dict[str, ndarray]`): The same scorers later.

    Returns:
        `float`: Share of prompts on which one scorer rose and another one fell. NaN for
        fewer than two scorers.
    """
    if len(before) < 2:
        return math.nan
    signs = np.stack([np.sign(nanmean(after[name] - before[name])) for name in before])
    return float(((signs > 0).any(0) & (signs < 0).any(0)).mean())


class Guardian:
    """Watches the held-out scorers of a run.

    Args:
        level (`float`, *optional*, defaults to `0.95`): Coverage of the interval that a
            scorer must fall beyond.
    """

    def __init__(self, level: float = 0.95) -> None:
        self.level = level
        self.looks: list[Look] = []

    def look(self, look: Look) -> Verdict:
        """Compare a validation with the earlier ones.

        Args:
            look (`Look`): The validation.

        Returns:
            `Verdict`: Whether the reward is hacked.
        """
        earlier = [past for past in self.looks if past.step < look.step]
        self.looks = [*earlier, look]
        if not earlier:
            return Verdict()
        metrics: dict[str, float] = {}
        hacked: list[tuple[str, Look, float, float]] = []
        for name, now in look.held_out.items():
            best = max(earlier, key=lambda past: self._mean(past.held_out[name]))
            change, _, high = change_interval(best.held_out[name], now, self.level)
            gain = self._mean(look.reward) - self._mean(best.reward)
            metrics[f"guardian/{name}"] = change
            if high < 0 < gain:
                hacked.append((name, best, change, gain))
        metrics["guardian/reward"] = self._mean(look.reward) - self._mean(earlier[0].reward)
        if look.members:
            metrics["guardian/disagreement"] = disagreement(earlier[0].members, look.members)
        metrics["guardian/hacked"] = float(bool(hacked))
        if not hacked:
            return Verdict(metrics=metrics)
        name, best, change, gain = hacked[0]
        since = f"step {best.step}" if best.step else "the start"
        sentence = (
            f"step {look.step}: the reward has risen by {gain:.3g} of its spread since {since}, "
            f"and {name} has fallen by {-change:.3g}, beyond its {self.level:.0%} interval: the "
            "reward is being hacked"
        )
        return Verdict(True, best.step, sentence, metrics)

    @staticmethod
    def _mean(values: Array) -> float:
        mean = float(nanmean(nanmean(values)[None])[0])
        return -math.inf if math.isnan(mean) else mean

    def verdict_at(self, step: int) -> Verdict:
        """Repeat the verdict of a step, for a resumed run.

        Args:
            step (`int`): The optimizer step.
        """
        looks = [look for look in self.looks if look.step <= step]
        if not looks or looks[-1].step != step:
            return Verdict()
        again = Guardian(self.level)
        again.looks = looks[:-1]
        return again.look(looks[-1])

    def hacked_steps(self) -> list[int]:
        """List the steps at which the reward was being hacked."""
        return [look.step for look in self.looks if self.verdict_at(look.step).hacked]

    # Files ----------------------------------------------------------------------------

    def write(self, file: Path) -> None:
        """Write all looks.

        Args:
            file (`Path`): Replaced at once.
        """

        def plain(values: Array) -> list[list[float | None]]:
            return [[None if math.isnan(v) else float(v) for v in row] for row in values]

        looks = [
            {
                "step": look.step,
                "reward": plain(look.reward),
                "held_out": {name: plain(values) for name, values in look.held_out.items()},
                "members": {name: plain(values) for name, values in look.members.items()},
            }
            for look in self.looks
        ]
        write_atomically(file, (json.dumps({"looks": looks}) + "\n").encode())

    def read(
        self,
        file: Path,
        last_step: int,
        names: Sequence[str] | None = None,
        shape: tuple[int, int] | None = None,
    ) -> bool:
        """Read the looks of an earlier part of the run.

        Args:
            file (`Path`): The file. Nothing happens without it.
            last_step (`int`): Later looks are forgotten.
            names (`Sequence[str]`, *optional*): Held-out scorers that the looks must
                have.
            shape (`tuple[int, int]`, *optional*): Prompts and images that they must
                have.

        Returns:
            `bool`: False if the looks are of other scorers, prompts or images. They are
            then forgotten.
        """
        if not file.is_file():
            return True

        def array(rows: Any) -> Array:
            return np.array(rows, dtype=np.float64)  # None becomes NaN

        looks = [
            Look(
                entry["step"],
                array(entry["reward"]),
                {name: array(rows) for name, rows in entry["held_out"].items()},
                {name: array(rows) for name, rows in entry["members"].items()},
            )
            for entry in json.loads(file.read_text("utf-8"))["looks"]
        ]
        fitting = all(
            (names is None or set(names) == set(look.held_out))
            and (shape is None or look.reward.shape == shape)
            for look in looks
        )
        self.looks = [look for look in looks if look.step <= last_step] if fitting else []
        return fitting


def standardised(columns: Array, base: Array, weights: Sequence[float]) -> Array:
    """Combine the scores of a reward into one, in units of their spread at the start.

    Args:
        columns (`ndarray`): Scores, (images, scorers), higher is better.
        base (`ndarray`): Scores of the starting weights, of the same shape.
        weights (`Sequence[float]`): One per scorer.

    Returns:
        `ndarray`: (images,).
    """
    spread = np.nanstd(base, axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    factors = np.asarray(weights, dtype=np.float64)
    return (columns / spread * factors).sum(1) / np.abs(factors).sum()
