"""Throughput of a rollout beside the plain diffusers pipeline, same batch, steps and
guidance.

    python benchmarks/rollout.py [--output benchmarks/rollout.md]

A rollout stores every state with its log-probability and decodes the images; the
pipeline (DDIM, eta 1) only draws them. Prompts are encoded in both. The embedded
pipeline and one with a random UNet of some 50 M parameters; variants take turns,
medians are reported.
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

from diffalign import D3POConfig, D3POTrainer, DataConfig
from diffalign.generation.pipelines import base_pipeline
from diffalign.shapes.prompts import train_prompts

ROOT = Path(__file__).resolve().parents[1]
GUIDANCE = 5.0


def pipeline(large: bool) -> Any:
    pipe = large_pipeline() if large else base_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


def measure(large: bool, images: int, steps: int, rounds: int) -> tuple[float, float]:
    """Median seconds of (pipeline, rollout) for `images` images."""
    prompts = train_prompts()[: images // 2]
    plain = pipeline(large)
    plain.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as folder:
        args = D3POConfig(
            output_dir=folder,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            rollout_batch_size=images,
            per_device_train_batch_size=images // 2,
            max_steps=1,
        )
        trainer = D3POTrainer(
            model=pipeline(large),
            args=args,
            train_dataset=[{"prompt": p} for p in prompts],
            data=DataConfig(resolution=64),
            scorers=lambda pictures, given: torch.zeros(len(pictures)),
        )
        trainer.setup()
        examples = next(trainer.data_pipeline.batches(0))
        times: dict[str, list[float]] = {"pipeline": [], "rollout": []}
        for number in range(rounds + 1):
            started = time.perf_counter()
            repeated = [p for p in prompts for _ in range(2)]
            generators = [torch.Generator().manual_seed(i) for i in range(images)]
            with torch.inference_mode():
                plain(
                    repeated,
                    num_inference_steps=steps,
                    guidance_scale=GUIDANCE,
                    eta=1.0,
                    generator=generators,
                )
            middle = time.perf_counter()
            trainer.sample(trainer.data_pipeline.builder(examples))
            if number:
                times["pipeline"].append(middle - started)
                times["rollout"].append(time.perf_counter() - middle)
    return statistics.median(times["pipeline"]), statistics.median(times["rollout"])


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
        "| pipeline | images | steps | pipeline, images/s | rollout, images/s | slower by |",
        "|---|---|---|---|---|---|",
    ]
    for name, large, images, steps in (("embedded", False, 16, 20), ("random UNet", True, 8, 10)):
        plain, rollout = measure(large, images, steps, options.rounds)
        lines.append(
            f"| {name} | {images} | {steps} | {images / plain:.2f} | {images / rollout:.2f} | "
            f"{rollout / plain:.2f}x |"
        )
    options.output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
