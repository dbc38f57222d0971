"""Images per second of the reward scorers: a batched call beside scoring one by one,
and the cache beside scoring.

    python benchmarks/scoring.py [--full] [--rounds 9] [--output benchmarks/scoring.md]

64 PNG files with 8 distinct prompts: 64x64 for shapes-clip and tiny weights, 512x512
for towers of full size. Weights are random, in the published formats, written to a
temporary folder and loaded by `load_scorer`: tiny ones always, towers of full size
(ViT-L/14, ViT-H/14, BLIP ViT-L with BERT) with --full, which takes about half an hour
on two cores and 12 GiB of memory. The ways take turns within each round, with towers of
full size after every 8 images, and medians over rounds count:

* batched: one call `scorer(images, prompts)`;
* one by one: 64 calls of the same scorer with one image each;
* README loop: what PickScore's and CLIP's own READMEs do, processor and model on one
  image and one prompt at a time, on transformers; only where it runs on the installed
  versions.

The shares say where the time of a batched call goes; reading and resizing run in
threads beside the towers, so they can add up to more than the whole.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import io
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "rewards"), str(ROOT)]

PROMPTS = [
    f"a photograph of a {color} {thing}"
    for color in ("red", "blue")
    for thing in ("car", "house", "bird", "tree")
]


def encoded_images(count: int, size: int) -> list[bytes]:
    """PNG files of smooth random pictures, as generators write them."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((size, size), Image.Resampling.BICUBIC).save(buffer, format="PNG")
        files.append(buffer.getvalue())
    return files


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def staged(scorer: Any, call: Callable[[], Any]) -> tuple[dict[str, float], float]:
    """(seconds spent in each stage of one call, its length)."""
    spent = dict.fromkeys(("read and resize", "text", "vision", "head"), 0.0)
    stages = {
        "prepare_item": "read and resize",
        "text_features": "text",
        "image_features": "vision",
        "similarity": "head",
    }

    def watch(name: str, stage: str) -> None:
        inner = getattr(scorer, name)

        def outer(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*arguments)
            finally:
                spent[stage] += time.perf_counter() - start

        setattr(scorer, name, outer)

    for name, stage in stages.items():
        watch(name, stage)
    whole = timed(call)
    for name in stages:
        delattr(scorer, name)
    return spent, whole


def readme_loop(scorer: Any) -> Callable[[list[Image.Image], list[str]], None] | None:
    """One image and one prompt at a time through transformers' own processor and model,
    without our code."""
    clip = getattr(scorer, "clip", None)
    if type(clip).__name__ != "HFClip" or scorer.heads():
        return None
    from transformers import CLIPImageProcessorPil

    size = scorer.preprocess.size
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )

    def run(images: list[Image.Image], prompts: list[str]) -> None:
        with torch.no_grad():
            for image, prompt in zip(images, prompts, strict=True):
                pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
                text = clip.tokenizer(
                    [prompt],
                    padding=True,
                    truncation=True,
                    max_length=clip.max_length,
                    return_tensors="pt",
                )
                image_features = clip.module.get_image_features(pixel_values=pixels).pooler_output
                text_features = clip.module.get_text_features(**text).pooler_output
                image_features = image_features / image_features.norm(dim=-1, keepdim=True)
                text_features = text_features / text_features.norm(dim=-1, keepdim=True)
                (clip.module.logit_scale.exp() * (text_features * image_features).sum()).item()

    return run


