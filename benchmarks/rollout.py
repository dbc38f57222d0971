"""Throughput of a rollout beside the plain diffusers pipeline, same batch, steps and
guidance.

    python benchmarks/rollout.py [--output benchmarks/rollout.md]

A rollout with states stores every state with its log-probability (D3PO, GRPO), one
without keeps the final latents alone (DiffusionNFT, AWM, online pairs). Both decode the
images. The pipeline (DDIM, eta 1) only draws them, and encodes the prompts as well. The
embedded pipeline and one with a random UNet of some 50 M parameters, without a LoRA,
which would slow the network itself. Variants take turns, medians are reported.

The second table has the shares of a round of DiffusionNFT with the verifier as its
judge: three trained times per image.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from random_unet import large_pipeline

from diffalign import (
    D3POConfig,
    D3POTrainer,
    DataConfig,
    DiffusionNFTConfig,
    DiffusionNFTTrainer,
)
from diffalign.generation.pipelines import base_pipeline
from diffalign.shapes.prompts import train_prompts

ROOT = Path(__file__).resolve().parents[1]
GUIDANCE = 5.0


def pipeline(large: bool) -> Any:
    pipe = large_pipeline() if large else base_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


def trainer_of(kind: str, large: bool, images: int, steps: int, folder: str) -> Any:
    """A trainer that draws `images` images two per prompt, in one batch."""
    prompts = train_prompts()[: images // 2]
    common: dict[str, Any] = {
        "output_dir": folder,
        "num_inference_steps": steps,
        "guidance_scale": GUIDANCE,
        "rollout_batch_size": images,
        "images_per_prompt": 2,
        "per_device_train_batch_size": images // 2,
        "max_steps": 1,
    }
    keywords: dict[str, Any] = {
        "model": pipeline(large),
        "train_dataset": [{"prompt": p} for p in prompts],
        "data": DataConfig(resolution=64),
        "scorers": ["shapes"],
    }
    if kind == "states":
        return D3POTrainer(args=D3POConfig(**common), **keywords)
    more = {"eta": 1.0, "kl_weight": 0.0, "times_per_image": 3}
    return DiffusionNFTTrainer(args=DiffusionNFTConfig(**common, **more), **keywords)


def measure(large: bool, images: int, steps: int, rounds: int) -> dict[str, float]:
    """Median seconds of the pipeline and of both kinds of rollouts, for `images`
    images."""
    prompts = train_prompts()[: images // 2]
    plain = pipeline(large)
    plain.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            kind: trainer_of(kind, large, images, steps, f"{folder}/{kind}")
            for kind in ("states", "final")
        }
        for trainer in trainers.values():
            trainer.setup()
        times: dict[str, list[float]] = {"pipeline": [], "states": [], "final": []}
        for number in range(rounds + 1):
            repeated = [p for p in prompts for _ in range(2)]
            generators = [torch.Generator().manual_seed(i) for i in range(images)]
            started = time.perf_counter()
            with torch.inference_mode():
                plain(
                    repeated,
                    num_inference_steps=steps,
                    guidance_scale=GUIDANCE,
                    eta=1.0,
                    generator=generators,
                )
            seconds = {"pipeline": time.perf_counter() - started}
            for kind, trainer in trainers.items():
                batch = trainer.data_pipeline.builder(next(trainer.data_pipeline.batches(0)))
                started = time.perf_counter()
                trainer.sampler(batch, 2, None, "rollout")
                seconds[kind] = time.perf_counter() - started
            if number:
                for kind, value in seconds.items():
                    times[kind].append(value)
    return {kind: statistics.median(values) for kind, values in times.items()}


def shares(large: bool, images: int, steps: int) -> dict[str, float]:
    """Share of drawing, scoring and training in three rounds of DiffusionNFT."""
    spent = {"drawing": 0.0, "scoring": 0.0}

    def timed(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments, **options)
            spent[name] += time.perf_counter() - started
            return result

        return call

    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of("final", large, images, steps, folder)
        trainer.args.max_steps = 3
        trainer.setup()
        trainer.reward_function.__class__ = type(
            "Timed", (type(trainer.reward_function),),
            {"__call__": timed("scoring", type(trainer.reward_function).__call__)},
        )  # fmt: skip
        trainer.sample = timed("drawing", trainer.sample)
        started = time.perf_counter()
        trainer.train()
        total = time.perf_counter() - started
    drawing = spent["drawing"] - spent["scoring"]
    return {
        "drawing": drawing / total,
        "scoring": spent["scoring"] / total,
        "training": (total - spent["drawing"]) / total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "rollout.md")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    assert __doc__ is not None
    threads = torch.get_num_threads()
    facts = (
        f"{platform.machine()}, {os.cpu_count()} CPU cores, torch "
        f"{torch.__version__.split('+')[0]} with {threads} threads"
    )
    lines = [
        "# Throughput of a rollout",
        "",
        *__doc__.split("\n\n", 1)[1].rstrip().split("\n"),
        "",
        f"Measured on {facts}.",
        "",
    ]
    lines += [
        "| pipeline | images | steps | pipeline, images/s | with states | final latents alone |",
        "|---" * 6 + "|",
    ]
    sizes = (("embedded", False, 16, 20), ("random UNet", True, 8, 10))
    for name, large, images, steps in sizes:
        seconds = measure(large, images, steps, options.rounds)
        plain = seconds["pipeline"]
        shown = " | ".join(f"{seconds[kind] / plain:.2f}x" for kind in ("states", "final"))
        lines.append(f"| {name} | {images} | {steps} | {images / plain:.2f} | {shown} |")
    lines += ["", "| pipeline | drawing | scoring | training |", "|---|---|---|---|"]
    for name, large, images, steps in sizes:
        parts = shares(large, images, steps)
        shown = " | ".join(f"{100 * parts[k]:.0f} %" for k in ("drawing", "scoring", "training"))
        lines.append(f"| {name} | {shown} |")
    options.output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
