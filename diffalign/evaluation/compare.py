"""Models compared on the same prompts from the same noise: paired images, scores, win-rates with intervals, diversity.

Image i of a prompt has one seed under every model, which decides its initial and its step noise; all models draw the same batches. What is
left of a difference between two images of a pair is therefore the models'.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..data.prompt_sets import PromptSet, load_prompts
from ..errors import ConfigError, UserError
from ..generation.sampling import draw_files, drawn_file
from ..runtime.distributed import Processes
from ..runtime.files import claim_output_dir
from ..runtime.missing import Missing, check_any, left_out
from ..runtime.seeds import image_seed
from .comparison import Array, Comparison, image_name
from .diversity import PIXEL, Diversity
from .models import ModelSpec, opened, parse_model

if TYPE_CHECKING:
    from ..rewards.panel import Panel

MARKER = "compare.json"


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
    for name, least, value in (
        ("num_images", 1, num_images),
        ("seed", 0, seed),
        ("batch_size", 1, batch_size),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(name, f"expected int >= {least}, got {value!r}")
    for name in ("generator", "prompt"):
        if name in pipe_kwargs:
            raise ConfigError(
                name, "both sides need the same noise and prompts; give seed= and prompts= instead"
            )
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
        _draw(
            model,
            found.prompts,
            folder,
            num_images,
            seed,
            batch_size,
            pipe_kwargs,
            dtype,
            processes,
        )
    processes.wait()
    missing = {
        model.name: _missing(model.name, len(found.prompts), num_images, folder) for model in models
    }
    scores = {
        model.name: _scores(model.name, found, folder, num_images, panel, processes)
        for model in models
    }
    spread = {
        model.name: _diversity(kind, model.name, found, folder, num_images, processes)
        for model in models
    }
    processes.stop()
    from ..runtime.versions import versions

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
            raise ConfigError(
                "scorers", "name at least one, e.g. pickscore; diffalign scorers lists them"
            )
        scorers = ["shapes"]
    panel = Panel.from_config(scorers, device=processes.device)
    for entry in panel.entries:
        entry.on_error = "nan"  # one image without a score shall not cost the comparison; its pair is left out and counted
    for name in panel.names:
        if "metadata" in panel.specs[name].requires and not all(prompts.metadata):
            raise UserError(
                f"scorers: {name} needs metadata of every prompt; take a set that has it, e.g. geneval"
            )
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
                drawing.append(
                    stack.enter_context(
                        opened(model, device=processes.device, dtype=dtype, field=model.name)
                    )
                )
            return drawing[0](texts, seeds, **settings)

        draw_files(draw, wanted, batch_size, processes, f"drawing, {model.name}")


def _missing(model: str, prompts: int, count: int, folder: Path) -> str:
    """What is missing of a model's images, in words.

    Raises:
        NoImages: all of them.
    """
    files = [
        drawn_file(folder / image_name(model, p, n)) for p in range(prompts) for n in range(count)
    ]
    check_any(files, model)
    return left_out(files, len(files), model)


def _scores(
    model: str, prompts: PromptSet, folder: Path, count: int, panel: Panel, processes: Processes
) -> dict[str, Array]:
    """Scorer -> (P, N), in chunks that are kept."""
    from ..annotation.score_parts import ScoreWork, score_all
    from ..annotation.score_source import FolderSource

    files = [
        folder / image_name(model, p, n) for p in range(len(prompts.prompts)) for n in range(count)
    ]
    texts: list[str | None] = [prompt for prompt in prompts.prompts for _ in range(count)]
    extra = [dict(metadata) for metadata in prompts.metadata for _ in range(count)]
    source = FolderSource(model, folder, files, texts, extra)
    parts = folder / "parts"
    parts.mkdir(exist_ok=True)
    table = score_all(ScoreWork(panel, source, source.chunks(64), parts), processes)
    for name, values in table.columns.items():
        if values and all(math.isnan(value) for value in values):
            raise UserError(
                f"scorers: {name} has no score for any image of {model} ({next(iter(table.errors[name].values()))})"
            )
    return {
        name: np.array(values, dtype=np.float64).reshape(-1, count)
        for name, values in table.columns.items()
    }


def _diversity(
    kind: Diversity, model: str, prompts: PromptSet, folder: Path, count: int, processes: Processes
) -> Array:
    total = len(prompts.prompts)
    if count < 2:
        return np.full(total, np.nan)
    mine = []
    for p in range(processes.rank, total, processes.world):
        files = [drawn_file(folder / image_name(model, p, n)) for n in range(count)]
        images = [
            Image.open(file).convert("RGB") for file in files if not isinstance(file, Missing)
        ]
        mine.append((p, kind(images) if len(images) > 1 else float("nan")))
    found = dict(processes.gather(mine))
    return np.array([found[p] for p in range(total)])
