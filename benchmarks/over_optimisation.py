"""Over-optimisation: learned rewards rise while the verifier falls, and what ensembles
and averaged weights change.

    python benchmarks/over_optimisation.py [--images 64] [--members 4]
        [--overfitted 6] [--work FOLDER] [--output benchmarks/over_optimisation.md]

The purest optimiser of a reward is to draw n images of a prompt and to keep the one
that the reward likes best: it needs no training, and n says how hard it optimises. The
embedded pipeline draws --images images for each of 120 held-out prompts; for n = 1, 2,
4, ... a judge picks the best of n, and the verifier, which stands for what people want,
says how good the picked image is. The mean over all choices of n images is computed
exactly from the ranks. Intervals are 95 %, clustered by prompt.

The rewards are trained by `RewardTrainer` on few and noisy preferences: 360 pairs of 60
training prompts, labels drawn as for `benchmarks/rewards.py`, a quarter of them turned
round. Their base is a CLIP that has seen captions and no preference. A judge turns at
the n at which the verifier of its picks is highest: harder picking makes them worse.

*Overfitted rewards*: all weights are trained for 300 steps of 8 prompts at a learning
rate of 5e-4 or 4e-4, and the last step counts, so they learn wrong labels by heart. The
labels are drawn six times. For each draw there are four rewards of all preferences,
and --overfitted rewards that saw a half of the prompts each (`train.subsample: 0.5`);
they differ in seed and learning rate. The judges: each reward of all preferences alone
(the mean over them is shown), the mean of their scores, the win rate of an image among
all of its prompt (`winrate`, the default rule of several scorers), and the average of
their weights (WARM, `diffalign reward average`); of the rewards of halves each alone,
the mean, win rates, the mean less one standard deviation and the lowest of their
scores, both also centred (`center: true`: all rewards have one level per prompt), and
the average of their weights. Scores are on the scale of the base's images, win rates
are shares. Beside the 120 prompts they judge 200 training prompts that no reward has
seen, drawn in the same way. Win rates and centring were added when the figures of the
other rules on the first 120 prompts were known; the 200 were drawn after that.

*Rewards stopped in time*: one draw of labels, --members rewards of 200 steps at 5e-4 or
3e-4, of which the step with the best validation loss counts, as is usual. The further
judges: one head on frozen towers, and an ensemble of 8 heads (`members: 8`), by mean
and by mean less one standard deviation; the embedded reward `shapes-clip`; and the
verifier itself, which is as good as picking can be.

The last picture is of training: AWM (`configs/awm/shapes.yaml`, with --steps steps at
a constant learning rate) optimises the weakest of the latter rewards, which is right
least often on the pairs that it was not trained on, and the mean of all less one
standard deviation, each from --seeds seeds. Every 25 steps the same 60 prompts, which
the runs do not train on, are drawn from the same noise, two images each. Shown are the
optimised reward, in standard deviations of the first of these drawings, and the
verifier. The verifier turns at the first drawing at which it has fallen since an
earlier one, by the test of the guardian (95 % over all pairs of drawings, clustered by
prompt). Goes on where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import json
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from guardian import turn
from leaderboard import ROOT, choice_prompts, folder_name, kept, recipe, train_whole
from rewards import World, drawn_labels

from diffalign.evaluation.statistics import clustered_bootstrap
from diffalign.generation.pipelines import base_pipeline
from diffalign.generation.sampling import draw_files, generate
from diffalign.recipe import build_trainer
from diffalign.reward_training import RewardConfig, RewardTrainer, average_rewards
from diffalign.reward_training.judgements import Judgements
from diffalign.rewards import combine, load_scorer
from diffalign.runtime.distributed import DistributedContext
from diffalign.runtime.files import write_atomically
from diffalign.runtime.seeds import image_seed
from diffalign.shapes.prompts import held_out_prompts, train_prompts
from diffalign.shapes.sampling_defaults import SAMPLING
from diffalign.training.guardian import Guardian, Look
from diffalign.training.sections import ValidationConfig

ONE = "one reward from few preferences"
WEAKEST = "the weakest reward"
FLIPS, PROMPTS = 0.25, 60
WORLD = 200  # training prompts whose images the rewards may be trained on
FURTHER = 200  # prompts that the overfitted rewards judge beside the held-out ones
SCALED = 60  # prompts whose images give the scale of the rewards that train
FIRST = 64  # images of each of them
LEARNING_RATES = (5e-4, 3e-4)  # of the rewards
TOWERS: dict[str, Any] = {
    "towers": "full",
    "lr_scheduler": "cosine",
    "warmup_steps": 20,
    "per_device_train_batch_size": 8,
}
OVERFITTED: dict[str, Any] = TOWERS | {"max_steps": 300, "eval_steps": 300}
OVERFITTED_RATES = (5e-4, 4e-4)
OF_ALL = 4  # overfitted rewards of all preferences
LABELS, OVERFITTED_LABELS = 7, range(31, 37)  # seeds of the drawn labels
EVERY = 25  # steps of the training against them
OTHERS = {
    "average of the weights": "average",
    "one head": "head",
    "8 heads, mean": "heads",
    "8 heads, mean less one standard deviation": "heads-careful",
    "shapes-clip": "shapes-clip",
}
Array = npt.NDArray[np.float64]


@functools.cache
def few_prompts(work: Path) -> World:
    return World(work / "world", WORLD)


def few_preferences(work: Path, labels: int = LABELS) -> tuple[Path, Judgements]:
    """The base without preferences, and noisy judgements of a few prompts."""
    world = few_prompts(work)
    first, second = world.pairs(False)
    kept_rows = world.prompt[first] < PROMPTS
    first, second = first[kept_rows], second[kept_rows]
    noise = np.random.default_rng(labels)
    label = drawn_labels(world.score[first] - world.score[second], noise, FLIPS)
    return world.folder, world.judged(first, second, label)


def learned_from_few(work: Path, members: int) -> dict[str, Path]:
    """Name -> folder of every trained reward; trains those that are not there."""
    base, data = few_preferences(work)
    rewards = {
        f"few-{seed}": trained(
            work / "rewards" / f"few-{seed}",
            base,
            data,
            seed=seed,
            learning_rate=LEARNING_RATES[seed % len(LEARNING_RATES)],
            max_steps=200,
            **TOWERS,
        )
        for seed in range(members)
    }
    rewards["average"] = averaged([*rewards.values()], work / "rewards" / "average", data)
    return rewards | {
        "heads": trained(work / "rewards" / "heads", base, data, members=8),
        "head": trained(work / "rewards" / "head", base, data),
    }


def overfitted(work: Path, members: int) -> dict[tuple[str, int], list[Path]]:
    """What they saw and the seed of the labels -> folders, the last of the average."""
    rewards = {}
    for labels in OVERFITTED_LABELS:
        base, data = few_preferences(work, labels)
        for saw, share, count in (("all", 1.0, OF_ALL), ("half", 0.5, members)):
            place = work / "rewards" / f"overfitted-{saw}-{labels}"
            folders = [
                trained(
                    place.with_name(f"{place.name}-{seed}"),
                    base,
                    data,
                    seed=100 * labels + seed,
                    learning_rate=OVERFITTED_RATES[seed % len(OVERFITTED_RATES)],
                    subsample=share,
                    **OVERFITTED,
                )
                for seed in range(count)
            ]
            average = averaged(folders, place.with_name(f"{place.name}-average"), data)
            rewards[saw, labels] = [*folders, average]
    return rewards


def trained(folder: Path, base: Path, data: Judgements, **settings: Any) -> Path:
    """The folder, after training if it is not there."""
    if not (folder / "reward.json").is_file():
        args = RewardConfig(output_dir=str(folder), overwrite_output_dir=True, **settings)
        RewardTrainer("shapes-clip", args, data, model_path=str(base)).train()
    return folder


def averaged(folders: list[Path], average: Path, data: Judgements) -> Path:
    """The folder, after averaging if it is not there."""
    if not (average / "reward.json").is_file():
        average_rewards(folders, average, data, force=True)
    return average


def scored(
    work: Path, images: int, prompts: list[str], judges: dict[str, str], careful: str | None = None
) -> dict[str, Array]:
    """Draw images of prompts and score them.

    Args:
        work: Folder that keeps images and scores.
        images: Of each prompt.
        prompts: What is drawn.
        judges: Name -> scorer, beside the verifier.
        careful: Name of an ensemble that scores by its mean less one deviation, too.

    Returns:
        Judge -> (prompts, images).
    """
    work = work / "over-optimisation"
    place = work / f"images-{len(prompts)}"
    # The first of all prompts begin the list, so that their batches are the same
    # whatever --images is.
    wanted = [
        (p, image_seed(5, p, n), place / f"{i:03d}-{n:03d}.png")
        for begin in range(0, images, FIRST)
        for i, p in enumerate(prompts)
        for n in range(begin, min(begin + FIRST, images))
    ]
    pipes: list[Any] = []

    def draw(texts: list[str], seeds: list[int]) -> list[Any]:
        if not pipes:
            pipes.append(base_pipeline())
        return generate(pipes[0], texts, seeds, batch_size=len(texts), progress=False, **SAMPLING)

    draw_files(draw, wanted, 128, DistributedContext(0, 1, None), "drawing")
    wanted.sort(key=lambda image: image[2])

    def scores(name: str, key: str, **options: str) -> Array:
        def judge() -> list[list[float]]:
            values = load_scorer(key, **options)(
                [file for _, _, file in wanted], [prompt for prompt, _, _ in wanted]
            )
            return values.reshape(-1, images).tolist()

        return np.asarray(
            kept(work / f"{name}-{len(prompts)}-{images}.json", judge), dtype=np.float64
        )

    values = {"verifier": scores("verifier", "shapes")}
    values |= {name: scores(name, key) for name, key in judges.items()}
    if careful is not None:
        name = f"{careful}-careful"
        values[name] = scores(name, judges[careful], combine="mean_minus_std")
    return values


def best_of(judge: Array, value: Array, n: int) -> Array:
    """(prompts,): mean `value` of the image that `judge` likes best, over all choices
    of n of the images of a prompt.

    The image with rank r (from 0, by the judge) is the best of a choice if the other
    n - 1 are among the r below it.
    """
    count = judge.shape[1]
    weights = np.array([comb(rank, n - 1) / comb(count, n) for rank in range(count)])
    ordered = np.take_along_axis(value, np.argsort(judge, axis=1, kind="stable"), axis=1)
    return ordered @ weights


def curves(
    scores: dict[str, Array], members: list[str], powers: list[int]
) -> dict[str, dict[str, Array]]:
    """Judge -> its own reward and the verifier, (len(powers), prompts) each. `ONE` is
    the mean over the single rewards, which follow by name."""
    units = in_units(scores)
    judges: dict[str, list[Array]] = {ONE: [units[name] for name in members]}
    for name, method in (
        (f"mean of {len(members)}", "mean"),
        (f"mean of {len(members)} less one standard deviation", "mean_minus_std"),
    ):
        judges[name] = [combined(scores, members, method)]
    for name, key in OTHERS.items():
        judges[name] = [units[key]]
    judges["verifier"] = [units["verifier"]]
    judges |= {name: [units[name]] for name in members}
    return {name: curve(of, scores["verifier"], powers) for name, of in judges.items()}


def in_units(scores: dict[str, Array]) -> dict[str, Array]:
    """Scores in standard deviations of the base's images."""
    return {name: (values - values.mean()) / values.std() for name, values in scores.items()}


