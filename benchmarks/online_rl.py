"""Reward by images drawn: GRPO, DiffusionNFT, AWM, D3PO, SPO and online Diffusion-DPO.

    python benchmarks/online_rl.py [--model shapes] [--results FOLDER]
        [--output benchmarks/online_rl.md]

The runs are those of `leaderboard.py`, which trains these methods on the verifier's
graded score from their own run files, under a common budget of network passes. It
leaves their results in --results (default `benchmarks/leaderboard/MODEL`). After every
tenth of a run the 60 prompts that choose are drawn from the same noise, one image each,
at guidance 2. The picture shows the verifier's mean score there by the number of images
that the method has drawn. SPO's count is of the images whose scores it needs: it draws
several candidates per step, and each has a score.

Methods draw different numbers of images for the same passes. The table compares them
after as many images as the thriftiest one draws in its whole run, between two
checkpoints along a straight line. Win-rates are of whole runs at their best guidance
on the held-out prompts, against the base at its best, as in the leaderboard.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from leaderboard import ONLINE, ROOT, folder_name, interval, not_run, rates

from diffalign.runtime.files import write_atomically


def read_runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Method -> its results that have a curve, in the order of their seeds."""
    runs = {}
    for name in ONLINE:
        files = sorted(folder.glob(f"{folder_name(name)}-[0-9].json"))
        rows = [json.loads(file.read_text()) for file in files]
        runs[name] = [row for row in rows if "curve" in row]
    return {name: rows for name, rows in runs.items() if rows}


def score_after(run: dict[str, Any], images: float) -> float:
    """Score after a number of images drawn, between two points of the curve."""
    drawn, scores = zip(*run["curve"], strict=True)
    return float(np.interp(images, drawn, scores))


def table(runs: dict[str, list[dict[str, Any]]], base: dict[str, Any]) -> list[str]:
    common = min(run["curve"][-1][0] for rows in runs.values() for run in rows)
    lines = [
        f"| method | seeds | images drawn | score after {common:.0f} images, per seed | at the end "
        "| training, s | best guidance | win-rate % against the base at its best, per seed |",
        "|---" * 8 + "|",
    ]
    for name, rows in runs.items():
        cells = [
            name,
            f"{len(rows)}",
            f"{rows[0]['curve'][-1][0]:.0f}",
            " / ".join(f"{score_after(run, common):.3f}" for run in rows),
            " / ".join(f"{run['curve'][-1][1]:.3f}" for run in rows),
            f"{np.median([run['seconds'] for run in rows]):.0f}"
            + ("*" if any(run.get("disturbed") for run in rows) else ""),
            ", ".join(f"{run['best']:g}" for run in rows),
            " / ".join(interval(rate) for rate in rates(base, rows)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot(
    runs: dict[str, list[dict[str, Any]]], base: dict[str, Any], path: Path, title: str
) -> None:
    """Mean score by images drawn: a line per method, a thin one per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    for number, (name, rows) in enumerate(runs.items()):
        color = pyplot.get_cmap("tab10")(number)
        last = min(run["curve"][-1][0] for run in rows)
        places = np.linspace(0, last, 21)
        for run in rows:
            axes.plot(*zip(*run["curve"], strict=True), color=color, lw=0.8, alpha=0.35)
        mean = np.mean([[score_after(run, x) for x in places] for run in rows], axis=0)
        axes.plot(places, mean, color=color, lw=2.2, label=name)
    best = max(base["choice"].values())
    axes.axhline(best, color="black", ls="--", lw=1, label="base at its best guidance")
    axes.set(xlabel="images drawn", ylabel="verifier's score at guidance 2", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("shapes", "shapes-flow"), default="shapes")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    folder = options.results or ROOT / "benchmarks" / "leaderboard" / options.model
    suffix = "_flow" if options.model == "shapes-flow" else ""
    output: Path = options.output or ROOT / "benchmarks" / f"online_rl{suffix}.md"
    base = json.loads((folder / "base-0.json").read_text())
    runs = read_runs(folder)
    if not runs:
        raise SystemExit(f"{folder} has no run with a curve; run benchmarks/leaderboard.py first")
    picture = output.with_suffix(".png")
    missing = not_run({name: (len(runs.get(name, ())), 3) for name in ONLINE})
    lines = [
        f"# Online methods on `{options.model}`, by images drawn",
        "",
        *str(__doc__).split("\n\n", 1)[1].rstrip().split("\n"),
        "",
        f"The base at its best guidance, {base['best']:g}, scores "
        f"{max(base['choice'].values()):.3f} on the choosing prompts and "
        f"{np.mean(base['scores']):.3f} on the held-out ones. * beside other work.",
        *(["", missing] if missing else []),
        "",
        *table(runs, base),
        "",
        f"![Score by images drawn]({picture.name})",
    ]
    write_atomically(output, ("\n".join(lines) + "\n").encode())
    plot(runs, base, picture, f"{options.model}: thin lines are single seeds")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
