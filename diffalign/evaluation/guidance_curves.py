"""Hold the scores of models over guidance scales, and compare each at its best one.

The best scale of each model is chosen on one half of the prompts, and the models are
compared on the other half.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..runtime.json_values import plain
from .comparison import (
    Array,
    Comparison,
    Table,
    between,
    head_to_head,
    interval,
    markdown,
    mean_of,
    notes,
)
from .formatting import few_prompts, number, rate
from .models import ModelSpec
from .statistics import WinRate, nanmean, sign_test, win_rate

LEAST_PROMPTS = 4
"""With fewer prompts, neither half has two of them."""
CHOOSING, REPORTING = slice(0, None, 2), slice(1, None, 2)
"""The prompts that choose a model's best scale, and those that it is compared on."""


def check_prompts(count: int, field: str = "prompts") -> None:
    """Refuse too few prompts.

    Raises:
        ConfigError: One half of the prompts cannot choose for the other.
    """
    if count < LEAST_PROMPTS:
        raise ConfigError(
            field,
            f"expected at least {LEAST_PROMPTS} prompts, got {count}: one half chooses the best "
            "guidance, and the other half is reported",
        )


def best_index(scores: Sequence[Array]) -> int:
    """Find the scale with the highest mean on the prompts that choose.

    Args:
        scores (`Sequence[ndarray]`): Scores at each scale, (P, N), higher is better.
            NaN means missing.

    Returns:
        `int`: The index of the scale, the first of equal ones.
    """
    choosing = np.stack([np.asarray(values, dtype=np.float64)[CHOOSING] for values in scores])
    # Images that have no score at one scale must not favour another one.
    complete = ~np.isnan(choosing).any(0)
    if complete.any():
        choosing = np.where(complete, choosing, np.nan)
    means = np.array([nanmean(nanmean(values)[None])[0] for values in choosing])
    return int(np.argmax(np.where(np.isnan(means), -np.inf, means)))


def model_name(arm: str, scale: float) -> str:
    """Name a model at one guidance scale, as in its folder of images."""
    return f"{arm}@g{scale:g}"


@dataclass
class GuidanceCurves:
    """The result of `compare_guidance`.

    Attributes:
        comparison (`Comparison`): The scores of all models at all scales. Its models
            are named ``NAME@gSCALE``.
        arms (`list[ModelSpec]`): The base first, then the tuned models.
        scales (`list[float]`): The guidance scales, smallest first.

    Example:
        >>> from diffalign import compare_guidance
        >>> curves = compare_guidance(
        ...     "shapes",
        ...     "again=shapes",
        ...     guidance_scales=[1, 3],
        ...     max_prompts=4,
        ...     num_images=1,
        ...     num_inference_steps=2,
        ...     output_dir="guidance",
        ... )
        >>> [scale for scale, *_ in curves.curve("again")]
        [1.0, 3.0]
    """

    comparison: Comparison
    arms: list[ModelSpec]
    scales: list[float]

    @property
    def base(self) -> str:
        """The name of the model that the others are compared with."""
        return self.arms[0].name

    @property
    def tuned(self) -> list[str]:
        """The names of the other models."""
        return [arm.name for arm in self.arms[1:]]

    @property
    def folder(self) -> Path:
        """Holds the images, tables and the report."""
        return self.comparison.folder

    @property
    def scorers(self) -> list[str]:
        """The names of the scorers. The first one chooses the best scales."""
        return self.comparison.scorers

    def signed(self, arm: str, scale: float, scorer: str | None = None) -> Array:
        """Return the scores of a model at one scale, (P, N), higher is better.

        Args:
            arm (`str`): Name of the model.
            scale (`float`): One of `scales`.
            scorer (`str`, *optional*): Name of the scorer. Defaults to the first.

        Raises:
            ConfigError: There is no such model, scale or scorer.
        """
        known = [a.name for a in self.arms]
        if arm not in known:
            raise ConfigError("model", f"expected one of {', '.join(known)}, got {arm!r}")
        if scale not in self.scales:
            scales = ", ".join(f"{s:g}" for s in self.scales)
            raise ConfigError("guidance_scale", f"expected one of {scales}, got {scale!r}")
        return self.comparison.signed(model_name(arm, scale), scorer)

    def best(self, arm: str) -> float:
        """Return the scale with the highest mean on the prompts that choose.

        These are the first, third, fifth, ... of the prompts. Of equal scales the
        smallest is the best.

        Args:
            arm (`str`): Name of the model.
        """
        return self.scales[best_index([self.signed(arm, scale) for scale in self.scales])]

    def at_best(self, arm: str, scorer: str | None = None) -> Array:
        """Return the scores at the model's best scale on the prompts that report.

        Args:
            arm (`str`): Name of the model.
            scorer (`str`, *optional*): Name of the scorer. Defaults to the first.

        Returns:
            Scores of the second, fourth, sixth, ... prompt, higher is better.
        """
        return self.signed(arm, self.best(arm), scorer)[REPORTING]

    def win_rate(
        self, arm: str, scorer: str | None = None, *, against: str | None = None
    ) -> WinRate:
        """Compute how often a model beats the base, both at their best scales.

        Args:
            arm (`str`): Name of the model.
            scorer (`str`, *optional*): Name of the scorer. Defaults to the first.
            against (`str`, *optional*): Name of the other model. Defaults to the base.
        """
        return win_rate(self.at_best(against or self.base, scorer), self.at_best(arm, scorer))

    def sign_test(self, arm: str, scorer: str | None = None) -> float:
        """Compute the p value of the sign test over prompts for `win_rate`."""
        return sign_test(self.at_best(self.base, scorer), self.at_best(arm, scorer))

    def gain(self, arm: str, scorer: str | None = None) -> tuple[float, float, float]:
        """Compute the mean difference to the base, both at their best scales.

        Returns:
            (mean, low, high), positive where the model is better, with the 95 %
            interval clustered by prompt.
        """
        return mean_of(self.at_best(arm, scorer) - self.at_best(self.base, scorer))

    def win_rate_at(self, arm: str, scale: float, scorer: str | None = None) -> WinRate:
        """Compute how often a model beats the base at one scale, on all prompts."""
        return win_rate(self.signed(self.base, scale, scorer), self.signed(arm, scale, scorer))

    def curve(
        self, arm: str, scorer: str | None = None
    ) -> list[tuple[float, tuple[float, float, float], float]]:
        """Return quality and diversity of a model at every scale, on all prompts.

        Args:
            arm (`str`): Name of the model.
            scorer (`str`, *optional*): Name of the scorer. Defaults to the first.

        Returns:
            Per scale: the scale, the mean score with its 95 % interval, and the mean
            diversity. Scores are as the scorer gave them.
        """
        names = [(scale, model_name(arm, scale)) for scale in self.scales]
        c = self.comparison
        return [
            (scale, c.mean(name, scorer), float(nanmean(c.diversity[name][None])[0]))
            for scale, name in names
        ]

    def to_dict(self) -> dict[str, Any]:
        """Collect everything but images and single scores, for JSON."""
        c = self.comparison
        content: dict[str, Any] = {
            "prompts": c.prompts.facts(),
            "num_images": c.num_images,
            "base": self.base,
            "guidance_scales": self.scales,
            "models": {},
            "comparisons": {},
            **c.facts,
        }
        for arm in self.arms:
            content["models"][arm.name] = {
                "described": arm.described,
                "best_guidance_scale": self.best(arm.name),
                "scores": {
                    scorer: {
                        f"{scale:g}": interval(mean)
                        for scale, mean, _ in self.curve(arm.name, scorer)
                    }
                    for scorer in self.scorers
                },
                "diversity": {f"{scale:g}": value for scale, _, value in self.curve(arm.name)},
            }
        for name in self.tuned:
            content["comparisons"][name] = {
                scorer: {
                    **dataclasses.asdict(self.win_rate(name, scorer)),
                    "sign_test": self.sign_test(name, scorer),
                    "gain": interval(self.gain(name, scorer)),
                    "at_equal_guidance": {
                        f"{scale:g}": dataclasses.asdict(self.win_rate_at(name, scale, scorer))
                        for scale in self.scales
                    },
                }
                for scorer in self.scorers
            }
        if len(self.tuned) > 1:
            content["between"] = between(
                self.tuned, self.scorers, lambda a, b, s: self.win_rate(a, s, against=b)
            )
        return plain(content)

    def table(self) -> str:
        """Write the tables of the report as markdown."""
        return markdown(all_tables(self), all_notes(self))


