"""Speed and memory on a CUDA GPU, with random weights, in one call of some minutes.

    python benchmarks/gpu.py [--peer train_diffusion_dpo.py]
        [--peer_sdxl train_diffusion_dpo_sdxl.py] [--minutes 8] [--parts NAME ...]
        [--results FILE] [--output benchmarks/gpu.md]

The peers are `examples/research_projects/diffusion_dpo/train_diffusion_dpo.py` and
`..._sdxl.py` of huggingface/diffusers, which the user downloads.

Training is LoRA Diffusion-DPO (rank 16, bf16) on rendered pairs: SD1.5 at 512 px, SDXL
and Flux at 1024 px with the shapes of the released networks, Flux with as many blocks
as fill 40 % of the memory. Text encoders have one layer. Ours runs plain (images and
prompts are encoded in every step, as in the peers), from caches, with precomputed
reference errors and with compiled blocks. All read images with worker processes. A GPU
with less than 120 GiB trains Flux with checkpointed activations, one with less than 40
SDXL too, peers included. The time between optimizer steps is measured after the warm-up
and its median counts. Peaks are of allocated memory during the steps. The work of a
step (policy, reference, backward; no encoders, no second forward pass of checkpointing)
is counted by torch, and divided by the time and by the card's dense bf16 rate from its
data sheet: MFU. For an unknown card a product of matrices is measured instead.

Sampling is a D3PO rollout of the SD1.5 shape beside the plain pipeline, and a steering
call with a free reward beside the same. Last come the tests with the marker `gpu`.

Every part is a process of its own. A part for which no time is left is left out and
named. With `--results` the figures are kept in a file, to which a later call adds its
parts, and `--report` writes the table from that file on any machine: counting the work
of a step takes minutes, but no GPU. `--tiny` runs all of it on small networks, also
without a GPU: the figures say nothing then, but the way there is tried.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from full_size import SIZES, TINY_SIDE, pipeline, step_estimate
from train_step import make_pairs, peer_arguments, run_script

ROOT = Path(__file__).resolve().parents[1]
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
RATES = {
    "h200": 989.0, "h100 pcie": 756.0, "h100": 989.0, "b200": 2250.0, "a100": 312.0,
    "l40s": 362.0, "l4": 121.0, "a10": 125.0, "rtx 4090": 165.0, "rtx 3090": 71.0,
    "rtx 5090": 209.0, "rtx a6000": 155.0,
}  # fmt: skip
"""Part of a card's name -> dense bf16 TFLOP/s with float32 accumulation, as NVIDIA's
data sheets give it."""
WARM_UP, STEPS = 4, 12
WORKERS = min(8, (os.cpu_count() or 1) // 2)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cached": {"cache": True},
    "cached, precomputed": {"cache": True, "precompute_ref_errors": True, "ref_error_draws": 1},
    "cached, compiled": {"cache": True, "compile": True},
    "cached, precomputed, compiled": {
        "cache": True, "precompute_ref_errors": True, "ref_error_draws": 1, "compile": True,
    },
}  # fmt: skip
PARTS = (
    "sd15", "peer sd15", "sdxl", "peer sdxl", "flux", "sampling", "tests", "compiled sd15",
    "compiled sdxl", "compiled flux",
)  # fmt: skip
"""In order of importance: where time runs out, the last ones are left out."""


@dataclass(frozen=True, eq=False)
class Setup:
    """What is trained, for one card.

    Attributes:
        pairs: model -> pairs in a step.
        checkpointed: models that train with checkpointed activations.
        flux_blocks: of Flux, or None for all.
        tiny: small networks in place of the full ones.
        precision: bf16, but on a CPU float32: many of them have no bf16 kernels.
    """

    pairs: dict[str, int]
    checkpointed: tuple[str, ...]
    flux_blocks: int | None
    tiny: bool
    precision: Any

    def side(self, model: str) -> int:
        return TINY_SIDE if self.tiny else SIZES[model]

    def pipeline(self, model: str) -> Any:
        """A pipeline of random weights, made on the device."""
        dtype = torch.bfloat16 if CUDA else torch.float32
        return pipeline(model, dtype, self.flux_blocks, DEVICE, tiny=self.tiny)


def setup_for(memory: float, tiny: bool, precision: str = "bf16" if CUDA else "no") -> Setup:
    """Batches and blocks for a card.

    Args:
        memory: of the GPU in GiB.
        tiny: whether networks are small.
        precision: of the passes.
    """
    if tiny:
        return Setup(dict.fromkeys(SIZES, 1), ("sdxl", "flux"), 3, tiny, precision)
    # A block of Flux takes some 0.4 GiB in bf16.
    blocks = int(0.4 * memory / 0.42)
    pairs = (32, 6, 1) if memory >= 120 else (8, 2, 1) if memory >= 40 else (4, 1, 1)
    checkpointed = ("sdxl", "flux") if memory < 40 else ("flux",) if memory < 120 else ()
    return Setup(
        dict(zip(SIZES, pairs, strict=True)),
        checkpointed,
        None if blocks >= 57 else max(3, blocks),
        tiny,
        precision,
    )


def memory_of_card() -> float:
    return torch.cuda.get_device_properties(0).total_memory / 2**30 if CUDA else 16.0


def emit(row: dict[str, Any]) -> None:
    """Prints a row on a line of its own, also beside a progress bar."""
    print("\nrow", json.dumps(row), flush=True)


# Training


def synchronise() -> None:
    if CUDA:
        torch.cuda.synchronize()


def reset_peak() -> None:
    if CUDA:
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if CUDA else None


class StepClock:
    """Notes the time after every optimizer step of any optimizer of this process."""

    def __init__(self, after_last: Callable[[], None] | None = None, steps: int = STEPS) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.times: list[float] = []
        self._last, self._steps = after_last, steps
        self._handle = register_optimizer_step_post_hook(self._after)

    def _after(self, *_: Any) -> None:
        synchronise()
        self.times.append(time.perf_counter())
        if len(self.times) == 1:
            reset_peak()
        if len(self.times) == self._steps and self._last is not None:
            self._last()

    def stop(self) -> float:
        """Median seconds of a step after the warm-up."""
        self._handle.remove()
        times = self.times[WARM_UP:]
        return statistics.median(b - a for a, b in itertools.pairwise(times))


def train(model: str, variant: str, setup: Setup, data: Path, work: Path) -> dict[str, Any]:
    """Trains some steps with our trainer, in this process."""
    from peft import LoraConfig

    from diffalign import DataConfig, DiffusionDPOConfig, DiffusionDPOTrainer

    options = dict(VARIANTS[variant])
    caches = str(work / f"cache-{model}") if options.pop("cache", False) else None
    trainer = DiffusionDPOTrainer(
        model=setup.pipeline(model),
        args=DiffusionDPOConfig(
            output_dir=str(work / "run"),
            overwrite_output_dir=True,
            max_steps=STEPS,
            per_device_train_batch_size=setup.pairs[model],
            learning_rate=1e-4,
            mixed_precision=setup.precision,
            gradient_checkpointing=model in setup.checkpointed,
            **options,
        ),
        peft_config=LoraConfig(r=16, lora_alpha=16, init_lora_weights="gaussian"),
        data=DataConfig(
            dataset_name=str(data),
            resolution=setup.side(model),
            num_workers=WORKERS,
            cache_latents=caches,
            cache_text_embeddings=caches,
        ),
    )
    clock = StepClock()
    trainer.train()
    return {"seconds": clock.stop(), "peak": peak_gib()}


def trained(model: str, variants: list[str], setup: Setup, work: Path) -> None:
    """Prints one row for each variant. One that fails leaves its sentence."""
    data = pairs_of(model, setup, work)
    for variant in variants:
        row: dict[str, Any] = {"model": model, "variant": variant}
        started = time.monotonic()
        try:
            row |= train(model, variant, setup, data, work)
        except torch.OutOfMemoryError:
            row["failed"] = "out of memory"
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        row["wall"] = time.monotonic() - started
        emit(row)
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()


def pairs_of(model: str, setup: Setup, work: Path) -> Path:
    folder = work / f"pairs-{setup.side(model)}"
    if not folder.is_dir():
        most = max(setup.pairs[name] for name in SIZES if setup.side(name) == setup.side(model))
        make_pairs(folder, most, setup.side(model), copies=4)
    return folder


def peer(model: str, script: Path, setup: Setup, work: Path) -> None:
    """Runs diffusers' script in this process, and leaves after the last step."""
    folder = work / f"pipeline-{model}"
    pipe = setup.pipeline(model)
    pipe.save_pretrained(folder)
    del pipe
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
    arguments = peer_arguments(
        str(folder), pairs_of(model, setup, work), work / f"peer-{model}",
        setup.pairs[model], setup.side(model), STEPS + 1,
    )  # fmt: skip
    arguments[arguments.index("--mixed_precision") + 1] = setup.precision
    arguments += ["--dataloader_num_workers", str(WORKERS)]
    if model in setup.checkpointed:
        arguments.append("--gradient_checkpointing")

    def leave() -> None:
        row = {"model": model, "variant": "peer", "seconds": clock.stop(), "peak": peak_gib()}
        emit(row)
        os._exit(0)

    clock = StepClock(leave)
    run_script(str(script), arguments)


