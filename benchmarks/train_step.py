"""Speed and memory of one optimizer step of LoRA Diffusion-DPO: this package beside
diffusers' research script, in one run.

    python benchmarks/train_step.py --peer path/to/train_diffusion_dpo.py
        [--output benchmarks/train_step.md]
    python benchmarks/train_step.py --before COMMIT

The peer is `examples/research_projects/diffusion_dpo/train_diffusion_dpo.py` of
huggingface/diffusers, which the user downloads; without --peer only our own variants
are measured. --before measures an earlier commit of ours, too, from a git worktree.

Every variant is a process of its own that trains the same LoRA on the same pairs in
Pick-a-Pic columns with the same batch. A global optimizer hook notes the time after
each step and the process's peak resident memory, in our processes and the peer's alike;
the median of the steps after the warm-up counts. Variants take turns, so that a slow
minute of the machine hits all of them. "The network alone" is what no trainer can be
faster than: the same UNet with the same LoRA on tensors that are there already, policy
forward and backward and AdamW, with and without the reference's forward pass.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import io
import itertools
import json
import os
import platform
import random
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BARE = {"the network alone": True, "the network alone, no reference": False}
VARIANTS = {
    "diffalign": [],
    "diffalign, cache": ["cache"],
    "diffalign, cache + precompute_ref_errors": ["cache", "precompute"],
}


def worker(result: str, steps: int, script: str, arguments: list[str]) -> None:
    """Runs `script` as its own main program, notes every optimizer step, and leaves
    after the last."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    times: list[float] = []

    def after_step(*_: Any) -> None:
        times.append(time.perf_counter())
        if len(times) == steps:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            Path(result).write_text(json.dumps({"times": times, "peak_kib": peak}))
            os._exit(0)

    register_optimizer_step_post_hook(after_step)
    run_script(script, arguments)


def run_script(script: str, arguments: list[str]) -> None:
    """Runs a training script in this process as if it were the main program."""
    try:
        import wandb  # noqa: F401
    except ImportError:  # the peers import it even when it is not used
        sys.modules["wandb"] = types.ModuleType("wandb")
        sys.modules["wandb"].__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def bare(result: str, model: str, rows: int, size: int, steps: int, reference: bool) -> None:
    """Steps of the network alone: no data, no encoders, no loss of ours."""
    import torch
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").requires_grad_(False)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=targets))
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    width = unet.config["cross_attention_dim"]
    inputs = torch.randn(rows, 4, size // 8, size // 8), torch.full((rows,), 300)
    prompt = torch.randn(rows, 16, width)
    times = []
    for _ in range(steps):
        if reference:
            unet.disable_adapters()
            with torch.no_grad():
                unet(*inputs, prompt)
            unet.enable_adapters()
        unet(*inputs, prompt).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Path(result).write_text(json.dumps({"times": times, "peak_kib": peak}))


def make_pairs(folder: Path, count: int, size: int, copies: int = 1) -> None:
    """Rendered pairs in Pick-a-Pic columns: a right image and one of another scene.

    Each of `count` pairs has several rows where `copies` is more than 1.
    """
    from datasets import Dataset

    from diffalign.shapes import all_scenes, render

    rng = random.Random(0)

    def encoded(scene: Any) -> bytes:
        buffer = io.BytesIO()
        render(scene, rng).resize((size, size)).save(buffer, "png")
        return buffer.getvalue()

    rows = []
    for _ in range(count):
        right, wrong = rng.sample(all_scenes(), 2)
        first = rng.random() < 0.5
        images = [encoded(right), encoded(wrong)] if first else [encoded(wrong), encoded(right)]
        rows.append(
            {
                "caption": right.prompt,
                "jpg_0": images[0],
                "jpg_1": images[1],
                "label_0": float(first),
                "label_1": float(not first),
            }
        )
    folder.mkdir(parents=True)
    Dataset.from_list(rows * copies).to_parquet(folder / "train-00000-of-00001.parquet")


def make_midsize(folder: Path) -> int:
    """The shapes pipeline with a random UNet of more than 50 M parameters; returns the
    count."""
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    from diffalign.shapes import weights_dir

    torch.manual_seed(0)
    pipe = StableDiffusionPipeline.from_pretrained(weights_dir())
    pipe.unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(128, 256, 544),
        down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=64,
        attention_head_dim=8,
    )
    pipe.save_pretrained(folder)
    return sum(p.numel() for p in pipe.unet.parameters())


def our_arguments(
    model: str, data: Path, work: Path, batch: int, size: int, steps: int, features: list[str]
) -> list[str]:
    values = {
        "method": "diffusion_dpo",
        "model": model,
        "lora.r": 16,
        "data.dataset_name": data,
        "data.resolution": size,
        "train.output_dir": work / "out",
        "train.beta": 5000.0,
        "train.learning_rate": 1e-4,
        "train.max_steps": steps,
        "train.per_device_train_batch_size": batch,
        "train.report_to": "tensorboard",
    }
    if "cache" in features:
        values |= {
            "data.cache_latents": work / "cache",
            "data.cache_text_embeddings": work / "cache",
        }
    if "precompute" in features:
        values |= {"train.precompute_ref_errors": "true", "train.ref_error_draws": 1}
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)]


