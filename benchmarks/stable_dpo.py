"""DPO where it diverges: which options keep the chosen error below the reference's?

    python benchmarks/stable_dpo.py [--model shapes] [--seeds 2] [--arms NAME ...]
        [--work FOLDER] [--output benchmarks/stable_dpo.md]

Users' loudest complaint about DPO is that the errors of both images rise, the rejected
one faster, so that the loss falls while the images get worse. Diffusion-DPO is trained
as `configs/diffusion_dpo/shapes.yaml` says, but at three times its learning rate,
constant, and a twentieth of its beta, which does that. Every other arm changes one
thing.
"regression" has the raw scores of the verifier as its targets. The data are
those of `benchmarks/leaderboard.py`.

Every 20 steps the run is evaluated on pairs of the 60 prompts that choose, which it
does not train on, with one fixed noise and timestep per pair: the mean error of policy
minus reference, of chosen and of rejected images. At the end the model draws these
prompts, two images each, at guidance 1, 2, 3 and 5. The best mean score of the verifier
is reported, chosen on the same images for all arms. No held-out prompt is used. Goes on
where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from leaderboard import (
    IMAGES_PER_PROMPT,
    choice_prompts,
    dataset,
    drawing,
    folder_name,
    kept,
    logged,
    make_data,
    recipe,
    train_whole,
)

from diffalign.cli import entry
from diffalign.evaluation.compare import read_models
from diffalign.evaluation.models import opened
from diffalign.recipe import build_trainer
from diffalign.runtime.files import write_atomically
from diffalign.shapes.verifier import score

SCALES = (1.0, 2.0, 3.0, 5.0)
SEED, IMAGES = 47_000_000, 2
WILD = {"train.learning_rate": 3e-3, "train.beta": 25.0, "train.lr_scheduler": "constant"}
ARMS: dict[str, dict[str, Any]] = {
    "base": {},
    "recipe": {"train.learning_rate": 1e-3, "train.beta": 500.0, "train.lr_scheduler": "cosine"},
    "diverging": {},
    "lower learning rate (3e-4)": {"train.learning_rate": 3e-4},
    "higher beta (500)": {"train.beta": 500.0},
    "beta: auto": {"train.beta": "auto", "train.beta_start": 25.0},
    "preserve_winner 0.9": {"train.preserve_winner": 0.9},
    "preserve_winner 1": {"train.preserve_winner": 1.0},
    "sft_weight 1": {"train.sft_weight": 1.0},
    "label_smoothing 0.1": {"train.label_smoothing": 0.1},
    "loss_type: ipo": {"train.loss_type": "ipo"},
    "loss_type: dmpo": {"train.loss_type": "dmpo"},
    "loss_type: linear": {"train.loss_type": "linear"},
    "loss_type: regression": {"train.loss_type": "regression"},
    "score_margin 10": {"train.score_margin": 10.0},
    "reference_decay 0.99": {"train.reference_decay": 0.99},
    "timesteps 300 to 1000": {"train.min_timestep": 300},
}


def evaluation_pairs(work: Path, model: str) -> Path:
    """Ranked images of the prompts that choose."""
    prompts = work / "choice.txt"
    prompts.write_text("\n".join(choice_prompts()) + "\n")
    build = ["data", "build", "--prompts", str(prompts), "--models", model, "--scorers", "shapes"]
    build += ["--num_images", str(IMAGES_PER_PROMPT), "--batch_size", "60"]
    code = entry.run([*build, "--output_dir", str(work / "choice")])
    if code:
        raise SystemExit(code)
    return work / "choice" / "ranked"


def measure(name: str, options: argparse.Namespace, seed: int, pairs: Path) -> dict[str, Any]:
    """Train an arm, and draw with it."""
    folder = options.work / "stable" / f"{folder_name(name)}-{seed}"
    curve: list[dict[str, float]] = []
    described: dict[str, Any] = {"name": "arm"}
    if name != "base":
        values = {
            **WILD,
            "model": options.model,
            "data.dataset_name": dataset(options.work, "ranked"),
            "data.cache_latents": options.work / "cache",
            "data.cache_text_embeddings": options.work / "cache",
            "train.output_dir": folder,
            "train.seed": seed,
            "train.overwrite_output_dir": "true",
            "train.save_steps": 100_000,
            "train.eval_steps": 20,
            "train.divergence_patience": 1000,
            **ARMS[name],
        }
        trainer = build_trainer(recipe("diffusion_dpo/shapes", values))
        trainer.eval_dataset = trainer.read_dataset(str(pairs), "train")
        train_whole(trainer)
        curve = read_curve(folder)
        described["lora"] = str(folder)
    prompts = [prompt for prompt in choice_prompts() for _ in range(IMAGES)]
    spec = read_models(options.model, [described if name != "base" else f"arm={options.model}"])[1]
    scores = {}
    with opened(spec) as draw:
        for scale in SCALES:
            images = drawing(draw, prompts, SEED, scale)
            scores[f"{scale:g}"] = float(score(images, prompts).mean())
    return {"curve": curve, "scores": scores}


def read_curve(folder: Path) -> list[dict[str, float]]:
    """What the evaluations of a run wrote into its log."""
    return [
        {"step": row["step"], **{key: row[f"eval/{key}"] for key in CURVES}}
        for row in logged(folder)
        if f"eval/{CURVES[0]}" in row
    ]


CURVES = ("change/chosen", "change/rejected", "rewards/accuracies")


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Change of the chosen error by step, a line per arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    axes.axhline(0.0, color="black", linewidth=0.8)
    colors = pyplot.get_cmap("tab20")
    for number, (name, runs) in enumerate(results.items()):
        if not runs[0]["curve"]:
            continue
        steps = [point["step"] for point in runs[0]["curve"]]
        values = np.mean([[p["change/chosen"] for p in run["curve"]] for run in runs], axis=0)
        width = 2.5 if name == "diverging" else 1.3
        axes.plot(steps, values, label=name, color=colors(number % 20), linewidth=width)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("error of chosen images, policy minus reference")
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def table(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Lines of Markdown."""
    lines = [
        "| arm | chosen error, x 1000 | rejected error, x 1000 | accuracy | best score | at |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        means = {s: float(np.mean([run["scores"][s] for run in runs])) for s in runs[0]["scores"]}
        best = max(means, key=means.__getitem__)
        cells = ["", "", ""]
        if runs[0]["curve"]:
            last = [np.mean([run["curve"][-1][key] for run in runs]) for key in CURVES]
            cells = [f"{1000 * last[0]:+.2f}", f"{1000 * last[1]:+.2f}", f"{100 * last[2]:.0f} %"]
        lines.append(f"| {name} | {' | '.join(cells)} | {means[best]:.3f} | {best} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="NAME")
    parser.add_argument("--work", type=Path, default=Path("runs/stable_dpo"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/stable_dpo.md"))
    options = parser.parse_args()
    make_data(options.work, options.model)
    pairs = evaluation_pairs(options.work, options.model)
    results: dict[str, list[dict[str, Any]]] = {}
    for name in options.arms:
        seeds = range(1 if name == "base" else options.seeds)
        results[name] = [
            kept(
                options.work / "stable" / f"{folder_name(name)}-{seed}.json",
                lambda name=name, seed=seed: measure(name, options, seed, pairs),
            )
            for seed in seeds
        ]
        print("\n".join(table(results)), flush=True)
    plot(results, options.output.with_suffix(".png"))
    about = str(__doc__).split("\n\n")
    text = [
        "# DPO where it diverges",
        "",
        f"`python benchmarks/stable_dpo.py --model {options.model} --seeds {options.seeds}`",
        "",
        *[part.replace("\n", " ") + "\n" for part in about[2:]],
        f"![chosen error by step]({options.output.with_suffix('.png').name})",
        "",
        *table(results),
    ]
    write_atomically(options.output, ("\n".join(text) + "\n").encode())


if __name__ == "__main__":
    main()
