"""What `diffalign steer` writes at its end: tables, pictures and `results.json`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..runtime.files import save_image, write_atomically
from ..runtime.json_values import plain
from ..runtime.missing import MaybeImage, Missing

if TYPE_CHECKING:
    from ..evaluation.best_of_n import BestOfNComparison


def write_report(
    options: argparse.Namespace,
    settings: dict[str, Any],
    prompts: list[str],
    records: list[dict[str, Any]],
) -> str:
    """Write the files of the whole run.

    Args:
        options (`argparse.Namespace`): Options of the command.
        settings (`dict`): What decides the results, as in `settings.json`.
        prompts (`list[str]`): All prompts.
        records (`list[dict]`): Of every call.

    Returns:
        `str`: What the command prints.

    Raises:
        UserError: No image has a score.
    """
    import numpy as np

    from ..runtime.versions import versions

    folder = options.output_dir
    comparison = _comparison(options, prompts, records)
    if options.compare:
        table = comparison.table()
        save_image(comparison.grid(), folder / "grid.png")
    else:
        table = _plain_table(comparison)
        save_image(_particle_grid(options, comparison), folder / "grid.png")
    steered = [record["arms"]["steering"] for record in records]
    collapsed = (
        int((comparison.arms["steering"].roots == 1).sum()) if options.num_particles > 1 else 0
    )
    total = comparison.arms["steering"].roots.size
    notes = (
        [
            f"{collapsed} of {total} populations descend from one initial noise; lower "
            "--lmbda to keep more"
        ]
        if collapsed
        else []
    )
    missing = sum(arm["nan_count"] for arm in steered)
    notes += [f"{missing} rewards were NaN and counted as minus infinity"] if missing else []
    rewards = comparison.arms["steering"].scores["reward"]
    silent = [p for p, row in zip(prompts, rewards, strict=True) if np.isnan(row).all()]
    if len(silent) == len(prompts):
        raise UserError(
            f"--scorer: {options.scorer} gave no score to any image; take a scorer that knows "
            "these prompts"
        )
    if silent:
        notes.append(
            f"{len(silent)} of {len(prompts)} prompts have no score, so nothing was steered "
            f"there; the first is {silent[0]!r:.100}"
        )
    results = {
        "settings": settings,
        "versions": versions(),
        "kernel": steered[0]["kernel"] or "scheduler",
        "populations": [
            {
                **unit,
                "text": prompts[unit["prompt"]],
                **{arm: _unit(values, row) for arm, values in record["arms"].items()},
            }
            for record in records
            for row, unit in enumerate(record["units"])
        ],
        "totals": comparison.to_dict()
        if options.compare
        else {"seconds": comparison.arms["steering"].seconds},
        "warnings": notes,
    }
    write_atomically(folder / "table.md", (table + "\n").encode())
    write_atomically(folder / "results.json", json.dumps(plain(results), indent=1).encode())
    return "\n".join(
        [table, *notes, f"wrote {folder}: images/, lineage/, grid.png, table.md, results.json"]
    )


def _unit(values: dict[str, Any], row: int) -> dict[str, Any]:
    """Return the entries of one population."""
    names = (
        "rewards",
        "log_weights",
        "log_z",
        "lmbda",
        "roots",
        "best",
        "ess",
        "ancestors",
        "degenerate",
    )
    entries = {name: values[name][row] for name in names} | {"scored_steps": values["scored_steps"]}
    return entries | {"judges": {name: scores[row] for name, scores in values["judges"].items()}}


def _shown(path: Path) -> MaybeImage:
    """Read an image for a picture. Its file is closed at once."""
    from PIL import Image

    if not path.is_file():
        return Missing("not drawn")
    with Image.open(path) as image:
        return image.convert("RGB")


def _comparison(
    options: argparse.Namespace, prompts: list[str], records: list[dict[str, Any]]
) -> BestOfNComparison:
    """Return the records as arrays over prompts and populations.

    Without `--compare` they are of steering alone.
    """
    import numpy as np

    from ..evaluation.best_of_n import REWARD, ArmScores, BestOfNComparison

    shape = (len(prompts), options.num_seeds, options.num_particles)
    arms = {}
    for arm in records[0]["arms"]:
        names = [REWARD, *records[0]["arms"][arm]["judges"]]
        scores = {name: np.full(shape, np.nan) for name in names}
        weights, roots, low = np.zeros(shape), np.zeros(shape[:2]), np.zeros(shape[:2])
        files: list[list[Any]] = [[None] * options.num_seeds for _ in prompts]
        for record in records:
            values = record["arms"][arm]
            for row, unit in enumerate(record["units"]):
                at = (unit["prompt"], unit["seed"])
                for name in names:
                    scores[name][at] = (
                        values["rewards"][row] if name == REWARD else values["judges"][name][row]
                    )
                weights[at] = np.exp(values["log_weights"][row])
                roots[at], low[at] = len(set(values["roots"][row])), min(values["ess"][row])
                end = "best_of_n" if arm == "best_of_n" else f"particle{values['best'][row]}"
                files[at[0]][at[1]] = (
                    options.output_dir / "images" / f"{at[0]:04d}-seed{at[1]}-{end}.png"
                )
        shown = [[_shown(file) for file in row[:4]] for row in files[:24]]
        totals = {
            key: sum(record["arms"][arm]["counts"][key] for record in records)
            for key in ("model_rows", "decodes", "scored_images", "reward_calls")
        }
        seconds = sum(record["arms"][arm]["seconds"]["total"] for record in records)
        arms[arm] = ArmScores(
            scores, weights, roots, low, best_images=shown, **totals, seconds=seconds
        )
    return BestOfNComparison(prompts, list(range(options.num_seeds)), options.num_particles, arms)


def _plain_table(comparison: BestOfNComparison) -> str:
    arm = comparison.arms["steering"]
    lines = [
        "| prompt | best reward | weighted mean | smallest ESS | roots |",
        "|---|---|---|---|---|",
    ]
    values = [arm.best("reward"), arm.weighted("reward"), arm.min_ess, arm.roots]
    for i, prompt in enumerate(comparison.prompts):
        best, mean, low, roots = (float(value[i].mean()) for value in values)
        short = prompt if len(prompt) <= 70 else prompt[:67] + "..."
        lines.append(
            f"| {short.replace('|', '/')} | {best:.4g} | {mean:.4g} | {low:.2f} | {roots:.2g} |"
        )
    return "\n".join(lines)


def _particle_grid(options: argparse.Namespace, comparison: BestOfNComparison) -> Any:
    """Draw all particles of the first prompts, with a frame around the best."""
    import numpy as np

    from ..generation.grids import framed_grid

    rewards = comparison.arms["steering"].scores["reward"]
    rows = []
    for i, prompt in enumerate(comparison.prompts[:24]):
        images = [
            _shown(options.output_dir / "images" / f"{i:04d}-seed0-particle{k}.png")
            for k in range(options.num_particles)
        ]
        rows.append((prompt, images, int(np.nan_to_num(rewards[i, 0], nan=-np.inf).argmax())))
    return framed_grid(rows)
