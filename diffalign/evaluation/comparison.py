"""Hold the result of a comparison: scores, win-rates, categories and tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..data.prompt_sets import PromptSet
from ..errors import ConfigError
from ..generation.sampling import drawn_file
from ..runtime.files import write_atomically
from ..runtime.json_values import plain
from ..runtime.missing import MaybeImage, Missing
from .formatting import few_prompts, number, percent, rate
from .models import ModelSpec
from .statistics import WinRate, clustered_bootstrap, nanmean, sign_test, win_rate

Array = npt.NDArray[np.float64]


@dataclass
class Comparison:
    """The result of `compare`: scores, win-rates, diversity and where the images are.

    Attributes:
        models (`list[ModelSpec]`): The base first, then the tuned models.
        prompts (`PromptSet`): P prompts with their categories and origin.
        num_images (`int`): N images per prompt.
        scores (`dict`): model -> scorer -> (P, N) float64, as the scorer gave them. NaN
            means missing.
        higher_is_better (`dict[str, bool]`): By scorer. The first scorer decides.
        diversity (`dict`): model -> (P,), mean distance of two images of a prompt. NaN
            with one image.
        diversity_kind (`str`): Name of that distance, see `Diversity`.
        folder (`Path`): Holds the images, tables and the report.
        facts (`dict`): Settings, versions, seconds, and what is missing.

    Example:
        >>> from diffalign import compare
        >>> result = compare(
        ...     "shapes",
        ...     "again=shapes",
        ...     max_prompts=2,
        ...     num_images=1,
        ...     num_inference_steps=2,
        ...     output_dir="comparison",
        ... )
        >>> result.tuned, result.win_rate("again").rate
        (['again'], 0.5)
    """

    models: list[ModelSpec]
    prompts: PromptSet
    num_images: int
    scores: dict[str, dict[str, Array]]
    higher_is_better: dict[str, bool]
    diversity: dict[str, Array]
    diversity_kind: str
    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """The name of the model that the others are compared with."""
        return self.models[0].name

    @property
    def tuned(self) -> list[str]:
        """The names of the other models."""
        return [model.name for model in self.models[1:]]

    @property
    def scorers(self) -> list[str]:
        """The names of the scorers. The first one decides."""
        return list(self.higher_is_better)

    def signed(self, model: str, scorer: str | None = None) -> Array:
        """Return the scores of one model such that higher is better.

        Args:
            model (`str`): Name of the model.
            scorer (`str`, *optional*): Name of the scorer. Defaults to the first.

        Returns:
            (P, N), the scores, negated where lower is better.

        Raises:
            ConfigError: There is no such model or scorer.
        """
        scorer = self.scorers[0] if scorer is None else scorer
        for name, value, known in (
            ("model", model, list(self.scores)),
            ("scorer", scorer, self.scorers),
        ):
            if value not in known:
                raise ConfigError(name, f"expected one of {', '.join(known)}, got {value!r}")
        values = self.scores[model][scorer]
        return values if self.higher_is_better[scorer] else -values

    def win_rate(
        self, model: str, scorer: str | None = None, *, against: str | None = None
    ) -> WinRate:
        """Compute how often a model beats the base or another model.

        Args:
            model (`str`): Name of the model.
            scorer (`str`, *optional*): Name of the scorer. Defaults to the first.
            against (`str`, *optional*): Name of the other model. Defaults to the base.

        Raises:
            ConfigError: There is no such model or scorer.
        """
        return win_rate(self.signed(against or self.base, scorer), self.signed(model, scorer))

    def sign_test(self, model: str, scorer: str | None = None) -> float:
        """Compute the p value of the sign test over prompts against the base."""
        return sign_test(self.signed(self.base, scorer), self.signed(model, scorer))

    def mean(self, model: str, scorer: str | None = None) -> tuple[float, float, float]:
        """Average the scores of one model.

        Args:
            model (`str`): Name of the model.
            scorer (`str`, *optional*): Name of the scorer. Defaults to the first.

        Returns:
            (mean, low, high), with the 95 % interval clustered by prompt.
        """
        values = self.scores[model][self.scorers[0] if scorer is None else scorer]
        return mean_of(values)

    def mean_diversity(self, model: str) -> tuple[float, float, float]:
        """Average the diversity of one model: (mean, low, high)."""
        return mean_of(self.diversity[model][:, None])

    def categories(self, model: str, scorer: str | None = None) -> dict[str, tuple[int, WinRate]]:
        """Compute the win-rate against the base for every category of prompts.

        Args:
            model (`str`): Name of the model.
            scorer (`str`, *optional*): Name of the scorer. Defaults to the first.

        Returns:
            Category -> (number of prompts, win-rate), in the order of their first
            prompts. Empty if the prompts have no categories.
        """
        categories: dict[str, tuple[int, WinRate]] = {}
        base, tuned = self.signed(self.base, scorer), self.signed(model, scorer)
        for name in dict.fromkeys(c for c in self.prompts.categories if c is not None):
            rows = [i for i, c in enumerate(self.prompts.categories) if c == name]
            categories[name] = (len(rows), win_rate(base[rows], tuned[rows]))
        return categories

    def file(self, model: str, prompt: int, number: int) -> Path:
        """Name the PNG of one image of a prompt."""
        return self.folder / image_name(model, prompt, number)

    def images(self, model: str, prompt: int) -> list[MaybeImage]:
        """Open the images of one prompt.

        Returns:
            N images, a `diffalign.runtime.missing.Missing` in place of one that cannot
            be used.
        """
        files = [drawn_file(self.file(model, prompt, n)) for n in range(self.num_images)]
        return [file if isinstance(file, Missing) else Image.open(file) for file in files]

    def extremes(
        self, model: str, count: int = 6, scorer: str | None = None
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Find the largest wins and the largest losses against the base.

        Args:
            model (`str`): Name of the model.
            count (`int`, defaults to 6): At most so many of either.
            scorer (`str`, *optional*): Name of the scorer. Defaults to the first.

        Returns:
            (wins, losses), each a list of (prompt, image) numbers, largest first.
        """
        difference = self.signed(model, scorer) - self.signed(self.base, scorer)
        order = [
            divmod(int(i), self.num_images)
            for i in np.argsort(difference, axis=None, kind="stable")
            if not np.isnan(difference.flat[i])
        ]
        losses = [place for place in order[:count] if difference[place] < 0]
        return [place for place in order[::-1][:count] if difference[place] > 0], losses

    def to_dict(self) -> dict[str, Any]:
        """Collect everything but images and single scores, for JSON.

        Returns:
            Plain values, with None in place of numbers that are not finite.
        """
        content: dict[str, Any] = {
            "prompts": self.prompts.facts(),
            "num_images": self.num_images,
            "base": self.base,
            "models": {},
            "comparisons": {},
            **self.facts,
        }
        for model in self.models:
            name = model.name
            content["models"][name] = {
                "described": model.described,
                "scores": {s: interval(self.mean(name, s)) for s in self.scorers},
                "missing": {s: int(np.isnan(self.scores[name][s]).sum()) for s in self.scorers},
                "diversity": {"kind": self.diversity_kind, **interval(self.mean_diversity(name))},
            }
        for name in self.tuned:
            content["comparisons"][name] = {s: self._against_base(name, s) for s in self.scorers}
        if len(self.tuned) > 1:
            content["between"] = between(
                self.tuned, self.scorers, lambda a, b, s: self.win_rate(a, s, against=b)
            )
        return plain(content)

    def _against_base(self, model: str, scorer: str) -> dict[str, Any]:
        """Collect what one scorer says of one model against the base."""
        categories = self.categories(model, scorer).items()
        return {
            **dataclasses.asdict(self.win_rate(model, scorer)),
            "sign_test": self.sign_test(model, scorer),
            "categories": {
                category: {"prompts": count, **dataclasses.asdict(won)}
                for category, (count, won) in categories
            },
        }

    def table(self) -> str:
        """Write the tables of the report as markdown."""
        return tables(self)


