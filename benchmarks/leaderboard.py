"""Every method and steering on the shapes world: quality against compute.

    python benchmarks/leaderboard.py [--seeds 3] [--methods NAME ...] [--jobs 2]
        [--work FOLDER] [--output benchmarks/leaderboard.md]

Each method is trained as its `configs/<method>/shapes.yaml` says, from `--seeds` seeds,
under one budget: at most 260,000 passes of one row through the network, everything
counted (a pass with backward as three; drawing the training images, with guidance, as
well). A recipe that would take more is shortened. Then one `diffalign.compare` draws 60
held-out prompts, four images each, under the base and all trained models from the same
noise: verifier, accuracy (all five attributes right), the learned reward `shapes-clip`,
diversity. Steering and best of four are no training but four (and more) times the work
of every image. Negative models are compared in a second run at the base's best guidance
scale, 4. Memory is the peak resident size of a process that trains three steps.

Methods train side by side, --jobs at a time, each in a process of its own with its
share of the cores. The runs lie in --work, which `benchmarks/methods.py` shares: what
one has trained the other does not train again. Interrupted, it goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import methods
import numpy as np
import online_methods
import torch
from methods import ROOT, Arm, folder_name, kept
from tqdm import tqdm

from diffalign import compare
from diffalign.evaluation.comparison import Comparison
from diffalign.recipe import build_trainer, load_run
from diffalign.shapes.prompts import held_out_prompts

BUDGET = 260_000
DRAWN = (
    600 * 6 * 20 * 2
)  # rows that drew data/ranked: prompts x images x steps x (conditional, unconditional)
NEGATIVE_SCALE = 4.0
BATCH = 60
LEADERS: dict[str, Arm] = {
    **{name: methods.ARMS[name] for name in ("SFT", "Diffusion-DPO", "MaPO", "DCPO", "RankDPO")},
    "Diffusion-ORPO": Arm("diffusion_orpo/shapes"),
    "SePPO": methods.ARMS["SePPO"],
    "D3PO": methods.ARMS["D3PO, verifier"],
    "SPO": methods.ARMS["SPO, verifier"],
    "Online Diffusion-DPO": methods.ARMS["Online Diffusion-DPO"],
    "Self-NPO": methods.ARMS["Self-NPO"],
    "Diffusion-NPO": methods.ARMS["Diffusion-NPO"],
}
SAME = {"D3PO": "D3PO, verifier", "SPO": "SPO, verifier"}  # as methods.py calls it
STEERED: dict[str, dict[str, Any]] = {
    "best of 4 (verifier)": {
        "scorer": "shapes",
        "num_particles": 4,
        "lmbda": 1.0,
        "resample_steps": (),
    },
    "FK steering, 4 particles (verifier)": {"scorer": "shapes", "num_particles": 4, "lmbda": 20.0},
    "FK steering, 4 particles (shapes-clip)": {
        "scorer": "shapes-clip",
        "num_particles": 4,
        "lmbda": 5.0,
    },
}
SCORERS = [
    {"name": "verifier", "scorer": "shapes"},
    {"name": "accuracy", "scorer": "shapes", "args": {"graded": False}},
    {"name": "shapes-clip", "scorer": "shapes-clip"},
]


class Rows:
    """Counts rows through a network: 3 for a pass with a backward, 1 without."""

    def __init__(self, network: Any) -> None:
        self.count = 0
        network.register_forward_hook(self._seen, with_kwargs=True)

    def _seen(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        sample = args[0] if args else kwargs["sample"]
        result = output[0] if isinstance(output, tuple) else output.sample
        self.count += len(sample) * (3 if result.requires_grad else 1)


def probe(name: str, work: Path) -> dict[str, float]:
    """In this process: three steps; rows per step and the peak resident size."""
    import resource
    import tempfile

    arm = LEADERS[name]
    with tempfile.TemporaryDirectory() as folder:
        overrides = online_methods.filled(arm.overrides, work)
        options = {
            "data.dataset_name": work / arm.dataset,
            "train.output_dir": f"{folder}/run",
            "train.max_steps": 3,
        }
        options |= {
            "train.save_steps": 1000,
            "data.cache_latents": f"{folder}/cache",
            "data.cache_text_embeddings": f"{folder}/cache",
        }
        if not arm.from_images:
            del options["data.cache_latents"]
        if "online" in arm.config:
            options["data.online.every"] = 3
        run = load_run(
            ROOT / "configs" / f"{arm.config}.yaml",
            [str(x) for k, v in options.items() for x in (f"--{k}", v)] + overrides,
        )
        run.validation = None
        trainer = build_trainer(run)
        trainer.setup()
        counted = Rows(trainer.network)
        trainer.train()
    return {
        "rows_per_step": counted.count / 3,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def measured(name: str, work: Path) -> dict[str, float]:
    """`probe` in a process of its own, once."""
    command = [sys.executable, __file__, "--probe", name, "--work", str(work)]

    def run() -> Any:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        return json.loads(done.stdout.splitlines()[-1])

    return kept(work / "probes" / f"{folder_name(name)}.json", run)


def train_apart(options: argparse.Namespace) -> None:
    """Trains every method in a process of its own, `--jobs` at a time; dear ones first,
    so that no core waits at the end."""
    expected = {
        "Online Diffusion-DPO": 6,
        "D3PO": 5,
        "SPO": 4,
        "SePPO": 4,
        "MaPO": 3,
        "Diffusion-ORPO": 2,
        "RankDPO": 2,
    }
    names = sorted(options.methods, key=lambda name: -expected.get(name, 0))
    environment = os.environ | {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.jobs))
    }

    def one(name: str) -> None:
        command = [sys.executable, __file__, "--train_only", "--jobs", "1", "--methods", name]
        command += ["--seeds", str(options.seeds), "--work", str(options.work)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-2000:]}")

    with ThreadPoolExecutor(options.jobs) as pool, tqdm(total=len(names), unit="method") as bar:
        for _ in pool.map(one, names):
            bar.update()


def drawn_rows(arm: Arm) -> int:
    """Rows that made the arm's training images; rendered ones and prompts cost none."""
    return DRAWN if arm.from_images and arm.dataset != "rendered" else 0


