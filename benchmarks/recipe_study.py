"""What single settings of a recipe do, on prompts that no leaderboard reports.

    python benchmarks/recipe_study.py --study guidance|lists|beta|dro [--model shapes]
        [--arms NAME ...] [--seeds N] [--work FOLDER] [--output FILE]

A method is trained as its `configs/<method>/shapes.yaml` says, and again with one
setting changed, on the training data of `benchmarks/leaderboard.py`. Every model draws
the 60 prompts that choose the guidance there, two images each, at six guidance scales,
from the same noise. No held-out prompt is used. The best guidance is chosen on the same
images as its score, for all arms alike. Trained models lie in --work: interrupted, it
goes on.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from leaderboard import (
    ROOT,
    SCALES,
    choice_prompts,
    dataset,
    drawing,
    folder_name,
    interval,
    kept,
    make_data,
    recipe,
    train_whole,
)
from tqdm import tqdm

from diffalign.evaluation.compare import read_models
from diffalign.evaluation.models import opened
from diffalign.evaluation.statistics import clustered_bootstrap, win_rate
from diffalign.recipe import build_trainer
from diffalign.runtime.files import write_atomically
from diffalign.shapes.verifier import attribute_table, score

IMAGES = 2
SEED = 43_000_000


@dataclass(frozen=True)
class Arm:
    """One way of training and drawing.

    Args:
        config: folder of the recipe; None is the base model.
        overrides: options over the recipe.
        spec: what `compare` is told beside the LoRA.
        data: ``ranked``, ``extremes`` (its best and worst image of each list), ``best``
            (the 500 best images of all prompts together) or ``recaptioned``.
    """

    config: str | None = "diffusion_dpo"
    overrides: tuple[str, ...] = ()
    spec: tuple[tuple[str, Any], ...] = ()
    data: str = "ranked"


def changed(config: str = "diffusion_dpo", data: str = "ranked", **values: Any) -> Arm:
    options = tuple(x for key, value in values.items() for x in (f"--train.{key}", str(value)))
    return Arm(config, options, data=data)


def listed(data: str = "ranked", **values: Any) -> Arm:
    """RankDPO at the beta of Diffusion-DPO's recipe, if no other is given."""
    return changed("rankdpo", data, **{"beta": 500.0, **values})


STUDIES: dict[str, dict[str, Arm]] = {
    "guidance": {
        "base": Arm(None),
        "recipe": Arm(),
        "unconditional branch of the base": Arm(spec=(("alpha", 0.0), ("beta", 0.0))),
        "LoRA at half strength": Arm(spec=(("lora_scale", 0.5),)),
        "no empty prompts": changed(proportion_empty_prompts=0.0),
        "30 % empty prompts": changed(proportion_empty_prompts=0.3),
        "beta 200": changed(beta=200.0),
        "beta 2000": changed(beta=2000.0),
        "learning rate 3e-4": changed(learning_rate=3e-4),
        "900 steps": changed(max_steps=900),
    },
    "lists": {
        "base": Arm(None),
        "Diffusion-DPO, best against worst": Arm(),
        "RankDPO": listed(),
        "RankDPO, best and worst alone": listed("extremes"),
        "RankDPO, best and worst alone, 16 lists": listed(
            "extremes", per_device_train_batch_size=16
        ),
        "RankDPO, gains from 0 to 1 in each list": listed(gains="minmax"),
        "RankDPO, shared noise": listed(shared_noise="true"),
        "RankDPO, shared noise, best and worst alone, 16 lists": listed(
            "extremes", shared_noise="true", per_device_train_batch_size=16
        ),
        "RankDPO, shared noise, beta 200": listed(shared_noise="true", beta=200.0),
        "RankDPO, beta 200": listed(beta=200.0),
        "RankDPO, beta 2000": listed(beta=2000.0),
    },
    "beta": {
        "base": Arm(None),
        **{f"Diffusion-DPO, beta {b:g}": changed(beta=b) for b in (20.0, 50.0, 100.0, 500.0)},
        **{f"RankDPO, beta {b:g}": listed(beta=b) for b in (20.0, 50.0, 200.0)},
        **{f"DCPO, beta {b:g}": changed("dcpo", "recaptioned", beta=b) for b in (5.0, 20.0, 50.0)},
    },
    "dro": {
        "base": Arm(None),
        "best of each list": changed("diffusion_dro", margin=0.1),
        "500 best": changed("diffusion_dro", "best", margin=0.1),
        "500 best, SFT": changed("sft", "best"),
    },
}
ABOUT = {
    "guidance": """Why does a tuned model suffer at high guidance, and what helps?

Guidance adds the difference between a conditional and an unconditional prediction, and
a LoRA moves both. Two arms change the drawing alone: in "unconditional branch of the
base" the LoRA is left out of the unconditional prediction, in "LoRA at half strength"
it is halved in both.""",
    "lists": """What does RankDPO's loss over whole lists give, beside Diffusion-DPO on the
same images?

"Best and worst alone" gives RankDPO lists of two images, the pair that Diffusion-DPO
learns from. On these its loss is Diffusion-DPO's times a weight. beta is 500 as in
Diffusion-DPO's recipe, a step has 8 lists, and the gains are the win rates that
`diffalign data build` writes, where an arm does not say otherwise.
"Shared noise" gives all images of a list one noise, as Diffusion-DPO does.""",
    "beta": """Which beta does a model want?

The errors of a flow model's velocity are larger than those of a UNet's noise, and so are
their differences between two images. The same beta then holds the policy back more.""",
    "dro": """Which images does Diffusion-DRO want?

The paper trains on the 500 best images of a whole dataset, not on the best image of each
prompt. Here `diffalign data build --best 500` chooses them among the 3,240 drawn images.
SFT on the same images is the loss without the policy's own samples.""",
}


