"""Models compared on the same prompts from the same noise: paired images, scores, win-rates with intervals, diversity.

Image i of a prompt has one seed under every model, which decides its initial and its step noise; all models draw the same batches. What is
left of a difference between two images of a pair is therefore the models'.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..drawn import Missing, check_any, left_out
from ..exceptions import ConfigError, UserError
from ..folders import claim_output_dir, write_atomically
from ..processes import Processes
from .diversity import PIXEL, Diversity
from .models import ModelSpec, opened, parse_model
from .prompt_sets import PromptSet, load_prompts
from .sampling import draw_files, drawn_file, image_seed
from .statistics import WinRate, clustered_bootstrap, nanmean, sign_test, win_rate

if TYPE_CHECKING:
    from ..rewards.panel import Panel

Array = npt.NDArray[np.float64]
MARKER = "compare.json"


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
        for name, value, known in (("model", model, list(self.scores)), ("scorer", scorer, self.scorers)):
            if value not in known:
                raise ConfigError(name, f"expected one of {', '.join(known)}, got {value!r}")
        values = self.scores[model][scorer]
        return values if self.higher_is_better[scorer] else -values

    def win_rate(self, model: str, scorer: str | None = None, *, against: str | None = None) -> WinRate:
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
        """The images of one prompt, `diffalign.drawn.Missing` where one cannot be used."""
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
            scores = {s: dict(zip(("mean", "low", "high"), self.mean(model.name, s), strict=True)) for s in self.scorers}
            missing = {s: int(np.isnan(self.scores[model.name][s]).sum()) for s in self.scorers}
            diversity = dict(zip(("mean", "low", "high"), self.mean_diversity(model.name), strict=True))
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
                        c: {"prompts": n, **dataclasses.asdict(rate)} for c, (n, rate) in self.categories(name, s).items()
                    },
                }
                for s in self.scorers
            }
        return _plain(found)

    def table(self) -> str:
        """The markdown tables of the report."""
        from .report import tables

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


def compare(
    base: Any,
    tuned: Any,
    prompts: str | Iterable[str] = "shapes",
    scorers: Any = None,
    *,
    output_dir: str | Path = "diffalign-comparison",
    num_images: int = 4,
    seed: int = 0,
    max_prompts: int | None = None,
    prompts_path: str | Path | None = None,
    batch_size: int = 8,
    diversity: Any = PIXEL,
    device: Any = None,
    dtype: Any = None,
    verbose: bool = False,
    **pipe_kwargs: Any,
) -> Comparison:
    """Draws every prompt under every model from the same noise, scores the images and says who wins how surely.

    Finished images and scores lie in `output_dir`: the same call goes on where an interrupted one stopped, and processes started by
    torchrun or ``accelerate launch`` share the work.

    Args:
        base: what the others are compared with: Hub id, folder, ``shapes``, a pipeline, or a mapping (see `parse_model`).
        tuned: one or a sequence of models: as `base`, or a LoRA on the base's model, ``PATH@0.5`` at a scale, an `FKSteering`, or a mapping
            with ``lora``, ``lora_scale``, ``negative``, ``steer``.
        prompts: name of a set, file, or prompts; see `load_prompts`.
        scorers: whatever a `Panel` takes (names, entries, a mapping with ``rewards``); the first decides. None is ``shapes`` for the embedded
            prompts.
        output_dir: created; one that holds a comparison with other settings is refused.
        num_images (`int`): per prompt.
        seed (`int`): of everything; image i of a prompt has the same seed whatever other prompts there are.
        max_prompts (`int`, *optional*): evenly over the set.
        prompts_path: of a named set, where its files are.
        batch_size (`int`): images per forward pass.
        diversity: ``pixel`` or a scorer with an image embedding; see `Diversity`.
        device, dtype: of models and scorers; None takes the GPU if there is one, with models in bfloat16.
        verbose (`bool`): print the tables.
        pipe_kwargs: for the pipelines' call (`num_inference_steps`, `guidance_scale`, `height`, ...), the same for all models.

    Raises:
        UserError: models, prompts, scorers or numbers that do not fit, before anything is drawn.
    """
    for name, least, value in (("num_images", 1, num_images), ("seed", 0, seed), ("batch_size", 1, batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(name, f"expected int >= {least}, got {value!r}")
    for name in ("generator", "prompt"):
        if name in pipe_kwargs:
            raise ConfigError(name, "both sides need the same noise and prompts; give seed= and prompts= instead")
    found = load_prompts(prompts, path=prompts_path, limit=max_prompts)
    models = read_models(base, tuned)
    processes = Processes.start(device)
    folder = Path(output_dir)
    panel, kind = _panel(scorers, found, processes), Diversity(diversity, device=processes.device)
    settings = {
        "models": {model.name: model.fingerprint() for model in models},
        "prompts": [found.name, found.sha256, len(found.prompts)],
        "num_images": num_images,
        "seed": seed,
        "batch_size": batch_size,
        "dtype": dtype,
        "arguments": pipe_kwargs,
    }
    claim_output_dir(folder, MARKER, settings, long=("models", "prompts"))
    processes.wait()
    started = time.perf_counter()
    for model in models:
        _draw(model, found.prompts, folder, num_images, seed, batch_size, pipe_kwargs, dtype, processes)
    processes.wait()
    missing = {model.name: _missing(model.name, len(found.prompts), num_images, folder) for model in models}
    scores = {model.name: _scores(model.name, found, folder, num_images, panel, processes) for model in models}
    spread = {model.name: _diversity(kind, model.name, found, folder, num_images, processes) for model in models}
    processes.stop()
    from ..training.hub import versions

    comparison = Comparison(
        models,
        found,
        num_images,
        scores,
        {name: panel.specs[name].higher_is_better for name in panel.names},
        spread,
        kind.name,
        folder,
        {
            "settings": settings,
            "versions": versions(),
            "seconds": round(time.perf_counter() - started, 1),
            "missing": {k: v for k, v in missing.items() if v},
        },
    )
    if processes.rank == 0:
        from .report import write

        write(comparison)
        if verbose:
            print(comparison.table())
    return comparison


def read_models(base: Any, tuned: Any) -> list[ModelSpec]:
    """The base and the others, every one with a name of its own.

    Raises:
        ConfigError: none to compare, or something that is no model.
    """
    first = parse_model(base, "base")
    others = list(tuned) if isinstance(tuned, Sequence) and not isinstance(tuned, str) else [tuned]
    if not others:
        raise ConfigError("tuned", "name at least one model to compare with the base")
    models = [first]
    for i, value in enumerate(others):
        field = "tuned" if len(others) == 1 else f"tuned[{i}]"
        models.append(parse_model(value, field, base=first, taken=[model.name for model in models]))
    return models


def _panel(scorers: Any, prompts: PromptSet, processes: Processes) -> Panel:
    from ..rewards.panel import Panel

    if scorers is None:
        if prompts.name != "shapes":
            raise ConfigError("scorers", "name at least one, e.g. pickscore; diffalign scorers lists them")
        scorers = ["shapes"]
    panel = Panel.from_config(scorers, device=processes.device)
    for entry in panel.entries:
        entry.on_error = "nan"  # one image without a score shall not cost the comparison; its pair is left out and counted
    for name in panel.names:
        if "metadata" in panel.specs[name].requires and not all(prompts.metadata):
            raise UserError(f"scorers: {name} needs metadata of every prompt; take a set that has it, e.g. geneval")
    return panel


def _draw(
    model: ModelSpec,
    prompts: list[str],
    folder: Path,
    count: int,
    seed: int,
    batch_size: int,
    settings: Mapping[str, Any],
    dtype: Any,
    processes: Processes,
) -> None:
    from contextlib import ExitStack

    wanted = [
        (prompt, image_seed(seed, prompt, n), folder / image_name(model.name, p, n))
        for p, prompt in enumerate(prompts)
        for n in range(count)
    ]
    with ExitStack() as stack:
        drawing: list[Any] = []

        def draw(texts: list[str], seeds: list[int]) -> list[Any]:
            if not drawing:  # a model whose images are all there is not loaded
                drawing.append(stack.enter_context(opened(model, device=processes.device, dtype=dtype, field=model.name)))
            return drawing[0](texts, seeds, **settings)

        draw_files(draw, wanted, batch_size, processes, f"drawing, {model.name}")


def _missing(model: str, prompts: int, count: int, folder: Path) -> str:
    """What is missing of a model's images, in words.

    Raises:
        NoImages: all of them.
    """
    files = [drawn_file(folder / image_name(model, p, n)) for p in range(prompts) for n in range(count)]
    check_any(files, model)
    return left_out(files, len(files), model)


def _scores(model: str, prompts: PromptSet, folder: Path, count: int, panel: Panel, processes: Processes) -> dict[str, Array]:
    """Scorer -> (P, N), in chunks that are kept."""
    from ..rewards.score_parts import ScoreWork, score_all
    from ..rewards.score_source import FolderSource

    files = [folder / image_name(model, p, n) for p in range(len(prompts.prompts)) for n in range(count)]
    texts: list[str | None] = [prompt for prompt in prompts.prompts for _ in range(count)]
    extra = [dict(metadata) for metadata in prompts.metadata for _ in range(count)]
    source = FolderSource(model, folder, files, texts, extra)
    parts = folder / "parts"
    parts.mkdir(exist_ok=True)
    table = score_all(ScoreWork(panel, source, source.chunks(64), parts), processes)
    for name, values in table.columns.items():
        if values and all(math.isnan(value) for value in values):
            raise UserError(f"scorers: {name} has no score for any image of {model} ({next(iter(table.errors[name].values()))})")
    return {name: np.array(values, dtype=np.float64).reshape(-1, count) for name, values in table.columns.items()}


def _diversity(kind: Diversity, model: str, prompts: PromptSet, folder: Path, count: int, processes: Processes) -> Array:
    total = len(prompts.prompts)
    if count < 2:
        return np.full(total, np.nan)
    mine = []
    for p in range(processes.rank, total, processes.world):
        files = [drawn_file(folder / image_name(model, p, n)) for n in range(count)]
        images = [Image.open(file).convert("RGB") for file in files if not isinstance(file, Missing)]
        mine.append((p, kind(images) if len(images) > 1 else float("nan")))
    found = dict(processes.gather(mine))
    return np.array([found[p] for p in range(total)])


def save_results(comparison: Comparison) -> None:
    """Writes ``results.json``, and last, as it says that the comparison is complete."""
    content = json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False, default=str) + "\n"
    write_atomically(comparison.folder / "results.json", content.encode())