def image_name(model: str, prompt: int, number: int) -> str:
    """Name the PNG of one image, relative to the folder of the comparison."""
    return f"images/{model}/{prompt:05d}-{number:03d}.png"


def mean_of(values: Array) -> tuple[float, float, float]:
    """Average (P, N) values: (mean, low, high), the interval clustered by prompt."""
    per_prompt = nanmean(values)
    return (float(nanmean(per_prompt[None])[0]), *clustered_bootstrap(values))


def interval(values: tuple[float, float, float]) -> dict[str, float]:
    """Name the parts of (mean, low, high)."""
    return dict(zip(("mean", "low", "high"), values, strict=True))


class Result(Protocol):
    """What `compare` and `compare_guidance` return, as far as it is written as JSON."""

    @property
    def folder(self) -> Path: ...

    def to_dict(self) -> dict[str, Any]: ...


def save_results(comparison: Result) -> None:
    """Write ``results.json``.

    It must be written last, because it says that the comparison is complete.
    """
    content = json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False, default=str) + "\n"
    write_atomically(comparison.folder / "results.json", content.encode())


Table = tuple[str, list[str], list[list[str]]]
"""(title, header, rows)."""


def all_tables(c: Comparison) -> list[Table]:
    """Make the tables that the markdown and the page show.

    Returns:
        Win-rates, means, and win-rates by category if the prompts have categories.
    """
    header = ["model", "scorer", "win-rate % (95 %)", "wins / ties / losses %", "sign test p"]
    wins = []
    for model in c.tuned:
        for scorer in c.scorers:
            won = c.win_rate(model, scorer)
            shares = " / ".join(percent(x) for x in (won.wins, won.ties, won.losses))
            wins.append([model, scorer, rate(won), shares, f"{c.sign_test(model, scorer):.2g}"])
    result: list[Table] = [(f"Against {c.base}", header, wins)]
    means = [
        [
            m.name,
            *(number(*c.mean(m.name, s)) for s in c.scorers),
            number(*c.mean_diversity(m.name)),
        ]
        for m in c.models
    ]
    result.append(("Means (95 %)", ["model", *c.scorers, f"diversity ({c.diversity_kind})"], means))
    result += head_to_head(c.tuned, c.scorers[0], lambda a, b: c.win_rate(a, against=b))
    by_model = {model: c.categories(model) for model in c.tuned}
    rows = [
        [category, str(prompts), *(rate(by_model[model][category][1]) for model in c.tuned)]
        for category, (prompts, _) in by_model[c.tuned[0]].items()
    ]
    if rows:
        title = f"By category, win-rate % against {c.base} by {c.scorers[0]} (95 %)"
        result.append((title, ["category", "prompts", *c.tuned], rows))
    return result