def combined(
    scores: dict[str, Array], members: list[str], method: str, center: bool = False
) -> Array:
    """Scores by an ensemble, each member on the scale of the base's images."""
    stacked = torch.from_numpy(np.stack([scores[name] for name in members], axis=-1))
    scales = [(float(scores[name].mean()), float(scores[name].std())) for name in members]
    return combine(stacked, method, affine=scales, center=center).double().numpy()


def curve(judges: list[Array], verifier: Array, powers: list[int]) -> dict[str, Array]:
    """Own reward and verifier of the best of n, (len(powers), prompts) each.

    The mean over the judges.
    """
    pairs = {"own": [(j, j) for j in judges], "verifier": [(j, verifier) for j in judges]}
    return {
        name: np.array([np.mean([best_of(*each, n) for each in of], axis=0) for n in powers])
        for name, of in pairs.items()
    }


def overfitted_curves(
    scores: dict[str, Array], rewards: dict[tuple[str, int], list[str]], powers: list[int]
) -> dict[str, dict[str, Array]]:
    """Judge -> its curves, the mean over the draws of the labels.

    Args:
        scores: Of all rewards, by name.
        rewards: What they saw and the seed of the labels -> names, the average last.
        powers: The n.
    """
    units = in_units(scores)
    of_all, of_halves = (
        [names for (seen, _), names in rewards.items() if seen == saw] for saw in ("all", "half")
    )
    count, halves = len(of_all[0]) - 1, len(of_halves[0]) - 1

    def each(sets: list[list[str]]) -> list[Array]:
        return [units[name] for names in sets for name in names[:-1]]

    def together(sets: list[list[str]], method: str, center: bool = False) -> list[Array]:
        return [combined(scores, names[:-1], method, center) for names in sets]

    def by_wins(sets: list[list[str]]) -> list[Array]:
        stacks = [np.stack([scores[name] for name in names[:-1]], axis=-1) for names in sets]
        return [combine(torch.from_numpy(stack)).double().numpy() for stack in stacks]

    judges = {
        ONE: each(of_all),
        f"mean of {count}": together(of_all, "mean"),
        f"win rates by {count}": by_wins(of_all),
        f"weights of {count}, averaged": [units[names[-1]] for names in of_all],
        "one reward of a half": each(of_halves),
        f"mean of {halves} of halves": together(of_halves, "mean"),
        f"win rates by {halves} of halves": by_wins(of_halves),
        f"mean of {halves} of halves less one standard deviation": together(
            of_halves, "mean_minus_std"
        ),
        f"mean of {halves} of halves less one standard deviation, centred": together(
            of_halves, "mean_minus_std", center=True
        ),
        f"lowest of {halves} of halves": together(of_halves, "min"),
        f"lowest of {halves} of halves, centred": together(of_halves, "min", center=True),
        f"weights of {halves} of halves, averaged": [units[names[-1]] for names in of_halves],
        "verifier": [units["verifier"]],
    }
    return {name: curve(of, scores["verifier"], powers) for name, of in judges.items()}