def peer_arguments(
    model: str, data: Path, work: Path, batch: int, size: int, steps: int
) -> list[str]:
    values = {
        "pretrained_model_name_or_path": model,
        "dataset_name": data,
        "dataset_split_name": "train",
        "output_dir": work / "out",
        "resolution": size,
        "train_batch_size": batch,
        "rank": 16,
        "beta_dpo": 2500,
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "max_train_steps": steps,
        "mixed_precision": "no",
        "report_to": "tensorboard",
        "seed": 0,
    }
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)]


def worktree(commit: str, folder: Path) -> Path:
    """A checkout of the commit."""
    subprocess.run(
        ["git", "-C", str(ROOT), "worktree", "add", "--detach", str(folder), commit],
        check=True,
        capture_output=True,
    )
    return folder


def measure(arguments: list[str], steps: int, warm_up: int, tree: Path) -> tuple[float, float]:
    """(median seconds per step, peak MiB) of one process of this file, with the package
    of `tree`."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        kind, *rest = arguments
        command = [sys.executable, __file__, kind, str(result), str(steps), *rest]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tree)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if not result.is_file():
            sys.exit(f"{rest[0]} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        values = json.loads(result.read_text())
    times = values["times"][warm_up:]
    return statistics.median(b - a for a, b in itertools.pairwise(times)), values["peak_kib"] / 1024


def compare(
    model: str,
    size: int,
    batch: int,
    steps: int,
    rounds: int,
    peer: Path | None,
    trees: dict[str, Path],
    work: Path,
) -> list[tuple[str, float, float]]:
    """(variant, samples per second, peak MiB), medians over rounds."""
    data = work / "pairs"
    make_pairs(data, max(64, 4 * batch), size)
    found: dict[str, list[tuple[float, float]]] = {}
    for number in range(rounds):
        ways: dict[str, tuple[list[str], Path]] = {}
        if peer is not None:
            arguments = peer_arguments(model, data, work / f"peer{number}", batch, size, steps)
            ways["peer"] = ["--worker", str(peer), *arguments], ROOT
        for (variant, features), (label, tree) in itertools.product(
            VARIANTS.items(), trees.items()
        ):
            place = work / f"{'-'.join(features) or 'plain'}{label.replace(' ', '-')}{number}"
            arguments = our_arguments(model, data, place, batch, size, steps, features)
            script = str(tree / "scripts" / "train.py")
            ways[variant + label] = ["--worker", script, *arguments], tree
        for name, reference in BARE.items():
            shape = [model, str(2 * batch), str(size), str(int(reference))]
            ways[name] = ["--bare", *shape], ROOT
        for name, (way, tree) in ways.items():
            seconds, peak = measure(way, steps, 5, tree)
            found.setdefault(name, []).append((seconds, peak))
            print(f"{name}: {batch / seconds:.1f} pairs/s, {peak:.0f} MiB", flush=True)
    middle = statistics.median
    return [
        (name, batch / middle(s for s, _ in runs), middle(m for _, m in runs))
        for name, runs in found.items()
    ]


def table(rows: list[tuple[str, float, float]]) -> str:
    base_speed, base_memory = rows[0][1], rows[0][2]
    lines = [
        f"| variant | pairs per second | ratio to {rows[0][0]} | peak memory, MiB | ratio |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {n} | {s:.1f} | {s / base_speed:.2f} | {m:.0f} | {m / base_memory:.2f} |"
        for n, s, m in rows
    ]
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5:])
    if sys.argv[1:2] == ["--bare"]:
        count, side, reference = (int(value) for value in sys.argv[5:8])
        return bare(sys.argv[2], sys.argv[4], count, side, int(sys.argv[3]), bool(reference))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--before", metavar="COMMIT", help="an earlier commit to measure, too")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--midsize_steps", type=int, default=14)
    options = parser.parse_args()
    from diffalign.shapes import weights_dir

    parts = []
    with tempfile.TemporaryDirectory() as folder:
        work, trees = Path(folder), {"": ROOT}
        if options.before:
            before = worktree(options.before, work / "before")
            trees = {f" at {options.before}": before, "": ROOT}
        rows = compare(
            str(weights_dir()),
            64,
            16,
            options.steps,
            options.rounds,
            options.peer,
            trees,
            work / "shapes",
        )
        parts.append(f"## The shapes pipeline, 16 pairs of 64x64 per step\n\n{table(rows)}")
        parameters = make_midsize(work / "midsize-model")
        rows = compare(
            str(work / "midsize-model"),
            128,
            4,
            options.midsize_steps,
            options.rounds,
            options.peer,
            trees,
            work / "midsize",
        )
        parts.append(
            f"## A random UNet of {parameters / 1e6:.0f} M parameters, 4 pairs of 128x128 per "
            f"step\n\n{table(rows)}"
        )
    command = (
        "python "
        f"benchmarks/train_step.py{' --peer train_diffusion_dpo.py' if options.peer else ''}"
        f"{f' --before {options.before}' if options.before else ''} "
        f"--rounds {options.rounds}"
    )
    text = (
        f"# One optimizer step of LoRA Diffusion-DPO\n\nMade by `{command}` on {os.cpu_count()} "
        f"CPU cores ({platform.machine()}), float32. Medians over steps and rounds; variants took "
        "turns. The step is measured from the end of one optimizer step to the end of the next: "
        "reading, decoding, encoding, policy, reference, backward. Filling the caches and "
        "computing the reference errors happens once before training and is not in it: it costs "
        "one encoding of every image, and one reference pass over the data per draw.\n\n"
        + "\n\n".join(parts)
        + "\n"
    )
    print(text)
    subprocess.run(["git", "-C", str(ROOT), "worktree", "prune"], check=True)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
