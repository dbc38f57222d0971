"""Steering against best-of-n: the same model rows, the same noise, the difference with its standard error.

Best-of-n is what steering has to beat: K plain samples, the one of highest reward. Other scorers judge the image that the *reward* chose;
taking each judge's own maximum over K would flatter both sides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from ..errors import ConfigError
from ..steering.fk_steering import FKSteering
from ..steering.result import SteeringResult
from ..steering.reward_fn import Rewarder
from .statistics import nanmean

Array = npt.NDArray[np.float64]
ARMS = ("best_of_n", "steering")
REWARD = "reward"


@dataclass
class ArmScores:
    """One side of a comparison.

    Attributes:
        scores: metric -> (prompts, seeds, K); ``reward`` and the judges.
        weights: (prompts, seeds, K), terminal weights.
        roots: (prompts, seeds), surviving initial noises.
        min_ess: (prompts, seeds), over the run.
        best_images: [prompt][seed], the image of highest reward.
        model_rows, decodes, scored_images, reward_calls, seconds: summed over the calls.
    """

    scores: dict[str, Array]
    weights: Array
    roots: Array
    min_ess: Array
    best_images: list[list[Any]] = field(default_factory=list)
    model_rows: int = 0
    decodes: int = 0
    scored_images: int = 0
    reward_calls: int = 0
    seconds: float = 0.0

    def best(self, metric: str) -> Array:
        """(prompts, seeds): the metric of the particle of highest *reward*."""
        top = np.nan_to_num(self.scores[REWARD], nan=-np.inf).argmax(-1)
        return np.take_along_axis(self.scores[metric], top[..., None], -1)[..., 0]

    def mean(self, metric: str) -> Array:
        """(prompts, seeds): the mean over the K particles."""
        return nanmean(self.scores[metric], -1)

    def weighted(self, metric: str) -> Array:
        """(prompts, seeds): the mean under the weights, an estimate for the tilted law."""
        return np.where(self.weights > 0, self.weights * self.scores[metric], 0.0).sum(-1)


@dataclass
class Difference:
    """A paired difference, steering minus best-of-n.

    Attributes:
        value: mean over prompts and seeds.
        standard_error: clustered by prompt; over seeds for a single prompt; NaN for a single population.
    """

    value: float
    standard_error: float

    @classmethod
    def of(cls, difference: Array) -> Difference:
        """From (prompts, seeds); NaN pairs are left out."""
        units = nanmean(difference, 1) if difference.shape[0] > 1 else difference[0]
        units = units[~np.isnan(units)]
        error = float(units.std(ddof=1) / math.sqrt(len(units))) if len(units) > 1 else math.nan
        return cls(float(units.mean()) if len(units) else math.nan, error)

    def __str__(self) -> str:
        return f"{self.value:+.4g}" + (
            "" if math.isnan(self.standard_error) else f" ± {self.standard_error:.2g}"
        )


@dataclass
class BestOfNComparison:
    """What `compare_best_of_n` returns.

    Attributes:
        prompts: P of them.
        seeds: S of them.
        num_particles: K.
        arms: ``best_of_n`` and ``steering``.
    """

    prompts: list[str]
    seeds: list[int]
    num_particles: int
    arms: dict[str, ArmScores]

    @property
    def metrics(self) -> list[str]:
        """``reward`` and the judges."""
        return list(self.arms["steering"].scores)

    def difference(self, metric: str = REWARD, of: str = "best") -> Difference:
        """Steering minus best-of-n.

        Args:
            metric (`str`): ``reward`` or a judge.
            of (`str`): ``best`` (the particle of highest reward) or ``mean`` (of the K particles).

        Raises:
            ConfigError: no such metric or quantity.
        """
        if metric not in self.metrics:
            raise ConfigError(
                "metric", f"expected one of {', '.join(self.metrics)}, got {metric!r}"
            )
        if of not in ("best", "mean"):
            raise ConfigError("of", f"expected best or mean, got {of!r}")
        plain, steered = (getattr(self.arms[name], of)(metric) for name in ARMS)
        return Difference.of(steered - plain)

    def table(self) -> str:
        """A markdown table: every metric of the best particle and of the mean of K, both sides, the difference ± one standard error; then what it cost."""
        k = self.num_particles
        plain, steered = (self.arms[name] for name in ARMS)
        lines = [f"| | best of {k} | steering | difference |", "|---|---|---|---|"]
        for metric in self.metrics:
            for of in ("best", "mean"):
                a, b = (float(np.nanmean(getattr(arm, of)(metric))) for arm in (plain, steered))
                what = "best particle" if of == "best" else f"mean of {k}"
                lines.append(
                    f"| {metric}, {what} | {a:.4g} | {b:.4g} | {self.difference(metric, of)} |"
                )
            lines.append(
                f"| {metric}, weighted mean | {np.nanmean(plain.weighted(metric)):.4g} | {np.nanmean(steered.weighted(metric)):.4g} | |"
            )
        lines.append(
            f"| initial noises that survive, of {k} | {plain.roots.mean():.2f} | {steered.roots.mean():.2f} | |"
        )
        lines.append(f"| smallest effective sample size | | {steered.min_ess.mean():.2f} | |")
        for name in ("model_rows", "decodes", "scored_images"):
            lines.append(
                f"| {name.replace('_', ' ')} | {getattr(plain, name)} | {getattr(steered, name)} | |"
            )
        lines.append(f"| seconds | {plain.seconds:.1f} | {steered.seconds:.1f} | |")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the images, for JSON; NaN is None."""
        found: dict[str, Any] = {
            "num_prompts": len(self.prompts),
            "seeds": self.seeds,
            "num_particles": self.num_particles,
        }
        for name, arm in self.arms.items():
            found[name] = {
                **{
                    metric: {
                        of: _number(float(np.nanmean(getattr(arm, of)(metric))))
                        for of in ("best", "mean", "weighted")
                    }
                    for metric in self.metrics
                },
                "roots": float(arm.roots.mean()),
                "min_ess": float(arm.min_ess.mean()),
                **{
                    key: getattr(arm, key)
                    for key in ("model_rows", "decodes", "scored_images", "reward_calls", "seconds")
                },
            }
        found["difference"] = {
            metric: {
                of: {"value": _number(d.value), "standard_error": _number(d.standard_error)}
                for of in ("best", "mean")
                for d in (self.difference(metric, of),)
            }
            for metric in self.metrics
        }
        return found

    def grid(self, rows: int = 24) -> Any:
        """The best image of both sides for the first prompts and seeds, side by side, as one picture."""
        from ..generation.grids import comparison_grid

        plain, steered = (self.arms[name].best_images for name in ARMS)
        count = min(4, len(self.seeds))
        chosen = [
            (prompt, plain[i][:count], steered[i][:count])
            for i, prompt in enumerate(self.prompts[:rows])
        ]
        return comparison_grid(
            chosen,
            left=f"best of {self.num_particles}",
            right="steering",
            columns=3 if count == 1 else 1,
        )


