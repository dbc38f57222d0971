"""Compare steering with best-of-n, from the same noise with the same model rows.

Best-of-n is what steering has to beat: draw K plain samples and keep the one of highest
reward. Other scorers judge the image that the *reward* chose. If every judge took its
own maximum over K, that would flatter both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ..runtime.json_values import plain
from ..runtime.progress import progress_bar
from ..steering.fk_steering import FKSteering
from ..steering.result import SteeringResult
from ..steering.reward_fn import Rewarder
from .statistics import nanmean

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ..runtime.protocols import Numbers

Array = npt.NDArray[np.float64]
ARMS = ("best_of_n", "steering")
REWARD = "reward"
COUNTS = ("model_rows", "decodes", "scored_images", "reward_calls")

JudgeLike: TypeAlias = "str | Callable[..., Numbers]"
"""A scorer, its name, or a function of images and prompts."""


@dataclass
class ArmScores:
    """One side of a comparison: best-of-n or steering.

    Attributes:
        scores (`dict`): metric -> (prompts, seeds, K). The metrics are ``reward`` and
            the judges.
        weights (`ndarray`): (prompts, seeds, K), weights at the end.
        roots (`ndarray`): (prompts, seeds), number of initial noises that survive.
        min_ess (`ndarray`): (prompts, seeds), smallest effective sample size.
        best_images (`list`): [prompt][seed], the image of highest reward.
        model_rows (`int`): Rows that went through the model, over all calls.
        decodes (`int`): Latents decoded on the way, over all calls.
        scored_images (`int`): Images scored, over all calls.
        reward_calls (`int`): Calls of the reward.
        seconds (`float`): Time of all calls.
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
        """Return a metric of the particle of highest *reward*, (prompts, seeds)."""
        top = np.nan_to_num(self.scores[REWARD], nan=-np.inf).argmax(-1)
        return np.take_along_axis(self.scores[metric], top[..., None], -1)[..., 0]

    def mean(self, metric: str) -> Array:
        """Average a metric over the K particles, (prompts, seeds)."""
        return nanmean(self.scores[metric], -1)

    def weighted(self, metric: str) -> Array:
        """Average a metric under the weights, (prompts, seeds).

        This estimates the mean of the distribution that steering aims at.
        """
        return np.where(self.weights > 0, self.weights * self.scores[metric], 0.0).sum(-1)


@dataclass
class Difference:
    """A paired difference: steering minus best-of-n.

    Attributes:
        value (`float`): Mean over prompts and seeds.
        standard_error (`float`): Clustered by prompt. With a single prompt it is over
            seeds. With a single population it is NaN.
    """

    value: float
    standard_error: float

    @classmethod
    def of(cls, difference: Array) -> Difference:
        """Average a difference of shape (prompts, seeds) and leave out NaN."""
        units = nanmean(difference, 1) if difference.shape[0] > 1 else difference[0]
        units = units[~np.isnan(units)]
        error = float(units.std(ddof=1) / math.sqrt(len(units))) if len(units) > 1 else math.nan
        return cls(float(units.mean()) if len(units) else math.nan, error)

    def __str__(self) -> str:
        if math.isnan(self.standard_error):
            return f"{self.value:+.4g}"
        return f"{self.value:+.4g} ± {self.standard_error:.2g}"


