"""Every method and steering on an embedded model, each at its own best guidance.

    python benchmarks/leaderboard.py [--model shapes] [--seeds 3] [--methods NAME ...]
        [--jobs 2] [--work FOLDER] [--results FOLDER]
        [--output benchmarks/leaderboard.md]

The 600 training prompts are split once: 540 make the training data, 60 choose. The base
draws six images of each of the 540 at its default guidance, and the verifier's graded
score ranks them (`diffalign data build`). DCPO gets a recaptioned copy, Diffusion-DRO
the 500 best images of all prompts (`--best 500`), as in its paper, and the methods that
sample for themselves get the prompts and the verifier. Each method is trained as
its `configs/<method>/shapes.yaml` (for the flow model `shapes_flow.yaml`, where there
is one) says, from --seeds seeds, under one budget: at most
260,000 passes of one row through the network, everything counted (a pass with backward
as three; drawing the training images, with guidance, as well). A recipe that would take
more is shortened.

Every model then draws the 60 prompts that choose, one image each, at guidance 1, 1.5,
2, 3, 5 and 7. The scale with the highest mean score is its best one. There it draws the
120 held-out prompts, four images each, from the same noise as the base at the base's
best scale. Settings of Diffusion-DPO and RankDPO were compared on the choosing prompts
(`benchmarks/recipe_study.py`), and so were Diffusion-DRO's images. Those of the other
methods were chosen on an earlier embedded world, with other weights, some on half of
the held-out prompts, and are unchanged. Steering and best of four are no training but
four times the work of every image. Memory is the peak resident size of a process that
trains three steps. Runs that draw images for the verifier leave ten checkpoints, with
which the choosing prompts are drawn at guidance 2 (`online_rl.py`).

Models are trained and judged --jobs at a time, each in a process of its own with its
share of the cores. Finished parts lie in --work: interrupted, it goes on. The results
behind the committed tables lie in `benchmarks/leaderboard/`: with
`--results benchmarks/leaderboard/shapes` the table is written from these.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from diffalign.cli import entry
from diffalign.evaluation.compare import read_models
from diffalign.evaluation.diversity import Diversity
from diffalign.evaluation.models import opened
from diffalign.evaluation.statistics import win_rate
from diffalign.generation.grids import comparison_grid
from diffalign.recipe import build_trainer, load_run
from diffalign.runtime.files import write_atomically
from diffalign.shapes.prompts import held_out_prompts, train_prompts
from diffalign.shapes.sampling_defaults import SAMPLING
from diffalign.shapes.verifier import attribute_table, score

ROOT = Path(__file__).parents[1]
BUDGET = 260_000
CHOICE = 60
IMAGES_PER_PROMPT = 6
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
IMAGES = 4
CHOICE_SEED, REPORT_SEED = 41_000_000, 42_000_000
POINTS, CURVE_SCALE = 10, 2.0
BATCH = 60
PICTURED = 8
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Arm:
    """What is trained and how it is judged.

    Args:
        config: file of configs/, or None for what needs no training.
        data: folder below the working folder: ranked, best or recaptioned.
        kind: ``lora``, ``negative`` (used in guidance), ``online`` (draws its own
            images) or ``sampling`` (no training).
        spec: for ``sampling``, how `compare` would be told the model.
        overrides: options over the config.
    """

    config: str | None
    data: str = "ranked"
    kind: str = "lora"
    spec: tuple[tuple[str, Any], ...] = ()
    overrides: tuple[str, ...] = ()


def steered(scorer: str, **options: Any) -> Arm:
    steer = {"scorer": scorer, "num_particles": 4, **options}
    return Arm(None, kind="sampling", spec=(("steer", steer),))


ARMS: dict[str, Arm] = {
    "Diffusion-DPO": Arm("diffusion_dpo/shapes"),
    "DCPO": Arm("dcpo/shapes", "recaptioned"),
    "RankDPO": Arm("rankdpo/shapes"),
    "Diffusion-DRO": Arm("diffusion_dro/shapes", "best"),
    "Diffusion-KTO": Arm("diffusion_kto/shapes"),
    "DGPO": Arm("dgpo/shapes"),
    "MaPO": Arm("mapo/shapes"),
    "Diffusion-ORPO": Arm("diffusion_orpo/shapes"),
    "SFT": Arm("sft/shapes"),
    "SePPO": Arm("seppo/shapes"),
    "D3PO": Arm("d3po/shapes", kind="online"),
    "SPO": Arm("spo/shapes", kind="online"),
    "GRPO": Arm("grpo/shapes", kind="online"),
    "DiffusionNFT": Arm("diffusion_nft/shapes", kind="online"),
    "AWM": Arm("awm/shapes", kind="online"),
    "Online Diffusion-DPO": Arm("diffusion_dpo/shapes_online", kind="online"),
    "ReFL (shapes-clip)": Arm("reward_backprop/shapes", kind="online"),
    "Self-NPO": Arm("self_npo/shapes", kind="negative"),
    "Diffusion-NPO": Arm("diffusion_npo/shapes", kind="negative"),
    "best of 4 (verifier)": steered("shapes", lmbda=1.0, resample_steps=()),
    "FK steering, 4 particles (verifier)": steered("shapes", lmbda=20.0),
    "FK steering, 4 particles (shapes-clip)": steered("shapes-clip", lmbda=5.0),
}
MUST_WIN = ("Diffusion-DPO", "DCPO", "RankDPO", "D3PO", "SPO")
ONLINE = ("GRPO", "DiffusionNFT", "AWM", "D3PO", "SPO", "Online Diffusion-DPO")
"""Arms that draw images and let the verifier judge them."""
ONLINE_RL = ("GRPO", "DiffusionNFT", "AWM", "Online Diffusion-DPO", "ReFL (shapes-clip)")
"""Arms that learn from a reward by thousands of images of their own."""
SLOW_FIRST = ("Online Diffusion-DPO", "D3PO", "GRPO", "SPO", "SePPO", "MaPO", "RankDPO")


def folder_name(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` returns, from the file where it is there already."""
    if path.is_file():
        return json.loads(path.read_text())
    value = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(value).encode())
    return value