def head_to_head(
    names: Sequence[str], scorer: str, beats: Callable[[str, str], WinRate]
) -> list[Table]:
    """Make the table of the tuned models against each other.

    Args:
        names (`Sequence[str]`): The tuned models.
        scorer (`str`): The scorer that decides.
        beats (`Callable`): Win-rate of the first model against the second.

    Returns:
        No table of fewer than two models.
    """
    if len(names) < 2:
        return []
    rows = [[a, *("" if a == b else rate(beats(a, b)) for b in names)] for a in names]
    title = f"Against each other, win-rate % of the row by {scorer} (95 %)"
    return [(title, ["", *names], rows)]


def between(
    names: Sequence[str], scorers: Sequence[str], beats: Callable[[str, str, str], WinRate]
) -> dict[str, Any]:
    """Collect the win-rates of the tuned models against each other, for JSON.

    Args:
        names (`Sequence[str]`): The tuned models.
        scorers (`Sequence[str]`): Names of the scorers.
        beats (`Callable`): Win-rate of the first model against the second, by a scorer.

    Returns:
        Model -> other model -> scorer -> win-rate of the first against the second.
    """
    return {
        a: {b: {s: dataclasses.asdict(beats(a, b, s)) for s in scorers} for b in names if b != a}
        for a in names
    }


def notes(c: Comparison) -> list[str]:
    """Say what a reader must know of the numbers, one sentence or two per note."""
    count = len(c.prompts.prompts)
    sentences = [
        f"{count} prompts ({c.prompts.name}) x {c.num_images} images; image i of a prompt starts "
        "from the same noise under every model. A tie is half a win. Intervals and the sign test "
        "count prompts, not images."
    ]
    sentences += c.prompts.notes
    sentences += few_prompts(count)
    for sentence in c.facts.get("missing", {}).values():
        sentences.append(f"{sentence}; their pairs are left out.")
    for model in c.models:
        for scorer in c.scorers:
            missing = int(np.isnan(c.scores[model.name][scorer]).sum())
            if missing:
                sentences.append(
                    f"{scorer} has no score for {missing} images of {model.name}; "
                    "their pairs are left out."
                )
    for model in c.models:
        if model.steer is not None:
            sentences.append(
                f"{model.name} draws several particles for every image and keeps the best: "
                "it costs that many times the work."
            )
    return sentences


def tables(c: Comparison) -> str:
    """Write all tables and notes as markdown."""
    return markdown(all_tables(c), notes(c))


def markdown(sections: list[Table], sentences: list[str]) -> str:
    """Write tables, and sentences below them, as markdown."""
    lines = []
    for title, header, rows in sections:
        lines += [f"**{title}**", "", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
    return "\n".join([*lines, *sentences])