def measure(
    label: str, scorer: Any, files: list[bytes], rounds: int, block: int | None = None
) -> dict[str, Any]:
    """Medians over rounds of each way's images per second. The ways take turns after
    every `block` images, or after all of them."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(files))]
    if scorer.name.startswith("shapes"):
        from diffalign.shapes import train_prompts

        prompts = [train_prompts()[i % len(PROMPTS)] for i in range(len(files))]

    def batched(part: slice) -> None:
        scorer(files[part], prompts[part])

    def one_by_one(part: slice) -> None:
        for file, prompt in zip(files[part], prompts[part], strict=True):
            scorer([file], [prompt])

    ways: dict[str, Callable[[slice], Any]] = {"batched": batched, "one by one": one_by_one}
    loop = readme_loop(scorer)
    if loop is not None:
        ways["README loop"] = lambda part: loop(
            [Image.open(io.BytesIO(file)) for file in files[part]], prompts[part]
        )
    scorer(files[:2], prompts[:2])  # first calls allocate
    times: dict[str, list[float]] = {name: [] for name in ways}
    spent: dict[str, float] = {}
    for _ in range(rounds):
        sums = dict.fromkeys(ways, 0.0)
        for start in range(0, len(files), block or len(files)):
            part = slice(start, start + (block or len(files)))
            for name, way in ways.items():
                if start == 0:
                    scorer.forget_prompts()
                if name == "batched":
                    stages, seconds = staged(scorer, lambda way=way, part=part: way(part))
                    spent = {
                        stage: spent.get(stage, 0.0) + value for stage, value in stages.items()
                    }
                else:
                    seconds = timed(lambda way=way, part=part: way(part))
                sums[name] += seconds
        for name, seconds in sums.items():
            times[name].append(seconds)
    speed = {name: len(files) / statistics.median(values) for name, values in times.items()}
    shares = {stage: seconds / sum(times["batched"]) for stage, seconds in spent.items()}
    print(
        label,
        {k: round(v, 2) for k, v in speed.items()},
        {k: round(v, 2) for k, v in shares.items()},
        flush=True,
    )
    return {"label": label, "speed": speed, "shares": shares}


def measure_cache(
    load: Callable[..., Any], folder: Path, size: int, rounds: int
) -> tuple[float, float]:
    """Seconds for 1,000 images: scored, and answered from the cache."""
    files = encoded_images(1000, size)
    paths = []
    for i, data in enumerate(files):
        paths.append(folder / f"known-{i}.png")
        paths[-1].write_bytes(data)
    from diffalign.shapes import train_prompts

    prompts = [train_prompts()[i % 100] for i in range(len(paths))]
    scorer = load(cache=folder / "scores.sqlite")
    plain = load()
    scorer(paths, prompts)
    scored = statistics.median(timed(lambda: plain(paths, prompts)) for _ in range(rounds))
    known = statistics.median(timed(lambda: scorer(paths, prompts)) for _ in range(rounds))
    print(
        f"1,000 images: scored in {scored:.3f} s, known in {known:.4f} s, {scored / known:.0f} "
        "times faster",
        flush=True,
    )
    return scored, known


def tiny_scorers(folder: Path) -> list[tuple[str, Any]]:
    """Scorers of every family on the tiny random checkpoints of the tests."""
    from models import MODELS, load_tiny

    return [
        (f"{name}, tiny", load_tiny(name, folder))
        for name in MODELS
        if name not in ("shapes-clip", "hpsv2.0", "aesthetic-v1")
    ]


def full_scorers(folder: Path) -> list[tuple[str, Callable[[], Any]]]:
    """Loaders of the published architectures and formats with random weights."""
    return [
        ("clip-l14, ViT-L/14", lambda: full_clip("clip-l14", folder / "l14", VIT_L14)),
        ("imagereward, BLIP ViT-L/16 + BERT", lambda: full_imagereward(folder / "blip-l")),
        ("pickscore, ViT-H/14", lambda: full_clip("pickscore", folder / "h14", VIT_H14)),
    ]


VIT_L14: dict[str, Any] = {
    "projection_dim": 768,
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
    "text_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
}
VIT_H14: dict[str, Any] = {
    "projection_dim": 1024,
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
}


def full_clip(name: str, folder: Path, config: dict[str, Any]) -> Any:
    from transformers import CLIPConfig, CLIPModel

    from diffalign import load_scorer
    from diffalign.rewards.testing import reference_models as checkpoints

    CLIPModel(CLIPConfig(**config)).save_pretrained(folder)
    checkpoints.write_clip_tokenizer(folder)
    scorer = load_scorer(name, model=folder)
    shutil.rmtree(folder)
    return scorer


def full_imagereward(folder: Path) -> Any:
    from diffalign import load_scorer
    from diffalign.rewards.testing import reference_models as checkpoints

    packed = (
        ROOT / "tests" / "rewards" / "fixtures" / "imagereward_full_keys.json.gz"
    ).read_bytes()
    shapes = json.loads(gzip.decompress(packed))["shapes"]
    state = {
        name: torch.randn(shape) * 0.02
        if "position_ids" not in name
        else torch.arange(shape[-1])[None]
        for name, shape in shapes.items()
    }
    for name in state:
        if ("norm" in name.lower()) and name.endswith("weight"):
            state[name] = torch.ones_like(state[name])
    folder.mkdir()
    torch.save(state, folder / "ImageReward.pt")
    words = checkpoints.bert_vocabulary()
    (folder / "vocab.txt").write_text(
        "\n".join([*words, *(f"filler{i}" for i in range(30522 - len(words)))]) + "\n"
    )
    scorer = load_scorer("imagereward", model=folder)
    shutil.rmtree(folder)
    return scorer


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        (
            "| scorer | batched, images/s | one by one | ratio | README loop | ratio | read and "
            "resize | text | vision | head |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        speed, part = row["speed"], row["shares"]
        loop = speed.get("README loop")
        cells = [
            row["label"],
            f"{speed['batched']:.3g}",
            f"{speed['one by one']:.3g}",
            f"{speed['batched'] / speed['one by one']:.2f}",
            f"{loop:.3g}" if loop else "–",
            f"{speed['batched'] / loop:.2f}" if loop else "–",
            *(
                f"{100 * part[name]:.0f} %"
                for name in ("read and resize", "text", "vision", "head")
            ),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="also towers of full size")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--full_rounds", type=int, default=1)
    parser.add_argument("--full_images", type=int, default=64)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    from diffalign import load_scorer

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows.append(
            measure(
                "shapes-clip", load_scorer("shapes-clip"), encoded_images(64, 64), options.rounds
            )
        )
        files = encoded_images(64, 64)
        for label, scorer in tiny_scorers(folder):
            rows.append(measure(label, scorer, files, options.rounds))
        scored, known = measure_cache(
            lambda **extra: load_scorer("shapes-clip", **extra), folder, 64, options.rounds
        )
        files = encoded_images(options.full_images, 512)
        for label, load in full_scorers(folder) if options.full else []:
            rows.append(measure(label, load(), files, options.full_rounds, block=8))
            gc.collect()
    lines = [
        "# Speed of the reward scorers",
        "",
        f"Made by `python benchmarks/scoring.py{' --full' if options.full else ''}` on "
        f"{os.cpu_count()} CPU cores ({platform.machine()}), float32, torch {torch.__version__}. "
        f"64 images, 8 distinct prompts, micro-batches of 8; medians of {options.rounds} rounds "
        f"({options.full_rounds} for towers of full size). What each column is stands at the head "
        "of the script.",
        "",
        *table(rows),
        "",
        f"The cache answers 1,000 known 64x64 PNG files in {known * 1000:.0f} ms; shapes-clip "
        f"scores them in {scored:.2f} s: {scored / known:.0f} times faster.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