def all_tables(curves: GuidanceCurves) -> list[Table]:
    """Make the tables that the markdown and the page show."""
    first = curves.scorers[0]
    header = [
        "model",
        "guidance",
        "scorer",
        "win-rate % (95 %)",
        "difference (95 %)",
        "sign test p",
    ]
    rows = [
        [
            name,
            f"{curves.best(name):g}",
            scorer,
            rate(curves.win_rate(name, scorer)),
            number(*curves.gain(name, scorer)),
            f"{curves.sign_test(name, scorer):.2g}",
        ]
        for name in curves.tuned
        for scorer in curves.scorers
    ]
    at_best = f"Each at its best guidance, against {curves.base} at {curves.best(curves.base):g}"
    result: list[Table] = [(at_best, header, rows)]
    result += head_to_head(curves.tuned, first, lambda a, b: curves.win_rate(a, against=b))
    columns = ["model", *(f"guidance {scale:g}" for scale in curves.scales)]
    for scorer in curves.scorers:
        means = [
            [arm.name, *(number(*mean) for _, mean, _ in curves.curve(arm.name, scorer))]
            for arm in curves.arms
        ]
        result.append((f"Mean of {scorer} (95 %)", columns, means))
    if curves.comparison.num_images > 1:
        spread = [
            [arm.name, *(number(value) for _, _, value in curves.curve(arm.name))]
            for arm in curves.arms
        ]
        result.append((f"Diversity ({curves.comparison.diversity_kind})", columns, spread))
    equal = [
        [name, *(rate(curves.win_rate_at(name, scale)) for scale in curves.scales)]
        for name in curves.tuned
    ]
    title = f"At equal guidance, win-rate % against {curves.base} by {first} (95 %)"
    result.append((title, columns, equal))
    return result


def all_notes(curves: GuidanceCurves) -> list[str]:
    """Say what a reader must know of the numbers."""
    total = len(curves.comparison.prompts.prompts)
    half = [f"First table: {sentence}" for sentence in few_prompts(total // 2)]
    which = "first table is" if len(curves.tuned) < 2 else "first two tables are"
    return [
        "The best guidance of each model is the one with the highest mean of "
        f"{curves.scorers[0]} on {(total + 1) // 2} of the prompts (the first, third, ...). The "
        f"{which} of the other {total // 2}, the other tables are of all.",
        *half,
        *notes(curves.comparison),
    ]