# Sampling


def sampling(setup: Setup, work: Path) -> None:
    """Seconds of a rollout and of a steering call, beside the plain pipeline."""
    from diffusers import DDIMScheduler

    from diffalign import D3POConfig, D3POTrainer, DataConfig, FKSteering
    from diffalign.shapes.prompts import train_prompts

    steps, images, guidance = (2, 4, 5.0) if setup.tiny else (20, 8, 5.0)
    prompts = train_prompts()[: images // 2]
    side = setup.side("sd15")

    def made() -> Any:
        pipe = setup.pipeline("sd15")
        pipe.to(DEVICE, pipe.unet.dtype)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def constant(pictures: Any, given: Any) -> torch.Tensor:
        return torch.zeros(len(pictures))

    pipe = made()
    trainer = D3POTrainer(
        model=made(),
        args=D3POConfig(
            output_dir=str(work / "rollout"),
            num_inference_steps=steps,
            guidance_scale=guidance,
            rollout_batch_size=images,
            per_device_train_batch_size=images // 2,
            mixed_precision=setup.precision,
            max_steps=1,
        ),
        train_dataset=[{"prompt": prompt} for prompt in prompts],
        data=DataConfig(resolution=side),
        scorers=constant,
    )
    trainer.setup()
    batch = trainer.data_pipeline.builder(next(trainer.data_pipeline.batches(0)))
    steering = FKSteering(
        pipe, constant, num_particles=images // len(prompts), lmbda=1.0,
        intermediate_reward=lambda x0, given: x0.flatten(1).mean(1),
    )  # fmt: skip
    call: dict[str, Any] = {
        "num_inference_steps": steps, "guidance_scale": guidance, "eta": 1.0,
        "height": side, "width": side,
    }  # fmt: skip

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    ways: dict[str, Callable[[], Any]] = {
        "plain pipeline": lambda: pipe(
            prompts, num_images_per_prompt=images // len(prompts), generator=generator(), **call
        ),
        "D3PO rollout": lambda: trainer.sample(batch),
        "steering, free reward": lambda: steering(prompts, seed=0, **call),
    }
    for name, way in ways.items():
        times = []
        with torch.inference_mode(name == "plain pipeline"):
            for number in range(2 if setup.tiny else 4):
                if number == 1:
                    reset_peak()
                started = time.perf_counter()
                way()
                synchronise()
                times.append(time.perf_counter() - started)
        row = {"way": name, "images": images, "seconds": statistics.median(times[1:])}
        emit(row | {"peak": peak_gib()})


def matrix_rate() -> float:
    """TFLOP/s of a product of large matrices in bf16."""
    size = 8192 if CUDA else 512
    left, right = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(12):
        synchronise()
        started = time.perf_counter()
        left @ right
        synchronise()
        times.append(time.perf_counter() - started)
    return float(2 * size**3 / statistics.median(times[2:]) / 1e12)


# Running


def do_part(name: str, options: argparse.Namespace) -> None:
    """One part, in this process."""
    setup = setup_for(memory_of_card(), options.tiny)
    kind, _, model = name.rpartition(" ")
    if model == "sampling":
        sampling(setup, options.work)
    elif kind == "peer":
        script = options.peer if model == "sd15" else options.peer_sdxl
        peer(model, script, setup, options.work)
    else:
        compiled = kind == "compiled"
        trained(model, [v for v in VARIANTS if ("compiled" in v) == compiled], setup, options.work)


def command_of(name: str, options: argparse.Namespace) -> list[str]:
    """The command that runs a part, or nothing where it has no peer."""
    if name == "tests":
        return [sys.executable, "-m", "pytest", "-m", "gpu", str(ROOT / "tests/gpu")]
    command = [sys.executable, __file__, "--part", name, "--work", str(options.work)]
    for key in ("peer", "peer_sdxl"):
        if getattr(options, key) is not None:
            command += [f"--{key}", str(getattr(options, key))]
    missing = {"peer sd15": options.peer is None, "peer sdxl": options.peer_sdxl is None}
    if missing.get(name):
        return []
    return [*command, "--tiny"] if options.tiny else command


def run_parts(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Adds the rows of all parts to the results, and what is missing."""
    ends = time.monotonic() + 60 * options.minutes
    for name in options.parts:
        rows: list[dict[str, Any]] = []
        notes: list[str] = []
        command = command_of(name, options)
        left = ends - time.monotonic()
        if not command or left < 20:
            reason = "no time was left" if command else "no script was given"
            nothing = {"rows": rows, "notes": [f"{name}: not run, {reason}."]}
            results["parts"].setdefault(name, nothing)  # figures of an earlier call stay
            keep(results, options.results)
            continue
        results["parts"][name] = {"rows": rows, "notes": notes}
        started = time.monotonic()
        log = options.work / f"{name.replace(' ', '-')}.log"
        with log.open("w") as writer:
            try:
                done = subprocess.run(
                    command, stdout=writer, stderr=subprocess.STDOUT, timeout=left, cwd=ROOT,
                    env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
                )  # fmt: skip
                failed = done.returncode not in (0, 5)
            except subprocess.TimeoutExpired:
                writer.write("\nout of time\n")
                failed = True
        output = log.read_text()
        rows += [json.loads(line[4:]) for line in output.splitlines() if line.startswith("row ")]
        seconds = time.monotonic() - started
        state = " FAILED" if failed else ""
        print(f"{name}: {len(rows)} rows, {seconds:.0f} s{state}", flush=True)
        if name == "tests":
            lines = re.findall(r"(?m)^.*(?:passed|failed|skipped|deselected).*$", output)
            notes.append(f"Tests with the marker gpu: {(lines or ['no summary'])[-1].strip('= ')}.")
        if failed:
            last = (output.strip().splitlines() or ["no message"])[-1]
            notes.append(f"{name}: failed after {seconds:.0f} s: {last[:300]}")
            print(output[-3000:], file=sys.stderr)
        keep(results, options.results)


def keep(results: dict[str, Any], file: Path | None) -> None:
    """Writes the results into their file, if there is one."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n")


# The report


def optional(value: float | None, places: int = 1) -> str:
    return "-" if value is None else f"{value:.{places}f}"


@functools.cache
def expectation(model: str, variant: str, setup: Setup) -> tuple[float, float]:
    """FLOPs of a step without a second forward pass of checkpointing, and the GiB that
    `diffalign estimate` expects."""
    settings: dict[str, Any] = {
        "mixed_precision": setup.precision,
        "per_device_train_batch_size": setup.pairs[model],
        "precompute_ref_errors": "precomputed" in variant,
        "cached": "cached" in variant,
    }
    place: Any = (model, setup.flux_blocks, setup.side(model), True, setup.tiny)
    plain = step_estimate(*place, **settings)
    if model not in setup.checkpointed:
        return plain.flops, plain.peak / 2**30
    saving = step_estimate(*place, gradient_checkpointing=True, **settings)
    return plain.flops, saving.peak / 2**30


def training_table(rows: list[dict[str, Any]], setup: Setup, rate: float) -> list[str]:
    lines = [
        "| model | variant | pairs in a step | pairs per second | to diffusers' script "
        "| peak, GiB | estimated, GiB | TFLOP of a step | MFU % |",
        "|---" * 9 + "|",
    ]
    for model in SIZES:
        mine = [row for row in rows if row.get("model") == model]
        pairs = setup.pairs[model]
        peers = [pairs / row["seconds"] for row in mine if row["variant"] == "peer"]
        for row in mine:
            name = "diffusers' script" if row["variant"] == "peer" else row["variant"]
            if "failed" in row:
                lines.append(f"| {model} | {name} | {pairs} | {row['failed']} |" + " |" * 5)
                continue
            counted, expected = expectation(model, row["variant"], setup)
            speed = pairs / row["seconds"]
            to_peer = f"{speed / peers[0]:.2f}" if peers else "-"
            mfu = 100 * counted / row["seconds"] / 1e12 / rate
            lines.append(
                f"| {model} | {name} | {pairs} | {speed:.2f} | {to_peer} | "
                f"{optional(row['peak'])} | {expected:.1f} | {counted / 1e12:.1f} | {mfu:.1f} |"
            )
    return lines


def sampling_table(rows: list[dict[str, Any]]) -> list[str]:
    ways = [row for row in rows if "way" in row]
    if not ways:
        return []
    lines = ["", "| sampling, SD1.5 shape | images per second | time, plain = 1 | peak, GiB |"]
    lines.append("|---" * 4 + "|")
    for row in ways:
        lines.append(
            f"| {row['way']} | {row['images'] / row['seconds']:.2f} | "
            f"{row['seconds'] / ways[0]['seconds']:.2f} | {optional(row['peak'])} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--peer_sdxl", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        do_part(options.part, options)
        return
    results: dict[str, Any] = {"tiny": options.tiny, "parts": {}}
    if options.results is not None and options.results.exists():
        results = json.loads(options.results.read_text())
    if options.report and "card" not in results:
        sys.exit("--report writes the table of --results FILE, and there is no such file")
    if not options.report:
        measure(options, results)
    if options.report or options.results is None:
        report(results, options.output)


def measure(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Runs the parts on this machine."""
    if not CUDA and not options.tiny:
        sys.exit("no CUDA GPU was found; --tiny tries the benchmark itself on the CPU")
    card = torch.cuda.get_device_name(0) if CUDA else "CPU"
    before = results.get("card", card), results["tiny"]
    if before != (card, options.tiny):
        sys.exit(f"{options.results} is of {before[0]} (tiny: {before[1]}); name another file")
    results |= {
        "card": card,
        "memory": memory_of_card(),
        "torch": torch.__version__,
        "matrices": matrix_rate(),
        "precision": "bf16" if CUDA else "no",
    }
    with tempfile.TemporaryDirectory() as folder:
        if options.work is None:
            options.work = Path(folder)
        options.work.mkdir(parents=True, exist_ok=True)
        for key in ("peer", "peer_sdxl"):
            if getattr(options, key) is not None:
                setattr(options, key, getattr(options, key).resolve())
        run_parts(options, results)


def report(results: dict[str, Any], output: Path) -> None:
    """Writes the tables."""
    card, memory, measured = (results[name] for name in ("card", "memory", "matrices"))
    rows = [row for part in results["parts"].values() for row in part["rows"]]
    notes = [note for part in results["parts"].values() for note in part["notes"]]
    known = [rate for name, rate in RATES.items() if name in card.lower()]
    rate = known[0] if known else measured
    setup = setup_for(memory, results["tiny"], results["precision"])
    blocks = "all 57" if setup.flux_blocks is None else str(setup.flux_blocks)
    lines = [
        f"# Speed and memory on one {card}",
        "",
        *str(__doc__).split("\n\n", 1)[1].rstrip().split("\n"),
        "",
        f"{card}, {memory:.0f} GiB, torch {results['torch']}. Dense bf16: "
        f"{rate:.0f} TFLOP/s {'by its data sheet' if known else 'measured'}; a product of "
        f"matrices reaches {measured:.0f}. Flux has {blocks} blocks. Checkpointed activations: "
        f"{', '.join(setup.checkpointed) or 'none'}.",
        "",
        *training_table(rows, setup, rate),
        *sampling_table(rows),
        "",
        *(f"- {note}" for note in notes),
    ]
    output.write_text("\n".join(lines).rstrip() + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