def trained(name: str, seed: int, work: Path) -> dict[str, Any]:
    """Trains one model within the budget; returns folder, rows, seconds, steps."""
    arm, facts = LEADERS[name], measured(name, work)
    recipe = load_run(
        ROOT / "configs" / f"{arm.config}.yaml", ["--data.dataset_name", "x"]
    ).train.max_steps
    steps = min(recipe, int((BUDGET - drawn_rows(arm)) / facts["rows_per_step"]))
    shown = SAME.get(name, name)
    methods.ARMS[shown] = Arm(arm.config, arm.dataset, arm.overrides, arm.kind)
    if steps < recipe:
        shown = f"{name} within the budget"
        methods.ARMS[shown] = Arm(
            arm.config, arm.dataset, (*arm.overrides, "--train.max_steps", str(steps)), arm.kind
        )
    found = kept(
        work / "results" / f"{folder_name(shown)}-{seed}-train.json",
        lambda: methods.train(shown, seed, work),
    )
    rows = drawn_rows(arm) + facts["rows_per_step"] * found["steps"]
    return {
        **found,
        "rows": rows,
        "folder": str(work / "runs" / f"{folder_name(shown)}-{seed}"),
        "peak_mib": facts["peak_mib"],
    }


def judged(
    work: Path, results: dict[str, list[dict[str, Any]]]
) -> tuple[Comparison, Comparison | None]:
    """All models on the test prompts: at usual guidance, negative ones at the best."""
    prompts = held_out_prompts()[60:]
    options: dict[str, Any] = {"num_images": 4, "batch_size": BATCH, "seed": 77}
    positive, negative = [], []
    for name, runs in results.items():
        for seed, run in enumerate(runs):
            kind = "negative" if LEADERS[name].kind == "negative" else "lora"
            (negative if kind == "negative" else positive).append(
                {"name": f"{folder_name(name)}-{seed}", kind: run["folder"]}
            )
    steered = [{"name": folder_name(name), "steer": options} for name, options in STEERED.items()]
    label = (
        "-".join(sorted(folder_name(n) for n in results)) if set(results) != set(LEADERS) else "all"
    )
    first = compare(
        "shapes",
        [*positive, *steered],
        prompts,
        SCORERS,
        output_dir=work / f"leaderboard-{label}",
        **options,
    )
    second = None
    if negative:
        folder = work / f"leaderboard-{label}-negative"
        second = compare(
            "shapes",
            negative,
            prompts,
            SCORERS,
            output_dir=folder,
            guidance_scale=NEGATIVE_SCALE,
            **options,
        )
    return first, second


def row(name: str, models: list[str], c: Comparison, facts: dict[str, Any]) -> dict[str, Any]:
    """One line of the table, means over seeds; the win-rate's interval pools the seeds,
    prompts being the units."""
    from diffalign.evaluation.statistics import win_rate

    def pooled(scorer: str) -> Any:
        base = np.concatenate([c.signed(c.base, scorer)] * len(models), axis=1)
        return win_rate(base, np.concatenate([c.signed(model, scorer) for model in models], axis=1))

    found = pooled("verifier")
    return {
        "name": name,
        "accuracy": 100 * float(np.mean([c.mean(m, "accuracy")[0] for m in models])),
        "win": found,
        "each": [100 * c.win_rate(m, "verifier").rate for m in models],
        "learned": pooled("shapes-clip"),
        "diversity": float(np.mean([c.mean_diversity(m)[0] for m in models])),
        **facts,
    }


