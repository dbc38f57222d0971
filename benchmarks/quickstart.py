"""`diffalign quickstart` for several seeds, one after the other.

    python benchmarks/quickstart.py [--seeds 0 1 2 3 4] [--work DIR]
        [--output benchmarks/quickstart.md]

Every run is the command itself in a fresh folder with its default settings. With --work
finished runs are kept and not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def run(seed: int, folder: Path) -> dict[str, Any]:
    """The results of one seed, with the wall time of the whole command."""
    record = folder / f"seed-{seed}.json"
    if not record.is_file():
        command = [
            sys.executable,
            "-m",
            "diffalign",
            "quickstart",
            "--seed",
            str(seed),
            "--output_dir",
            str(folder / f"seed-{seed}"),
        ]
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        results = json.loads((folder / f"seed-{seed}" / "results.json").read_text())
        record.write_text(json.dumps({**results, "command_seconds": seconds}))
    return json.loads(record.read_text())


def row(seed: int, r: dict[str, Any]) -> str:
    base, tuned, wins = r["base"], r["tuned"], r["win_rate"]
    pairs = [
        f"{side['guidance_scale']:g} | {side['accuracy']:.1%} ± "
        f"{side['accuracy_standard_error']:.1%} | {side['style']:.1%} | {side['score']:.3f}"
        for side in (base, tuned)
    ]
    return (
        f"| {seed} | {' | '.join(pairs)} | {wins['rate']:.1%} | "
        f"{wins['low']:.1%} to {wins['high']:.1%} | {r['command_seconds']:.0f} s |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = {}
        for seed in options.seeds:
            found[seed] = run(seed, folder)
            print(row(seed, found[seed]), flush=True)
    first = next(iter(found.values()))
    settings = ", ".join(f"{k} {v}" for k, v in first["settings"].items() if k != "seed")
    heading = " | ".join(
        f"{side}: {what}"
        for side in ("base", "tuned")
        for what in ("guidance", "all correct", "preferred style", "score")
    )
    attributes = [
        f"| {name} | "
        + " | ".join(
            f"{sum(r[side]['attributes'][name] for r in found.values()) / len(found):.1%}"
            for side in ("base", "tuned")
        )
        + " |"
        for name in first["base"]["attributes"]
    ]
    scales = list(first["base"]["choice_scores"])
    choice = [
        f"| {side} | "
        + " | ".join(
            f"{sum(r[side]['choice_scores'][s] for r in found.values()) / len(found):.3f}"
            for s in scales
        )
        + " |"
        for side in ("base", "tuned")
    ]
    lines = [
        f"# Quickstart, {len(found)} seeds",
        "",
        f"Made by `python benchmarks/quickstart.py` on {os.cpu_count()} CPU cores "
        f"({platform.machine()}). Each row is `diffalign quickstart --seed N` in a fresh folder: "
        f"{settings}. Each model is judged at its own best guidance scale, chosen by the mean "
        f"score of {first['settings']['choice_prompts']} training prompts without preferences. "
        f"Held-out prompts ({first['prompts']} x {first['images_per_prompt']} images, the same "
        "seeds under both models), judged by the verifier; standard errors and the 95 % interval "
        "of the win-rate are clustered by prompt. The time is the whole command. The settings of "
        "training were chosen on training prompts, none on held-out ones.",
        "",
        f"| seed | {heading} | win-rate | 95 % interval | time |",
        "|---" * 12 + "|",
        *(row(seed, r) for seed, r in found.items()),
        "",
        "Means over the seeds, held-out prompts:",
        "",
        "| attribute | base | tuned |",
        "|---|---|---|",
        *attributes,
        "",
        "Mean score by guidance on the prompts that choose:",
        "",
        f"| | {' | '.join(scales)} |",
        "|---" * (len(scales) + 1) + "|",
        *choice,
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