def turns(
    found: dict[str, dict[str, Array]], powers: list[int], samples: int = 10_000
) -> list[str]:
    """The n at which the verifier of a judge's picks is highest, with intervals."""
    lines = [
        "",
        "Where a judge turns, the n at which the verifier of its picks is highest, and how many "
        f"times later than {ONE}:",
        "",
        "| picked by | n | 95 % | times later | 95 % |",
        "|---|---|---|---|---|",
    ]
    prompts = found[ONE]["verifier"].shape[1]
    picks = np.random.default_rng(0).integers(prompts, size=(samples, prompts))
    drawn = {
        name: np.array(powers)[np.stack([v[picks].mean(1) for v in curve["verifier"]]).argmax(0)]
        for name, curve in found.items()
    }
    tops = {name: powers[int(c["verifier"].mean(1).argmax())] for name, c in found.items()}
    for name, top in tops.items():
        low, high = np.quantile(drawn[name], [0.025, 0.975])
        row = f"| {name} | {top} | {low:.0f} to {high:.0f} |"
        if name == ONE:
            lines.append(f"{row} | |")
            continue
        least, most = np.quantile(drawn[name] / drawn[ONE], [0.025, 0.975])
        lines.append(f"{row} {top / tops[ONE]:g} | {least:g} to {most:g} |")
    return lines


