"""The demo under load: start, first image, twenty visitors at once, memory over two
hundred requests.

    python benchmarks/demo.py [--requests 200] [--output benchmarks/demo.md]

`diffalign demo` runs as a process of its own on the embedded pipeline; requests are
those of the page (two images of 20 steps with scores), sent through gradio's client.
Needs Linux (memory is read from /proc). About five minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gradio_client import Client

ROOT = Path(__file__).resolve().parents[1]
CALL = {
    "prompt": "a small red circle on the left of a gray background",
    "seed": 0,
    "steps": 20,
    "guidance": 2,
    "side": 64,
    "left": "base",
    "right": "diffusion-dpo",
    "scale": 1,
}
AT_ONCE = 20


def resident(pid: int) -> float:
    """MiB."""
    line = next(
        x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS")
    )
    return int(line.split()[1]) / 1024


def ask(client: Client, seed: int) -> float:
    started = time.perf_counter()
    _, _, status = client.predict(*{**CALL, "seed": seed}.values(), api_name="/compare")
    assert f"Seed {seed}," in status, status
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "demo.md")
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [sys.executable, "-m", "diffalign", "demo", "--port", str(port)]
        server = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            while True:
                try:
                    urllib.request.urlopen(url, timeout=2).read()
                    break
                except OSError:
                    time.sleep(0.05)
            facts: dict[str, Any] = {"start": time.perf_counter() - started}
            client = Client(url, verbose=False)
            facts["first"] = ask(client, 0)
            facts["second"] = ask(client, 1)
            clients = [Client(url, verbose=False) for _ in range(AT_ONCE)]
            with ThreadPoolExecutor(AT_ONCE) as pool:
                started = time.perf_counter()
                times = list(pool.map(ask, clients, range(AT_ONCE)))
                facts["all"], facts["last"] = time.perf_counter() - started, max(times)
            memory = [resident(server.pid)]
            for i in range(options.requests):
                ask(client, i)
                if (i + 1) % (options.requests // 8) == 0:
                    memory.append(resident(server.pid))
        finally:
            server.kill()
            server.wait()
    every = options.requests // 8
    body = [
        "# The demo under load",
        "",
        *(__doc__ or "").split("\n\n", 1)[1].rstrip().split("\n"),
        "",
        f"Measured on {platform.machine()}, {os.cpu_count()} CPU cores.",
        "",
        "| | |",
        "|---|---|",
        f"| from the command to a page that answers, s | {facts['start']:.1f} |",
        f"| first pair of images with scores, s | {facts['first']:.1f} |",
        f"| second pair, s | {facts['second']:.1f} |",
        f"| {AT_ONCE} requests at once: answered | {AT_ONCE} of {AT_ONCE} |",
        f"| ... all within, s | {facts['all']:.1f} |",
        "",
        f"Resident memory after the {AT_ONCE} and then after every {every} of {options.requests} "
        "more requests, MiB: "
        + ", ".join(f"{x:.0f}" for x in memory)
        + f". From the second to the last: {memory[-1] - memory[1]:+.0f}.",
    ]
    options.output.write_text("\n".join(body) + "\n")
    print("\n".join(body))


if __name__ == "__main__":
    main()
