"""Feynman-Kac steering against best-of-n on the shapes world, with the same model rows
and the same noise.

    python benchmarks/steering.py [--seeds 8] [--prompts 24] [--work FOLDER]
        [--output benchmarks/steering.md]

24 held-out prompts times 8 seeds, four particles each, the embedded pipeline with DDIM
eta 1 and 30 steps. Best-of-n draws the same four images without resampling (bit-equal
initial and step noise) and takes the one of highest reward; steering takes its particle
of highest reward. *Accuracy* is the verifier's: all five attributes right. Differences
are paired by prompt and seed, their standard errors clustered by prompt. Finished arms
lie in --work as JSON: an interrupted run goes on. About half an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from diffalign import FKSteering, load_scorer
from diffalign.evaluation.statistics import clustered_standard_error
from diffalign.generation.pipelines import base_pipeline
from diffalign.shapes.prompts import held_out_prompts
from diffalign.shapes.verifier import attribute_table

K, STEPS = 4, 30
PLAIN: dict[str, Any] = {"lmbda": 1.0, "resample_steps": ()}
# (guidance, reward, options): the first of each guidance is best-of-n, drawn once and
# judged by both rewards.
ARMS: list[tuple[float, str, dict[str, Any]]] = [
    (2.0, "", PLAIN),
    (2.0, "shapes", {"lmbda": 5.0}),
    (2.0, "shapes", {"lmbda": 10.0}),
    (2.0, "shapes", {"lmbda": 20.0}),
    (2.0, "shapes", {"lmbda": 10.0, "ess_threshold": 1.0}),
    (2.0, "shapes", {"lmbda": 10.0, "potential": "max"}),
    (2.0, "shapes", {"ess_target": 0.5}),
    (2.0, "shapes-clip", {"lmbda": 2.0}),
    (2.0, "shapes-clip", {"lmbda": 5.0}),
    (2.0, "shapes-clip", {"lmbda": 10.0}),
    (2.0, "shapes-clip", {"lmbda": 5.0, "ess_threshold": 1.0}),
    (2.0, "shapes-clip", {"lmbda": 5.0, "potential": "max"}),
    (2.0, "shapes-clip", {"ess_target": 0.5}),
    (1.0, "", PLAIN),
    (1.0, "shapes", {"lmbda": 20.0}),
    (1.0, "shapes-clip", {"lmbda": 5.0}),
]


def describe(options: dict[str, Any]) -> str:
    return (
        "best-of-n"
        if options == PLAIN
        else ", ".join(
            f"{name} {value:g}" if not isinstance(value, str) else f"{name} {value}"
            for name, value in options.items()
        )
    )


def run_arm(
    pipe: Any,
    prompts: list[str],
    seeds: int,
    guidance: float,
    reward: str,
    options: dict[str, Any],
    scorers: dict[str, Any],
) -> dict[str, Any]:
    """Accuracy of every particle and every reward, (prompts, seeds, K) as lists, and
    what the arm cost."""
    rows: dict[str, list[Any]] = {
        name: [] for name in ("accuracy", "shapes", "shapes-clip", "roots", "min_ess", "lmbda")
    }
    seconds = {"total": 0.0, "decode": 0.0, "reward": 0.0}
    model_rows = 0
    repeated = [prompt for prompt in prompts for _ in range(K)]
    for seed in tqdm(
        range(seeds), desc=f"{reward or 'plain'} {describe(options)} at guidance {guidance:g}"
    ):
        steering = FKSteering(pipe, scorers[reward or "shapes"], num_particles=K, **options)
        result = steering(
            prompts,
            seed=[1_000_000 + 1000 * seed + i for i in range(len(prompts))],
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            eta=1.0,
        )
        images = [image for row in result.images for image in row]
        rows["accuracy"].append([row["all"] for row in attribute_table(images, repeated)])
        for name, scorer in scorers.items():
            rows[name].append(scorer(images, repeated).tolist())
        rows["roots"].append(result.num_roots.tolist())
        rows["min_ess"].append(result.ess.min(0).values.tolist())
        rows["lmbda"].append(result.lmbda.tolist())
        seconds = {name: seconds[name] + result.seconds[name] for name in seconds}
        model_rows += result.counts["model_rows"]
    return {**rows, "seconds": seconds, "model_rows": model_rows}


def arrays(arm: dict[str, Any], prompts: int) -> dict[str, np.ndarray]:
    """(prompts, seeds, K) per quantity of images."""
    return {
        name: np.array(arm[name], dtype=np.float64).reshape(-1, prompts, K).swapaxes(0, 1)
        for name in ("accuracy", "shapes", "shapes-clip")
    }


def best(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    """The value of each population's particle of highest reward, (prompts, seeds)."""
    return np.take_along_axis(values, by.argmax(-1)[..., None], -1)[..., 0]