def after_the_turn(found: dict[str, dict[str, Array]], powers: list[int]) -> list[str]:
    """What picking harder than where one reward turns changes, judge by judge."""
    one = found[ONE]["verifier"]
    turn_of_one = int(one.mean(1).argmax())
    lines = [
        "",
        f"From n = {powers[turn_of_one]}, where {ONE} turns, to {powers[-1]}, the verifier of the "
        "picks changes by:",
        "",
        f"| picked by | change | against {ONE} |",
        "|---|---|---|",
    ]
    for name, curve in found.items():
        change = curve["verifier"][-1] - curve["verifier"][turn_of_one]
        against = "" if name == ONE else said(change - (one[-1] - one[turn_of_one]))
        lines.append(f"| {name} | {said(change)} | {against} |")
    return lines


def shared_errors(scores: dict[str, Array], members: list[str]) -> list[str]:
    """How much two rewards are wrong about the same images.

    An error is what is left of a reward's scores beside the verifier, within a prompt.
    """

    def within(values: Array) -> Array:
        centred = (values - values.mean(1, keepdims=True)).ravel()
        return centred / centred.std()

    verifier = within(scores["verifier"])
    agreement = {name: float(np.mean(within(scores[name]) * verifier)) for name in members}
    errors = [within(scores[name]) - agreement[name] * verifier for name in members]
    shared = np.corrcoef(errors)[np.triu_indices(len(members), 1)]
    low, high = min(agreement.values()), max(agreement.values())
    return [
        "",
        "Within a prompt the scores of one reward correlate with the verifier by "
        f"{low:.2f} to {high:.2f}. What is left of them, the errors, correlates between two "
        f"rewards by {shared.min():.2f} to {shared.max():.2f}.",
    ]


