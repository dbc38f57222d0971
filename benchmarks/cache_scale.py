"""How long a tensor cache takes to open, by the number of its entries.

    python benchmarks/cache_scale.py [--entries 10000 100000 1000000] [--work FOLDER]
        [--output benchmarks/cache_scale.md]

An entry is the latent of a 64x64 image of the embedded model, 1 KiB, and a shard holds
512 of them. Every reading is made in a process of its own: opening without an index,
which writes it (once, or when many shards are new), opening with it, and 1,000 entries
at random places. Times leave out imports. Memory is what opening adds to the resident
size.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

from memory import resident

KEY = "latent-{:064d}"


def fill(folder: Path, entries: int) -> None:
    """Write the shards, if they are not there yet."""
    import torch

    from diffalign.data.cache import TensorCache

    cache = TensorCache(folder)
    latent = torch.zeros(4, 8, 8)
    for number in range(len(cache), entries):
        cache.add(KEY.format(number), {"latent": latent})
    cache.flush()


def worker(folder: Path, entries: int) -> None:
    """Open the cache and read from it."""
    import numpy  # noqa: F401
    import torch  # noqa: F401

    from diffalign.data.cache import TensorCache

    before, started = resident(), time.perf_counter()
    cache = TensorCache(folder)
    opened, size = time.perf_counter() - started, resident() - before
    if len(cache) != entries:
        raise SystemExit(f"{folder} holds {len(cache)} entries, not {entries}")
    chosen = random.Random(0).sample(range(entries), 1000)
    started = time.perf_counter()
    for number in chosen:
        cache[KEY.format(number)]
    read = time.perf_counter() - started
    print(json.dumps({"open": opened, "size": size, "read": read}))


def measured(folder: Path, entries: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", str(folder), str(entries)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entries", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--work", type=Path, default=Path("runs/cache_scale"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/cache_scale.md"))
    options = parser.parse_args()
    lines = [
        "| entries | shards | opening without an index, s | with it, s | memory of the opened "
        "cache, MiB | 1,000 random entries, s |",
        "|---" * 6 + "|",
    ]
    for entries in options.entries:
        folder = options.work / str(entries)
        fill(folder, entries)
        (folder / "index.safetensors").unlink(missing_ok=True)
        first, again = measured(folder, entries), measured(folder, entries)
        shards = len(list(folder.glob("shard-*")))
        lines.append(
            f"| {entries:,} | {shards:,} | {first['open']:.1f} | {again['open']:.2f} | "
            f"{again['size'] / 2**20:.0f} | {again['read']:.2f} |"
        )
        print(lines[-1], flush=True)
    options.output.write_text(
        "# Opening a cache of any size\n\n`python benchmarks/cache_scale.py`\n\n"
        + "\n".join(lines)
        + "\n"
    )


if __name__ == "__main__":
    if "--worker" in sys.argv:
        worker(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