def compare_best_of_n(
    steering: FKSteering,
    prompts: str | Sequence[str],
    *,
    seeds: int | Sequence[int] = 1,
    judges: Mapping[str, Any] | Sequence[str] | None = None,
    metadata: Sequence[Mapping[str, Any]] | None = None,
    progress: bool = True,
    **pipe_kwargs: Any,
) -> BestOfNComparison:
    """Steers, and draws best-of-n from the same noise with the same number of model rows.

    Args:
        steering (`FKSteering`): at least two particles.
        prompts: P of them.
        seeds: how many populations per prompt, or their seeds.
        judges: name -> scorer (or function of images and prompts), or names of scorers; they judge the same images and choose none.
        metadata: one mapping per prompt, for scorers that read it.
        progress (`bool`): show a bar.
        pipe_kwargs: for the pipeline's call.

    Raises:
        ConfigError: a single particle, no seeds, a judge called like another metric.
        UserError: as `FKSteering.__call__`.
    """
    if steering.num_particles < 2:
        raise ConfigError(
            "num_particles", "a comparison with best-of-n needs at least 2 particles, got 1"
        )
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    numbers = list(range(seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
    if not numbers:
        raise ConfigError("seeds", f"expected at least one, got {seeds!r}")
    for name in ("generator", "seed"):
        if name in pipe_kwargs:
            raise ConfigError(name, "both sides need the same noise; give seeds= instead")
    named = read_judges(judges)
    parts: dict[str, list[tuple[SteeringResult, dict[str, Array]]]] = {arm: [] for arm in ARMS}
    sides = {"best_of_n": steering.best_of_n(), "steering": steering}
    with (
        quiet_bars(steering.pipe),
        tqdm(total=2 * len(numbers), desc="comparing", unit="round", disable=not progress) as bar,
    ):
        for number in numbers:
            for arm, sampler in sides.items():
                own = [population_seed(number, i) for i in range(len(texts))]
                result = sampler(texts, seed=own, metadata=metadata, **pipe_kwargs)
                parts[arm].append((result, judge(result, named, metadata)))
                bar.update()
    return BestOfNComparison(
        texts, numbers, steering.num_particles, {arm: _arm(rounds) for arm, rounds in parts.items()}
    )


@contextmanager
def quiet_bars(pipe: Any) -> Iterator[None]:
    """The pipeline's own progress bar off: one bar for all calls is enough."""
    if not hasattr(pipe, "set_progress_bar_config"):
        yield
        return
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def population_seed(seed: int, prompt: int) -> int:
    """The seed of prompt number `prompt` in round `seed`: the same whatever other prompts and rounds there are."""
    return seed * 1_000_003 + prompt


def read_judges(judges: Mapping[str, Any] | Sequence[str] | None) -> dict[str, Rewarder]:
    """Judges by name.

    Raises:
        ConfigError: one called ``reward``, or not a scorer.
    """
    table = dict(judges) if isinstance(judges, Mapping) else {name: name for name in judges or ()}
    if REWARD in table:
        raise ConfigError("judges", f"{REWARD!r} is the steering reward's own name; choose another")
    return {name: Rewarder(scorer) for name, scorer in table.items()}


def judge(
    result: SteeringResult, judges: Mapping[str, Rewarder], metadata: Any = None
) -> dict[str, Array]:
    """Scores of all returned images by every judge, (prompts, K) each."""
    k = result.rewards.shape[1]
    images = [image for row in result.images for image in row]
    return {
        name: one.start(result.prompts, metadata, k).of_images(images).numpy()
        for name, one in judges.items()
    }


def _arm(rounds: list[tuple[SteeringResult, dict[str, Array]]]) -> ArmScores:
    results = [result for result, _ in rounds]

    def stacked(values: Sequence[Any]) -> Array:
        return np.stack([np.asarray(value, dtype=np.float64) for value in values], axis=1)

    scores = {REWARD: stacked([result.rewards for result in results])}
    scores |= {name: stacked([judged[name] for _, judged in rounds]) for name in rounds[0][1]}
    return ArmScores(
        scores=scores,
        weights=stacked([result.weights for result in results]),
        roots=stacked([result.num_roots for result in results]),
        min_ess=stacked([result.ess.min(0).values for result in results]),
        best_images=[
            list(images) for images in zip(*(result.best for result in results), strict=True)
        ],
        **{
            key: sum(result.counts[key] for result in results)
            for key in ("model_rows", "decodes", "scored_images", "reward_calls")
        },
        seconds=sum(result.seconds["total"] for result in results),
    )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
