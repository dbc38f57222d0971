"""Compare models on the same prompts from the same noise.

Image i of a prompt has one seed under every model. The seed decides the initial noise
and the noise of every step, and all models draw the same batches. So the images of a
pair differ only because the models do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..data.prompt_sets import PromptSet, load_prompts
from ..errors import ConfigError, UserError
from ..generation.sampling import draw_files, drawn_file
from ..runtime.distributed import DistributedContext
from ..runtime.files import claim_output_dir
from ..runtime.missing import Missing, check_any, left_out
from ..runtime.seeds import image_seed
from .comparison import Array, Comparison, image_name
from .diversity import PIXEL, Diversity
from .models import Draw, ModelLike, ModelSpec, opened, parse_model

if TYPE_CHECKING:
    import torch

    from ..rewards.base import Scorer
    from ..rewards.panel import Panel
    from ..runtime.missing import MaybeImage
    from ..runtime.protocols import DeviceLike

MARKER = "compare.json"


def compare(
    base: ModelLike,
    tuned: ModelLike | Sequence[ModelLike],
    prompts: str | Iterable[str] = "shapes",
    scorers: object = None,
    *,
    output_dir: str | Path = "diffalign-comparison",
    num_images: int = 4,
    seed: int = 0,
    max_prompts: int | None = None,
    prompts_path: str | Path | None = None,
    batch_size: int = 8,
    diversity: str | Scorer = PIXEL,
    device: DeviceLike = None,
    dtype: torch.dtype | None = None,
    verbose: bool = False,
    **pipe_kwargs: Any,
) -> Comparison:
    """Compare models: draw the same prompts, score the images and compute win-rates.

    Finished images and scores stay in `output_dir`. The same call continues where an
    interrupted one stopped. Processes started by torchrun or ``accelerate launch``
    share the work.

    Args:
        base (`str`, pipeline or mapping): Model that the others are compared with. It
            is a Hub id, a folder, ``shapes``, a pipeline, or a mapping (see
            `parse_model`).
        tuned: One model or a sequence of them. Each is given like `base`, or as a LoRA
            on the base's model (``PATH@0.5`` for a scale of 0.5), an `FKSteering`, or a
            mapping with ``lora``, ``lora_scale``, ``negative`` or ``steer``.
        prompts (`str` or `Iterable[str]`, defaults to ``shapes``): Name of a set, a
            file, or prompts, see `load_prompts`.
        scorers (*optional*): What a `Panel` takes: names, entries, or a mapping with
            ``rewards``. The first one decides. Defaults to ``shapes`` for the embedded
            prompts and is required for others.
        output_dir (`str` or `Path`, defaults to ``diffalign-comparison``): Folder for
            the results. It is created. If it holds a comparison with other settings, it
            is refused.
        num_images (`int`, defaults to 4): Images per prompt.
        seed (`int`, defaults to 0): Seed of everything. Image i of a prompt has the
            same seed whatever other prompts there are.
        max_prompts (`int`, *optional*): At most so many prompts, evenly over the set.
        prompts_path (`str` or `Path`, *optional*): Where the files of a named set are.
        batch_size (`int`, defaults to 8): Images per forward pass.
        diversity (`str` or scorer, defaults to ``pixel``): Distance of two images, see
            `Diversity`.
        device (*optional*): Where models and scorers run. Defaults to the GPU if there
            is one.
        dtype (*optional*): Number type of the models. Defaults to bfloat16 on a GPU.
        verbose (`bool`, defaults to `False`): Print the tables.
        pipe_kwargs: Arguments of the pipelines' call, the same for all models, such as
            `num_inference_steps`, `guidance_scale`, `height`.

    Returns:
        `Comparison` with the scores. Tables, pictures and a report are in `output_dir`.

    Raises:
        UserError: Models, prompts, scorers or numbers do not fit, which is found before
            anything is drawn. Or a model has not a single image with a score.

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
        >>> result.win_rate("again").rate
        0.5
    """
    comparison, is_main = measure(
        read_models(base, tuned),
        prompts,
        scorers,
        output_dir=output_dir,
        num_images=num_images,
        seed=seed,
        max_prompts=max_prompts,
        prompts_path=prompts_path,
        batch_size=batch_size,
        diversity=diversity,
        device=device,
        dtype=dtype,
        **pipe_kwargs,
    )
    if is_main:
        from .report import write

        write(comparison)
        if verbose:
            print(comparison.table())
    return comparison


def measure(
    models: Sequence[ModelSpec],
    prompts: str | Iterable[str],
    scorers: object,
    *,
    output_dir: str | Path,
    num_images: int = 4,
    seed: int = 0,
    max_prompts: int | None = None,
    prompts_path: str | Path | None = None,
    batch_size: int = 8,
    diversity: str | Scorer = PIXEL,
    device: DeviceLike = None,
    dtype: torch.dtype | None = None,
    check: Callable[[PromptSet], None] | None = None,
    identity: Mapping[str, Any] | None = None,
    **pipe_kwargs: Any,
) -> tuple[Comparison, bool]:
    """Draw and score the images of all models, and write no report.

    Args:
        models (`Sequence[ModelSpec]`): The models, with different names. The arguments
            of a pipeline's call may differ in their `guidance_scale`.
        check (`Callable`, *optional*): Called with the prompts before anything is
            drawn. It may raise a `UserError`.
        identity (`Mapping[str, Any]`, *optional*): What a folder must have been made
            with to be gone on with, in place of the models' fingerprints.

    The other arguments are those of `compare`.

    Returns:
        `tuple[Comparison, bool]`: The scores, and whether this process is the one that
        writes.

    Raises:
        UserError: See `compare`.
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
    prompt_set = load_prompts(prompts, path=prompts_path, limit=max_prompts)
    if check is not None:
        check(prompt_set)
    texts = prompt_set.prompts
    processes = DistributedContext.start(device)
    folder = Path(output_dir)
    panel = _panel(scorers, prompt_set, processes)
    distance = Diversity(diversity, device=processes.device)
    if identity is None:
        identity = {"models": {model.name: model.fingerprint() for model in models}}
    settings = {
        **identity,
        "prompts": [prompt_set.name, prompt_set.sha256, len(texts)],
        "num_images": num_images,
        "seed": seed,
        "batch_size": batch_size,
        "dtype": dtype,
        "arguments": pipe_kwargs,
    }
    claim_output_dir(folder, MARKER, settings, long=("models", "prompts"))
    processes.wait()
    started = time.perf_counter()
    # Models that differ in their guidance alone are loaded once.
    for _, group in groupby(models, lambda m: replace(m, name="", guidance_scale=None)):
        _draw(
            list(group), texts, folder, num_images, seed, batch_size, pipe_kwargs, dtype, processes
        )
    processes.wait()
    names = [model.name for model in models]
    missing = {name: _missing(name, len(texts), num_images, folder) for name in names}
    scores = {
        name: _scores(name, prompt_set, folder, num_images, panel, processes) for name in names
    }
    spread = {
        name: _diversity(distance, name, prompt_set, folder, num_images, processes)
        for name in names
    }
    processes.stop()
    from ..runtime.versions import versions

    comparison = Comparison(
        list(models),
        prompt_set,
        num_images,
        scores,
        {name: panel.specs[name].higher_is_better for name in panel.names},
        spread,
        distance.name,
        folder,
        {
            "settings": settings,
            "versions": versions(),
            "seconds": round(time.perf_counter() - started, 1),
            "missing": {name: sentence for name, sentence in missing.items() if sentence},
        },
    )
    return comparison, processes.rank == 0


