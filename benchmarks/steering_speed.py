"""Wall time of steering beside the plain pipeline at the same model rows, taking turns
in one run.

    python benchmarks/steering_speed.py [--rounds 7]
        [--output benchmarks/steering_speed.md]

The embedded pipeline, DDIM eta 1, 30 steps, guidance 2, 4 prompts x 4 particles. Ways:

* plain: the diffusers pipeline, ``num_images_per_prompt=4``;
* free reward: steering that scores five steps with the mean of the predicted latent and
  the end with a constant, decodes nothing in between and resamples always;
* full autoencoder: steering by `shapes-clip`, five scored steps decoded by the
  pipeline's own autoencoder;
* one call per prompt: the same with ``prompts_per_call=1``.

Ratios are medians over rounds of the times within one round.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffalign import FKSteering, load_scorer
from diffalign.generation.pipelines import base_pipeline
from diffalign.shapes.prompts import held_out_prompts

CALL: dict[str, Any] = {"num_inference_steps": 30, "guidance_scale": 2.0, "eta": 1.0}


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", ".*prompts:")
    pipe, scorer = base_pipeline(), load_scorer("shapes-clip")
    pipe.set_progress_bar_config(disable=True)
    prompts = held_out_prompts()[:4]

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    free = FKSteering(
        pipe,
        lambda images, prompts: torch.zeros(len(images)),
        num_particles=4,
        lmbda=5.0,
        ess_threshold=1.0,
        intermediate_reward=lambda x0, prompts: x0.flatten(1).mean(1),
    )
    full = FKSteering(pipe, scorer, num_particles=4, lmbda=5.0)
    single = FKSteering(pipe, scorer, num_particles=4, lmbda=5.0, prompts_per_call=1)
    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: pipe(prompts, num_images_per_prompt=4, generator=generator(), **CALL),
        "free": lambda: free(prompts, generator=generator(), **CALL),
        "full": lambda: full(prompts, seed=0, **CALL),
        "single": lambda: single(prompts, seed=0, **CALL),
    }
    for way in ways.values():
        way()  # warm
    times: dict[str, list[float]] = {name: [] for name in ways}
    shares: dict[str, list[float]] = {"decode": [], "reward": []}
    for number in range(options.rounds):
        order = list(ways) if number % 2 == 0 else list(ways)[::-1]
        for name in order:
            seconds, value = timed(ways[name])
            times[name].append(seconds)
            if name == "full":
                for part in shares:
                    shares[part].append(value.seconds[part] / value.seconds["total"])

    def ratio(a: str, b: str) -> str:
        each = [x / y for x, y in zip(times[a], times[b], strict=True)]
        return f"{statistics.median(each):.3f} ({min(each):.3f} to {max(each):.3f})"

    text = "\n".join(
        [
            "# Speed of steering",
            "",
            (
                f"Made by `python benchmarks/steering_speed.py --rounds {options.rounds}` on "
                f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__},"
            ),
            (
                f"{torch.get_num_threads()} threads. The embedded pipeline, 4 prompts x 4 "
                "particles, 30 steps with guidance: 960 model rows in every way."
            ),
            "",
            "| ratio of wall times | median (range over rounds) |",
            "|---|---|",
            (
                "| steering with a free reward and no decoding / plain pipeline | "
                f"{ratio('free', 'plain')} |"
            ),
            (
                "| steering by `shapes-clip`, five scored steps through the full autoencoder / "
                f"plain pipeline | {ratio('full', 'plain')} |"
            ),
            (
                "| one call per prompt / all prompts in one call, same steering | "
                f"{ratio('single', 'full')} |"
            ),
            "",
            "With the full autoencoder, decoding took "
            f"{100 * statistics.median(shares['decode']):.1f} % and scoring "
            f"{100 * statistics.median(shares['reward']):.1f} % of the call (five intermediate "
            "scorings of 16 images and the last one; the last decode is the pipeline's own and not "
            f"counted). The plain pipeline took {statistics.median(times['plain']):.2f} s. The "
            "embedded autoencoder is large for its tiny denoiser; with other models "
            "`result.seconds` says what the shares are.",
            "",
        ]
    )
    options.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