def extremes(work: Path) -> Path:
    """The ranked dataset with the best and the worst image of each list."""
    from datasets import load_dataset

    target = work / "extremes"
    if not target.is_dir():
        rows = load_dataset("parquet", data_dir=str(dataset(work, "ranked")), split="train")

        def both(row: dict[str, Any]) -> dict[str, Any]:
            order = np.argsort(row["scores"], kind="stable")
            ends = [int(order[-1]), int(order[0])]
            return {key: [row[key][i] for i in ends] for key in ("images", "scores")}

        target.mkdir()
        kept_columns = rows.select_columns(["prompt", "images", "scores"])
        kept_columns.map(both).to_parquet(target / "train-00000-of-00001.parquet")
    return target


def trained(arm: Arm, seed: int, options: argparse.Namespace) -> Path:
    """The folder of the arm's LoRA; trains it if it is not there."""
    changes = [arm.config, arm.data, *(x.removeprefix("--train.") for x in arm.overrides), seed]
    folder = options.work / "study" / folder_name("-".join(map(str, changes)))
    if (folder / "pytorch_lora_weights.safetensors").is_file():
        return Path(folder)
    work = options.work
    data = extremes(work) if arm.data == "extremes" else dataset(work, arm.data)
    values = {
        "model": options.model,
        "data.dataset_name": data,
        "data.cache_latents": options.work / "cache",
        "data.cache_text_embeddings": options.work / "cache",
        "train.output_dir": folder,
        "train.overwrite_output_dir": "true",
        "train.save_steps": 100_000,
        "train.seed": seed,
    }
    train_whole(build_trainer(recipe(f"{arm.config}/shapes", values, arm.overrides)))
    return Path(folder)