def with_error(difference: np.ndarray) -> str:
    return f"{100 * difference.mean():+.1f} ± {100 * clustered_standard_error(difference):.1f}"


def table(
    guidance: float, reward: str, found: dict[str, dict[str, Any]], prompts: int
) -> list[str]:
    """One table: best-of-n and the arms of one reward at one guidance."""
    lines = [
        (
            "| | best: accuracy % | against best-of-n | mean of K: accuracy % | against best-of-n "
            "| best reward, difference | roots of 4 | smallest ESS | seconds |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    plain_arm = found[key(guidance, "", PLAIN)]
    plain = arrays(plain_arm, prompts)
    for arm_guidance, arm_reward, options in ARMS:
        if arm_guidance != guidance or arm_reward not in ("", reward):
            continue
        arm = found[key(guidance, arm_reward, options)]
        values = arrays(arm, prompts)
        top, mean = best(values["accuracy"], values[reward]), values["accuracy"].mean(-1)
        d_top, d_mean = (
            top - best(plain["accuracy"], plain[reward]),
            mean - plain["accuracy"].mean(-1),
        )
        d_reward = best(values[reward], values[reward]) - best(plain[reward], plain[reward])
        same = options == PLAIN
        text = describe(options)
        low = f"{np.mean(arm['min_ess']):.2f}"
        if "ess_target" in options:
            text += f" (lmbda chosen: median {np.median(arm['lmbda']):.1f})"
        reward = f"{d_reward.mean():+.3f} ± {clustered_standard_error(d_reward):.3f}"
        lines.append(
            f"| {text} | {100 * top.mean():.1f} | {'' if same else with_error(d_top)} | "
            f"{100 * mean.mean():.1f} | {'' if same else with_error(d_mean)} | "
            f"{'' if same else reward} | {np.mean(arm['roots']):.2f} | {'' if same else low} | "
            f"{arm['seconds']['total']:.0f} |"
        )
    return lines


def key(guidance: float, reward: str, options: dict[str, Any]) -> str:
    return f"g{guidance:g}-{reward or 'plain'}-{describe(options)}".replace(" ", "_").replace(
        ",", ""
    )


def report(found: dict[str, dict[str, Any]], prompts: int, seeds: int) -> str:
    lines = [
        "# Steering against best-of-n",
        "",
        (
            f"Made by `python benchmarks/steering.py --seeds {seeds} --prompts {prompts}` on "
            f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}. The "
            "first"
        ),
        (
            f"{prompts} held-out prompts of the shapes world, {seeds} seeds each, K = 4, DDIM eta "
            f"1, {STEPS} steps, five scored steps from 20 to 80 %, the"
        ),
        (
            "embedded pipeline. Every arm runs the same number of model rows from the same noise. "
            "Differences in points of accuracy (all five attributes right by"
        ),
        "the verifier), paired by prompt and seed, ± one standard error clustered by prompt.",
    ]
    for guidance in (2.0, 1.0):
        for reward, what in (
            ("shapes", "the verifier's graded score"),
            ("shapes-clip", "the learned reward `shapes-clip`"),
        ):
            lines += [
                "",
                f"## Reward: {what}, guidance {guidance:g}",
                "",
                *table(guidance, reward, found, prompts),
            ]
    lines += [
        "",
        (
            "Lambda was not tuned on other prompts: the tables show every value that was run. "
            "*best* is the particle of highest reward, *mean of K* the average over all four "
            "particles"
        ),
        (
            "without weights. *roots*: how many of the four initial noises still have descendants. "
            "Seconds are of the whole arm with decoding and scoring, on a machine that did other "
            "work besides."
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "diffalign-steering-benchmark"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", ".*prompts:")
    prompts = held_out_prompts()[: options.prompts]
    options.work.mkdir(parents=True, exist_ok=True)
    pipe = base_pipeline()
    pipe.set_progress_bar_config(disable=True)
    scorers = {name: load_scorer(name) for name in ("shapes", "shapes-clip")}
    found = {}
    started = time.perf_counter()
    for guidance, reward, arm in ARMS:
        name = key(guidance, reward, arm)
        path = options.work / f"{name}-{options.prompts}x{options.seeds}.json"
        if not path.is_file():
            values = run_arm(pipe, prompts, options.seeds, guidance, reward, arm, scorers)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(values))
            os.replace(temporary, path)
        found[name] = json.loads(path.read_text())
    options.output.write_text(report(found, options.prompts, options.seeds))
    print(report(found, options.prompts, options.seeds))
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
