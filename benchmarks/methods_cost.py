"""What the offline methods cost beside Diffusion-DPO, and negative guidance beside
ordinary guidance, measured side by side.

    python benchmarks/methods_cost.py [--output benchmarks/methods_cost.md]

- RankDPO: one optimizer step on lists of four images against the bare forward work of
  the same images (one no-gradient pass of the reference, one pass of the policy with
  its backward, at the same batch) and against a Diffusion-DPO step on as many images in
  pairs. A global hook on the network counts calls and rows.
- MaPO: peak resident memory of full fine-tuning against Diffusion-DPO with its frozen
  copy, each in a process of its own, on a random UNet of 54 M parameters.
- Negative guidance: network rows and time of the embedded pipeline with a negative
  LoRA, with a negative network, and without.

Variants take turns; medians are reported. About five minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from diffalign.training.loop import take_step

ROOT = Path(__file__).resolve().parents[1]
LISTS, IMAGES = 8, 4


def rows(count: int, kind: str) -> list[dict[str, Any]]:
    """Rendered shapes images with made-up judgements, which do not matter for time."""
    from diffalign.shapes.prompts import parse_prompt, train_prompts
    from diffalign.shapes.renderer import render

    prompts = train_prompts()[: count * IMAGES]
    images = [render(parse_prompt(prompt)) for prompt in prompts]
    if kind == "pair":
        return [
            {"prompt": prompts[i], "chosen": images[i], "rejected": images[i + 1]}
            for i in range(0, count, 2)
        ]
    lists = range(0, count, IMAGES)
    scores = [i / IMAGES for i in range(IMAGES)]
    return [
        {"prompt": prompts[i], "images": images[i : i + IMAGES], "scores": scores} for i in lists
    ]


def make_trainer(
    method: str, folder: str, batch: int, model: Any = "shapes", lora: bool = True, **options: Any
) -> Any:
    from peft import LoraConfig

    from diffalign import DataConfig
    from diffalign.methods import config_class, trainer_class

    args = config_class(method)(
        output_dir=f"{folder}/{method}", per_device_train_batch_size=batch, max_steps=1, **options
    )
    kind = "ranked" if method == "rankdpo" else "pair"
    cache = f"{folder}/cache"
    return trainer_class(method)(
        model=model,
        args=args,
        train_dataset=rows(LISTS * IMAGES, kind),
        peft_config=LoraConfig(r=16, lora_alpha=16, init_lora_weights="gaussian") if lora else None,
        data=DataConfig(cache_latents=cache, cache_text_embeddings=cache, resolution=64),
    )


class Step:
    """One optimizer step of a trainer, again and again."""

    def __init__(self, method: str, folder: str, batch: int) -> None:
        self.trainer = make_trainer(method, folder, batch)
        trainer = self.trainer
        trainer.setup()
        trainer.precompute_reference_errors()
        self.run = trainer.make_run()
        self.calls: list[int] = []
        trainer.network.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.append((args[0] if args else kwargs["sample"]).shape[0])

    def __call__(self) -> float:
        self.calls.clear()
        started = time.perf_counter()
        take_step(self.trainer, self.run)
        return time.perf_counter() - started

    def bare(self) -> float:
        """The network's work on the same images: the reference without gradient, the
        policy with its backward."""
        trainer = self.trainer
        batch = next(self.run.batches)
        times = batch.times.repeat_interleave(batch.k)
        noisy = trainer.process.add_noise(batch.x0.flatten(0, 1), batch.noise.flatten(0, 1), times)
        at = trainer.process.model_times(times)
        started = time.perf_counter()
        with torch.no_grad():
            trainer.reference.predict(noisy, at, batch.condition)
        trainer.policy.predict(noisy, at, batch.condition).square().mean().backward()
        trainer.optimizer.zero_grad()
        return time.perf_counter() - started


def rankdpo(rounds: int) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        ranked, pairs = (
            Step("rankdpo", folder, LISTS),
            Step("diffusion_dpo", folder, LISTS * IMAGES // 2),
        )
        # LoRA starts at zero: both networks are ready after a first step.
        times: dict[str, list[float]] = {"ranked": [], "pairs": [], "bare": []}
        for number in range(rounds + 2):
            found = {"ranked": ranked(), "pairs": pairs(), "bare": ranked.bare()}
            if number >= 2:
                for name, seconds in found.items():
                    times[name].append(seconds)
        ranked()
        calls = list(ranked.calls)
    median = {name: statistics.median(values) for name, values in times.items()}
    return [
        f"RankDPO, {LISTS} lists of {IMAGES} images (LoRA, embedded pipeline, cached latents): "
        f"network calls per step {len(calls)}, rows {' + '.join(map(str, calls))}.",
        "",
        "| | seconds per step | ratio |",
        "|---|---|---|",
        f"| bare forward work of the images | {median['bare']:.3f} | 1.00 |",
        f"| RankDPO step | {median['ranked']:.3f} | {median['ranked'] / median['bare']:.2f} |",
        (
            f"| Diffusion-DPO step, as many images in pairs | {median['pairs']:.3f} | "
            f"{median['pairs'] / median['bare']:.2f} |"
        ),
        "",
    ]


def peak(method: str) -> None:
    """In a process of its own: two steps of full fine-tuning, then the peak memory."""
    from random_unet import large_pipeline

    pipe = large_pipeline()
    parameters = sum(p.numel() for p in pipe.unet.parameters())
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(method, folder, 4, model=pipe, lora=False, save_steps=None)
        trainer.setup()
        trainer.precompute_reference_errors()
        run = trainer.make_run()
        for _ in range(3):
            take_step(trainer, run)
    mebibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak": mebibytes, "parameters": parameters}))


def mapo() -> list[str]:
    found = {}
    for method in ("diffusion_dpo", "mapo"):
        output = subprocess.run(
            [sys.executable, __file__, "--peak", method], capture_output=True, text=True, check=True
        )
        found[method] = json.loads(output.stdout.strip().split("\n")[-1])
    count = found["mapo"]["parameters"] / 1e6
    ratio = found["mapo"]["peak"] / found["diffusion_dpo"]["peak"]
    return [
        (
            f"Full fine-tuning of a random UNet of {count:.0f} M parameters, 4 pairs per step, "
            "float32 AdamW, peak resident memory of the process:"
        ),
        "",
        "| | MiB | ratio |",
        "|---|---|---|",
        f"| Diffusion-DPO with its frozen copy | {found['diffusion_dpo']['peak']:.0f} | 1.00 |",
        f"| MaPO, no reference | {found['mapo']['peak']:.0f} | {ratio:.2f} |",
        "",
    ]


def guidance(rounds: int) -> list[str]:
    import copy

    from diffalign import NegativeGuidance
    from diffalign.generation.pipelines import base_pipeline
    from diffalign.shapes.prompts import held_out_prompts
    from diffalign.shapes.sampling_defaults import SAMPLING

    prompts = held_out_prompts()[:16]
    counted: list[int] = []

    def prepared() -> Any:
        pipe = base_pipeline()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def counts(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        counted.append((args[0] if args else kwargs["sample"]).shape[0])

    with tempfile.TemporaryDirectory() as folder:
        make_trainer("diffusion_npo", folder, 4).train()
        plain, with_lora, with_network = prepared(), prepared(), prepared()
        network = copy.deepcopy(with_network.unet)
        variants = {
            "ordinary guidance": (plain, None),
            "negative LoRA on the same network": (
                with_lora,
                NegativeGuidance(with_lora, negative=f"{folder}/diffusion_npo"),
            ),
            "negative network": (with_network, NegativeGuidance(with_network, negative=network)),
        }
        times: dict[str, list[float]] = {name: [] for name in variants}
        calls: dict[str, int] = {}
        for number in range(rounds + 1):
            for name, (pipe, negative) in variants.items():
                if negative is not None:
                    negative.__enter__()
                modules = {
                    id(m): m for m in (pipe.unet, network if negative is not None else pipe.unet)
                }
                inner = [
                    m.conv_in.register_forward_pre_hook(counts, with_kwargs=True)
                    for m in modules.values()
                ]
                if (
                    negative is not None and name == "negative network"
                ):  # the merged copy is made on entering
                    inner.append(
                        negative._branches[0].__self__.conv_in.register_forward_pre_hook(
                            counts, with_kwargs=True
                        )
                    )
                counted.clear()
                started = time.perf_counter()
                pipe(prompts, generator=torch.Generator().manual_seed(0), **SAMPLING)
                if number:
                    times[name].append(time.perf_counter() - started)
                calls[name] = sum(counted)
                for hook in inner:
                    hook.remove()
                if negative is not None:
                    negative.__exit__(None, None, None)
    base = statistics.median(times["ordinary guidance"])
    lines = [
        (
            f"Guidance, {len(prompts)} prompts of the embedded pipeline in one call, "
            f"{SAMPLING['num_inference_steps']} steps:"
        ),
        "",
        "| | network rows | seconds | ratio |",
        "|---|---|---|---|",
    ]
    for name, values in times.items():
        median = statistics.median(values)
        lines.append(f"| {name} | {calls[name]} | {median:.2f} | {median / base:.2f} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "methods_cost.md")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.peak:
        peak(options.peak)
        return
    assert __doc__ is not None
    facts = (
        f"{platform.machine()}, {os.cpu_count()} CPU cores, torch "
        f"{torch.__version__.split('+')[0]} with {torch.get_num_threads()} threads"
    )
    body = [
        "# The cost of the offline methods",
        "",
        *__doc__.split("\n\n", 1)[1].rstrip().split("\n"),
        "",
        f"Measured on {facts}.",
        "",
    ]
    for part in (lambda: rankdpo(options.rounds), mapo, lambda: guidance(options.rounds)):
        body += part()
    options.output.write_text("\n".join(body).rstrip() + "\n")
    print("\n".join(body))


if __name__ == "__main__":
    main()
