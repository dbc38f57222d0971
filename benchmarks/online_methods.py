"""What `benchmarks/methods.py` needs for the methods that sample while they learn: winners, learned rewards, curves.

The learned reward is `shapes-clip`, made from noisy labels on purpose. The ensemble has two more of the same recipe with other seeds
(`python -m diffalign.shapes.pretrain_reward`), so that what one of them is wrong about the others need not be.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from diffalign.rewards import load_scorer
from diffalign.shapes.prompts import parse_prompt, train_prompts
from diffalign.shapes.renderer import render

WATCHED = "[shapes-clip, {name: verifier, scorer: shapes, role: eval}]"
ENSEMBLE = "<ensemble>"
ENSEMBLE_SEEDS = (1, 2)
CURVES = ("D3PO, verifier", "D3PO, shapes-clip", "D3PO, conservative ensemble")


def render_winners(folder: Path) -> None:
    """One rendered image for every training prompt, as an imagefolder."""
    table = folder / "metadata.jsonl"
    if table.is_file():
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i, prompt in enumerate(train_prompts()):
        name = f"images/{i:04d}.png"
        render(parse_prompt(prompt), random.Random(i)).save(folder / name)
        rows.append(json.dumps({"file_name": name, "prompt": prompt}))
    table.write_text("\n".join(rows) + "\n")


def learned_rewards(work: Path) -> list[tuple[str, str | None]]:
    """(name, folder) of the members; trains those that are not there."""
    from diffalign.shapes import pretrain_reward

    members: list[tuple[str, str | None]] = [("learned", None)]
    for seed in ENSEMBLE_SEEDS:
        folder = work / "rewards" / f"shapes-clip-{seed}"
        if not (folder / "accuracy.json").is_file():
            pretrain_reward.main(["--seed", str(seed), "--output_dir", str(folder)])
        members.append((f"learned-{seed}", str(folder)))
    return members


def ensemble(work: Path) -> str:
    """The ensemble's `rewards:` section: the mean minus one standard deviation, on the scale of the base's images."""
    rows = pq.read_table(work / "data" / "scores.parquet").to_pylist()[:1200]
    prompts = [row["prompt"] for row in rows]
    images = [str(work / "data" / row["image"]) for row in rows]
    entries: list[dict[str, Any]] = []
    for name, folder in learned_rewards(work):
        scores = load_scorer("shapes-clip", **({"model": folder} if folder else {}))(images, prompts).numpy()
        scale = {"kind": "affine", "mean": float(scores.mean()), "std": float(scores.std())}
        entries.append({"name": name, "scorer": "shapes-clip", "normalize": scale, **({"model": folder} if folder else {})})
    entries.append({"name": "verifier", "scorer": "shapes", "role": "eval"})
    return json.dumps({"rewards": entries, "combine": {"method": "mean_minus_std", "k": 1.0}})


def filled(overrides: Sequence[str], work: Path) -> list[str]:
    """Options with the ensemble's section in its place."""
    return [ensemble(work) if option == ENSEMBLE else option for option in overrides]
