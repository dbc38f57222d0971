"""Over-optimisation: a learned reward pushed until the verifier turns, and what a conservative ensemble changes.

    python benchmarks/over_optimisation.py [--steps 80] [--seed 0] [--work FOLDER] [--output benchmarks/over_optimisation.md]

SPO, the method that learns fastest from a judge here, is trained on the shapes world twice as long as its recipe says and with three times its
learning rate: once judged by the learned reward `shapes-clip`, once by a conservative ensemble (the mean less one standard deviation) of it and
two rewards of the same recipe from other seeds, all on the scale of the base's images. Every --every steps the weights are kept; afterwards one
`diffalign.compare` draws 60 held-out prompts, four images each, under the base and all of them, and both the learned reward and the verifier
judge. The two runs train side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import methods
import online_methods
from methods import ROOT

from diffalign import compare
from diffalign.evaluation.compare import Comparison
from diffalign.shapes.prompts import held_out_prompts

ARMS = ("shapes-clip", "ensemble")
SCALE = 3.0  # of scores with the standard deviation 1 on the base's images: candidates 0.2 apart make a pair
SCORERS = [{"name": "verifier", "scorer": "shapes"}, {"name": "learned", "scorer": "shapes-clip"}]


def judge(arm: str, work: Path) -> tuple[str, float]:
    """The run's `rewards:` section, and its scale of scores: a single reward decides as it is, the ensemble's members are normalised."""
    panel = online_methods.ensemble(work)
    if arm == "ensemble":
        return panel, SCALE
    return online_methods.WATCHED, SCALE / json.loads(panel)["rewards"][0]["normalize"]["std"]


def run_folder(arm: str, options: argparse.Namespace) -> Path:
    return options.work / "over-optimisation" / f"{arm}-{options.seed}"


def train(arm: str, options: argparse.Namespace) -> float:
    """Trains one arm in a process of its own, or goes on with it; seconds."""
    folder, started = run_folder(arm, options), time.perf_counter()
    rewards, scale = judge(arm, options.work)
    command = [sys.executable, "-m", "diffalign", "train", "--config", str(ROOT / "configs" / "spo" / "shapes.yaml")]
    command += ["--data.dataset_name", str(options.work / "data" / "ranked"), "--rewards", rewards]
    settings = {
        "output_dir": folder,
        "seed": options.seed,
        "max_steps": options.steps,
        "score_scale": scale,
        "learning_rate": 3e-3,
    }
    settings |= {"save_steps": options.every, "save_total_limit": "null", "logging_steps": 4}
    if any(folder.glob("checkpoint-*")):
        settings["resume_from_checkpoint"] = "latest"
    command += [str(x) for name, value in settings.items() for x in (f"--train.{name}", value)]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(ARMS)))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arm}: {done.stderr[-2000:]}")
    return time.perf_counter() - started


def judged(options: argparse.Namespace) -> Comparison:
    """The base and every kept step of both arms on the test prompts."""
    models = [
        {"name": f"{arm}-{step}", "lora": str(run_folder(arm, options) / f"checkpoint-{step}")}
        for arm in ARMS
        for step in range(options.every, options.steps + 1, options.every)
    ]
    folder = options.work / "over-optimisation" / f"compare-{options.seed}-{options.every}-{options.steps}"
    return compare("shapes", models, held_out_prompts()[60:], SCORERS, num_images=4, batch_size=60, seed=77, output_dir=folder)


def rows(found: Comparison, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Per arm and kept step, the base first: mean learned reward, mean verifier score, win-rates of both."""
    result: dict[str, list[dict[str, Any]]] = {}
    for arm in ARMS:
        for step in range(0, options.steps + 1, options.every):
            name = found.base if step == 0 else f"{arm}-{step}"
            row: dict[str, Any] = {"step": step, "diversity": found.mean_diversity(name)[0]}
            for scorer in ("learned", "verifier"):
                row[scorer], row[f"{scorer} win"] = found.mean(name, scorer)[0], found.win_rate(name, scorer)
            result.setdefault(arm, []).append(row)
    return result


def table(arms: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        "| judge | step | learned reward | its win-rate % | verifier | its win-rate % | diversity |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, entries in arms.items():
        for r in entries:
            wins = [f"{100 * w.rate:.1f} ({100 * w.low:.1f}-{100 * w.high:.1f})" for w in (r["learned win"], r["verifier win"])]
            lines.append(
                f"| {arm} | {r['step']} | {r['learned']:.3f} | {wins[0]} | {r['verifier']:.3f} | {wins[1]} | {r['diversity']:.3f} |"
            )
    return lines


def plot(arms: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Win-rates against the base over training, both judges, a panel per arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(arms), figsize=(11, 4), sharey=True, layout="constrained")
    for axes, (arm, entries) in zip(panels, arms.items(), strict=True):
        for scorer, colour in (("learned", "#d1242f"), ("verifier", "#1f6feb")):
            steps, wins = [r["step"] for r in entries], [r[f"{scorer} win"] for r in entries]
            axes.plot(steps, [100 * w.rate for w in wins], color=colour, marker="o", ms=4, label=f"by the {scorer}")
            axes.fill_between(steps, [100 * w.low for w in wins], [100 * w.high for w in wins], color=colour, alpha=0.15, lw=0)
        axes.axhline(50, color="black", lw=0.8)
        axes.set(title=f"trained by: {arm}", xlabel="optimizer step")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="win-rate against the base, %")
    panels[0].legend(fontsize=9)
    figure.savefig(path, dpi=110)


def peak(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The step whose images the verifier likes best."""
    return max(entries, key=lambda r: r["verifier"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--every", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/methods-benchmark"))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "over_optimisation.md")
    options = parser.parse_args()
    methods.make_data(options.work)
    online_methods.ensemble(options.work)  # its members, before two processes would train them
    with ThreadPoolExecutor(len(ARMS)) as pool:
        list(pool.map(lambda arm: train(arm, options), ARMS))
    arms = rows(judged(options), options)
    picture = options.output.with_suffix(".png")
    plot(arms, picture)
    assert __doc__ is not None
    body = ["# Over-optimisation of a learned reward", "", *__doc__.split("\n\n", 1)[1].rstrip().split("\n"), ""]
    body += [f"![win-rates over training]({picture.name})", "", *table(arms), ""]
    for arm, entries in arms.items():
        best, last = peak(entries), entries[-1]
        body.append(
            f"- Trained by {arm}: the verifier is at its best, {best['verifier']:.3f}, at step {best['step']} and at {last['verifier']:.3f} at the end; "
            f"the learned reward goes from {best['learned']:.3f} to {last['learned']:.3f} in between."
        )
    options.output.write_text("\n".join(body) + "\n")
    print("\n".join(body))


if __name__ == "__main__":
    main()
