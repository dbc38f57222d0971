"""How long a run takes to start, and what it keeps in memory, by the number of rows.

    python benchmarks/data_scale.py [--rows 10000 100000 1000000] [--work FOLDER]
        [--output benchmarks/data_scale.md]

Makes pairs of 64x64 JPEG images in parquet shards, and starts Diffusion-DPO on the
embedded model with them, each time in a process of its own: for the first time (when
`datasets` prepares its files), and again. Then a run on the same shards as a stream
resumes in the middle, in a process that has read nothing before. Times are from the
start of the process to the end of the first optimizer step, and without the imports.
Memory is the highest resident size of the process, and the part of it that is no file.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHARDS = 8
POOL = 200  # distinct images


def make_data(folder: Path, rows: int) -> None:
    """Write the shards, if they are not there yet."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    if (folder / "done").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    images = []
    for _ in range(POOL):
        buffer = io.BytesIO()
        pixels = noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64)).save(buffer, "jpeg", quality=80)
        images.append(buffer.getvalue())
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("prompt", pa.string()), ("chosen", kind), ("rejected", kind)])
    for shard in range(SHARDS):
        path = folder / f"train-{shard:05d}-of-{SHARDS:05d}.parquet"
        with pq.ParquetWriter(path, schema) as writer:
            mine = range(shard * rows // SHARDS, (shard + 1) * rows // SHARDS)
            for start in range(mine.start, mine.stop, 10_000):
                part = range(start, min(start + 10_000, mine.stop))
                cells = [
                    [{"bytes": images[(i * k) % POOL], "path": None} for i in part] for k in (3, 7)
                ]
                prompts = [f"a large red circle number {i % 50_000}" for i in part]
                columns = [pa.array(prompts), *(pa.array(each, kind) for each in cells)]
                writer.write_table(pa.table(columns, schema=schema))
    (folder / "done").touch()


def measured(mode: str, data: Path, output: Path, cache: Path, *more: object) -> dict[str, float]:
    """Run this file once more as a worker, and read what it says."""
    environment = os.environ | {
        "HF_DATASETS_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "STARTED": repr(time.time()),
    }
    command = [sys.executable, __file__, "--worker", mode, str(data), str(output), *map(str, more)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def memory() -> dict[str, float]:
    """Gigabytes: the highest resident size, and what of the present one is no file."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    read = {name: int(fields[name].split()[0]) / 2**20 for name in ("VmHWM", "RssAnon")}
    return {"resident": read["VmHWM"], "anonymous": read["RssAnon"]}


def worker(mode: str, data: str, output: str, until: int = 0) -> None:
    """Start a run, and say how long it took."""
    started = float(os.environ["STARTED"])
    import torch
    from peft import LoraConfig

    from diffalign import DataConfig, DiffusionDPOConfig, DiffusionDPOTrainer

    torch.set_num_threads(1)
    imported = time.time()
    streaming = mode.startswith("stream")
    batch = 8
    steps = 1
    if streaming:
        steps = until // batch + (2 if mode == "stream-resume" else 0)
    trainer = DiffusionDPOTrainer(
        "shapes",
        args=DiffusionDPOConfig(
            output_dir=output,
            max_steps=max(steps, 1),
            per_device_train_batch_size=batch,
            save_steps=None,
            report_to="none",
        ),
        peft_config=LoraConfig(r=4),
        data=DataConfig(
            dataset_name=data,
            dataset_streaming=streaming,
            resolution=64,
            verify_images="none" if streaming else "auto",
        ),
    )
    read = time.time()
    if mode == "stream-fill":
        fill_stream(trainer, until // batch)
    else:
        trainer.train(resume_from_checkpoint="latest" if mode == "stream-resume" else None)
    ended = time.time()
    print(
        json.dumps(
            {
                "imports": imported - started,
                "data": read - imported,
                "all": ended - started,
                "step": ended - read,
                **memory(),
            }
        )
    )


def fill_stream(trainer: Any, steps: int) -> None:
    """Walk the stream up to a step without training, and write the checkpoint there."""
    from diffalign.training.group_reader import StreamPosition

    trainer.setup()
    data = trainer.data_pipeline
    groups = steps * data.global_batch
    next(itertools.islice(data.stream, groups - 1, None))
    data.positions, data.streamed = [StreamPosition(0, data.stream.state_dict())], groups
    trainer.state.global_step, trainer.state.samples_seen = steps, groups
    trainer.output_dir.mkdir(parents=True, exist_ok=True)
    trainer.checkpoints.save(trainer.state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--work", type=Path, default=Path("runs/data_scale"))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "data_scale.md")
    parser.add_argument("--no_stream", action="store_true")
    options = parser.parse_args()
    results: dict[int, dict[str, dict[str, float]]] = {}
    for rows in options.rows:
        data, cache = options.work / f"pairs-{rows}", options.work / f"cache-{rows}"
        make_data(data, rows)
        shutil.rmtree(cache, ignore_errors=True)
        found = {}
        for name in ("first", "again"):
            output = options.work / f"run-{rows}"
            shutil.rmtree(output, ignore_errors=True)
            found[name] = measured("table", data, output, cache)
            print(rows, name, found[name], flush=True)
        if not options.no_stream:
            output = options.work / f"stream-{rows}"
            shutil.rmtree(output, ignore_errors=True)
            measured("stream-fill", data, output, cache, rows // 2)
            found["resumed"] = measured("stream-resume", data, output, cache, rows // 2)
            print(rows, "resumed", found["resumed"], flush=True)
        results[rows] = found
    write(results, options.output)


def write(results: dict[int, dict[str, dict[str, float]]], output: Path) -> None:
    lines = [
        "| rows | start | seconds | without imports | reading the data | resident GB |"
        " not files GB |",
        "|---" * 7 + "|",
    ]
    for rows, found in results.items():
        for name, values in found.items():
            numbers = [values["all"], values["all"] - values["imports"], values["data"]]
            seconds = " | ".join(f"{number:.1f}" for number in numbers)
            sizes = f"{values['resident']:.2f} | {values['anonymous']:.2f}"
            lines.append(f"| {rows:,} | {name} | {seconds} | {sizes} |")
    draw(results, output.with_suffix(".png"))
    output.write_text(
        "# Starting on data of any size\n\n`python benchmarks/data_scale.py`\n\n"
        + "\n".join(lines)
        + f"\n\n![Seconds and memory by rows]({output.with_suffix('.png').name})\n"
    )


def draw(results: dict[int, dict[str, dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (seconds, memory_axes) = plt.subplots(1, 2, figsize=(9, 3.5))
    for name in next(iter(results.values())):
        rows = [count for count, found in results.items() if name in found]
        spent = [results[r][name]["all"] - results[r][name]["imports"] for r in rows]
        seconds.plot(rows, spent, "o-", label=name)
        memory_axes.plot(rows, [results[r][name]["resident"] for r in rows], "o-", label=name)
    seconds.set_ylabel("seconds to the first step, without imports")
    memory_axes.set_ylabel("highest resident size, GB")
    for axes in (seconds, memory_axes):
        axes.set_xscale("log")
        axes.set_xlabel("rows")
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        mode, data, output, *until = sys.argv[2:]
        worker(mode, data, output, *map(int, until))
    else:
        main()