def said(difference: Array) -> str:
    low, high = clustered_bootstrap(difference[:, None])
    return f"{difference.mean():+.3f} ({low:+.3f} to {high:+.3f})"


def tables(found: dict[str, dict[str, Array]], powers: list[int]) -> list[str]:
    lines = [
        "Verifier of the picked image:",
        "",
        f"| picked by | {' | '.join(f'n = {n}' for n in powers)} |",
    ]
    lines.append("|---" * (len(powers) + 1) + "|")
    lines += [
        f"| {name} | {' | '.join(f'{v.mean():.3f}' for v in curve['verifier'])} |"
        for name, curve in found.items()
    ]
    lines += ["", "The judge's own reward of it, standard deviations of the base's images:", ""]
    lines += [
        f"| picked by | {' | '.join(f'n = {n}' for n in powers)} |",
        "|---" * (len(powers) + 1) + "|",
    ]
    lines += [
        f"| {name} | {' | '.join(f'{v.mean().round(2) + 0.0:.2f}' for v in curve['own'])} |"
        for name, curve in found.items()
    ]
    four, last = powers.index(4), len(powers) - 1
    lines += [
        "",
        (
            "What harder optimisation changes in the verifier, and what it leaves of the gain over "
            "an image that nobody picked:"
        ),
        "",
    ]
    lines += [
        f"| picked by | n = 1 to 4 | n = 4 to {powers[last]} | n = 1 to {powers[last]} |",
        "|---|---|---|---|",
    ]
    for name, curve in found.items():
        v = curve["verifier"]
        lines.append(
            f"| {name} | {said(v[four] - v[0])} | {said(v[last] - v[four])} | "
            f"{said(v[last] - v[0])} |"
        )
    lines += ["", f"Against {ONE}, verifier of the picked image, same images:", ""]
    lines += [f"| picked by | n = 4 | n = {powers[last]} |", "|---|---|---|"]
    for name in [name for name in found if name not in (ONE, "verifier")]:
        gains = [said(found[name]["verifier"][i] - found[ONE]["verifier"][i]) for i in (four, last)]
        lines.append(f"| {name} | {gains[0]} | {gains[1]} |")
    return lines


def plot(found: dict[str, dict[str, Array]], powers: list[int], path: Path) -> None:
    """The judge's own reward (left) and the verifier (right) of the best of n."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colours = pyplot.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for (name, curve), colour in zip(found.items(), colours, strict=False):
        for axes, what in zip(panels, ("own", "verifier"), strict=True):
            if what == "own" and name == "verifier":
                continue
            axes.plot(
                powers,
                curve[what].mean(1),
                color=colour,
                marker="o",
                ms=4,
                ls="--" if name == "verifier" else "-",
                label=name,
            )
            bounds = np.array([clustered_bootstrap(values[:, None]) for values in curve[what]])
            axes.fill_between(powers, bounds[:, 0], bounds[:, 1], color=colour, alpha=0.12, lw=0)
    panels[0].set(
        title="the judge's own reward (standard deviations)", xlabel="n, images to pick the best of"
    )
    panels[1].set(title="verifier of the same image", xlabel="n, images to pick the best of")
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_xticks(powers, [str(n) for n in powers])
        axes.grid(alpha=0.3)
    figure.legend(
        *panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9
    )
    figure.savefig(path, dpi=110)


# Training


def reward_sections(
    scores: dict[str, Array], members: dict[str, Path], weakest: str
) -> dict[str, dict[str, Any]]:
    """Arm -> its `rewards:` section; rewards are on the scale of the base's images."""
    entries = {
        name: {
            "name": name,
            "scorer": str(folder),
            "normalize": {
                "kind": "affine",
                "mean": float(scores[name].mean()),
                "std": float(scores[name].std()),
            },
        }
        for name, folder in members.items()
    }
    method = {"method": "mean_minus_std", "k": 1.0}
    return {
        WEAKEST: {"rewards": [entries[weakest]]},
        f"mean of {len(entries)} less one standard deviation": {
            "rewards": [*entries.values()],
            "combine": method,
        },
    }


