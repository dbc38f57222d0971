"""Peak memory of a training step, measured beside `diffalign estimate`.

    python benchmarks/memory.py [--models sd15 sdxl flux] [--cases NAME ...] [--heap]
        [--work FOLDER] [--output benchmarks/memory.md]

SD1.5 and SDXL have their full shapes, Flux has 12 of its 57 blocks, all with random
weights. Every case is a process of its own on the CPU: it fills its caches, drops the
encoders and the autoencoder as a run that loads them from a folder does, and trains
Diffusion-DPO with one pair: two steps of SD1.5, one of the others. Its highest resident
size while it trains counts, less that before the model was built. It first trains the
embedded model with the same settings, so that libraries are loaded before. Blocks of
128 KiB or more go back to the system when they are freed (MALLOC_MMAP_THRESHOLD_). By
default glibc keeps freed blocks of up to 32 MiB, which makes a process larger than its
tensors: --heap measures that. The estimate is of the same run, with what it says of
weights, optimizer, reference, activations and gradients. Finished cases lie in --work.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from leaderboard import kept

BLOCKS = 12
LORA = {"lora": True}
CASES: dict[str, dict[str, Any]] = {
    "LoRA, fp32": LORA,
    "LoRA, fp32, checkpointed": {**LORA, "gradient_checkpointing": True},
    "LoRA, bf16": {**LORA, "mixed_precision": "bf16"},
    "LoRA, bf16, checkpointed": {
        **LORA, "mixed_precision": "bf16", "gradient_checkpointing": True,
    },
    "LoRA, bf16, checkpointed, layerwise casting": {
        **LORA, "mixed_precision": "bf16", "gradient_checkpointing": True,
        "layerwise_casting": True,
    },
    "LoRA, bf16, precomputed reference": {
        **LORA, "mixed_precision": "bf16", "precompute_ref_errors": True,
    },
    "full, fp32, checkpointed": {"gradient_checkpointing": True},
    "full, bf16, checkpointed": {"mixed_precision": "bf16", "gradient_checkpointing": True},
}  # fmt: skip
SMALLEST = "LoRA, bf16, checkpointed"
DEFAULT = {"sd15": list(CASES), "sdxl": [SMALLEST], "flux": [SMALLEST]}
"""Model -> cases that fit 20 GB and take minutes on a CPU. --cases takes others."""


def trainer_of(model: str, case: str, work: Path, **more: Any) -> Any:
    """The trainer of a case, on one pair."""
    from full_size import SIZES, pipeline

    precision = CASES[case].get("mixed_precision", "no")
    is_half = precision == "bf16" and CASES[case].get("lora", False)
    dtype = torch.bfloat16 if is_half else torch.float32
    caches = work / f"cache-{model}-{precision}"
    return pair_trainer(pipeline(model, dtype, BLOCKS), SIZES[model], caches, case, **more)


def pair_trainer(pipe: Any, side: int, caches: Path, case: str, **more: Any) -> Any:
    """The trainer of any model with the settings of a case, on one pair."""
    from PIL import Image

    from diffalign import DataConfig, DiffusionDPOConfig, DiffusionDPOTrainer

    options = dict(CASES[case])
    peft_config = None
    if options.pop("lora", False):
        from peft import LoraConfig

        peft_config = LoraConfig(r=16, lora_alpha=16, init_lora_weights="gaussian")
    images = [Image.new("RGB", (side, side), colour) for colour in ("red", "blue")]
    rows = [{"prompt": "a red square", "chosen": images[0], "rejected": images[1]}] * 2
    return DiffusionDPOTrainer(
        model=pipe,
        args=DiffusionDPOConfig(
            output_dir=str(caches.parent / "run"),
            overwrite_output_dir=True,
            per_device_train_batch_size=1,
            ref_error_draws=1,
            **options,
            **more,
        ),
        train_dataset=rows,
        peft_config=peft_config,
        data=DataConfig(
            resolution=side, cache_latents=str(caches), cache_text_embeddings=str(caches)
        ),
    )


def resident() -> float:
    """Resident size of this process now, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return float(pages * resource.getpagesize())


def measure(model: str, case: str, work: Path) -> dict[str, float]:
    """In this process: train, and say the peak."""
    import diffusers  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401

    import diffalign  # noqa: F401

    pair_trainer("shapes", 64, work / "cache-shapes", case, max_steps=1).train()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident()
    trainer = trainer_of(model, case, work, max_steps=2 if model == "sd15" else 1)
    trainer.setup()
    for component in trainer.backbone.source.pipe.components.values():
        if isinstance(component, torch.nn.Module) and component is not trainer.network:
            component.to("meta")
    gc.collect()
    # The peak of loading and caching is not a step's.
    Path("/proc/self/clear_refs").write_text("5")
    trainer.save_model = lambda folder: None  # the encoders have no content any more
    trainer.train()
    status = Path("/proc/self/status").read_text()
    peak = float(status.partition("VmHWM:")[2].split()[0]) * 1024
    return {"bytes": peak - before}


def estimated(model: str, case: str) -> dict[str, float]:
    """The estimate of the same run, part by part."""
    from full_size import SIZES, step_estimate

    options = dict(CASES[case])
    lora = bool(options.pop("lora", False))
    result = step_estimate(model, BLOCKS, SIZES[model], lora, **options)
    return {**result.bytes, "flops": result.flops}


def alone(heap: bool, *arguments: object) -> dict[str, float]:
    """Runs this file in a process of its own."""
    block = {} if heap else {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
    done = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | block,
    )
    if done.returncode:
        raise SystemExit(f"{arguments}: {done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(DEFAULT), choices=list(DEFAULT))
    parser.add_argument("--cases", nargs="+", choices=list(CASES))
    parser.add_argument("--heap", action="store_true", help="leave glibc's heap as it is")
    parser.add_argument("--work", type=Path, default=Path("runs/memory"))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--estimate", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        model, case = options.measure
        print(json.dumps(measure(model, case, options.work)))
        return
    if options.estimate:
        model, case = options.estimate
        print(json.dumps(estimated(model, case)))
        return
    lines = [
        "# Peak memory of a step, measured and estimated",
        "",
        *str(__doc__).split("\n\n", 1)[1].rstrip().split("\n"),
        "",
        f"`python benchmarks/memory.py --models {' '.join(options.models)}`, measured on "
        f"{platform.machine()}, torch {torch.__version__.split('+')[0]}"
        f"{', with the heap as glibc keeps it' if options.heap else ''}.",
        "",
        "| model | case | measured, GiB | estimated, GiB | ratio | TFLOP of a step |",
        "|---|---|---|---|---|---|",
    ]
    work = options.work
    for model in options.models:
        for case in options.cases or DEFAULT[model]:
            name = f"{model}-{case}".replace(" ", "-").replace(",", "")
            where = (model, case, "--work", work)
            heap = options.heap
            file = work / f"{name}{'-heap' if heap else ''}.json"
            real = kept(file, partial(alone, heap, "--measure", *where))
            guess = kept(work / f"{name}-estimate.json", partial(alone, heap, "--estimate", *where))
            flops = guess.pop("flops") / 1e12
            total, peak = sum(guess.values()) / 2**30, real["bytes"] / 2**30
            lines.append(
                f"| {model} | {case} | {peak:.2f} | {total:.2f} | {total / peak:.2f} | "
                f"{flops:.1f} |"
            )
            print(lines[-1], flush=True)
    options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