def report(work: Path, results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    first, second = judged(work, results)
    rows = []
    for name, runs in results.items():
        c = second if LEADERS[name].kind == "negative" else first
        assert c is not None
        facts = {
            "rows": np.mean([r["rows"] for r in runs]),
            "seconds": np.mean([r["seconds"] for r in runs]),
        }
        facts |= {
            "steps": runs[0]["steps"],
            "peak_mib": runs[0]["peak_mib"],
            "kind": LEADERS[name].kind,
        }
        rows.append(
            row(name, [f"{folder_name(name)}-{seed}" for seed in range(len(runs))], c, facts)
        )
    for name in STEERED:
        rows.append(
            row(
                name,
                [folder_name(name)],
                first,
                {"rows": 0, "seconds": 0, "steps": 0, "peak_mib": None, "kind": "sampling"},
            )
        )
    for c, name in ((first, "base, guidance 2"), (second, f"base, guidance {NEGATIVE_SCALE:g}")):
        if c is not None:
            facts = {"rows": 0, "seconds": 0, "steps": 0, "peak_mib": None, "kind": "base"}
            rows.append(row(name, [c.base], c, facts))
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        (
            "| method | accuracy % | win-rate % by the verifier | per seed | win-rate % by "
            "shapes-clip | diversity | passes, thousand | training, s (steps) | peak, MiB |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        win, learned = (
            f"{100 * w.rate:.1f} ({100 * w.low:.1f}-{100 * w.high:.1f})"
            for w in (r["win"], r["learned"])
        )
        each = (
            " / ".join(f"{x:.1f}" for x in r["each"])
            if r["kind"] not in ("base", "sampling")
            else ""
        )
        cost = (
            [f"{r['rows'] / 1000:.0f}", f"{r['seconds']:.0f} ({r['steps']})"]
            if r["steps"]
            else ["", ""]
        )
        cost.append("" if r["peak_mib"] is None else f"{r['peak_mib']:.0f}")
        mark = " (negative model)" if r["kind"] == "negative" else ""
        lines.append(
            f"| {r['name']}{mark} | {r['accuracy']:.1f} | {win} | {each} | {learned} | "
            f"{r['diversity']:.3f} | {' | '.join(cost)} |"
        )
    return lines


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Win-rate with its interval against network passes; steering as lines, since it
    costs nothing before the first image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    trained_rows = [r for r in rows if r["steps"]]
    for r in trained_rows:
        colour = (
            "#8250df"
            if r["kind"] == "negative"
            else "#1a7f37"
            if r["kind"] == "online" or r["name"] == "SePPO"
            else "#1f6feb"
        )
        y, x = 100 * r["win"].rate, r["rows"] / 1000
        axes.errorbar(
            x,
            y,
            yerr=[[y - 100 * r["win"].low], [100 * r["win"].high - y]],
            fmt="o",
            color=colour,
            capsize=3,
        )
        axes.annotate(r["name"], (x, y), xytext=(6, 4), textcoords="offset points", fontsize=9)
    for r, style in zip(
        [r for r in rows if r["kind"] == "sampling"], (":", "--", "-."), strict=False
    ):
        axes.axhline(100 * r["win"].rate, color="#6e7781", ls=style, lw=1.2, label=r["name"])
    axes.axhline(50, color="black", lw=0.8)
    axes.set(
        xlabel="passes of a row through the network, thousand (drawing the data included)",
        ylabel="win-rate against the base, % (verifier)",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left")
    axes.margins(x=0.12)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(LEADERS), choices=list(LEADERS))
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="methods that train at the same time"
    )
    parser.add_argument("--train_only", action="store_true", help="train and stop")
    parser.add_argument("--probe", choices=list(LEADERS), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, default=Path("runs/methods-benchmark"))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "leaderboard.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.probe:
        print(json.dumps(probe(options.probe, options.work)))
        return
    started, fresh = time.perf_counter(), not options.work.exists()
    methods.make_data(options.work)
    if options.jobs > 1:
        train_apart(options)
    results = {
        name: [trained(name, seed, options.work) for seed in range(options.seeds)]
        for name in options.methods
    }
    if options.train_only:
        return
    rows = report(options.work, results)
    plot(rows, options.output.with_suffix(".png"))
    minutes = (time.perf_counter() - started) / 60
    # A run that found some of its work done says nothing about the time of a whole one.
    whole = f", {minutes:.0f} minutes from nothing to this table" if fresh else ""
    facts = (
        f"{platform.machine()}, {os.cpu_count()} CPU cores, torch {torch.__version__.split('+')[0]}"
    )
    assert __doc__ is not None
    body = [
        "# Leaderboard of the shapes world",
        "",
        *__doc__.split("\n\n", 1)[1].rstrip().split("\n"),
        "",
        f"Measured on {facts}; {options.seeds} seeds, {options.jobs} methods at a time{whole}.",
        "",
        f"![quality against compute]({options.output.with_suffix('.png').name})",
        "",
        *table(rows),
        "",
        "Intervals are over prompts, seeds pooled. Negative models are judged against the base at "
        f"guidance {NEGATIVE_SCALE:g}, all others at 2. Seconds are those of the training runs as "
        "they ran, side by side. Passes leave out decoding and judging, which is most of SPO's "
        "time here: it decodes every candidate of every step.",
    ]
    options.output.write_text("\n".join(body) + "\n")
    print("\n".join(body))


if __name__ == "__main__":
    main()
