"""Notice when a model learns to please its reward and nothing else.

At every validation the same prompts and seeds are drawn and scored by what trains and
by scorers that do not. A reward is hacked when it has risen since an earlier validation
while a held-out scorer has fallen beyond the interval of the difference. All pairs of
validations and all held-out scorers share one error rate, so that a long run is stopped
by chance no more often than a short one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.statistics import Array, nanmean, student_quantile
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
        validations (`int`): Validations that the whole run is planned to have.
    """

    step: int
    reward: Array
    held_out: dict[str, Array]
    members: dict[str, Array] = field(default_factory=dict)
    validations: int = 10


@dataclass(frozen=True)
class Verdict:
    """What a validation says about the reward.

    Attributes:
        hacked (`bool`): Whether the reward rose while a held-out scorer fell.
        best_step (`int`): Step since when that scorer has fallen.
        sentence (`str`): What happened, for the user. Empty if nothing did.
        metrics (`dict[str, float]`): Metrics to log.
    """

    hacked: bool = False
    best_step: int = 0
    sentence: str = ""
    metrics: dict[str, float] = field(default_factory=dict)


def change_interval(before: Array, after: Array, level: float) -> tuple[float, float, float]:
    """Compute the mean change of paired scores and its t interval over prompts.

    Args:
        before (`ndarray`): (prompts, images). Pairs with a NaN are left out.
        after (`ndarray`): Of the same shape.
        level (`float`): Coverage of the interval.

    Returns:
        `tuple[float, float, float]`: Mean, lower and upper end. NaN without two
        prompts.
    """
    change = nanmean(after - before)
    change = change[~np.isnan(change)]
    if len(change) < 2:
        return math.nan, math.nan, math.nan
    mean, error = change.mean(), change.std(ddof=1) / math.sqrt(len(change))
    half = student_quantile((1 + level) / 2, len(change) - 1) * error
    return float(mean), float(mean - half), float(mean + half)


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
        error_rate (`float`, *optional*, defaults to `0.05`): Most probability that a
            run is called hacked although no held-out scorer falls (Bonferroni over all
            pairs of validations and all held-out scorers).
    """

    def __init__(self, error_rate: float = 0.05) -> None:
        self.error_rate = error_rate
        self.looks: list[Look] = []

    def level(self, look: Look) -> float:
        """Return the coverage of the interval of each comparison of a validation.

        Args:
            look (`Look`): The validation.
        """
        validations = max(look.validations, len(self.looks) - 1)  # the first is the start
        comparisons = max(1, len(look.held_out)) * validations * (validations + 1) / 2
        return 1 - 2 * self.error_rate / comparisons  # a fall is at one side

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
        falls: list[tuple[float, str, Look]] = []
        level = self.level(look)
        for name, now in look.held_out.items():
            means = [_mean(past.held_out[name]) for past in earlier]
            best = earlier[int(np.argmax(np.nan_to_num(means, nan=-np.inf)))]
            metrics[f"guardian/{name}"] = change_interval(best.held_out[name], now, level)[0]
            for past in earlier:
                change, _, high = change_interval(past.held_out[name], now, level)
                if high < 0 < self._gain(past, look):
                    falls.append((change, name, past))
        metrics["guardian/reward"] = self._gain(earlier[0], look)
        if look.members:
            metrics["guardian/disagreement"] = disagreement(earlier[0].members, look.members)
        metrics["guardian/hacked"] = float(bool(falls))
        if not falls:
            return Verdict(metrics=metrics)
        change, name, best = min(falls, key=lambda fall: fall[0])
        since = f"step {best.step}" if best.step else "the start"
        sentence = (
            f"step {look.step}: the reward has risen by {self._gain(best, look):.3g} of its spread "
            f"since {since}, and {name} has fallen by {-change:.3g}, more than chance explains: "
            "the reward is being hacked"
        )
        return Verdict(True, best.step, sentence, metrics)

    @staticmethod
    def _gain(before: Look, after: Look) -> float:
        """How much the reward has risen, on the images that it scored both times.

        NaN if there are none.
        """
        return _mean(after.reward - before.reward)

    def verdict_at(self, step: int) -> Verdict:
        """Repeat the verdict of a step, for a resumed run.

        Args:
            step (`int`): The optimizer step.
        """
        looks = [look for look in self.looks if look.step <= step]
        if not looks or looks[-1].step != step:
            return Verdict()
        again = Guardian(self.error_rate)
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
                "validations": look.validations,
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
                entry.get("validations", 10),
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


def _mean(values: Array) -> float:
    """Average images, then prompts. NaN without a value."""
    return float(nanmean(nanmean(values)[None])[0])


def standardised(columns: Array, base: Array, weights: Sequence[float]) -> Array:
    """Combine the scores of a reward into one, in units of their spread at the start.

    Args:
        columns (`ndarray`): Scores, (images, scorers), higher is better. NaN leaves its
            weight to the other scorers.
        base (`ndarray`): Scores of the starting weights, of the same shape.
        weights (`Sequence[float]`): One per scorer.

    Returns:
        `ndarray`: (images,). NaN without a score.
    """
    known = ~np.isnan(base)
    centred = np.where(known, base - nanmean(base, axis=0), 0.0)
    spread = np.sqrt((centred**2).sum(0) / np.maximum(known.sum(0), 1))
    spread = np.where(spread > 0, spread, 1.0)
    factors = np.asarray(weights, dtype=np.float64)
    known = ~np.isnan(columns)
    total = np.where(known, columns / spread * factors, 0.0).sum(1)
    weight = (known * np.abs(factors)).sum(1)
    return np.where(weight > 0, total / np.where(weight > 0, weight, 1.0), np.nan)
