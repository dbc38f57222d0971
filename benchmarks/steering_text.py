"""Steering of the embedded masked text denoiser against best-of-n, with the same
network rows and the same noise.

    python benchmarks/steering_text.py [--groups 500]
        [--output benchmarks/steering_text.md]

Captions of the shapes world, 16 sampler steps, K = 4, default schedule. The reward
counts what a text says of "a small blue star on a black background" (0 to 4 words, each
in about a quarter of the captions or less). Best-of-n: the same four texts without
resampling. *captions*: the share of all K texts that are captions of the world word for
word, which the reward knows nothing of. About a minute on two cores.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.steering.text import FKTextSteering, TextSteeringResult
from tools.shapes.pretrain_text import is_caption

WORDS = ("small", "blue", "star", "black")
STEPS = 16
ARMS: list[dict[str, Any]] = [
    {"lmbda": 2.0, "num_x0_samples": 1},
    {"lmbda": 2.0, "num_x0_samples": 4},
    {"lmbda": 2.0, "num_x0_samples": 16},
    {"lmbda": 2.0, "num_x0_samples": 4, "aggregate": "lme"},
    {"lmbda": 5.0, "num_x0_samples": 4},
    {"lmbda": 2.0, "num_x0_samples": 4, "ess_threshold": 1.0},
    {"lmbda": 2.0, "num_x0_samples": 4, "potential": "max"},
]


def reward(texts: list[str]) -> list[float]:
    return [float(sum(word in text.split() for word in WORDS)) for text in texts]


def sample(groups: int, **options: Any) -> TextSteeringResult:
    return FKTextSteering(None, None, reward, num_particles=4, num_steps=STEPS, **options)(
        [""] * groups, seed=0
    )


def mean_with_error(values: Tensor) -> str:
    return f"{float(values.mean()):.3f} ± {float(values.std() / math.sqrt(len(values))):.3f}"


def captions(result: TextSteeringResult) -> float:
    texts = [text for row in result.texts for text in row]
    return sum(map(is_caption, texts)) / len(texts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", type=int, default=500)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    plain = sample(options.groups, lmbda=2.0, resample_steps=())
    best, mean = plain.rewards.amax(1), plain.rewards.mean(1)
    lines = [
        "# Text steering against best-of-n",
        "",
        (
            f"Made by `python benchmarks/steering_text.py --groups {options.groups}` on "
            f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}. The "
            "embedded masked denoiser,"
        ),
        (
            f"{options.groups} populations of 4 texts, {STEPS} steps, five scored ones; the reward "
            f"counts the words {', '.join(WORDS)} (0 to 4). The same noise and network rows"
        ),
        "in every arm; differences are paired, ± one standard error over populations.",
        "",
        (
            "| | best reward | against best-of-n | mean of 4 | against best-of-n | captions | "
            "roots of 4 |"
        ),
        "|---|---|---|---|---|---|---|",
        (
            f"| best-of-n | {best.mean():.3f} | | {mean.mean():.3f} | | "
            f"{100 * captions(plain):.1f} % | 4.00 |"
        ),
    ]
    for arm in ARMS:
        found = sample(options.groups, **arm)
        top, middle = found.rewards.amax(1), found.rewards.mean(1)
        name = ", ".join(
            f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in arm.items()
        )
        lines.append(
            f"| {name} | {top.mean():.3f} | {mean_with_error(top - best)} | {middle.mean():.3f} | "
            f"{mean_with_error(middle - mean)} | {100 * captions(found):.1f} % | "
            f"{float(found.smc.num_roots.double().mean()):.2f} |"
        )
    z = [
        float(sample(options.groups, lmbda=1.0, resample_steps=steps).log_z.exp().mean())
        for steps in ((), None)
    ]
    lines += [
        "",
        (
            f"Two estimates of Z = E[exp(r)] that must agree: {z[0]:.2f} from plain samples with "
            f"terminal weights, {z[1]:.2f} from steering (lmbda 1)."
        ),
        "",
    ]
    options.output.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