def logged(folder: Path) -> list[dict[str, Any]]:
    """What a run wrote into its log, a row per entry."""
    return [json.loads(line) for line in (folder / "logs/metrics.jsonl").read_text().splitlines()]


def choice_prompts() -> list[str]:
    return train_prompts()[-CHOICE:]


# The data


def make_data(work: Path, model: str) -> None:
    """The ranked dataset and its recaptioned copy."""
    prompts = work / "prompts.txt"
    work.mkdir(parents=True, exist_ok=True)
    prompts.write_text("\n".join(train_prompts()[:-CHOICE]) + "\n")
    build = ["data", "build", "--prompts", str(prompts), "--models", model, "--scorers", "shapes"]
    build += ["--num_images", str(IMAGES_PER_PROMPT), "--batch_size", "60", "--best", "500"]
    recaption = ["data", "recaption", str(work / "data" / "ranked"), "--strategy", "h"]
    recaption += ["--captioner", "shapes", "--perturber", "shapes"]
    # The first command does nothing twice, and refuses a folder of other weights.
    commands = [[*build, "--output_dir", str(work / "data")]]
    if not dataset(work, "recaptioned").is_dir():
        commands.append([*recaption, "--output_dir", str(work / "recaptioned")])
    for command in commands:
        code = entry.run(command)
        if code:
            raise SystemExit(code)


def dataset(work: Path, name: str) -> Path:
    if name == "recaptioned":
        return work / "recaptioned" / "data"
    return work / "data" / name


def drawn_rows(arm: Arm) -> int:
    """Rows that made the arm's training images, conditional and unconditional."""
    if arm.kind in ("online", "sampling") or (arm.config or "").startswith("self_npo"):
        return 0
    prompts = len(train_prompts()) - CHOICE
    return prompts * IMAGES_PER_PROMPT * SAMPLING["num_inference_steps"] * 2


# Training


