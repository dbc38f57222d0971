"""Compare the numbers of two commits bit for bit, on one machine, with one thread.

    python tools/compare_commits.py BEFORE AFTER [--work FOLDER] [--parts PART ...]

Each commit is checked out into a git worktree. The same commands run in it: 20 steps
of every method's configs/*/shapes.yaml, `diffalign compare`, steering with fixed seeds
and the scores of every embedded scorer. The parts are data, train, compare, steer and
scores. Nothing is stored in the repository, since other processors round differently. A
finished part is kept in --work, so that an interrupted comparison goes on. Exits with 1
where something differs.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PARTS = ("data", "train", "compare", "steer", "scores")
STEPS = 20
PROMPTS, IMAGES = 48, 4
UNEQUAL_BY_NATURE = (
    "seconds",
    "time",
    "versions",
    "date",
    "path",
    "output_dir",
    "folder",
    "described",
)
"""Keys of result files that hold clocks and places."""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "diffalign", *arguments]


def build(folder: Path) -> None:
    """The ranked dataset and its recaptioned copy."""
    options = ["--models", "shapes", "--scorers", "shapes", "--batch_size", "32"]
    size = ["--max_prompts", str(PROMPTS), "--num_images", str(IMAGES)]
    run("data", "build", "--prompts", "shapes", *options, *size, "--output_dir", folder / "data")
    names = ["--strategy", "h", "--captioner", "shapes", "--perturber", "shapes"]
    dataset = folder / "data" / "ranked"
    run("data", "recaption", dataset, *names, "--output_dir", folder / "recaptioned")


def run(*arguments: Any) -> None:
    subprocess.run(command(*map(str, arguments)), check=True, stdout=subprocess.DEVNULL)


def train(folder: Path) -> None:
    """Twenty steps of every method of configs/."""
    for config in sorted(Path("configs").glob("*/shapes*.yaml")):
        if config.parent.name == "rewards":
            continue
        captions = config.parent.name == "dcpo"
        data = folder / ("recaptioned/data" if captions else "data/ranked")
        name = f"{config.parent.name}-{config.stem}"
        output = folder / "train" / name
        if (output / "pytorch_lora_weights.safetensors").is_file():
            continue
        shutil.rmtree(output, ignore_errors=True)
        cache = folder / "cache" / name
        changes = {
            "data.dataset_name": data,
            "data.cache_text_embeddings": cache,
            "train.output_dir": output,
            "train.max_steps": STEPS,
            "train.save_steps": 10,
            "train.per_device_train_batch_size": 8,
        }
        text = config.read_text()
        if "warmup_steps" in text:
            changes["train.warmup_steps"] = 2
        if "cache_latents" in text:
            changes["data.cache_latents"] = cache
        if "validation:" in text:
            changes["validation.validation_steps"] = 10
        options = [part for key, value in changes.items() for part in (f"--{key}", str(value))]
        run("train", "--config", config, *options)


def compare(folder: Path) -> None:
    """Two trained models against the base."""
    tuned = [
        part
        for name in ("diffusion_dpo-shapes", "rankdpo-shapes")
        for part in ("--tuned", str(folder / "train" / name))
    ]
    size = ["--max_prompts", "8", "--num_images", "2", "--num_inference_steps", "10"]
    run(
        "compare",
        *tuned,
        *size,
        "--scorers",
        "shapes,shapes-clip",
        "--output_dir",
        folder / "compare",
    )


def steer(folder: Path) -> None:
    """Latents, weights and genealogies of steered populations, in Python."""
    import torch
    from diffusers import DDIMScheduler

    from diffalign import FKSteering

    pipe = base_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    prompts = [
        "a small red circle on the left of a gray background",
        "a large blue star in the center of a white background",
    ]
    arms: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "own": ({}, {"eta": 1.0}),
        "ddim": ({"kernel": "ddim", "scheme": "residual"}, {}),
        "ancestral": ({"kernel": "ancestral", "potential": "max"}, {}),
        "target": ({"kernel": "ddim", "lmbda": None, "ess_target": 0.5}, {}),
        "split": ({"kernel": "ddim", "model_batch_size": 3, "scheme": "multinomial"}, {}),
    }
    results: dict[str, Any] = {}
    for name, (options, call) in arms.items():
        steering = FKSteering(pipe, "shapes", **{"num_particles": 4, "lmbda": 4.0, **options})
        result = steering(prompts, num_inference_steps=10, guidance_scale=2.0, seed=3, **call)
        for field in ("latents", "log_weights", "log_z", "rewards", "lmbda"):
            results[f"{name}.{field}"] = getattr(result, field).double().tolist()
        results[f"{name}.roots"] = result.roots.tolist()
        results[f"{name}.ess"] = [float(value) for value in torch.as_tensor(result.final_ess)]
    (folder / "steer.json").write_text(json.dumps(results))


def base_pipeline() -> Any:
    """The embedded pipeline, wherever this commit keeps its loader."""
    from importlib import import_module

    for place in ("generation.pipelines", "shapes.quickstart"):
        module = f"diffalign.{place}"
        try:
            return import_module(module).base_pipeline()
        except (ImportError, AttributeError):
            continue
    raise SystemExit("no base_pipeline in this commit")


def scores(folder: Path) -> None:
    """Scores of the built images by every scorer that works without a download."""
    import pyarrow.parquet as pq
    from PIL import Image

    from diffalign import list_scorers, load_scorer

    table = pq.read_table(next((folder / "data" / "ranked").glob("*.parquet")))
    images, prompts = [], []
    for row in table.slice(0, 12).to_pylist():
        for cell in row["images"]:
            images.append(Image.open(io.BytesIO(cell["bytes"])).convert("RGB"))
            prompts.append(row["prompt"])
    results: dict[str, list[float]] = {}
    for name in list_scorers():
        if name.startswith(("shapes", "jpeg")):
            results[name] = [float(value) for value in load_scorer(name)(images, prompts)]
    (folder / "scores.json").write_text(json.dumps(results))


def probe(folder: Path, parts: list[str]) -> None:
    """Runs the parts in this checkout."""
    work = {"data": build, "train": train, "compare": compare, "steer": steer, "scores": scores}
    for part in parts:
        mark = folder / f"{part}.done"
        if not mark.is_file():
            work[part](folder)
            mark.write_text("")
            print(f"  {part}", flush=True)


def plain(value: Any) -> Any:
    """Leave out what may differ: clocks, versions, places, and fingerprints of files.

    safetensors writes the metadata of a file in an order that changes from run to run,
    so the hash of a LoRA changes while its tensors are equal.
    """
    if isinstance(value, dict):
        return {
            key: plain(item)
            for key, item in value.items()
            if not any(word in str(key) for word in UNEQUAL_BY_NATURE)
        }
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value):
        return None
    return [plain(item) for item in value] if isinstance(value, list) else value


def differences(first: Path, second: Path, parts: list[str]) -> list[str]:
    """What is not bit-equal between two folders of results."""
    import pyarrow.parquet as pq
    from safetensors.numpy import load_file

    found: list[str] = []
    names: set[str] = set()
    for folder in (first, second):
        patterns = []
        if "data" in parts:
            patterns += ["data/**/*.png", "data/ranked/*.parquet", "recaptioned/data/*.parquet"]
        if "train" in parts:
            patterns += ["train/*/pytorch_lora_weights.safetensors"]
        if "compare" in parts:
            patterns += ["compare/*.json", "compare/**/*.png"]
        patterns += [f"{part}.json" for part in ("steer", "scores") if part in parts]
        names |= {str(p.relative_to(folder)) for pattern in patterns for p in folder.glob(pattern)}
    for name in sorted(names):
        a, b = first / name, second / name
        if not a.is_file() or not b.is_file():
            found.append(f"{name}: only in {'the second' if b.is_file() else 'the first'}")
        elif name.endswith(".safetensors"):
            one, two = load_file(a), load_file(b)
            unequal = [k for k in one if k not in two or one[k].tobytes() != two[k].tobytes()]
            if unequal or one.keys() != two.keys():
                found.append(f"{name}: {len(unequal)} of {len(one)} tensors")
        elif name.endswith(".json"):
            one, two = (plain(json.loads(path.read_text())) for path in (a, b))
            found += [name] if one != two else []
        elif name.endswith(".parquet"):
            found += [name] if not pq.read_table(a).equals(pq.read_table(b)) else []
        elif a.read_bytes() != b.read_bytes():
            found += [name]
    print(f"{len(names)} files compared")
    return found if names else ["nothing was compared"]


def worktree(commit: str, folder: Path) -> Path:
    """A checkout of the commit."""
    if not folder.is_dir():
        subprocess.run(
            ["git", "-C", str(ROOT), "worktree", "add", "--detach", str(folder), commit],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commits", nargs="*", help="two commits")
    parser.add_argument("--work", type=Path, default=Path("runs/compare-commits"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--probe", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.probe is not None:
        probe(options.probe, options.parts)
        return
    if len(options.commits) != 2:
        parser.error("give two commits")
    folders = []
    for commit in options.commits:
        name = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short=12", commit],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        work = options.work.absolute() / name
        work.mkdir(parents=True, exist_ok=True)
        tree = worktree(name, work / "tree")
        environment = {
            **os.environ,
            "PYTHONPATH": str(tree),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
        }
        print(f"{commit} ({name})", flush=True)
        subprocess.run(
            [
                sys.executable,
                str(Path(__file__).absolute()),
                "--probe",
                str(work / "results"),
                "--parts",
                *options.parts,
            ],
            cwd=tree,
            env=environment,
            check=True,
        )
        folders.append(work / "results")
        shutil.rmtree(work / "tree", ignore_errors=True)
        subprocess.run(["git", "-C", str(ROOT), "worktree", "prune"], check=True)
    unequal = differences(folders[0], folders[1], options.parts)
    for line in unequal:
        print(f"differs: {line}")
    print("all equal" if not unequal else f"{len(unequal)} differ")
    raise SystemExit(bool(unequal))


if __name__ == "__main__":
    main()