def read_models(base: ModelLike, tuned: ModelLike | Sequence[ModelLike]) -> list[ModelSpec]:
    """Read the base and the tuned models, and give each a name of its own.

    Args:
        base: Model that the others are compared with, see `parse_model`.
        tuned: One model or a sequence of them.

    Returns:
        The models, the base first.

    Raises:
        ConfigError: There is nothing to compare with, or something is no model.
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


def _panel(scorers: object, prompts: PromptSet, processes: DistributedContext) -> Panel:
    """Load the scorers.

    Raises:
        UserError: There are none, or one cannot score these prompts.
    """
    from ..rewards.panel import Panel

    if scorers is None:
        if prompts.name != "shapes":
            raise ConfigError(
                "scorers", "name at least one, e.g. pickscore; diffalign scorers lists them"
            )
        scorers = ["shapes"]
    panel = Panel.from_config(scorers, device=processes.device)
    for entry in panel.entries:
        # One image without a score must not end the comparison. Its pair is left out
        # and counted.
        entry.on_error = "nan"
    for name in panel.names:
        if "metadata" in panel.specs[name].requires and not all(prompts.metadata):
            raise UserError(
                f"scorers: {name} needs metadata of every prompt; "
                "take a set that has it, e.g. geneval"
            )
    return panel


def _draw(
    models: Sequence[ModelSpec],
    prompts: list[str],
    folder: Path,
    count: int,
    seed: int,
    batch_size: int,
    settings: Mapping[str, Any],
    dtype: torch.dtype | None,
    processes: DistributedContext,
) -> None:
    """Draw the missing images of one model, at one or several guidance scales."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        draw_function: list[Draw] = []

        def draw(texts: list[str], seeds: list[int], **arguments: Any) -> list[MaybeImage]:
            if not draw_function:  # so a model whose images are all there is never loaded
                first = models[0]
                draw_function.append(
                    stack.enter_context(
                        opened(first, device=processes.device, dtype=dtype, field=first.name)
                    )
                )
            return draw_function[0](texts, seeds, **arguments)

        for model in models:
            images = [
                (prompt, image_seed(seed, prompt, n), folder / image_name(model.name, p, n))
                for p, prompt in enumerate(prompts)
                for n in range(count)
            ]
            arguments = dict(settings)
            if model.guidance_scale is not None:
                arguments["guidance_scale"] = model.guidance_scale
            draw_files(
                partial(draw, **arguments),
                images,
                batch_size,
                processes,
                f"drawing, {model.name}",
            )


