"""Memory of each process of a run on several, measured beside `diffalign estimate`.

    python benchmarks/sharded_memory.py [--work FOLDER] [--output FILE]

Measured: a network of SD1.5's shape with half its widths and random weights, trained by
Diffusion-DPO with one pair of 256 pixels per process, by two gloo processes on CPUs, as
DDP and spread by FSDP2. The highest resident size of a process while it trains counts,
less that before the model was built. The larger of the two is shown. Simulated: 8 and
64 processes of the same run. The simulation runs one process of them on tensors without
content, with torch's process group that only pretends to send. A process first trains
the embedded model in the same way, so that libraries are loaded and threads run before
the first reading.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
SIDE = 256
CASES = {"full": False, "LoRA": True}
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}


def half_width() -> Any:
    """A pipeline of SD1.5's shape with half its widths."""
    import diffusers
    from full_size import pipeline

    pipe = pipeline("sd15", torch.float32)
    pipe.unet = diffusers.UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, block_out_channels=(160, 320, 640, 640)
    )
    return pipe


def run_file(model: Path, lora: bool, folder: Path) -> dict[str, Any]:
    return {
        "method": "diffusion_dpo",
        "model": str(model),
        **({"lora": {"r": 16, "alpha": 16}} if lora else {}),
        "data": {
            "dataset_name": str(folder / "pairs.parquet"),
            "resolution": SIDE,
            "cache_latents": str(folder / "cache"),
            "cache_text_embeddings": str(folder / "cache"),
        },
        "train": {
            "output_dir": str(folder / "run"),
            "overwrite_output_dir": True,
            "per_device_train_batch_size": 1,
            "max_steps": 2,
            "save_steps": None,
        },
    }


def prepare(work: Path) -> Path:
    """Write the model and the pairs, if they are not there yet."""
    model = work / "model"
    if not (model / "model_index.json").is_file():
        half_width().save_pretrained(model)
    pairs = work / "pairs.parquet"
    if not pairs.is_file():
        import datasets
        from PIL import Image

        images = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "blue")]
        row = {"prompt": "a red square", "chosen": images[0], "rejected": images[1]}
        datasets.Dataset.from_list([row] * 4).to_parquet(pairs)
    return model


def worker(path: str) -> None:
    """One process of a measured run: train, and write the peak."""
    import diffusers  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401
    from memory import resident

    from diffalign.recipe import build_trainer, load_run

    torch.set_num_threads(1)
    folder = Path(path).parent / f"warm-up-{Path(path).stem}"
    small = ["--model", "shapes", "--data.resolution", "64", "--train.output_dir", str(folder)]
    build_trainer(load_run(Path(path), [*small, "--data.cache_latents", f"{folder}/cache"])).train()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident()
    trainer = build_trainer(load_run(Path(path), []))
    trainer.setup()
    gc.collect()
    # The peak of loading is not a step's.
    Path("/proc/self/clear_refs").write_text("5")
    trainer.state.max_steps = 2
    trainer.checkpoints.save = lambda state: trainer.output_dir  # type: ignore[method-assign]
    trainer.save_model = lambda folder: None  # type: ignore[method-assign]
    trainer.train()
    status = Path("/proc/self/status").read_text()
    peak = float(status.partition("VmHWM:")[2].split()[0]) * 1024
    rank = trainer.accelerator.process_index
    Path(f"{path}.{rank}").write_text(json.dumps(peak - before))


def measured(path: Path, sharded: bool) -> float:
    """Bytes of the larger of two processes."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024), "OMP_NUM_THREADS": "1"}
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *(__file__, "--worker", str(path)),
    ]
    done = subprocess.run(
        command, env=environment | (FSDP if sharded else {}), capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return max(json.loads(Path(f"{path}.{rank}").read_text()) for rank in (0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/sharded_memory"))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "sharded_memory.md")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    import yaml

    from diffalign.cli.estimate import estimate_run
    from diffalign.recipe import load_run
    from diffalign.training.estimate import GIB, Layout

    model, lines = prepare(work), []
    for case, lora in CASES.items():
        path = work / f"{case}.yaml"
        path.write_text(yaml.safe_dump(run_file(model, lora, work)))
        run = load_run(path, [])
        for name, shards in (("ddp", 1), ("fsdp2", 2)):
            found = measured(path, shards > 1)
            expected = estimate_run(run, Layout(2, shards)).peak
            lines.append(
                f"| {case}, {name}, 2 processes | {found / GIB:.2f} | {expected / GIB:.2f} | "
                f"{expected / found - 1:+.1%} |"
            )
            print(lines[-1], flush=True)
        layouts = [("ddp", n, 1) for n in (8, 64)] + [("fsdp2", n, n) for n in (8, 64)]
        for name, processes, shards in [*layouts, ("hsdp", 64, 8)]:
            size = estimate_run(run, Layout(processes, shards)).peak
            lines.append(f"| {case}, {name}, {processes} processes | - | {size / GIB:.2f} | |")
            print(lines[-1], flush=True)
    options.output.write_text(
        "# Memory of each process\n\n`python benchmarks/sharded_memory.py`\n\n"
        "| run | measured, GiB | estimated, GiB | difference |\n|---|---|---|---|\n"
        + "\n".join(lines)
        + "\n"
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    if "--worker" in sys.argv:
        worker(sys.argv[-1])
    else:
        main()