class Rows:
    """Counts rows through a network: 3 for a pass with a backward, 1 without."""

    def __init__(self, network: Any) -> None:
        self.count = 0
        network.register_forward_hook(self._seen, with_kwargs=True)

    def _seen(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        result = output[0] if isinstance(output, tuple) else output.sample
        self.count += len(sample) * (3 if result.requires_grad else 1)


def run_of(name: str, options: argparse.Namespace, seed: int, **more: Any) -> Any:
    """The recipe of an arm, with this benchmark's data and folders."""
    arm = ARMS[name]
    work: Path = options.work
    values: dict[str, Any] = {
        "model": options.model,
        "data.dataset_name": dataset(work, arm.data),
        "data.cache_text_embeddings": work / "cache",
        "train.output_dir": run_folder(work, name, seed),
        "train.seed": seed,
        "train.overwrite_output_dir": "true",
        "train.save_steps": 100_000,
        "train.logging_steps": 4 if arm.kind == "online" else 50,
    }
    if arm.kind != "online" and not (arm.config or "").startswith("self_npo"):
        values["data.cache_latents"] = work / "cache"
    return recipe(str(arm.config), values | more, arm.overrides)


def recipe(config: str, values: dict[str, Any], overrides: Iterable[str] = ()) -> Any:
    """A run of `configs/` with other values, without its validation. The flow model has
    files of its own for some methods."""
    own = f"{config}_flow"
    if values.get("model") == "shapes-flow" and (ROOT / "configs" / f"{own}.yaml").is_file():
        config = own
    arguments = [str(x) for key, value in values.items() for x in (f"--{key}", value)]
    run = load_run(ROOT / "configs" / f"{config}.yaml", [*arguments, *overrides])
    run.validation = None
    return run


def train_whole(trainer: Any) -> None:
    """Trains to the end. An interruption ends the command, since a half-trained model
    must not be kept as a finished one."""
    output = trainer.train()
    if output.interrupted_by is not None:
        raise SystemExit(128 + output.interrupted_by)


def run_folder(work: Path, name: str, seed: int) -> Path:
    return work / "runs" / f"{folder_name(name)}-{seed}"


def probe(name: str, options: argparse.Namespace) -> dict[str, float]:
    """In this process: three steps; rows per step and the peak resident size."""
    import resource
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        more: dict[str, Any] = {"train.output_dir": f"{folder}/run", "train.max_steps": 3}
        if "online" in (ARMS[name].config or ""):
            more["data.online.every"] = 3
        run = run_of(name, options, 0, **more)
        trainer = build_trainer(run)
        trainer.setup()
        counted = Rows(trainer.network)
        trainer.train()
    return {
        "rows_per_step": counted.count / 3,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def train(name: str, options: argparse.Namespace, seed: int, facts: dict[str, Any]) -> Any:
    """Trains one arm within the budget."""
    recipe_steps = run_of(name, options, seed).train.max_steps
    room = int((BUDGET - drawn_rows(ARMS[name])) / facts["rows_per_step"])
    run = run_of(name, options, seed, **{"train.max_steps": min(recipe_steps, room)})
    if name in ONLINE:
        run.train.save_steps = max(1, run.train.max_steps // POINTS)
        run.train.save_total_limit = None
    trainer = build_trainer(run)
    started = time.perf_counter()
    train_whole(trainer)
    seconds = time.perf_counter() - started
    steps = trainer.state.global_step
    result = {
        "seconds": seconds,
        "steps": steps,
        "recipe_steps": recipe_steps,
        "rows": drawn_rows(ARMS[name]) + facts["rows_per_step"] * steps,
    }
    if name in ONLINE:
        result["curve"] = curve(run, options)
    return result


def images_per_step(run: Any) -> float:
    """Images that a run draws for an optimizer step, over all of its groups. SPO's are
    the candidates of each step, which have a score each."""
    args = run.train
    groups = args.per_device_train_batch_size * args.gradient_accumulation_steps
    online = run.data.online
    if online is not None:
        return float(groups * online.k)
    images = args.images_per_prompt
    if run.method == "spo":
        images *= args.num_inference_steps - args.first_step
    return float(groups * images / args.num_inner_epochs)


def curve(run: Any, options: argparse.Namespace) -> list[tuple[float, float]]:
    """Images drawn, and the mean score of the choosing prompts, of a run's checkpoints.
    Only the last one stays."""
    checkpoints = {
        int(folder.name.rpartition("-")[2]): folder
        for folder in Path(run.train.output_dir).glob("checkpoint-*")
    }

    def mean_score(spec: Any) -> float:
        with opened(spec) as draw:
            images = drawing(draw, choice_prompts(), CHOICE_SEED, CURVE_SCALE)
        return float(score(images, choice_prompts()).mean())

    # All runs start from the same base.
    start = kept(options.work / "curve-start.json", lambda: mean_score(spec_of("base", options, 0)))
    points = [(0.0, start)]
    for step in sorted(checkpoints):
        tuned = {"name": "tuned", "lora": str(checkpoints[step])}
        mean = mean_score(read_models(options.model, [tuned])[1])
        points.append((step * images_per_step(run), mean))
    for step in sorted(checkpoints)[:-1]:
        shutil.rmtree(checkpoints[step])
    return points


# Judging


def spec_of(name: str, options: argparse.Namespace, seed: int) -> Any:
    if name == "base":
        return read_models(options.model, [f"again={options.model}"])[0]
    arm = ARMS[name]
    described: dict[str, Any] = {"name": folder_name(name), **dict(arm.spec)}
    if arm.kind != "sampling":
        key = "negative" if arm.kind == "negative" else "lora"
        described[key] = str(run_folder(options.work, name, seed))
    return read_models(options.model, [described])[1]


def drawing(draw: Any, prompts: list[str], first: int, scale: float) -> list[Any]:
    images: list[Any] = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        seeds = range(first + start, first + start + len(part))
        settings = {**SAMPLING, "guidance_scale": scale}
        images += draw(part, list(seeds), **settings)
    return images


def judge(name: str, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The best guidance on the choosing prompts, and everything about the held-out
    images there."""
    started = time.perf_counter()
    with opened(spec_of(name, options, seed)) as draw:
        choice = {}
        for scale in SCALES:
            images = drawing(draw, choice_prompts(), CHOICE_SEED, scale)
            choice[f"{scale:g}"] = float(score(images, choice_prompts()).mean())
        best = float(max(choice, key=choice.__getitem__))
        prompts = [prompt for prompt in held_out_prompts() for _ in range(IMAGES)]
        drawn_at = time.perf_counter()
        images = drawing(draw, prompts, REPORT_SEED, best)
        drawing_seconds = time.perf_counter() - drawn_at
    table = attribute_table(images, prompts)

    def shaped(values: Iterable[float]) -> list[list[float]]:
        return np.round(np.asarray(list(values), float), 4).reshape(-1, IMAGES).tolist()

    distance = Diversity()
    groups = [images[i : i + IMAGES] for i in range(0, len(images), IMAGES)]
    return {
        "choice": choice,
        "best": best,
        "scores": shaped(score(images, prompts)),
        "right": shaped(row["all"] for row in table),
        "style": shaped(row["style"] for row in table),
        "diversity": float(np.mean([distance(group) for group in groups])),
        "seconds_per_image": drawing_seconds / len(images),
        "judging_seconds": time.perf_counter() - started,
    }


def pictures(options: argparse.Namespace, folder: Path) -> None:
    """Draws what each method did: base and tuned model from the same noise, each at its
    own best guidance, on the first held-out prompts; of the first seed."""
    prompts = list(held_out_prompts()[:PICTURED])

    def draw_at_best(name: str) -> list[Any]:
        best = json.loads(result_file(options, name, 0).read_text())["best"]
        with opened(spec_of(name, options, 0)) as draw:
            return drawing(draw, prompts, REPORT_SEED, best)

    base = draw_at_best("base")
    for name in options.methods:
        arm = ARMS[name]
        method, _, recipe_name = (arm.config or "").partition("/")
        has_weights = (options.work / "trained" / f"{folder_name(name)}-0.json").is_file()
        if recipe_name != "shapes" or not result_file(options, name, 0).is_file():
            continue
        if not has_weights:
            raise SystemExit(f"{name}: --work holds no weights of seed 0")
        tuned = draw_at_best(name)
        rows = [(p, [a], [b]) for p, a, b in zip(prompts, base, tuned, strict=True)]
        grid = comparison_grid(rows, right=name, cell=112, columns=4)
        grid.save(folder / f"{method}.jpg", quality=90)
        print(folder / f"{method}.jpg", flush=True)


# Running


def units(options: argparse.Namespace) -> list[tuple[str, int]]:
    """(arm, seed), the slow ones first, so that no core waits at the end."""
    pairs = [("base", 0)]
    for name in options.methods:
        seeds = 1 if ARMS[name].kind == "sampling" else options.seeds
        pairs += [(name, seed) for seed in range(seeds)]
    order = {name: i for i, name in enumerate(SLOW_FIRST)}
    return sorted(pairs, key=lambda pair: (order.get(pair[0], len(order)), pair[1]))


def result_file(options: argparse.Namespace, name: str, seed: int) -> Path:
    return options.results / f"{folder_name(name)}-{seed}.json"


def do_unit(name: str, seed: int, options: argparse.Namespace) -> None:
    """Trains and judges one arm and seed, in this process."""
    facts: dict[str, Any] = {}
    if name != "base" and ARMS[name].kind != "sampling":
        facts = kept(
            options.work / "probes" / f"{folder_name(name)}.json",
            lambda: json.loads(alone(options, "--probe", name).splitlines()[-1]),
        )
        facts |= kept(
            options.work / "trained" / f"{folder_name(name)}-{seed}.json",
            lambda: train(name, options, seed, facts),
        )
    kept(result_file(options, name, seed), lambda: {**facts, **judge(name, options, seed)})


def alone(options: argparse.Namespace, *arguments: object, script: str = __file__) -> str:
    """Runs this file, or another benchmark, in a process with its share of the
    cores."""
    threads = str(max(1, (os.cpu_count() or 1) // options.jobs))
    command = [sys.executable, script, "--model", options.model, "--work", options.work]
    command += ["--results", options.results]
    done = subprocess.run(
        [str(x) for x in (*command, "--jobs", options.jobs, *arguments)],
        env=os.environ | {"OMP_NUM_THREADS": threads},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))}: {done.stderr[-3000:]}")
    return done.stdout


def run_all(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    pairs = units(options)
    waiting = [pair for pair in pairs if not result_file(options, *pair).is_file()]
    with ThreadPoolExecutor(options.jobs) as pool, tqdm(total=len(waiting), unit="model") as bar:
        for _ in pool.map(lambda p: alone(options, "--unit", p[0], p[1]), waiting):
            bar.update()
    results: dict[str, list[dict[str, Any]]] = {}
    for name in ("base", *options.methods):
        seeds = sorted(seed for arm, seed in pairs if arm == name)
        results[name] = [json.loads(result_file(options, name, s).read_text()) for s in seeds]
    return results


def so_far(options: argparse.Namespace) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """The rows that are there, and a sentence about those that are not."""
    results: dict[str, list[dict[str, Any]]] = {}
    counts = {}
    for name in ("base", *options.methods):
        seeds = sorted(seed for arm, seed in units(options) if arm == name)
        files = [result_file(options, name, seed) for seed in seeds]
        rows = [json.loads(file.read_text()) for file in files if file.is_file()]
        if rows:
            results[name] = rows
        counts[name] = len(rows), len(files)
    return results, not_run(counts)


def not_run(counts: dict[str, tuple[int, int]]) -> str:
    """A sentence about the arms whose seeds are not all there, "" if there is none."""
    missing = [f"{name} ({n} of {total} seeds)" for name, (n, total) in counts.items() if n < total]
    return f"Not run yet: {', '.join(missing)}." if missing else ""


# The report


def percent(values: Any) -> float:
    return 100 * float(np.mean(values))


def interval(rate: Any) -> str:
    return f"{100 * rate.rate:.1f} ({100 * rate.low:.1f}-{100 * rate.high:.1f})"


def rates(base: dict[str, Any], runs: list[dict[str, Any]], key: str = "scores") -> list[Any]:
    return [win_rate(np.array(base[key]), np.array(run[key])) for run in runs]


def pooled(base: dict[str, Any], runs: list[dict[str, Any]], key: str) -> Any:
    """All seeds together, prompts being the units."""
    tuned = np.concatenate([np.array(run[key]) for run in runs], axis=1)
    return win_rate(np.concatenate([np.array(base[key])] * len(runs), axis=1), tuned)


def table(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    base = results["base"][0]
    lines = [
        "| method | best guidance | win-rate % against the base at its best | per seed | "
        "all correct % | preferred style % | score | diversity | "
        "passes, thousand | training, s (steps) | peak, MiB | ms an image |",
        "|---" * 12 + "|",
    ]
    for name, runs in results.items():
        kind = "base" if name == "base" else ARMS[name].kind
        each = " / ".join(interval(rate) for rate in rates(base, runs)) if len(runs) > 1 else ""
        trained = kind not in ("base", "sampling")
        cost = ["", "", ""]
        star = "*" if any(run.get("disturbed") for run in runs) else ""
        if trained:
            cost = [
                f"{np.mean([run['rows'] for run in runs]) / 1000:.0f}",
                f"{np.median([run['seconds'] for run in runs]):.0f}{star} ({runs[0]['steps']})",
                f"{runs[0]['peak_mib']:.0f}",
            ]
        cells = [
            f"{name} (negative model)" if kind == "negative" else name,
            ", ".join(f"{run['best']:g}" for run in runs),
            "" if kind == "base" else interval(pooled(base, runs, "scores")),
            each,
            f"{percent([run['right'] for run in runs]):.1f}",
            f"{percent([run['style'] for run in runs]):.1f}",
            f"{np.mean([run['scores'] for run in runs]):.3f}",
            f"{np.mean([run['diversity'] for run in runs]):.3f}",
            *cost,
            f"{1000 * np.median([run['seconds_per_image'] for run in runs]):.0f}{star}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def hours(runs: dict[str, list[dict[str, Any]]]) -> float:
    """Hours of two cores, on each of which one model at a time is trained and judged.

    Every run counts as the quickest one of its method, since many found the machine
    busy.
    """
    seconds = [
        len(members) * min(run.get("seconds", 0.0) + run["judging_seconds"] for run in members)
        for members in runs.values()
    ]
    return sum(seconds) / 2 / 3600


def curves(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Mean score by guidance on the prompts that choose."""
    lines = [
        "",
        f"Mean score by guidance on the {CHOICE} prompts that choose, over the seeds:",
        "",
        f"| method | {' | '.join(f'{scale:g}' for scale in SCALES)} |",
        "|---" * (len(SCALES) + 1) + "|",
    ]
    for name, runs in results.items():
        means = [np.mean([run["choice"][f"{scale:g}"] for run in runs]) for scale in SCALES]
        lines.append(f"| {name} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return lines


def verdicts(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    base, lines = results["base"][0], [""]
    for name in MUST_WIN:
        above = [rate.low > 0.5 for rate in rates(base, results.get(name, []))]
        if above:
            lines.append(
                f"- {name} beats the base at its best (the interval lies above 50 %) in "
                f"{sum(above)} of {len(above)} seeds."
            )
    if {"Diffusion-DPO", "RankDPO"} <= set(results):
        pairs = zip(results["Diffusion-DPO"], results["RankDPO"], strict=False)
        shown = ", ".join(interval(rates(dpo, [rank])[0]) for dpo, rank in pairs)
        lines.append(f"- RankDPO against Diffusion-DPO, per seed: {shown}.")
    return lines


def label_points(figure: Any, axes: Any, points: list[tuple[str, float, float]]) -> None:
    """Write a name beside each point, higher where it would lie on another text."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    for name, x, y in sorted(points, key=lambda point: point[2]):
        text = axes.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
        shift = 4
        while any(text.get_window_extent(renderer).overlaps(box) for box in boxes):
            shift += 3
            text.set_position((5, shift))
        boxes.append(text.get_window_extent(renderer))


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Win-rate against passes, and score against diversity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {
        "lora": "#1f6feb",
        "online": "#1a7f37",
        "negative": "#8250df",
        "sampling": "#6e7781",
        "base": "#d1242f",
    }
    base = results["base"][0]
    rates: list[tuple[str, float, float]] = []
    scores: list[tuple[str, float, float]] = []
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    for name, runs in results.items():
        kind = "base" if name == "base" else ARMS[name].kind
        x = float(np.mean([run["diversity"] for run in runs]))
        y = float(np.mean([run["scores"] for run in runs]))
        right.plot(x, y, "o", color=colours[kind])
        scores.append((name, x, y))
        if kind == "base":
            continue
        rate = pooled(base, runs, "scores")
        if kind == "sampling":
            left.axhline(100 * rate.rate, color=colours[kind], lw=1, ls="--")
            left.annotate(
                name, (0, 100 * rate.rate), xytext=(2, 2), fontsize=8, textcoords="offset points"
            )
            continue
        rows = float(np.mean([run["rows"] for run in runs])) / 1000
        low, high = 100 * (rate.rate - rate.low), 100 * (rate.high - rate.rate)
        left.errorbar(
            rows, 100 * rate.rate, yerr=[[low], [high]], fmt="o", color=colours[kind], capsize=3
        )
        rates.append((name, rows, 100 * rate.rate))
    left.axhline(50, color="black", lw=0.8)
    left.set_xlim(left=0)
    left.set(
        xlabel="passes of a row through the network, thousand (drawing the data included)",
        ylabel="win-rate against the base, each at its best guidance, %",
    )
    right.set(xlabel="diversity (pixel distance of a prompt's images)", ylabel="mean score")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.margins(x=0.2)
    label_points(figure, left, rates)
    label_points(figure, right, scores)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("shapes", "shapes-flow"), default="shapes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="models at a time")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--results", type=Path, help="default: results/ in --work")
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--so_far", action="store_true", help="write the page of the rows that are there"
    )
    parser.add_argument(
        "--pictures", type=Path, help="only draw what each method did, into this folder"
    )
    parser.add_argument("--probe", choices=list(ARMS), help=argparse.SUPPRESS)
    parser.add_argument("--unit", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work = options.work or Path(f"runs/leaderboard-{options.model}")
    options.results = options.results or options.work / "results"
    suffix = "" if options.model == "shapes" else "_flow"
    output = options.output or ROOT / "benchmarks" / f"leaderboard{suffix}.md"
    warnings.simplefilter("ignore")
    if options.probe:
        print(json.dumps(probe(options.probe, options)))
        return
    if options.unit:
        do_unit(options.unit[0], int(options.unit[1]), options)
        return
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
        pictures(options, options.pictures)
        return
    started, fresh = time.perf_counter(), not options.work.exists()
    missing = ""
    if options.so_far:
        fresh = False
        results, missing = so_far(options)
    elif any(not result_file(options, *pair).is_file() for pair in units(options)):
        make_data(options.work, options.model)
    if not options.so_far:
        results = run_all(options)
    picture = output.with_suffix(".png")
    plot(results, picture)
    minutes = (time.perf_counter() - started) / 60
    # A run that found some of its work done says nothing about the time of a whole one.
    whole = f", {minutes:.0f} minutes from nothing to this table" if fresh else ""
    facts = (
        f"{platform.machine()}, {os.cpu_count()} CPU cores, torch {torch.__version__.split('+')[0]}"
    )
    assert __doc__ is not None
    body = [
        f"# Leaderboard of `{options.model}`",
        "",
        *__doc__.split("\n\n", 1)[1].rstrip().split("\n"),
        "",
        f"Measured on {facts}; {options.seeds} seeds, {options.jobs} models at a time{whole}.",
        *(["", missing] if missing else []),
        "",
        f"![quality against compute and diversity]({picture.name})",
        "",
        *table(results),
        *curves(results),
        *verdicts(results),
        "",
        "Intervals are 95 %, clustered by prompt; the win-rate column pools the seeds. Seconds "
        "are medians over the seeds, of runs side by side. Passes leave out decoding and "
        "judging, which is most of SPO's time here: it decodes every candidate of every step. "
        "A star marks seconds of a machine that was busy with other work (`disturbed` in the "
        "results).",
        "",
        f"By the quickest run of each, all rows take {hours(results):.1f} hours on two cores, "
        f"{hours({n: runs for n, runs in results.items() if n not in ONLINE_RL}):.1f} of them "
        f"without {', '.join(ONLINE_RL[:-1])} and {ONLINE_RL[-1]}.",
    ]
    output.write_text("\n".join(body) + "\n")
    print("\n".join(body))


if __name__ == "__main__":
    main()
