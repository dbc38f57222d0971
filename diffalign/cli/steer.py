"""`diffalign steer`: draw steered images for a list of prompts."""

from __future__ import annotations

import argparse
import inspect
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.ranges import count, finite, not_negative, seed, side, steps
from ..config.yaml_text import NotYaml, read_yaml_text
from ..errors import ConfigError, UserError, one_line
from ..runtime.distributed import DistributedContext
from ..runtime.files import LOCK, claim_output_dir, holds_run, save_image
from ..runtime.missing import Missing
from ..runtime.weight_files import check_component, check_filled, loading_errors
from ..shapes.models import embedded_name
from .results import Result, read_json_file
from .steer_report import write_report

if TYPE_CHECKING:
    from ..runtime.protocols import DeviceLike
    from ..steering.fk_steering import FKSteering
    from ..steering.result import SteeringResult
    from ..steering.reward_fn import Rewarder

# Options that change no result, so a run may go on with other values.
_CONTENTS = "files of the model or the scorers"
_SETTINGS = "settings.json"
_MOST_UNSCORED = 8
_LONG = ("prompts", _CONTENTS, "scorers")
_PARTS = ("records", "images", "lineage")
_FREE = ("output_dir", "device", "model_batch_size", "decode_batch_size", "command", "handler")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command.

    Args:
        parser (`argparse.ArgumentParser`): Parser of the command.
    """
    parser.add_argument(
        "--model",
        default="shapes",
        help="Hub id or folder of a pipeline, shapes (default) or shapes-flow",
    )
    parser.add_argument(
        "--scorer",
        required=True,
        help="the reward: a name of `diffalign scorers`, the folder of a trained reward, or "
        "./FILE.py:NAME",
    )
    parser.add_argument(
        "--prompts",
        help="text file with a prompt per line, a dataset with prompts, shapes, shapes-held-out or "
        "a named set as in compare",
    )
    parser.add_argument(
        "--prompt", action="append", help="instead of --prompts; may be given several times"
    )
    parser.add_argument("--max_prompts", type=count(), help="use only the first N prompts")
    parser.add_argument(
        "--num_particles",
        type=count(1, 65_536),
        default=4,
        help="particles per prompt (default 4)",
    )
    parser.add_argument(
        "--lmbda",
        type=not_negative,
        help="strength of the tilt, in units of 1/reward; this or --ess_target",
    )
    parser.add_argument(
        "--ess_target",
        type=float,
        help="choose lmbda such that this share of the particles stays effective, e.g. 0.5",
    )
    parser.add_argument(
        "--potential", default="diff", help="diff (default), max, sum, rt, max_inc or tempered"
    )
    parser.add_argument(
        "--resample_steps",
        help="comma-separated fractions of the run (0.2,0.5) or step indices (10,20); default: "
        "five from 20 to 80 percent",
    )
    parser.add_argument(
        "--scheme",
        default="systematic",
        help="systematic (default), stratified, residual or multinomial",
    )
    parser.add_argument(
        "--ess_threshold",
        type=float,
        default=0.5,
        help="resample when the ESS is below this share of the particles (default 0.5)",
    )
    parser.add_argument(
        "--kernel",
        default="auto",
        help="auto (default), scheduler (the pipeline's own), ddim, ancestral or euler_maruyama "
        "(flow matching)",
    )
    parser.add_argument(
        "--eta",
        type=float,
        help="stochasticity of the kernel, or of the scheduler with --kernel scheduler",
    )
    parser.add_argument(
        "--tiny_decoder", help="Hub id or folder of an AutoencoderTiny for intermediate images"
    )
    parser.add_argument(
        "--num_inference_steps",
        type=steps,
        help="sampler steps (default: the pipeline's; 30 for shapes)",
    )
    parser.add_argument("--guidance_scale", type=finite, help="guidance (default: the pipeline's)")
    parser.add_argument(
        "--height", type=side, help="image height in pixels (default: the pipeline's)"
    )
    parser.add_argument(
        "--width", type=side, help="image width in pixels (default: the pipeline's)"
    )
    parser.add_argument(
        "--seed", type=seed, default=0, help="seed of a prompt's first population (default 0)"
    )
    parser.add_argument(
        "--num_seeds", type=count(), default=1, help="populations per prompt (default 1)"
    )
    parser.add_argument(
        "--compare", action="store_true", help="also draw best-of-n from the same noise and compare"
    )
    parser.add_argument(
        "--judges", help="comma-separated scorers that judge the images but do not steer"
    )
    parser.add_argument(
        "--scorer_args", help="options by scorer, e.g. '{pickscore: {model: FOLDER}}'"
    )
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="allow scorers of ./file.py:Class, which runs that file",
    )
    parser.add_argument(
        "--prompts_per_call",
        type=count(),
        help="prompts that share a pipeline call (default 1; 8 for shapes)",
    )
    parser.add_argument(
        "--model_batch_size", type=count(), help="rows per forward pass of the model (default: all)"
    )
    parser.add_argument("--decode_batch_size", type=count(), help="latents per decode (default 8)")
    parser.add_argument("--device", help="auto (default), cpu, cuda, cuda:1")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="precision of the model (default: bfloat16 on a GPU, else float32)",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("diffalign-steered"),
        help="default: diffalign-steered",
    )


def run(options: argparse.Namespace) -> int | Result:
    """Steer, and write images, lineage pictures, `grid.png` and `results.json`.

    `--compare` also draws best-of-n and writes `table.md`. Finished calls are in the
    folder `records`, so an interrupted command goes on where it stopped. Several
    processes share the calls.

    Args:
        options (`argparse.Namespace`): Options of the command.

    Returns:
        `int` or `Result`: Exit code, or what was done.

    Raises:
        UserError: Options, prompts, model or scorer do not fit, or the folder holds
            another run. Raised before anything is drawn.
    """
    steps = _check(options)
    prompts = _prompts(options)
    arguments = _scorer_arguments(options)
    settings = {k: v for k, v in sorted(vars(options).items()) if k not in _FREE} | {
        "prompts": prompts,
        "prompt": None,
        _CONTENTS: _contents(options, arguments),
    }
    folder = options.output_dir
    begun = not _is_unstarted(folder)
    # What a remote scorer is, its server says.
    asks = "remote" in arguments
    if begun and holds_run(folder, _SETTINGS, settings, _LONG) and not asks and _ended(folder):
        return _finished(folder)
    processes = DistributedContext.start(options.device)
    work = _Work.load(options, steps, arguments, processes.device)
    settings["scorers"] = work.fingerprints
    if processes.rank == 0:
        if not begun:
            _forget(folder)
        claim_output_dir(folder, _SETTINGS, settings, _LONG)
    processes.wait()
    if begun and _ended(folder):
        processes.stop()
        return _finished(folder)
    units = [(i, s) for s in range(options.num_seeds) for i in range(len(prompts))]
    size = options.prompts_per_call or (1 if embedded_name(options.model) is None else 8)
    chunks = [units[start : start + size] for start in range(0, len(units), size)]
    from ..runtime.progress import progress_bar

    for name in _PARTS:
        (options.output_dir / name).mkdir(exist_ok=True)
    files = [options.output_dir / "records" / f"{number:05d}.json" for number in range(len(chunks))]
    mine = list(zip(chunks, files, strict=True))[processes.rank :: processes.world]
    total = sum(len(chunk) for chunk, _ in mine)
    with progress_bar(
        total=total, desc="steering", unit="prompt", disable=processes.rank > 0
    ) as bar:
        for chunk, path in mine:
            if not path.is_file():
                work.do(chunk, prompts, path)
            bar.update(len(chunk))
    processes.wait()
    processes.stop()
    if processes.rank > 0:
        return 0
    records = [json.loads(path.read_text("utf-8")) for path in files]
    text = write_report(options, settings, prompts, records)
    return Result(text, read_json_file(options.output_dir / "results.json"))


def _check(options: argparse.Namespace) -> tuple[float | int, ...] | None:
    """Check everything that needs no model, and return the steps to resample at."""
    for name, least in (
        ("max_prompts", 1),
        ("num_particles", 1),
        ("num_inference_steps", 1),
        ("height", 8),
        ("width", 8),
        ("seed", 0),
        ("num_seeds", 1),
        ("prompts_per_call", 1),
        ("model_batch_size", 1),
        ("decode_batch_size", 1),
    ):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name}", f"expected int >= {least}, got {value}")
    if options.compare and options.num_particles < 2:
        raise ConfigError(
            "--num_particles", "a comparison with best-of-n needs at least 2 particles, got 1"
        )
    from ..steering.kernels import check_kernel
    from ..steering.schedule import check_schedule, schedule
    from ..steering.smc import check_options

    steps = (
        None
        if options.resample_steps is None
        else tuple(_number(text) for text in options.resample_steps.split(",") if text.strip())
    )
    try:
        check_options(
            num_particles=options.num_particles,
            lmbda=options.lmbda,
            ess_target=options.ess_target,
            potential=options.potential,
            scheme=options.scheme,
            ess_threshold=options.ess_threshold,
        )
        check_schedule(steps)
        if options.num_particles == 1 and steps:
            raise ConfigError(
                "num_particles",
                "1 particle cannot be resampled; give at least 2, or leave out --resample_steps",
            )
        if options.num_inference_steps is not None:
            schedule(steps, options.num_inference_steps)
        if options.kernel != "scheduler":
            check_kernel(options.kernel, options.eta)
    except ConfigError as error:
        raise ConfigError(f"--{error.field}", error.problem) from None
    return steps


def _number(text: str) -> int | float:
    try:
        return int(text) if text.strip().lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise ConfigError(
            "--resample_steps",
            f"expected comma-separated numbers, e.g. 0.2,0.5 or 10,20, got {text!r}",
        ) from None


def _prompts(options: argparse.Namespace) -> list[str]:
    if (options.prompts is None) == (options.prompt is None):
        raise UserError("--prompts, --prompt: give one of them, e.g. --prompts prompts.txt")
    if options.prompt is not None:
        prompts = [prompt for prompt in dict.fromkeys(options.prompt) if prompt.strip()]
        if not prompts:
            raise UserError("--prompt: the prompt is empty; write what the image should show")
        return prompts[: options.max_prompts]
    from ..data.prompt_sets import read_prompts

    if Path(options.prompts).suffix == ".txt" and not Path(options.prompts).is_file():
        raise UserError(f"--prompts: there is no file {options.prompts!r}")
    prompts, notes = read_prompts(options.prompts, options.max_prompts)
    for note in notes:
        print(f"--prompts: {note}")
    return prompts


def _scorer_arguments(options: argparse.Namespace) -> dict[str, Mapping[str, Any]]:
    """Return the options of each scorer by its name, the reward first."""
    from ..rewards.registry import get_spec

    names = [
        options.scorer,
        *(name.strip() for name in (options.judges or "").split(",") if name.strip()),
    ]
    try:
        arguments = (
            read_yaml_text(options.scorer_args, "--scorer_args") if options.scorer_args else {}
        )
    except NotYaml:
        arguments = None
    if not isinstance(arguments, dict) or not all(
        isinstance(value, dict) for value in arguments.values()
    ):
        raise UserError(
            f"--scorer_args: expected a mapping such as '{{pickscore: {{model: FOLDER}}}}', "
            f"got {options.scorer_args!r}"
        )
    unknown = [name for name in arguments if name not in names]
    if unknown:
        raise ConfigError(
            f"--scorer_args.{unknown[0]}", f"no such scorer here; there are {', '.join(names)}"
        )
    if "reward" in names[1:] or len(set(names[1:])) < len(names[1:]):
        raise ConfigError(
            "--judges", f"expected different names, none of them 'reward', got {options.judges!r}"
        )
    for name in names:
        if "metadata" in get_spec(name, trust_remote_code=options.trust_remote_code).requires:
            raise UserError(
                f"--scorer: {name} needs metadata for every prompt, which prompts alone do "
                "not have; steer in Python with metadata="
            )
    return {name: arguments.get(name, {}) for name in names}


def _contents(
    options: argparse.Namespace, arguments: dict[str, Mapping[str, Any]]
) -> dict[str, str]:
    """Hash the local files that decide the result, by the option that names them.

    A model that was trained further in its folder is another model.
    """
    from ..evaluation.models import ModelSpec
    from ..runtime.hashing import place_hash

    places = {"tiny_decoder": options.tiny_decoder}
    for name, own_args in arguments.items():
        places |= {name: name} | {f"{name}.{key}": value for key, value in own_args.items()}
    hashes = {name: place_hash(place) for name, place in places.items()}
    return {"model": ModelSpec("model", options.model).fingerprint()} | {
        name: content for name, content in hashes.items() if content
    }


def _is_unstarted(folder: Path) -> bool:
    """Whether a run claimed the folder and drew nothing."""
    if not (folder / _SETTINGS).is_file():
        return False
    ours = (*_PARTS, _SETTINGS, LOCK)
    if any(path.name not in ours for path in folder.iterdir()):
        return False
    parts = [folder / name for name in _PARTS]
    return not any(any(part.iterdir()) for part in parts if part.is_dir())


def _forget(folder: Path) -> None:
    """Remove what a run that drew nothing has left."""
    (folder / _SETTINGS).unlink(missing_ok=True)
    for name in _PARTS:
        if (folder / name).is_dir():
            (folder / name).rmdir()


def _ended(folder: Path) -> bool:
    return (folder / "results.json").is_file()


def _finished(folder: Path) -> Result:
    print(f"{folder} holds a finished run; nothing was run again")
    return Result((folder / "table.md").read_text("utf-8"), read_json_file(folder / "results.json"))


@dataclass
class _Work:
    """The loaded models, and one call of them."""

    options: argparse.Namespace
    steering: FKSteering
    judges: dict[str, Rewarder]
    call: dict[str, Any]
    fingerprints: dict[str, str]
    """Of the scorers whose options do not say what they are, by name."""
    unscored: int = 0
    """Populations so far without any score, -1 after the first that has one."""

    @classmethod
    def load(
        cls,
        options: argparse.Namespace,
        steps: Any,
        arguments: dict[str, Mapping[str, Any]],
        place: DeviceLike,
    ) -> _Work:
        """Load the model, its decoder and the scorers."""
        from ..evaluation.best_of_n import read_judges
        from ..generation.pipelines import default_settings, load_for_scoring
        from ..rewards.registry import load_scorer
        from ..runtime.devices import read_device, read_dtype
        from ..steering.fk_steering import FKSteering

        device = read_device(place)
        scorers = [
            load_scorer(
                name, device=device, trust_remote_code=options.trust_remote_code, **own_args
            )
            for name, own_args in arguments.items()
        ]
        pipe = load_for_scoring(
            options.model,
            device=device,
            dtype=None if options.dtype is None else read_dtype(options.dtype),
        )
        pipe.set_progress_bar_config(disable=True)
        decoder = None
        if options.tiny_decoder:
            decoder = _tiny_decoder(options.tiny_decoder, pipe.vae.dtype).to(device)
        by_scheduler = options.kernel == "scheduler"
        steering = FKSteering(
            pipe,
            scorers[0],
            num_particles=options.num_particles,
            lmbda=options.lmbda,
            ess_target=options.ess_target,
            potential=options.potential,
            resample_steps=steps,
            scheme=options.scheme,
            ess_threshold=options.ess_threshold,
            kernel=None if by_scheduler else options.kernel,
            eta=None if by_scheduler else options.eta,
            decoder=decoder,
            model_batch_size=options.model_batch_size,
            decode_batch_size=options.decode_batch_size,
            unscored="degenerate",
        )
        call = {name: getattr(options, name) for name in ("num_inference_steps", "guidance_scale")}
        call = {name: value for name, value in call.items() if value is not None}
        if by_scheduler and options.eta is not None:
            _check_scheduler_eta(pipe, options.eta)
            call["eta"] = options.eta
        call |= _sides(pipe, options)
        if embedded_name(options.model) is not None:
            call = {**default_settings(options.model), "num_inference_steps": 30, **call}
        return cls(
            options,
            steering,
            read_judges(dict(zip(list(arguments)[1:], scorers[1:], strict=True))),
            call,
            {
                name: scorer.fingerprint()
                for name, scorer in zip(arguments, scorers, strict=True)
                if name == "remote"
            },
        )

    def do(self, units: list[tuple[int, int]], prompts: list[str], path: Path) -> None:
        """Steer some prompts, and draw their best-of-n with `--compare`.

        The record is written last, when all images are there.

        Args:
            units (`list[tuple[int, int]]`): Numbers of prompt and population.
            prompts (`list[str]`): All prompts.
            path (`Path`): File of the record.
        """
        from ..evaluation.best_of_n import population_seed, score_arms
        from ..runtime.files import write_atomically

        seeds = [self.options.seed + population_seed(s, i) for i, s in units]
        texts = [prompts[i] for i, _ in units]
        record: dict[str, Any] = {"units": [{"prompt": i, "seed": s} for i, s in units], "arms": {}}
        sides = {"best_of_n": self.steering.best_of_n()} if self.options.compare else {}
        for arm, sampler in {**sides, "steering": self.steering}.items():
            with warnings.catch_warnings():
                # `write_report` repeats them once, for all prompts.
                warnings.simplefilter("ignore", UserWarning)
                try:
                    result = sampler(texts, seed=seeds, **self.call)
                except UserError as error:
                    raise UserError(_as_options(str(error))) from error
            self._check_scored(result)
            judged = score_arms(result, self.judges)
            record["arms"][arm] = _arm_record(result, judged)
            self._write_images(arm, units, result)
        write_atomically(path, json.dumps(record).encode())

    def _check_scored(self, result: SteeringResult) -> None:
        """Stop where the scorer cannot score the first prompts.

        Raises:
            UserError: None of the first populations has a score.
        """
        if self.unscored < 0:
            return
        if not bool(result.rewards.isnan().all()):
            self.unscored = -1
            return
        self.unscored += len(result.prompts)
        if self.unscored >= _MOST_UNSCORED:
            raise UserError(
                f"--scorer: {self.options.scorer} gave no score to any image of the first "
                f"{self.unscored} populations; take a scorer that knows these prompts"
            )

    def _write_images(self, arm: str, units: list[tuple[int, int]], result: SteeringResult) -> None:
        folder = self.options.output_dir
        for row, (i, s) in enumerate(units):
            name = f"{i:04d}-seed{s}"
            if arm == "best_of_n":
                _save(result.best[row], folder / "images" / f"{name}-best_of_n.png")
                continue
            for k, image in enumerate(result.images[row]):
                _save(image, folder / "images" / f"{name}-particle{k}.png")
            result.plot(row, folder / "lineage" / f"{name}.png")


def _as_options(text: str) -> str:
    """Word a message about the Python API for the command line."""
    for python, option in (
        ("pass eta=1.0 to the call", "give --eta 1"),
        ("use kernel='ddim'", "use --kernel ddim"),
        (" (or mode='prune' to only drop the worst)", ""),
    ):
        text = text.replace(python, option)
    return text


def _check_scheduler_eta(pipe: Any, eta: float) -> None:
    """Check the `eta` that goes to the pipeline's own scheduler.

    Raises:
        ConfigError: Pipeline or scheduler have none, or it is out of range.
    """
    takes = "eta" in inspect.signature(pipe.__call__).parameters
    if not takes or "eta" not in inspect.signature(pipe.scheduler.step).parameters:
        raise ConfigError(
            "--eta",
            f"{type(pipe.scheduler).__name__} of {type(pipe).__name__} has none; leave it out",
        )
    if not 0 <= eta <= 1:
        raise ConfigError("--eta", f"expected a number from 0 to 1, got {eta:g}")


def _sides(pipe: Any, options: argparse.Namespace) -> dict[str, int]:
    """Read `--height` and `--width`. One alone leaves the other at the default.

    Raises:
        ConfigError: A side that the model cannot draw.
    """
    if options.height is None and options.width is None:
        return {}
    from ..backbones import backbone_class, load_backbone
    from ..data.transforms import check_resolution

    given = {name: getattr(options, name) for name in ("height", "width")}
    if backbone_class(type(pipe).__name__) is None:
        return {name: pixels for name, pixels in given.items() if pixels is not None}
    backbone = load_backbone(pipe)
    for name, pixels in given.items():
        if pixels is not None:
            check_resolution(pixels, backbone.size_factor, f"--{name}")
    return {name: pixels or backbone.default_resolution for name, pixels in given.items()}


def _tiny_decoder(name: str, dtype: Any) -> Any:
    """Load an `AutoencoderTiny` from a folder or the Hub.

    Raises:
        UserError: It is none, or it is damaged.
    """
    from diffusers import AutoencoderTiny

    try:
        if Path(name).is_dir():
            check_component(Path(name), "--tiny_decoder")
        module = AutoencoderTiny.from_pretrained(name, dtype=dtype, use_safetensors=True)
    except UserError:
        raise
    except loading_errors() as error:
        raise UserError(
            f"--tiny_decoder: {name!r} holds no AutoencoderTiny ({one_line(error)})"
        ) from error
    check_filled(module, "--tiny_decoder", repr(name))
    return module


def _arm_record(result: SteeringResult, judged: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is stored of one call, as lists over its prompts."""
    return {
        "rewards": result.rewards.tolist(),
        "judges": {name: values.tolist() for name, values in judged.items()},
        "log_weights": result.log_weights.tolist(),
        "log_z": result.log_z.tolist(),
        "lmbda": result.lmbda.tolist(),
        "roots": result.roots.tolist(),
        "best": result.best_index.tolist(),
        "ess": result.ess.T.tolist(),
        "scored_steps": [step.index for step in result.steps],
        "ancestors": result.ancestors.movedim(0, 1).tolist(),
        "degenerate": result.degenerate.tolist(),
        "nan_count": result.nan_count,
        "kernel": result.kernel,
        "counts": result.counts,
        "seconds": result.seconds,
    }


def _save(image: Any, path: Path) -> None:
    if not isinstance(image, Missing):
        save_image(image, path)