def train(section: dict[str, Any], name: str, seed: int, options: argparse.Namespace) -> list[Look]:
    """Trains one arm as far as it has not been. Returns the scores on the way."""
    folder = options.work / "runs" / f"{folder_name(name)}-{seed}"
    if not (folder / f"checkpoint-{options.steps}").is_dir():
        train_on(section, folder, seed, options)
    guardian = Guardian()
    assert guardian.read(folder / "samples" / "guardian.json", options.steps)
    return guardian.looks


def train_on(section: dict[str, Any], folder: Path, seed: int, options: argparse.Namespace) -> None:
    prompts, choice = options.work / "train.jsonl", choice_prompts()
    texts = train_prompts()[: -len(choice)]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    values = {
        "rewards": json.dumps(section),
        "data.dataset_name": prompts,
        "data.cache_text_embeddings": options.work / "cache",
        "train.output_dir": folder,
        "train.seed": seed,
        "train.max_steps": options.steps,
        "train.save_steps": EVERY,
        "train.save_total_limit": 1,
        "train.lr_scheduler": "constant_with_warmup",
    }
    if any(folder.glob("checkpoint-*")):
        values["train.resume_from_checkpoint"] = "latest"
    run = recipe("awm/shapes", values)
    run.validation = ValidationConfig(
        validation_prompts=choice,
        scorers=["shapes"],
        on_hacking="warn",
        validation_steps=EVERY,
        num_inference_steps=10,
        guidance_scale=2.0,
    )
    train_whole(build_trainer(run))


def own(looks: list[Look]) -> Array:
    """(looks, prompts, images): the optimised reward, in spreads of the first look."""
    first = looks[0].reward
    return np.stack([(look.reward - first.mean()) / first.std() for look in looks])


def verified(looks: list[Look]) -> Array:
    """(looks, prompts, images): the verifier."""
    return np.stack([look.held_out["shapes"] for look in looks])


