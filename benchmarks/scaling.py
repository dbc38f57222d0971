"""How time grows: with processes, particles, prompts and images per list.

    python benchmarks/scaling.py [--output benchmarks/scaling.md]

On the embedded model, one thread per process. *Processes*: groups per second of LoRA
Diffusion-DPO with 8 groups per process, by one process and by two (gloo), as DDP and
spread by FSDP2; efficiency is the speed of two against twice that of one. *Particles*:
seconds of one steered prompt. *Prompts*: seconds to draw them. *Images per list*:
seconds of a RankDPO step. All are medians of steps or calls after a warm-up. Growth
with the number of rows is in `data_scale.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STEPS, WARM_UP = 14, 4
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}


def rows(count: int, images: int) -> list[dict[str, Any]]:
    """Lists of noise, with a prompt each."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0)

    def picture() -> Image.Image:
        return Image.fromarray(noise.integers(0, 256, (64, 64, 3), dtype=np.uint8))

    prompt = "a small red circle on the left of a gray background"
    scores = [float(i) for i in range(images)]
    return [
        {"prompt": prompt, "images": [picture() for _ in range(images)], "scores": scores}
        for _ in range(count)
    ]


def steps(method: str, images: int, batch: int) -> float:
    """Seconds of an optimizer step in this process."""
    import torch
    from peft import LoraConfig

    from diffalign import DataConfig, TrainerCallback
    from diffalign.methods import config_class, trainer_class

    torch.set_num_threads(1)
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(method)(
            "shapes",
            args=config_class(method)(
                output_dir=folder,
                max_steps=STEPS,
                per_device_train_batch_size=batch,
                save_steps=None,
                overwrite_output_dir=True,
                **({} if method == "rankdpo" else {"beta": 500.0}),
            ),
            train_dataset=rows(32, images),
            peft_config=LoraConfig(r=16),
            data=DataConfig(resolution=64),
            callbacks=[Clock()],
        )
        trainer.save_model = lambda folder: None
        trainer.train()
    return statistics.median(
        b - a for a, b in zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False)
    )


def speed(processes: int, engine: str) -> float:
    """Groups per second of all processes together."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (FSDP if engine == "fsdp2" else {})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "seconds"
        command = [sys.executable, *(launcher if processes > 1 else []), __file__]
        subprocess.run(
            [*command, "--worker", str(file)], env=environment, check=True, capture_output=True
        )
        return 8 * processes / float(json.loads(file.read_text()))


def worker(file: str) -> None:
    seconds = steps("diffusion_dpo", 2, 8)
    if os.environ.get("RANK", "0") == "0":
        Path(file).write_text(json.dumps(seconds))


def median_of(call: Any, times: int = 3) -> float:
    call()
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "scaling.md")
    options = parser.parse_args()
    import torch

    from diffalign import FKSteering, load_scorer
    from diffalign.generation.pipelines import load_pipeline
    from diffalign.generation.sampling import generate

    torch.set_num_threads(1)
    lines = ["| processes | groups per second | efficiency |", "|---|---|---|"]
    one = speed(1, "ddp")
    lines.append(f"| 1 | {one:.1f} | |")
    for engine in ("ddp", "fsdp2"):
        two = speed(2, engine)
        lines.append(f"| 2, {engine} | {two:.1f} | {two / (2 * one):.2f} |")
    pipe = load_pipeline("shapes", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    scorer = load_scorer("shapes-clip", device="cpu")
    prompt = "a large yellow star on the right of a black background"

    def steered(particles: int) -> Any:
        sampler = FKSteering(pipe, scorer, num_particles=particles, lmbda=10.0, kernel="ddim")
        return lambda: sampler([prompt], seed=0, num_inference_steps=10, guidance_scale=2.0)

    def drawn(count: int) -> Any:
        return lambda: generate(
            pipe, [prompt] * count, list(range(count)), num_inference_steps=10, progress=False
        )

    tables = {
        "particles": {n: median_of(steered(n)) for n in (1, 2, 4, 8, 16)},
        "prompts": {n: median_of(drawn(n)) for n in (8, 16, 32, 64)},
        "images per list": {n: steps("rankdpo", n, 4) for n in (2, 4, 8)},
    }
    for name, found in tables.items():
        base = next(iter(found.values())) / next(iter(found))
        lines += ["", f"| {name} | seconds | seconds of each, against the first |", "|---|---|---|"]
        lines += [f"| {n} | {s:.2f} | {s / n / base:.2f} |" for n, s in found.items()]
    options.output.write_text(
        "# How time grows\n\n`python benchmarks/scaling.py`\n\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    if "--worker" in sys.argv:
        worker(sys.argv[-1])
    else:
        main()