def _missing(model: str, prompts: int, count: int, folder: Path) -> str:
    """Say how many images of a model cannot be used, and why.

    Returns:
        One sentence, empty if nothing is missing.

    Raises:
        NoImages: Not a single image can be used.
    """
    files = [
        drawn_file(folder / image_name(model, p, n)) for p in range(prompts) for n in range(count)
    ]
    check_any(files, model)
    return left_out(files, len(files), model)


def _scores(
    model: str,
    prompts: PromptSet,
    folder: Path,
    count: int,
    panel: Panel,
    processes: DistributedContext,
) -> dict[str, Array]:
    """Score the images of one model, and keep finished chunks in the folder.

    Returns:
        Scorer -> (P, N).

    Raises:
        UserError: A scorer has no score for any image.
    """
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
            reason = next(iter(table.errors[name].values()))
            raise UserError(f"scorers: {name} has no score for any image of {model} ({reason})")
    return {
        name: np.array(values, dtype=np.float64).reshape(-1, count)
        for name, values in table.columns.items()
    }


def _diversity(
    distance: Diversity,
    model: str,
    prompts: PromptSet,
    folder: Path,
    count: int,
    processes: DistributedContext,
) -> Array:
    """Compute the diversity of every prompt, (P,). Processes share the prompts."""
    total = len(prompts.prompts)
    if count < 2:
        return np.full(total, np.nan)
    mine = []
    for p in range(processes.rank, total, processes.world):
        files = [drawn_file(folder / image_name(model, p, n)) for n in range(count)]
        images = [
            Image.open(file).convert("RGB") for file in files if not isinstance(file, Missing)
        ]
        mine.append((p, distance(images)))
    values = dict(processes.gather(mine))
    return np.array([values[p] for p in range(total)])
