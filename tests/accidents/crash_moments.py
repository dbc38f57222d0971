"""Kills a command at chosen moments and repeats it as a user would:
`python crash_moments.py SCENARIO MOMENTS FOLDER`.

A forked child counts writes, renames, removals and new folders below its output folder
by a Python audit hook and sends itself SIGKILL before the n-th; a file that it has open
then is cut to two thirds. Afterwards the same command runs again (training with
`latest`), and the results are compared with those of an uninterrupted run. Writes of
compiled libraries are not counted.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from safetensors.torch import load_file

from diffalign.cli.entry import run

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
torch.set_num_threads(1)
_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")
_COLORS, _SHAPES = ("red", "blue", "green", "yellow"), ("circle", "square", "star")
_SCRATCH = (
    "latents",
    "texts",
    "parts",
    "cache",
)  # folders of caches and of finished parts, whose division into files may differ
_TIMES = ("seconds", "time", "wall", "created")


def table(folder: Path, images: int = 2, rows: int = 12, ragged: bool = False) -> Path:
    """Pairs, or ranked lists, of pictures beside a jsonl file."""
    folder.mkdir(parents=True)
    lines = []
    for i in range(rows):
        count = images + (i % 2 if ragged else 0)
        files = [f"{i}-{j}.png" for j in range(count)]
        for j, file in enumerate(files):
            Image.new("RGB", (64, 64), (20 * i, 60 * j, 200 - 10 * i)).save(folder / file)
        row: dict[str, Any] = {
            "prompt": (
                f"a {('small', 'large')[i % 2]} {_COLORS[i % 4]} {_SHAPES[i % 3]} on the left of a "
                "gray background"
            )
        }
        pair = {"chosen": files[0], "rejected": files[1]}
        lines.append(
            row
            | (
                pair
                if count == 2 and not ragged
                else {"images": files, "scores": [float(j) for j in range(count)]}
            )
        )
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def train(method: str, data: Path, out: Path, steps: int, *more: Any) -> list[str]:
    fixed = {
        "method": method,
        "model": "shapes",
        "lora.r": 4,
        "lora.dropout": 0.2,
        "data.dataset_name": data,
        "train.output_dir": out,
    }
    fixed |= {
        "train.max_steps": steps,
        "train.per_device_train_batch_size": 4,
        "train.learning_rate": 1e-3,
        "train.logging_steps": 1,
    }
    options = [part for name, value in fixed.items() for part in (f"--{name}", value)]
    return [str(part) for part in ("train", *options, *more)]


_EMA = ("--train.use_ema", "true", "--train.ema_decay", "0.5")
_ROUNDS = (
    "--train.num_inference_steps",
    "3",
    "--train.guidance_scale",
    "2.0",
    "--rewards",
    "[jpeg_compressibility]",
)
_PROMPT = "[a small red circle]"
_BEST = [
    *(
        "--train.eval_steps",
        "2",
        "--data.dataset_test_split",
        "train",
        "--validation.validation_prompts",
        _PROMPT,
    ),
    *(
        "--validation.validation_steps",
        "2",
        "--validation.num_inference_steps",
        "2",
        "--validation.num_validation_images",
        "1",
    ),
    *(
        "--validation.scorers",
        "[jpeg_incompressibility]",
        "--validation.keep_best",
        "jpeg_incompressibility",
    ),
]


def scenarios(work: Path) -> dict[str, Callable[[Path], list[str]]]:
    """Name -> the command for an output folder."""
    pairs, lists = work / "pairs", work / "lists"
    online = (
        "--data.online.every",
        "3",
        "--data.online.k",
        "2",
        "--data.online.num_inference_steps",
        "3",
        "--data.online.guidance_scale",
        "2",
    )
    prompts = str(work / "prompts.txt")
    few = ("--num_inference_steps", "2", "--scorers", "jpeg_compressibility")
    reward = ("reward", "train", "--model", "shapes-clip", "--data", str(pairs))
    return {
        "dpo": lambda out: train(
            *(
                "diffusion_dpo",
                pairs,
                out,
                6,
                "--train.save_steps",
                2,
                "--train.save_total_limit",
                1,
                *_EMA,
            ),
            *(
                "--train.precompute_ref_errors",
                "true",
                "--data.cache_latents",
                f"{out}/l",
                "--data.cache_text_embeddings",
                f"{out}/t",
            ),
        ),
        "best": lambda out: train(
            "diffusion_dpo", pairs, out, 5, "--train.save_steps", 2, *_EMA, *_BEST
        ),
        "d3po": lambda out: train(
            "d3po",
            pairs,
            out,
            5,
            "--train.save_steps",
            2,
            "--train.reference",
            "iterated",
            *_ROUNDS,
        ),
        "seppo": lambda out: train(
            "seppo",
            pairs,
            out,
            5,
            "--train.save_steps",
            2,
            "--train.pool_save_steps",
            1,
            *_ROUNDS[:4],
        ),
        "online": lambda out: train(
            "diffusion_dpo", pairs, out, 5, "--train.save_steps", 2, *online, *_ROUNDS[4:]
        ),
        "ragged": lambda out: train(
            "rankdpo",
            lists,
            out,
            5,
            "--train.save_steps",
            2,
            *_EMA,
            "--train.precompute_ref_errors",
            "true",
        ),
        "streaming": lambda out: train(
            "diffusion_dpo",
            pairs,
            out,
            5,
            "--train.save_steps",
            2,
            "--data.dataset_streaming",
            "true",
        ),
        "score": lambda out: [
            "score",
            "--images",
            str(pairs),
            "--scorers",
            "jpeg_compressibility",
            "--chunk_size",
            "4",
            "--output_dir",
            str(out),
        ],
        "build": lambda out: [
            "data",
            "build",
            "--prompts",
            prompts,
            "--num_images",
            "2",
            *few,
            "--output_dir",
            str(out),
        ],
        "compare": lambda out: [
            *(
                "compare",
                "--base",
                "shapes",
                "--tuned",
                "twin=shapes",
                "--prompts",
                prompts,
                "--num_images",
                "1",
                *few,
            ),
            *("--diversity", "pixel", "--output_dir", str(out)),
        ],
        "recaption": lambda out: [
            "data",
            "recaption",
            str(pairs),
            "--strategy",
            "p",
            "--perturber",
            "shapes",
            "--output_dir",
            str(out),
        ],
        "sample": lambda out: [
            *("sample", "--model", "shapes", "--prompt", "a large red circle"),
            *("--num_images", "3", "--num_inference_steps", "2", "--output_dir", str(out)),
        ],
        "steer": lambda out: [
            *("steer", "--model", "shapes", "--prompts", prompts, "--num_particles", "2"),
            *("--num_inference_steps", "4", "--scorer", "jpeg_compressibility"),
            *("--lmbda", "0.1", "--prompts_per_call", "1", "--output_dir", str(out)),
        ],
        "reward": lambda out: [*reward, "--train.output_dir", str(out), "--train.members", "2"],
        "reward_lora": lambda out: [
            *(*reward, "--train.output_dir", str(out), "--train.towers", "lora"),
            *("--train.max_steps", "5", "--train.save_steps", "2", "--train.eval_steps", "2"),
        ],
        "quickstart": lambda out: [
            *(
                "quickstart",
                "--output_dir",
                str(out),
                "--num_prompts",
                "8",
                "--images_per_prompt",
                "2",
                "--max_steps",
                "4",
            ),
            *("--batch_size", "4", "--eval_prompts", "4", "--eval_images", "1"),
            *("--choice_prompts", "2"),
        ],
    }


def child(arguments: list[str], out: Path, moment: int, log: Path) -> tuple[int, int]:
    """(exit code, events) of the command, killed before event `moment` (0: never)."""
    count_file = log.with_suffix(".count")
    pid = os.fork()
    if pid:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return code, int(count_file.read_text()) if count_file.is_file() else 0
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # A folder that is replaced as a whole is filled beside the old one.
    places, count = (str(out), str(out.with_name(f".{out.name}."))), 0

    def writes(event: str, values: tuple[Any, ...]) -> bool:
        if event not in _EVENTS or not values or not isinstance(values[0], (str, os.PathLike)):
            return False
        if not os.fspath(values[0]).startswith(places):
            return False
        if event != "open":
            return True
        mode, flags = values[1], values[2]
        return bool(
            (isinstance(mode, str) and set(mode) & set("wax+"))
            or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR))
        )

    def hook(event: str, values: tuple[Any, ...]) -> None:
        nonlocal count
        if writes(event, values):
            count += 1
            if count == moment:
                _tear(places)
                os.write(2, f"\nkilled before {event} {values[0]}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    code = 1
    try:
        code = run(arguments)
    except BaseException:
        traceback.print_exc()
    count_file.write_text(str(count))
    os._exit(code)


def _tear(places: tuple[str, ...]) -> None:
    """Cuts the files that are open for writing to two thirds, as a kill in the middle
    of a write leaves them."""
    for link in Path("/proc/self/fd").iterdir() if Path("/proc/self/fd").is_dir() else ():
        try:
            target = os.readlink(link)
            if (
                target.startswith(places)
                and not target.endswith(".lock")
                and os.path.isfile(target)
            ):
                os.truncate(target, os.path.getsize(target) * 2 // 3)
        except OSError:
            continue


def outcome(out: Path) -> dict[str, Any]:
    """What a run must leave alike: tensors, log rows, tables, numbers; no times."""
    result: dict[str, Any] = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = path.relative_to(out).as_posix()
        if any(part.startswith((".", "checkpoint-", *_SCRATCH)) for part in Path(name).parts[:-1]):
            continue
        if path.name.startswith(
            "shard-"
        ):  # caches: the entries count, not how they are divided into files
            entries = result.get(path.parent.name, {})
            entries.update({key: value.tolist() for key, value in load_file(path).items()})
            result[path.parent.name] = dict(sorted(entries.items()))
        elif path.suffix == ".safetensors":
            result[name] = {key: value.tolist() for key, value in load_file(path).items()}
        elif path.suffix == ".parquet":
            result[name] = (
                datasets.Dataset.from_parquet(str(path), cache_dir=str(out.parent / "hf"))
                .with_format("arrow")[:]
                .to_pylist()
            )
        elif path.suffix == ".png":
            result[name] = path.read_bytes()
        elif path.name == "metrics.jsonl":
            result[name] = [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".csv":
            result[name] = path.read_text()
        elif path.name in ("results.json", "validation.json"):
            result[name] = str(_timeless(json.loads(path.read_text()))).replace(str(out), "OUT")
    return result


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if not any(word in k for word in _TIMES)}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def differences(name: str, moments: int, work: Path) -> list[str]:
    """What went otherwise in a scenario, killed at so many moments evenly over its
    events; empty if nothing did."""
    table(work / "pairs")
    table(work / "lists", 3, ragged=True)
    sentences = [
        f"a small {color} circle on the left of a gray background" for color in _COLORS[:3]
    ]
    (work / "prompts.txt").write_text("\n".join(sentences) + "\n")
    command = scenarios(work)[name]
    whole, cut = work / "whole", work / "cut"
    code, events = child(command(whole), whole, 0, work / "whole.log")
    if code:
        return [f"uninterrupted: exit code {code}: {(work / 'whole.log').read_text()[-600:]}"]
    expected = str(outcome(whole)).replace(str(whole), "OUT")
    problems = []
    for moment in sorted(
        {1 + round(i * (events - 1) / max(1, moments - 1)) for i in range(moments)}
    ):
        shutil.rmtree(cut, ignore_errors=True)
        killed, _ = child(command(cut), cut, moment, work / "killed.log")
        where = (
            (work / "killed.log")
            .read_text(errors="replace")
            .strip()
            .splitlines()[-1]
            .replace(str(cut), "")[:100]
        )
        again = command(cut) + (
            ["--train.resume_from_checkpoint", "latest"]
            if command(cut)[0] == "train" or "--train.towers" in command(cut)
            else []
        )
        code, _ = child(again, cut, 0, work / "again.log")
        if killed != -signal.SIGKILL:
            problems.append(f"moment {moment} of {events}: not killed, exit code {killed}")
        elif code:
            said = (work / "again.log").read_text(errors="replace").strip().splitlines()[-1][:300]
            problems.append(f"moment {moment}, {where}: exit code {code}: {said}")
        elif str(outcome(cut)).replace(str(cut), "OUT") != expected:
            parts = [
                key
                for key in {**outcome(whole), **outcome(cut)}
                if outcome(whole).get(key) != outcome(cut).get(key)
            ]
            problems.append(f"moment {moment}, {where}: another {', '.join(parts)[:300]}")
    return problems


if __name__ == "__main__":
    found = differences(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
    print("\n".join(found) or f"{sys.argv[1]}: {sys.argv[2]} moments end as the uninterrupted run")
    sys.exit(bool(found))
