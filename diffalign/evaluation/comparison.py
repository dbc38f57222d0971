"""The result of a comparison: scores, win-rates, categories and tables."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..data.prompt_sets import PromptSet
from ..errors import ConfigError
from ..generation.sampling import drawn_file
from ..runtime.files import write_atomically
from ..runtime.missing import Missing
from .formatting import few_prompts, number, percent, rate
from .models import ModelSpec
from .statistics import WinRate, clustered_bootstrap, nanmean, sign_test, win_rate

Array = npt.NDArray[np.float64]


@dataclass
class Comparison:
    """What `compare` returns.

    Attributes:
        models: the base first.
        prompts: P of them, with categories and where they come from.
        num_images: N per prompt.
        scores: model -> scorer -> (P, N) float64, as the scorer gave them; NaN = missing.
        higher_is_better: scorer -> bool.
        diversity: model -> (P,), mean distance of two images of a prompt; NaN with one image.
        diversity_kind: what that distance is.
        folder: images, tables and the report.
        facts: settings, versions, seconds.
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
        """Name of the model that the others are compared with."""
        return self.models[0].name

    @property
    def tuned(self) -> list[str]:
        """Names of the others."""
        return [model.name for model in self.models[1:]]

    @property
    def scorers(self) -> list[str]:
        """Names of the scorers, the deciding one first."""
        return list(self.higher_is_better)

    def signed(self, model: str, scorer: str | None = None) -> Array:
        """(P, N): scores of one model by one scorer (None: the first), higher is better.

        Raises:
            ConfigError: no such model or scorer.
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
        """How often `model` beats the base (or `against`), by one scorer (None: the first)."""
        return win_rate(self.signed(against or self.base, scorer), self.signed(model, scorer))

    def sign_test(self, model: str, scorer: str | None = None) -> float:
        """p value of the sign test over prompts against the base."""
        return sign_test(self.signed(self.base, scorer), self.signed(model, scorer))

    def mean(self, model: str, scorer: str | None = None) -> tuple[float, float, float]:
        """(mean score, low, high), with the 95 % interval clustered by prompt."""
        values = self.scores[model][self.scorers[0] if scorer is None else scorer]
        return _mean(values)

    def mean_diversity(self, model: str) -> tuple[float, float, float]:
        """(mean distance, low, high)."""
        return _mean(self.diversity[model][:, None])

    def categories(self, model: str, scorer: str | None = None) -> dict[str, tuple[int, WinRate]]:
        """Category -> (prompts, win-rate against the base), in the order of their first prompts; empty without categories."""
        found: dict[str, tuple[int, WinRate]] = {}
        base, tuned = self.signed(self.base, scorer), self.signed(model, scorer)
        for name in dict.fromkeys(c for c in self.prompts.categories if c is not None):
            rows = [i for i, c in enumerate(self.prompts.categories) if c == name]
            found[name] = (len(rows), win_rate(base[rows], tuned[rows]))
        return found

    def file(self, model: str, prompt: int, number: int) -> Path:
        """The PNG of image `number` of a prompt."""
        return self.folder / image_name(model, prompt, number)

    def images(self, model: str, prompt: int) -> list[Image.Image]:
        """The images of one prompt, `diffalign.runtime.missing.Missing` where one cannot be used."""
        files = [drawn_file(self.file(model, prompt, n)) for n in range(self.num_images)]
        return [file if isinstance(file, Missing) else Image.open(file) for file in files]

    def extremes(
        self, model: str, count: int = 6, scorer: str | None = None
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(prompt, image) of the largest wins and of the largest losses against the base, largest first."""
        difference = self.signed(model, scorer) - self.signed(self.base, scorer)
        order = [
            divmod(int(i), self.num_images)
            for i in np.argsort(difference, axis=None, kind="stable")
            if not np.isnan(difference.flat[i])
        ]
        losses = [place for place in order[:count] if difference[place] < 0]
        return [place for place in order[::-1][:count] if difference[place] > 0], losses

    def to_dict(self) -> dict[str, Any]:
        """Everything but images and single scores, for JSON; what is not a number is None."""
        found: dict[str, Any] = {
            "prompts": self.prompts.facts(),
            "num_images": self.num_images,
            "base": self.base,
            "models": {},
            "comparisons": {},
            **self.facts,
        }
        for model in self.models:
            scores = {
                s: dict(zip(("mean", "low", "high"), self.mean(model.name, s), strict=True))
                for s in self.scorers
            }
            missing = {s: int(np.isnan(self.scores[model.name][s]).sum()) for s in self.scorers}
            diversity = dict(
                zip(("mean", "low", "high"), self.mean_diversity(model.name), strict=True)
            )
            found["models"][model.name] = {
                "described": model.described,
                "scores": scores,
                "missing": missing,
                "diversity": {"kind": self.diversity_kind, **diversity},
            }
        for name in self.tuned:
            found["comparisons"][name] = {
                s: {
                    **dataclasses.asdict(self.win_rate(name, s)),
                    "sign_test": self.sign_test(name, s),
                    "categories": {
                        c: {"prompts": n, **dataclasses.asdict(rate)}
                        for c, (n, rate) in self.categories(name, s).items()
                    },
                }
                for s in self.scorers
            }
        return _plain(found)

    def table(self) -> str:
        """The markdown tables of the report."""
        pass

        return tables(self)