@dataclass
class BestOfNComparison:
    """The result of `compare_best_of_n`: both sides, their difference and their cost.

    Attributes:
        prompts (`list[str]`): P prompts.
        seeds (`list[int]`): S seeds.
        num_particles (`int`): K particles per population.
        arms (`dict[str, ArmScores]`): ``best_of_n`` and ``steering``.
    """

    prompts: list[str]
    seeds: list[int]
    num_particles: int
    arms: dict[str, ArmScores]

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics: ``reward`` and the judges."""
        return list(self.arms["steering"].scores)

    def difference(self, metric: str = REWARD, of: str = "best") -> Difference:
        """Compute steering minus best-of-n.

        Args:
            metric (`str`, defaults to ``reward``): ``reward`` or a judge.
            of (`str`, defaults to ``best``): ``best`` (the particle of highest reward)
                or ``mean`` (of the K particles).

        Returns:
            `Difference` with its standard error.

        Raises:
            ConfigError: There is no such metric or quantity.
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
        """Write a markdown table of both sides.

        For every metric it has the best particle and the mean of K, with the difference
        ± one standard error. Then it has what both sides cost.
        """
        k = self.num_particles
        plain, steered = (self.arms[name] for name in ARMS)
        lines = [f"| | best of {k} | steering | difference |", "|---|---|---|---|"]
        for metric in self.metrics:
            for of, label in (("best", "best particle"), ("mean", f"mean of {k}")):
                a, b = (_mean(arm, of, metric) for arm in (plain, steered))
                difference = self.difference(metric, of)
                lines.append(f"| {metric}, {label} | {a:.4g} | {b:.4g} | {difference} |")
            a, b = (_mean(arm, "weighted", metric) for arm in (plain, steered))
            lines.append(f"| {metric}, weighted mean | {a:.4g} | {b:.4g} | |")
        roots = f"{plain.roots.mean():.2f} | {steered.roots.mean():.2f}"
        lines.append(f"| initial noises that survive, of {k} | {roots} | |")
        lines.append(f"| smallest effective sample size | | {steered.min_ess.mean():.2f} | |")
        for name in ("model_rows", "decodes", "scored_images"):
            counts = f"{getattr(plain, name)} | {getattr(steered, name)}"
            lines.append(f"| {name.replace('_', ' ')} | {counts} | |")
        lines.append(f"| seconds | {plain.seconds:.1f} | {steered.seconds:.1f} | |")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Collect everything but the images, for JSON, with None in place of NaN."""
        content: dict[str, Any] = {
            "num_prompts": len(self.prompts),
            "seeds": self.seeds,
            "num_particles": self.num_particles,
        }
        for name, arm in self.arms.items():
            content[name] = {metric: _means(arm, metric) for metric in self.metrics}
            content[name]["roots"] = float(arm.roots.mean())
            content[name]["min_ess"] = float(arm.min_ess.mean())
            for key in (*COUNTS, "seconds"):
                content[name][key] = getattr(arm, key)
        content["difference"] = {
            metric: {of: _plain(self.difference(metric, of)) for of in ("best", "mean")}
            for metric in self.metrics
        }
        return content

    def grid(self, rows: int = 24) -> Image.Image:
        """Draw the best images of both sides next to each other, as one picture.

        Args:
            rows (`int`, defaults to 24): Number of prompts to show, from the first on.
                Of every prompt up to four seeds are shown.

        Returns:
            A PIL image.
        """
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
    judges: Mapping[str, JudgeLike] | Sequence[str] | None = None,
    metadata: Sequence[Mapping[str, Any]] | None = None,
    progress: bool = True,
    **pipe_kwargs: Any,
) -> BestOfNComparison:
    """Compare steering with best-of-n from the same noise, with the same model rows.

    Args:
        steering (`FKSteering`): The sampler, with at least two particles.
        prompts (`str` or `Sequence[str]`): P prompts.
        seeds (`int` or `Sequence[int]`, defaults to 1): Number of populations per
            prompt, or their seeds.
        judges (*optional*): name -> scorer (or function of images and prompts), or
            names of scorers. They score the same images and choose none.
        metadata (*optional*): One mapping per prompt, for scorers that read it.
        progress (`bool`, defaults to `True`): Show a bar.
        pipe_kwargs: Arguments of the pipeline's call.

    Returns:
        `BestOfNComparison` with the scores of both sides.

    Raises:
        ConfigError: There is a single particle or no seed, or a judge is called
            ``reward``.
        UserError: See `FKSteering.__call__`.
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
        progress_bar(
            total=2 * len(numbers), desc="comparing", unit="round", disable=not progress
        ) as bar,
    ):
        for number in numbers:
            for arm, sampler in sides.items():
                population_seeds = [population_seed(number, i) for i in range(len(texts))]
                result = sampler(texts, seed=population_seeds, metadata=metadata, **pipe_kwargs)
                parts[arm].append((result, score_arms(result, named, metadata)))
                bar.update()
    return BestOfNComparison(
        texts, numbers, steering.num_particles, {arm: _arm(rounds) for arm, rounds in parts.items()}
    )


@contextmanager
def quiet_bars(pipe: object) -> Iterator[None]:
    """Switch off the pipeline's own progress bar. One bar for all calls is enough."""
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
    """Derive the seed of one population.

    Args:
        seed (`int`): Seed of the round.
        prompt (`int`): Number of the prompt.

    Returns:
        A seed that does not depend on what other prompts and rounds there are.
    """
    return seed * 1_000_003 + prompt


def read_judges(judges: Mapping[str, JudgeLike] | Sequence[str] | None) -> dict[str, Rewarder]:
    """Load judges.

    Args:
        judges: name -> scorer or function, or names of scorers.

    Returns:
        The judges by name.

    Raises:
        ConfigError: One is called ``reward``, or is not a scorer.
    """
    table = dict(judges) if isinstance(judges, Mapping) else {name: name for name in judges or ()}
    if REWARD in table:
        raise ConfigError("judges", f"{REWARD!r} is the steering reward's own name; choose another")
    return {name: Rewarder(scorer) for name, scorer in table.items()}


def score_arms(
    result: SteeringResult,
    judges: Mapping[str, Rewarder],
    metadata: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Array]:
    """Score all images of a result by every judge.

    Args:
        result (`SteeringResult`): P prompts with K images each.
        judges: By name, see `read_judges`.
        metadata (*optional*): One mapping per prompt, for judges that read it.

    Returns:
        Judge -> (P, K).
    """
    k = result.rewards.shape[1]
    images = [image for row in result.images for image in row]
    return {
        name: one.start(result.prompts, metadata, k).of_images(images).numpy()
        for name, one in judges.items()
    }


def _arm(rounds: list[tuple[SteeringResult, dict[str, Array]]]) -> ArmScores:
    """Put the rounds of one side together, one per seed."""
    results = [result for result, _ in rounds]

    def stacked(values: Sequence[Tensor | Array]) -> Array:
        return np.stack([np.asarray(value, dtype=np.float64) for value in values], axis=1)

    scores = {REWARD: stacked([result.rewards for result in results])}
    for name in rounds[0][1]:
        scores[name] = stacked([by_judge[name] for _, by_judge in rounds])
    return ArmScores(
        scores=scores,
        weights=stacked([result.weights for result in results]),
        roots=stacked([result.num_roots for result in results]),
        min_ess=stacked([result.ess.min(0).values for result in results]),
        best_images=[
            list(images) for images in zip(*(result.best for result in results), strict=True)
        ],
        **{key: sum(result.counts[key] for result in results) for key in COUNTS},
        seconds=sum(result.seconds["total"] for result in results),
    )


def _mean(arm: ArmScores, of: str, metric: str) -> float:
    """Average over prompts and seeds what a method of `ArmScores` returns."""
    return float(np.nanmean(getattr(arm, of)(metric)))


def _means(arm: ArmScores, metric: str) -> dict[str, float | None]:
    return {of: plain(_mean(arm, of, metric)) for of in ("best", "mean", "weighted")}


def _plain(difference: Difference) -> dict[str, float | None]:
    return {
        "value": plain(difference.value),
        "standard_error": plain(difference.standard_error),
    }
