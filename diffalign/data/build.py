"""``diffalign data build``: preference data from prompts - draw images, score them with a panel, write pairs or ranked lists.

The recipe of RankDPO's Syn-Pic (arXiv 2410.18013, section 3.1): several images per prompt, from one or several models, ranked by how
often they win under several reward models. Image i of a prompt has the same seed under every model. What was drawn and scored is kept, so
an interrupted command goes on, and more prompts, images, models or scorers can be added to a finished one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.prompt_sets import NAMED, load_prompts
from ..exceptions import ConfigError, UserError
from ..folders import check_output_dir
from ..processes import process_rank
from ..ranges import count, finite, not_negative, seed, side, steps

if TYPE_CHECKING:
    from ..processes import Processes
    from ..rewards.panel import Panel

_SCORE_PROMPTS = 32  # prompts scored at once: the same ones whatever the number of processes, so that rounding is the same too
SELECTIONS = ("best_worst", "best_vs_rest", "all", "unanimous")
FORMATS = ("both", "pairs", "ranked")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--prompts",
        required=True,
        help="text file with one per line, any dataset with prompts, shapes, shapes-held-out or a named set as in compare",
    )
    parser.add_argument("--max_prompts", type=count(), help="take only the first so many")
    parser.add_argument("--models", nargs="+", default=["shapes"], help="Hub ids or folders of pipelines (default: shapes)")
    parser.add_argument("--lora", action="append", default=[], help="LoRA on the first model, as a further model; several times")
    parser.add_argument("--scorers", help="names with commas between, e.g. imagereward,pickscore")
    parser.add_argument("--rewards_config", type=Path, help="YAML with rewards: and combine: instead of --scorers")
    parser.add_argument("--scorer_args", help="options by scorer, e.g. '{pickscore: {model: FOLDER}}'")
    parser.add_argument("--num_images", type=count(), default=4, help="images per prompt and model (default 4)")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--format", default="both", choices=FORMATS, help="what to write (default both)")
    parser.add_argument(
        "--pair_selection",
        default="best_worst",
        choices=SELECTIONS,
        help="best_worst (default): one pair per prompt; best_vs_rest; all; unanimous: the widest on which all scorers agree",
    )
    parser.add_argument(
        "--min_margin", type=not_negative, default=0.0, help="least difference of the combined scores in a pair (default 0: any)"
    )
    parser.add_argument("--combine", help="how scorers are combined (default winrate)")
    parser.add_argument("--seed", type=seed, default=0, help="of the images (default 0)")
    parser.add_argument("--num_inference_steps", type=steps, help="sampler steps (default: the pipeline's)")
    parser.add_argument("--guidance_scale", type=finite, help="guidance (default: the pipeline's)")
    parser.add_argument("--resolution", type=side, help="side of the images (default: the pipeline's)")
    parser.add_argument("--batch_size", type=count(), default=8, help="images per forward pass of a model (default 8)")
    parser.add_argument("--device", help="auto (default), cpu, cuda, cuda:1")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the models (default: bfloat16 on a GPU)")
    parser.add_argument("--placement", default="exclusive", help="of the scorers: exclusive (default), offload or resident")
    parser.add_argument("--cache", type=Path, help="file that keeps scores (default: scores.sqlite in the output folder)")
    parser.add_argument("--trust_remote_code", action="store_true", help="allow scorers of ./file.py:Class, which runs that file")


def run(options: argparse.Namespace) -> int:
    """Draws, scores and writes; prints what came out.

    Raises:
        UserError: options, prompts, models or scorers that do not fit, before anything is drawn; a folder that holds another build.
    """
    _check_numbers(options)
    from ..processes import Processes
    from ..rewards.panel import Panel
    from ..rewards.score_command import panel_config

    config = panel_config(
        scorers=options.scorers,
        file=options.rewards_config,
        file_option="--rewards_config",
        scorer_args=options.scorer_args,
        combine=options.combine,
        trust_remote_code=options.trust_remote_code,
    )
    config["placement"] = options.placement
    config["cache"] = options.cache or options.output_dir / "scores.sqlite"
    prompts, notes = read_prompts(options.prompts, options.max_prompts)
    generators = find_generators(options)
    if len(generators) * options.num_images < 2:
        raise ConfigError(
            "--num_images", "one image per prompt leaves nothing to compare; draw at least 2, or name a second model"
        )
    processes = Processes.start(options.device)
    panel = Panel.from_config(config, device=processes.device, trust_remote_code=options.trust_remote_code)
    _check_panel(panel, processes)
    claim(options, generators)
    processes.wait()
    images = [
        Drawn(p, prompt, generator.name, i, options)
        for p, prompt in enumerate(prompts)
        for generator in generators
        for i in range(options.num_images)
    ]
    for generator in generators:
        draw(generator, [image for image in images if image.model == generator.name], options, processes)
    processes.wait()
    notes = notes + missing_notes(images)
    columns = score(panel, images, processes)
    processes.stop()
    if processes.rank == 0:
        from .build_output import write

        print(write(options, prompts, notes, generators, images, columns, panel))
    return 0


def _check_numbers(options: argparse.Namespace) -> None:
    for name, least in (
        ("num_images", 1),
        ("batch_size", 1),
        ("seed", 0),
        ("max_prompts", 1),
        ("num_inference_steps", 1),
        ("resolution", 8),
    ):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name}", f"expected int >= {least}, got {value}")
    if not 0 <= options.min_margin < float("inf"):
        raise ConfigError("--min_margin", f"expected a number of at least 0, got {options.min_margin}")


def _check_panel(panel: Panel, processes: Processes) -> None:
    """Everything that can be wrong with the scorers shows before hours of drawing: each is loaded once."""
    if not panel.train_names:
        raise UserError("rewards: all scorers have the role eval, so nothing would be labelled; give one the role train")
    for name in panel.names:
        if "metadata" in panel.specs[name].requires:
            raise UserError(
                f"rewards.{name}: it needs metadata for every prompt, which prompts alone do not have; score with diffalign score"
            )
    if processes.rank == 0:
        for name in panel.names:
            with panel.using(name):
                pass
    processes.wait()


def read_prompts(source: str, limit: int | None = None) -> tuple[list[str], list[str]]:
    """(distinct prompts in their order, what was left out and why): ``shapes``, its training prompts, here, where data are made.

    A text file or a named set is read as for a comparison; anything else is a dataset with prompts.

    Raises:
        UserError: no such source, or no prompt in it.
    """
    path = Path(source).expanduser()
    if source == "shapes" and not path.exists():
        from ..shapes import train_prompts

        given = train_prompts()
    elif (path.is_file() and path.suffix.lower() in (".txt", ".tsv")) or (
        source in {*NAMED, "shapes-held-out"} and not path.exists()
    ):
        found = load_prompts(source)
        return found.prompts[:limit], found.notes
    else:
        from .load import load_preferences

        given = [prompt for group in load_preferences(source, ties="keep", verbose=False) for prompt in group.prompts]
    kept = list(dict.fromkeys(prompt for prompt in given if prompt.strip()))
    empty = sum(not prompt.strip() for prompt in given)
    notes = [f"{empty} empty prompts left out"] * (empty > 0)
    repeated = len(given) - empty - len(kept)
    notes += [f"{repeated} repeated prompts taken once"] * (repeated > 0)
    if not kept:
        raise UserError(f"--prompts: {source!r} holds no prompt")
    return kept[:limit], notes


@dataclass(frozen=True)
class Generator:
    """A model that draws.

    Attributes:
        name: of its folder and column, made of letters, digits, dot, dash and underscore.
        model, lora: where it comes from.
        fingerprint: of its weights.
    """

    name: str
    model: str
    lora: str | None
    fingerprint: str

    @property
    def described(self) -> str:
        return self.model if self.lora is None else f"{self.model} with the LoRA {self.lora}"


def find_generators(options: argparse.Namespace) -> list[Generator]:
    """The models and LoRAs, each with a name of its own.

    Raises:
        ConfigError: a model or LoRA that is not there.
    """
    from ..backbones.loading import ModelSource
    from ..rewards.checkpoints import content_hash

    found: list[Generator] = []
    for model, lora in [*((model, None) for model in options.models), *((options.models[0], lora) for lora in options.lora)]:
        source = ModelSource(model)
        fingerprint = source.fingerprint(*source.component_names())
        if lora is not None:
            place = Path(lora)
            if not place.exists() or (place.is_dir() and not list(place.glob("*.safetensors"))):
                raise ConfigError("--lora", f"there is no file or folder with safetensors {lora!r}")
            fingerprint = f"{fingerprint}+{content_hash(place)[:16]}"
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(lora or model).name).strip("-.") or "model"
        taken = [generator.name for generator in found]
        name = next(n for n in (slug, *(f"{slug}-{i}" for i in range(2, 1000))) if n not in taken)
        found.append(Generator(name, model, lora, fingerprint))
    return found


class Drawn:
    """One image: which prompt, which model, which seed, which file."""

    def __init__(self, group: int, prompt: str, model: str, number: int, options: argparse.Namespace) -> None:
        self.group, self.prompt, self.model, self.number = group, prompt, model, number
        digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
        from ..evaluation.sampling import image_seed

        self.seed = image_seed(options.seed, prompt, number)
        # Named by the prompt's digest: a prompt can hold anything.
        self.path: Path = options.output_dir / "images" / model / digest[:2] / f"{digest[:20]}-{number:03d}.png"


def claim(options: argparse.Namespace, generators: Sequence[Generator]) -> None:
    """Makes sure that a folder's images were all drawn in one way; writes ``manifest.json``.

    Raises:
        UserError: the folder holds something else, or images drawn with other settings or weights.
    """
    folder: Path = options.output_dir
    names = ("seed", "num_inference_steps", "guidance_scale", "resolution", "dtype")
    settings = {name: getattr(options, name) for name in names}
    models = {generator.name: generator.fingerprint for generator in generators}
    file = folder / "manifest.json"
    check_output_dir(folder, file.name)
    if file.is_file():
        there = json.loads(file.read_text("utf-8"))
        for name, value in settings.items():
            if there["settings"].get(name) != value:
                raise UserError(
                    f"--output_dir: {str(folder)!r} holds images drawn with --{name} {there['settings'].get(name)}, not {value}; use that, or "
                    "another folder"
                )
        for name, fingerprint in models.items():
            if there["models"].get(name, fingerprint) != fingerprint:
                raise UserError(
                    f"--output_dir: {str(folder)!r} holds images of other weights under the name {name!r}; use another folder"
                )
        models = {**there["models"], **models}
    if process_rank() == 0:
        from ..folders import write_atomically

        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, (json.dumps({"settings": settings, "models": models}, indent=1) + "\n").encode())


def draw(generator: Generator, images: Sequence[Drawn], options: argparse.Namespace, processes: Processes) -> None:
    """Draws what is not there yet."""
    from ..evaluation.sampling import draw_files, generate

    loaded: list[Any] = []

    def pictures(prompts: list[str], seeds: list[int]) -> list[Any]:
        if not loaded:
            loaded.extend(_pipeline(generator, options, processes.device))
        return generate(loaded[0], prompts, seeds, batch_size=len(prompts), progress=False, **loaded[1])

    wanted = [(image.prompt, image.seed, image.path) for image in images]
    draw_files(pictures, wanted, options.batch_size, processes, f"drawing, {generator.name}")


def missing_notes(images: Sequence[Drawn]) -> list[str]:
    """What is missing of each model's images, in words.

    Raises:
        NoImages: a model drew none that can be used.
    """
    from ..drawn import check_any, left_out
    from ..evaluation.sampling import drawn_file

    notes = []
    for model in dict.fromkeys(image.model for image in images):
        files = [drawn_file(image.path) for image in images if image.model == model]
        check_any(files, model)
        notes.append(left_out(files, len(files), model))
    return [note for note in notes if note]


def _pipeline(generator: Generator, options: argparse.Namespace, device: Any) -> tuple[Any, dict[str, Any]]:
    """(pipeline, arguments of its call)."""
    import torch

    from ..adapters import load_lora
    from ..evaluation.models import default_settings, load_for_scoring

    dtype = getattr(torch, options.dtype) if options.dtype else None
    pipe = load_for_scoring(generator.model, dtype=dtype, device=device)
    if generator.lora is not None:
        load_lora(pipe, generator.lora, "drawing", "--lora")
    settings = default_settings(generator.model)
    for name in ("num_inference_steps", "guidance_scale"):
        if getattr(options, name) is not None:
            settings[name] = getattr(options, name)
    if options.resolution is not None:
        settings |= {"height": options.resolution, "width": options.resolution}
    return pipe, settings


def score(panel: Panel, images: Sequence[Drawn], processes: Processes) -> dict[str, list[float]]:
    """Scores of all images by column, scorer after scorer; NaN = missing."""
    from tqdm.auto import tqdm

    from ..rewards.model_scorer import ModelScorer

    parts = list(_prompt_parts(images))
    mine = parts[processes.rank :: processes.world]
    found: list[tuple[str, list[int], list[float]]] = []
    for name in panel.names:
        total = sum(map(len, mine))
        with (
            panel.using(name) as scorer,
            tqdm(total=total, desc=f"scoring, {name}", unit="image", disable=processes.rank > 0) as bar,
        ):
            for part in mine:
                if isinstance(scorer, ModelScorer):
                    scorer._texts.clear()  # rounding shall not depend on the parts before
                chosen = [images[i] for i in part]
                result = scorer.score([image.path for image in chosen], [image.prompt for image in chosen], on_error="nan")
                found.append((name, part, result.values.tolist()))
                bar.update(len(part))
    columns = {name: [float("nan")] * len(images) for name in panel.names}
    for name, part, values in processes.gather(found):
        for i, value in zip(part, values, strict=True):
            columns[name][i] = value
    return columns


def _prompt_parts(images: Sequence[Drawn]) -> Iterator[list[int]]:
    """Indices of the images of so many prompts at a time."""
    part: list[int] = []
    for i, image in enumerate(images):
        if part and image.group % _SCORE_PROMPTS == 0 and image.group != images[i - 1].group:
            yield part
            part = []
        part.append(i)
    yield part