def plot_training(trained: dict[str, list[list[Look]]], path: Path) -> None:
    """The optimised reward (left) and the verifier (right) of the same images."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for (name, runs), colour in zip(trained.items(), ("#d1242f", "#1a7f37"), strict=True):
        steps = [look.step for look in runs[0]]
        for axes, values in ((left, own), (right, verified)):
            scores = [values(looks) for looks in runs]
            for score in scores:
                axes.plot(steps, score.mean((1, 2)), color=colour, lw=0.7, alpha=0.6)
            together = np.concatenate(scores, axis=2)
            axes.plot(
                steps, together.mean((1, 2)), color=colour, lw=2, marker="o", ms=4, label=name
            )
            bounds = np.array([clustered_bootstrap(each) for each in together])
            axes.fill_between(steps, bounds[:, 0], bounds[:, 1], color=colour, alpha=0.12, lw=0)
    left.set(title="the optimised reward (standard deviations)", xlabel="optimizer step")
    right.set(title="verifier of the same images", xlabel="optimizer step")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(
        *right.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9
    )
    figure.savefig(path, dpi=110)


def training_table(trained: dict[str, list[list[Look]]]) -> list[str]:
    """Verifier at the start, at its highest and at the end, and where it turns."""
    lines = [
        "",
        "*Optimised reward*: at the end, in standard deviations since the start:",
        "",
        "| optimised | seed | optimised reward | verifier at the start | at its highest (step) | "
        "at the end | it turns at step |",
        "|---" * 7 + "|",
    ]
    for name, runs in trained.items():
        for seed, looks in enumerate(runs):
            verifier = verified(looks).mean((1, 2))
            top = int(verifier.argmax())
            lines.append(
                f"| {name} | {seed} | {own(looks)[-1].mean():+.2f} | {verifier[0]:.3f} | "
                f"{verifier[top]:.3f} ({looks[top].step}) | {verifier[-1]:.3f} | "
                f"{turn(looks) or 'never'} |"
            )
    single, ensemble = (
        np.concatenate([verified(looks)[-1] for looks in runs], axis=1) for runs in trained.values()
    )
    return [
        *lines,
        "",
        "Verifier at the end, the ensemble less the single reward, all seeds: "
        f"{said((ensemble - single).mean(1))}.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument(
        "--overfitted", type=int, default=6, help="overfitted rewards of each draw of labels"
    )
    parser.add_argument("--steps", type=int, default=250, help="of training")
    parser.add_argument("--seeds", type=int, default=3, help="of training, 0 for none")
    parser.add_argument("--work", type=Path, default=Path("runs/over-optimisation"))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "over_optimisation.md")
    options = parser.parse_args()
    if options.images < 8 or min(options.members, options.overfitted) < 2:
        parser.error("--images: at least 8; --members and --overfitted: at least 2")
    rewards = learned_from_few(options.work, options.members)
    members = {name: folder for name, folder in rewards.items() if name.startswith("few-")}
    of_labels = overfitted(options.work, options.overfitted)
    others = {folder.name: str(folder) for folders in of_labels.values() for folder in folders}
    powers = [2**i for i in range(options.images.bit_length()) if 2**i <= options.images]
    prompts = [*held_out_prompts()[60:], *held_out_prompts()[:60]]
    judged = {"shapes-clip": "shapes-clip"} | {name: str(place) for name, place in rewards.items()}
    scores = scored(options.work, options.images, prompts, judged | others, careful="heads")
    further = train_prompts()[WORLD : WORLD + FURTHER]
    more = scored(options.work, options.images, further, others)
    both = {name: np.concatenate([scores[name], values]) for name, values in more.items()}
    found = curves(scores, list(members), powers)
    judges = {name: curve for name, curve in found.items() if name not in members}
    picture = options.output.with_suffix(".png")
    plot(judges, powers, picture)
    names = {key: [folder.name for folder in folders] for key, folders in of_labels.items()}
    of_overfitted = overfitted_curves(both, names, powers)
    overfitted_picture = picture.with_stem(f"{picture.stem}_overfitted")
    # Beside the verifier's own picks the others could not be told apart, and there are
    # ten colours.
    unseen = ("verifier", f"win rates by {OF_ALL}", f"lowest of {options.overfitted} of halves")
    compared = {name: curve for name, curve in of_overfitted.items() if name not in unseen}
    plot(compared, powers, overfitted_picture)
    accuracy = {
        name: json.loads((folder / "report.json").read_text())["reward"]["accuracy"]
        for name, folder in rewards.items()
    }
    weakest = min(members, key=accuracy.__getitem__)
    some = {name: values[:SCALED, :FIRST] for name, values in scores.items()}
    sections = reward_sections(some, members, weakest) if options.seeds else {}
    trained_looks = {
        name: [train(section, name, seed, options) for seed in range(options.seeds)]
        for name, section in sections.items()
    }
    training_picture = picture.with_stem(f"{picture.stem}_training")
    if trained_looks:
        plot_training(trained_looks, training_picture)
    assert __doc__ is not None
    body = [
        "# Over-optimisation of a learned reward",
        "",
        *__doc__.split("\n\n", 1)[1].rstrip().split("\n"),
        "",
    ]
    body += [
        "## Overfitted rewards",
        "",
        f"![own reward and verifier of the best of n]({overfitted_picture.name})",
        "",
        *tables(of_overfitted, powers),
        *turns(of_overfitted, powers),
        *after_the_turn(of_overfitted, powers),
    ]
    for (saw, labels), (*alone, _) in names.items():
        seen = "all preferences" if saw == "all" else "a half of the prompts each"
        body += ["", f"Labels of seed {labels}, {seen}:", *shared_errors(both, alone)[1:]]
    body += [
        "",
        "## Rewards stopped in time",
        "",
        "Of the pairs of six prompts that they were not trained on, with noisy labels, the rewards "
        f"are right in {', '.join(f'{100 * a:.0f} % ({name})' for name, a in accuracy.items())}.",
        "",
        f"![own reward and verifier of the best of n]({picture.name})",
        "",
        *tables(judges, powers),
        *turns(found, powers),
        *shared_errors(scores, list(members)),
        "",
    ]
    body += ["## Training", ""]
    if trained_looks:
        body += [f"![optimised reward and verifier over training]({training_picture.name})"]
        body += training_table(trained_looks)
    else:
        body += ["Training was not run (--seeds 0)."]
    write_atomically(options.output, ("\n".join(body) + "\n").encode())
    print("\n".join(body))


if __name__ == "__main__":
    main()
