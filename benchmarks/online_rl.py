"""Reward by images drawn: GRPO, DiffusionNFT, AWM, D3PO, SPO and online Diffusion-DPO.

    python benchmarks/online_rl.py [--model shapes] [--seeds 3] [--methods NAME ...]
        [--images 6400] [--jobs 2] [--work FOLDER] [--output benchmarks/online_rl.md]

Every method trains on the verifier's graded score, from its own run file
(`configs/<method>/shapes.yaml`, for the flow model `shapes_flow.yaml`), until it has
drawn --images images. SPO's count is of the images whose scores it needs: it draws
several candidates per step, and each has a score.

Ten times in a run, and before it, the 60 prompts that choose (`leaderboard.py`) are
drawn from the same noise, one image each, at guidance 2. The picture shows the
verifier's mean score by the number of images drawn. At the end each model takes its
best guidance on these prompts and draws the 120 held-out prompts, four images each,
against the base at its best, as in `leaderboard.py`. Goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import leaderboard
import numpy as np
import torch
from leaderboard import (
    ROOT,
    choice_prompts,
    folder_name,
    interval,
    judge,
    kept,
    logged,
    rates,
    train_whole,
)

from diffalign.recipe import build_trainer
from diffalign.runtime.files import write_atomically
from diffalign.training.sections import ValidationConfig

METHODS = ("GRPO", "DiffusionNFT", "AWM", "D3PO", "SPO", "Online Diffusion-DPO")
POINTS = 10


def images_per_step(run: Any) -> float:
    """Images that a run draws for an optimizer step, over all of its groups."""
    args = run.train
    groups = args.per_device_train_batch_size * args.gradient_accumulation_steps
    online = run.data.online
    if online is not None:
        return groups * online.k
    images = args.images_per_prompt
    if run.method == "spo":
        images *= args.num_inference_steps - args.first_step
    return groups * images / args.num_inner_epochs


def measure(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one method from one seed, and judge it."""
    arm = f"online-rl {name}"
    leaderboard.ARMS[arm] = leaderboard.ARMS[name]
    run = leaderboard.run_of(arm, options, seed)
    per_step = images_per_step(run)
    steps = max(POINTS, round(options.images / per_step))
    run.train.max_steps = steps
    every = max(1, steps // POINTS)
    choice = options.work / "choice.txt"
    options.work.mkdir(parents=True, exist_ok=True)
    choice.write_text("\n".join(choice_prompts()) + "\n")
    run.validation = ValidationConfig(
        prompts=str(choice),
        scorers=["shapes"],
        on_hacking="off",
        num_validation_images=1,
        validation_steps=every,
        guidance_scale=2.0,
    )
    trainer = build_trainer(run)
    started = time.perf_counter()
    train_whole(trainer)
    seconds = time.perf_counter() - started
    rows = [row for row in logged(Path(run.train.output_dir)) if "validation/shapes" in row]
    curve = [(0.0, rows[0]["validation/shapes/base"])]
    curve += [(row["step"] * per_step, row["validation/shapes"]) for row in rows]
    return {
        "curve": curve,
        "steps": steps,
        "images": steps * per_step,
        "seconds": seconds,
        **judge(arm, options, seed),
    }


def table(results: dict[str, list[dict[str, Any]]], base: dict[str, Any]) -> list[str]:
    lines = [
        "| method | images drawn | steps | training, s | best guidance | win-rate % against the "
        "base at its best, per seed | score | all correct % | preferred style % | diversity |",
        "|---" * 10 + "|",
    ]
    for name, runs in results.items():
        shown = " / ".join(interval(rate) for rate in rates(base, runs))
        cells = [
            name,
            f"{runs[0]['images']:.0f}",
            f"{runs[0]['steps']}",
            f"{np.median([run['seconds'] for run in runs]):.0f}",
            ", ".join(f"{run['best']:g}" for run in runs),
            shown,
            f"{np.mean([np.mean(run['scores']) for run in runs]):.3f}",
            f"{100 * np.mean([np.mean(run['right']) for run in runs]):.1f}",
            f"{100 * np.mean([np.mean(run['style']) for run in runs]):.1f}",
            f"{np.mean([run['diversity'] for run in runs]):.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot(results: dict[str, list[dict[str, Any]]], path: Path, title: str) -> None:
    """Mean score by images drawn: a line per method, a thin one per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    for number, (name, runs) in enumerate(results.items()):
        color = pyplot.get_cmap("tab10")(number)
        curves = [np.array(run["curve"]) for run in runs]
        for curve in curves:
            axes.plot(curve[:, 0], curve[:, 1], color=color, lw=0.8, alpha=0.35)
        short = min(len(curve) for curve in curves)
        mean = np.mean([curve[:short, 1] for curve in curves], axis=0)
        axes.plot(curves[0][:short, 0], mean, color=color, lw=2.2, label=name)
    axes.set(xlabel="images drawn", ylabel="verifier's score at guidance 2", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    figure.savefig(path, dpi=110)


def result_file(options: argparse.Namespace, name: str, seed: int) -> Path:
    return options.work / "online_rl" / f"{options.model}-{folder_name(name)}-{seed}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("shapes", "shapes-flow"), default="shapes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--images", type=int, default=6400)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/online_rl"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--unit", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.results = options.work / "results"
    if options.unit:
        name, seed = options.unit[0], int(options.unit[1])
        kept(result_file(options, name, seed), lambda: measure(name, seed, options))
        return
    leaderboard.make_data(options.work, options.model)
    waiting = [
        (name, seed)
        for name in options.methods
        for seed in range(options.seeds)
        if not result_file(options, name, seed).is_file()
    ]
    more = ("--images", options.images, "--unit")
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda u: leaderboard.alone(options, *more, *u, script=__file__), waiting))
    base = kept(
        options.work / "online_rl" / f"{options.model}-base.json",
        lambda: judge("base", options, 0),
    )
    results = {
        name: [json.loads(result_file(options, name, s).read_text()) for s in range(options.seeds)]
        for name in options.methods
    }
    suffix = "_flow" if options.model == "shapes-flow" else ""
    output = options.output or ROOT / "benchmarks" / f"online_rl{suffix}.md"
    lines = [
        f"# Online methods on `{options.model}`, by images drawn",
        "",
        f"`python benchmarks/online_rl.py --model {options.model} --seeds {options.seeds}`, "
        f"{os.cpu_count()} CPU cores, {options.jobs} runs at a time, torch {torch.__version__}. "
        f"The base at its best guidance, {base['best']:g}, scores {np.mean(base['scores']):.3f}.",
        "",
        *table(results, base),
        "",
        f"![Score by images drawn]({output.with_suffix('.png').name})",
    ]
    write_atomically(output, ("\n".join(lines) + "\n").encode())
    plot(results, output.with_suffix(".png"), f"{options.model}: thin lines are single seeds")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