def image_name(model: str, prompt: int, number: int) -> str:
    """Of a PNG inside the folder."""
    return f"images/{model}/{prompt:05d}-{number:03d}.png"


def _mean(values: Array) -> tuple[float, float, float]:
    per_prompt = nanmean(values)
    return (float(nanmean(per_prompt[None])[0]), *clustered_bootstrap(values))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_results(comparison: Comparison) -> None:
    """Writes ``results.json``, and last, as it says that the comparison is complete."""
    content = json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False, default=str) + "\n"
    write_atomically(comparison.folder / "results.json", content.encode())


Table = tuple[str, list[str], list[list[str]]]
"""(title, header, rows)."""


def all_tables(c: Comparison) -> list[Table]:
    """What the markdown and the page show."""
    header = ["model", "scorer", "win-rate % (95 %)", "wins / ties / losses %", "sign test p"]
    wins = []
    for model in c.tuned:
        for scorer in c.scorers:
            won = c.win_rate(model, scorer)
            shares = " / ".join(percent(x) for x in (won.wins, won.ties, won.losses))
            wins.append([model, scorer, rate(won), shares, f"{c.sign_test(model, scorer):.2g}"])
    found: list[Table] = [(f"Against {c.base}", header, wins)]
    means = [
        [
            m.name,
            *(number(*c.mean(m.name, s)) for s in c.scorers),
            number(*c.mean_diversity(m.name)),
        ]
        for m in c.models
    ]
    found.append(("Means (95 %)", ["model", *c.scorers, f"diversity ({c.diversity_kind})"], means))
    by_model = {model: c.categories(model) for model in c.tuned}
    rows = [
        [category, str(prompts), *(rate(by_model[model][category][1]) for model in c.tuned)]
        for category, (prompts, _) in by_model[c.tuned[0]].items()
    ]
    if rows:
        title = f"By category, win-rate % against {c.base} by {c.scorers[0]} (95 %)"
        found.append((title, ["category", "prompts", *c.tuned], rows))
    return found


def notes(c: Comparison) -> list[str]:
    """What a reader must know of the numbers."""
    found = [
        f"{len(c.prompts.prompts)} prompts ({c.prompts.name}) x {c.num_images} images; image i of a prompt starts from the same noise under every "
        "model. A tie is half a win. Intervals and the sign test count prompts, not images."
    ]
    found += c.prompts.notes
    found += few_prompts(len(c.prompts.prompts))
    found += [
        f"{sentence}; their pairs are left out." for sentence in c.facts.get("missing", {}).values()
    ]
    for model in c.models:
        for scorer in c.scorers:
            missing = sum(1 for value in c.scores[model.name][scorer].flat if math.isnan(value))
            if missing:
                found.append(
                    f"{scorer} has no score for {missing} images of {model.name}; their pairs are left out."
                )
    for model in c.models:
        if model.steer is not None:
            found.append(
                f"{model.name} draws several particles for every image and keeps the best: it costs that many times the work."
            )
    return found


def tables(c: Comparison) -> str:
    """All tables as markdown."""
    lines = []
    for title, header, rows in all_tables(c):
        lines += [f"**{title}**", "", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
    return "\n".join([*lines, *notes(c)])