def judge(name: str, arm: Arm, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Scale -> scores, all correct, style and attributes on the choosing prompts."""
    if arm.config is None:
        spec = read_models(options.model, [f"again={options.model}"])[0]
    else:
        lora = str(trained(arm, seed, options))
        described = {"name": folder_name(name), "lora": lora, **dict(arm.spec)}
        if "alpha" in described:
            # theta_neg = theta + alpha (theta_pos - theta) + beta (theta_npo - theta)
            described["negative"] = lora
        spec = read_models(options.model, [described])[1]
    prompts = [prompt for prompt in choice_prompts() for _ in range(IMAGES)]
    results = {}
    with opened(spec) as draw:
        for scale in SCALES:
            images = drawing(draw, prompts, SEED, scale)
            rows = attribute_table(images, prompts)
            results[f"{scale:g}"] = {
                "scores": np.round(score(images, prompts), 4).reshape(-1, IMAGES).tolist(),
                **{key: float(np.mean([row[key] for row in rows])) for key in rows[0]},
            }
    return results


Results = dict[str, list[dict[str, Any]]]
"""Arm -> per seed: scale -> what `judge` says."""


def mean(runs: Iterable[dict[str, Any]], scale: str, key: str) -> float:
    return float(np.mean([run[scale][key] for run in runs]))


def best_scale(run: dict[str, Any]) -> str:
    return max(run, key=lambda scale: float(np.mean(run[scale]["scores"])))


def table(results: Results, key: str, form: str) -> list[str]:
    """A row per arm, a column per guidance scale."""
    scales = [f"{scale:g}" for scale in SCALES]
    lines = [f"| | {' | '.join(scales)} |", "|---" * (len(scales) + 1) + "|"]
    for name, runs in results.items():
        cells = [format(mean(runs, scale, key), form) for scale in scales]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def summary(results: Results) -> list[str]:
    """Each arm at its best guidance against the second arm at its own, and its loss to
    the highest guidance."""
    names = list(results)
    beside = names[1]
    lines = [
        f"| | best guidance | score there | win-rate % against {beside} | change to guidance 7 |",
        "|---" * 5 + "|",
    ]
    last = f"{SCALES[-1]:g}"

    def at_best(runs: list[dict[str, Any]]) -> Any:
        return np.concatenate([np.array(run[best_scale(run)]["scores"]) for run in runs], axis=1)

    for name, runs in results.items():
        best = at_best(runs)
        ends = np.concatenate([np.array(run[last]["scores"]) for run in runs], axis=1)
        low, high = clustered_bootstrap(ends - best)
        rate = ""
        if name not in (beside, "base") and len(runs) == len(results[beside]):
            rate = interval(win_rate(at_best(results[beside]), best))
        lines.append(
            f"| {name} | {', '.join(best_scale(run) for run in runs)} | {best.mean():.3f} | {rate} "
            f"| {(ends - best).mean():+.3f} ({low:+.3f} to {high:+.3f}) |"
        )
    return lines


def plot(results: Results, path: Path) -> None:
    """Score and share of images with every attribute right, by guidance."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for i, (name, runs) in enumerate(results.items()):
        style: dict[str, Any] = {"color": f"C{(i - 2) % 10}"}
        if i < 2:
            style = {"color": "black", "ls": "--" if i == 0 else "-"}
        for axes, key in zip(panels, ("scores", "all"), strict=True):
            values = [mean(runs, f"{scale:g}", key) for scale in SCALES]
            axes.plot(SCALES, values, marker="o", ms=3, label=name, **style)
    for axes, title in zip(panels, ("score", "share with all attributes right"), strict=True):
        axes.set(title=title, xlabel="guidance")
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", choices=list(STUDIES), required=True)
    parser.add_argument("--model", choices=("shapes", "shapes-flow"), default="shapes")
    parser.add_argument("--arms", nargs="+", help="default: all of the study")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--work", type=Path, help="the folder of benchmarks/leaderboard.py")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.work = options.work or Path(f"runs/leaderboard-{options.model}")
    arms = STUDIES[options.study]
    unknown = sorted(set(options.arms or ()) - set(arms))
    if unknown:
        parser.error(f"--arms: {unknown[0]!r} is not one of {', '.join(arms)}")
    suffix = "" if options.model == "shapes" else "_flow"
    output = options.output or ROOT / "benchmarks" / f"study_{options.study}{suffix}.md"
    warnings.simplefilter("ignore")
    make_data(options.work, options.model)
    results: Results = {}
    for name in tqdm(options.arms or list(arms), unit="model"):
        arm = arms[name]
        for seed in range(options.seeds if arm.config else 1):
            path = options.work / "study" / f"{folder_name(name)}-{seed}.json"
            run = kept(path, lambda: judge(name, arm, seed, options))  # noqa: B023
            results.setdefault(name, []).append(run)
    plot(results, output.with_suffix(".png"))
    assert __doc__ is not None
    title, _, explanation = ABOUT[options.study].partition("\n\n")
    body = [
        f"# {' '.join(title.split())}",
        "",
        f"`python benchmarks/recipe_study.py --study {options.study} --model {options.model} "
        f"--seeds {options.seeds}`",
        "",
        explanation,
        "",
        *__doc__.split("\n\n", 2)[2].rstrip().split("\n"),
        "",
        f"![score by guidance]({output.with_suffix('.png').name})",
        "",
        "Intervals are 95 %, clustered by prompt, seeds pooled:",
        "",
        *summary(results),
    ]
    for what, key, form in (
        ("Mean score", "scores", ".3f"),
        ("Share of images with every attribute right", "all", ".1%"),
        ("Share with the right colour", "color", ".1%"),
        ("Share with the right shape", "shape", ".1%"),
        ("Share in the preferred style", "style", ".1%"),
    ):
        body += ["", f"{what}, by guidance:", "", *table(results, key, form)]
    write_atomically(output, ("\n".join(body) + "\n").encode())
    print("\n".join(body))


if __name__ == "__main__":
    main()
