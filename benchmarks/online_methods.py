"""What `benchmarks/methods.py` needs for the methods that sample while they learn:
winners, learned rewards, curves.

The learned reward is `shapes-clip`, made from noisy labels on purpose. The ensemble has
two more of the same recipe with other seeds (`python -m tools.shapes.pretrain_reward`),
so that what one of them is wrong about the others need not be.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
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


def trained_reward(folder: Path, seed: int, **settings: int) -> Path:
    """The folder of a reward of `shapes-clip`'s recipe, with other settings; trains it
    if it is not there."""
    from tools.shapes import pretrain_reward

    if not (folder / "accuracy.json").is_file():
        options = [str(x) for name, value in settings.items() for x in (f"--{name}", value)]
        pretrain_reward.main(["--seed", str(seed), *options, "--output_dir", str(folder)])
    return folder


def learned_rewards(work: Path) -> list[tuple[str, str | None]]:
    """(name, folder) of the members; trains those that are not there."""
    members: list[tuple[str, str | None]] = [("learned", None)]
    for seed in ENSEMBLE_SEEDS:
        members.append(
            (f"learned-{seed}", str(trained_reward(work / "rewards" / f"shapes-clip-{seed}", seed)))
        )
    return members


def ensemble(work: Path) -> str:
    """The ensemble's `rewards:` section: the mean minus one standard deviation, on the
    scale of the base's images."""
    rows = pq.read_table(work / "data" / "scores.parquet").to_pylist()[:1200]
    prompts = [row["prompt"] for row in rows]
    images = [str(work / "data" / row["image"]) for row in rows]
    entries: list[dict[str, Any]] = []
    for name, folder in learned_rewards(work):
        scores = load_scorer("shapes-clip", **({"model": folder} if folder else {}))(
            images, prompts
        ).numpy()
        scale = {"kind": "affine", "mean": float(scores.mean()), "std": float(scores.std())}
        entries.append(
            {
                "name": name,
                "scorer": "shapes-clip",
                "normalize": scale,
                **({"model": folder} if folder else {}),
            }
        )
    entries.append({"name": "verifier", "scorer": "shapes", "role": "eval"})
    return json.dumps({"rewards": entries, "combine": {"method": "mean_minus_std", "k": 1.0}})


def filled(overrides: Sequence[str], work: Path) -> list[str]:
    """Options with the ensemble's section in its place."""
    return [ensemble(work) if option == ENSEMBLE else option for option in overrides]


# What comes of it


def held_out(name: str, seed: int, work: Path, draw: Any) -> dict[str, list[list[float]]]:
    """Scores of the test images by the verifier and all learned rewards, (prompts,
    images) each.

    Args:
        name: of the arm, or empty for the base.
        draw: () -> (images, prompts, images per prompt).
    """
    images, prompts, count = draw()
    found = {"verifier": load_scorer("shapes")(images, prompts)}
    for member, folder in learned_rewards(work):
        found[member] = load_scorer("shapes-clip", **({"model": folder} if folder else {}))(
            images, prompts
        )
    return {key: values.reshape(-1, count).tolist() for key, values in found.items()}


def curves(work: Path, arms: dict[str, list[Path]]) -> dict[str, list[dict[str, list[float]]]]:
    """arm -> per seed: step and the means of every judge over the round's samples, from
    the runs' logs."""
    found: dict[str, list[dict[str, list[float]]]] = {}
    for name, folders in arms.items():
        for folder in folders:
            lines = [
                json.loads(line)
                for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()
            ]
            keys = [
                key
                for key in lines[0]
                if key.startswith(("judge/", "online/")) and not key.endswith("/ties")
            ]
            lines = [line for line in lines if keys[0] in line]  # online rounds come every few logs
            series = {key.split("/", 1)[1]: [line[key] for line in lines] for key in keys}
            found.setdefault(name, []).append({"step": [line["step"] for line in lines], **series})
    return found


def plot(found: dict[str, list[dict[str, list[float]]]], path: Path) -> None:
    """The deciding reward (left) and the verifier (right), a line per run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = dict(
        zip(found, ("#1f6feb", "#d1242f", "#1a7f37", "#8250df", "#9a6700"), strict=False)
    )
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, runs in found.items():
        for i, run in enumerate(runs):
            label = name if i == 0 else None
            learned = [key for key in run if key.startswith(("learned", "shapes-clip"))]
            if learned:
                left.plot(
                    run["step"],
                    np.mean([run[key] for key in learned], axis=0),
                    color=colours[name],
                    lw=1.2,
                    label=label,
                )
            truth = run.get("verifier", run.get("shapes"))
            right.plot(run["step"], truth, color=colours[name], lw=1.2, label=label)
    left.set(title="learned reward of the samples (mean of the members)", xlabel="optimizer step")
    right.set(title="verifier of the same samples", xlabel="optimizer step")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def over_optimisation(base: dict[str, Any], arms: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Win-rates on the test prompts by the reward that trained, by two that did not,
    and by the verifier."""
    from diffalign.evaluation.statistics import win_rate

    judges = list(base)
    names = {
        "verifier": "verifier",
        "learned": "shapes-clip",
        "learned-1": "seed 1",
        "learned-2": "seed 2",
    }
    lines = [
        "",
        "Over-optimisation: the same test images, win-rate % against the base by the verifier, by "
        "the embedded `shapes-clip`, and by two rewards of the same recipe from other seeds, which "
        "only the ensemble was trained with:",
        "",
        (
            f"| arm | seed | {' | '.join(names[j] for j in judges)} | shapes-clip's win-rate less "
            "the verifier's |"
        ),
        f"|---|---|{'---|' * (len(judges) + 1)}",
    ]
    for name, runs in arms.items():
        for seed, run in enumerate(runs):
            rates = {j: win_rate(np.array(base[j]), np.array(run[j])) for j in judges}
            shown = [
                f"{100 * r.rate:.1f} ({100 * r.low:.1f}-{100 * r.high:.1f})" for r in rates.values()
            ]
            gap = 100 * (rates["learned"].rate - rates["verifier"].rate)
            lines.append(f"| {name} | {seed} | {' | '.join(shown)} | {gap:+.1f} |")
    return lines


READING = [
    "",
    "Within these recipes the learned reward and the verifier still rise together (picture); a "
    "reward that rises while the verifier falls was not seen in training, and a run with a "
    "learning rate three times as high and a weak pull to the reference lost both; it is seen "
    "where images are picked harder and by a weaker reward "
    "([over_optimisation.md](over_optimisation.md)). What exploitation there is shows in the last "
    "column: trained by `shapes-clip`, D3PO wins more by that reward than by the verifier, and "
    "less by the rewards of other seeds, which know other errors; trained by the verifier it is "
    "the other way round. The conservative ensemble (mean minus one standard deviation of the "
    "three rewards) closes the gap in two of three seeds; one of its seeds gains nothing at all "
    "(the accuracy rises, the sharpness that the graded score counts falls), so that over three "
    "seeds it is safer, not better. SPO, which compares steps instead of whole trajectories, "
    "learns more from the same verifier in half of D3PO's optimizer steps. SePPO beats the base "
    "from winners alone, and does not beat plain fine-tuning on the same winners. Seconds of D3PO "
    "with the verifier, SPO, online Diffusion-DPO and SePPO are those of the leaderboard's runs, "
    "one thread each with one other run beside it; those of the other D3PO arms were measured with "
    "more jobs on the same two cores.",
]
