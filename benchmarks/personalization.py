"""PPD on two populations with opposite tastes: whom does one model please?

    python benchmarks/personalization.py [--model shapes] [--seeds 3] [--work FOLDER]
        [--output benchmarks/personalization.md]
    python benchmarks/personalization.py --make_data FOLDER
        [--dataset diffalign-quickstart/dataset]
    python benchmarks/personalization.py --picture docs/papers/ppd.jpg

Six users judge the ranked images of `benchmarks/leaderboard.py`. All want the prompt
followed: 0.8 times the share of right attributes. Three of them want lit images and
three want flat ones: another 0.2. Each list is judged by one user of either kind, whose
best and worst image make a pair. PPD is trained on all pairs with their users
(`configs/ppd/shapes.yaml`), and Diffusion-DPO on the same pairs without them. For PPD,
pairs of a seventh and an eighth user come from the 60 prompts that choose: four each,
which no training has seen.

Every way of drawing is judged by the grade of one kind of user. It takes its own best
guidance on the 60 prompts that choose, then draws the 120 held-out prompts, two images
each, from the same noise. Trained models and scores lie in --work: interrupted, it goes
on. `--make_data` only writes the pairs of a ranked dataset. `--picture` trains the
first seed if need be, and only draws what two users get from the same noise.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from leaderboard import (
    SCALES,
    choice_prompts,
    dataset,
    drawing,
    interval,
    kept,
    make_data,
    recipe,
    train_whole,
)
from PIL import Image

from diffalign import load_preferences, load_users
from diffalign.data.images import raw_bytes
from diffalign.data.inspect import write_canonical
from diffalign.evaluation.statistics import win_rate
from diffalign.generation.grids import models_grid
from diffalign.generation.pipelines import base_pipeline
from diffalign.generation.sampling import generate
from diffalign.recipe import build_trainer
from diffalign.runtime.files import write_atomically
from diffalign.shapes.prompts import held_out_prompts
from diffalign.shapes.sampling_defaults import sampling_settings
from diffalign.shapes.verifier import parse_prompt, verify

STYLES = ("lit", "flat")
PEOPLE = 3
PICTURED = 8
IMAGES = 2
SEED, CHOICE_SEED, PAIR_SEED = 44_000_000, 45_000_000, 46_000_000
Array = npt.NDArray[np.float64]


def grade(images: Sequence[Image.Image], prompts: Sequence[str], style: str) -> Array:
    """What a user of a kind thinks of images, in [0, 1]."""
    grades = []
    for image, prompt in zip(images, prompts, strict=True):
        verdict = verify(image)
        right = verdict.matches(parse_prompt(prompt))
        grades.append(0.8 * sum(right.values()) / len(right) + 0.2 * (verdict.style == style))
    return np.array(grades)


def best_and_worst(images: list[Image.Image], prompt: str, style: str) -> tuple[int, int] | None:
    """The pair of a user, None where all images are equal to them."""
    grades = grade(images, [prompt] * len(images), style)
    best, worst = int(grades.argmax()), int(grades.argmin())
    return None if grades[best] == grades[worst] else (best, worst)


def write_pairs(source: str | Path, folder: Path) -> Path:
    """Turn ranked lists into pairs of six users."""
    rows = []
    for number, group in enumerate(load_preferences(str(source), verbose=False)):
        images = group.open_images()
        for style in STYLES:
            pair = best_and_worst(images, group.prompts[0], style)
            if pair is None:
                continue
            chosen, rejected = ({"bytes": raw_bytes(group.images[i]), "path": None} for i in pair)
            rows.append(
                {
                    "prompt": group.prompts[0],
                    "chosen": chosen,
                    "rejected": rejected,
                    "user_id": f"{style}-{number % PEOPLE + 1}",
                    "weight": 1.0,
                }
            )
    return write_canonical(rows, folder)


def trained(name: str, options: argparse.Namespace, seed: int, pairs: Path) -> Path:
    """The folder of a trained model."""
    folder = options.work / "runs" / f"{name}-{seed}"
    done = folder / (
        "user_adapter.safetensors" if name == "ppd" else "pytorch_lora_weights.safetensors"
    )
    if not done.is_file():
        values = {
            "model": options.model,
            "data.dataset_name": pairs,
            "data.cache_latents": options.work / "cache",
            "data.cache_text_embeddings": options.work / "cache",
            "train.output_dir": folder,
            "train.seed": seed,
            "train.overwrite_output_dir": "true",
            "train.save_steps": 100_000,
            "train.logging_steps": 50,
        }
        train_whole(
            build_trainer(recipe(f"{'ppd' if name == 'ppd' else 'diffusion_dpo'}/shapes", values))
        )
    return folder


def judged(draw: Callable[..., list[Any]], style: str) -> dict[str, Any]:
    """Held-out grades of one kind of user at the best guidance for them."""
    prompts = choice_prompts()
    choice = {
        scale: float(grade(drawing(draw, prompts, CHOICE_SEED, scale), prompts, style).mean())
        for scale in SCALES
    }
    best = max(choice, key=choice.__getitem__)
    held_out = [prompt for prompt in held_out_prompts() for _ in range(IMAGES)]
    images = drawing(draw, held_out, SEED, best)
    wanted = [verify(image).style == style for image in images]
    return {
        "choice": {f"{scale:g}": value for scale, value in choice.items()},
        "best": best,
        "grades": grade(images, held_out, style).reshape(-1, IMAGES).tolist(),
        "style": float(np.mean(wanted)),
    }


def new_pairs(model: str, style: str) -> list[tuple[str, Image.Image, Image.Image]]:
    """Four pairs of a user whom no training has seen, drawn by the base."""
    pipe, pairs = base_pipeline(model), []
    settings = {**sampling_settings(model), "guidance_scale": 2.0}
    for number, prompt in enumerate(choice_prompts()):
        seeds = [PAIR_SEED + 10 * number + i for i in range(6)]
        images = generate(pipe, [prompt] * 6, seeds, progress=False, **settings)
        pair = best_and_worst(images, prompt, style)
        if pair is not None:
            pairs.append((prompt, images[pair[0]], images[pair[1]]))
        if len(pairs) == 4:
            break
    return pairs


def measure(options: argparse.Namespace, seed: int, pairs: Path) -> dict[str, Any]:
    """Every way of drawing, of one seed."""
    folders = {name: trained(name, options, seed, pairs) for name in ("dpo", "ppd")}
    results: dict[str, Any] = {}

    def drawer(pipe: Any) -> Callable[..., list[Any]]:
        def draw(prompts: list[str], seeds: list[int], **settings: Any) -> list[Any]:
            own = {**sampling_settings(options.model), **settings}
            return generate(pipe, prompts, seeds, batch_size=60, progress=False, **own)

        return draw

    def keep(name: str, make: Callable[[], Any]) -> None:
        path = options.work / "judged" / f"{name.replace(' ', '-')}-{seed}.json"
        results[name] = kept(path, make)

    base = base_pipeline(options.model)
    plain = base_pipeline(options.model)
    plain.load_lora_weights(folders["dpo"])
    pipe = base_pipeline(options.model)
    users = load_users(pipe, folders["ppd"])

    def as_user(user: Any, style: str) -> Any:
        def make() -> Any:
            with users.apply(user):
                return judged(drawer(pipe), style)

        return make

    for style, other in (STYLES, STYLES[::-1]):
        keep(f"base for {style}", lambda style=style: judged(drawer(base), style))
        keep(f"dpo for {style}", lambda style=style: judged(drawer(plain), style))
        keep(f"own for {style}", as_user(f"{style}-1", style))
        keep(f"other for {style}", as_user(f"{other}-1", style))
        weights = kept(
            options.work / "judged" / f"weights-{style}-{seed}.json",
            lambda style=style: users.weights_of_pairs(new_pairs(options.model, style)),
        )
        results[f"weights of a new {style}"] = weights
        keep(f"new for {style}", as_user(weights, style))

    def mixture() -> Any:
        prompts = held_out_prompts()
        shares = []
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            with users.apply({"lit-1": share, "flat-1": 1 - share}):
                images = drawing(drawer(pipe), prompts, SEED, 2.0)
            shares.append(float(np.mean([verify(image).style == "lit" for image in images])))
        return shares

    keep("mixture", mixture)
    return results


def picture(options: argparse.Namespace, pairs: Path) -> None:
    """Draws the base, a lit user and a flat user from the same noise."""
    pipe, prompts = base_pipeline(options.model), list(held_out_prompts()[:PICTURED])
    seeds = range(SEED, SEED + len(prompts))
    settings = {**sampling_settings(options.model), "guidance_scale": 2.0}

    def drawn() -> list[Any]:
        return generate(pipe, prompts, seeds, batch_size=60, progress=False, **settings)

    columns = [drawn()]
    users = load_users(pipe, trained("ppd", options, 0, pairs))
    for style in STYLES:
        with users.apply(f"{style}-1"):
            columns.append(drawn())
    rows = [(prompt, [[column[i]] for column in columns]) for i, prompt in enumerate(prompts)]
    headings = ["base", *(f"a user who wants {style} images" for style in STYLES)]
    grid = models_grid(rows, headings, cell=112, columns=2)
    grid.save(options.picture, quality=90)


def lit_share(weights: dict[str, float]) -> float:
    return sum(weight for name, weight in weights.items() if name.startswith("lit"))


def table(results: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown."""
    lines = [
        "| who | against | seed | win-rate % | grade | theirs | style wanted, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for style in STYLES:
        for who, against in (
            ("own", "base"), ("own", "dpo"), ("own", "other"), ("new", "base"), ("new", "dpo"),
            ("new", "other"),
        ):  # fmt: skip
            for seed, result in enumerate(results):
                mine, theirs = result[f"{who} for {style}"], result[f"{against} for {style}"]
                rate = win_rate(np.array(theirs["grades"]), np.array(mine["grades"]))
                name = {"own": f"{style} user", "new": f"new {style} user, 4 pairs"}[who]
                rival = {"dpo": "Diffusion-DPO on all pairs", "other": "the other kind's user"}
                lines.append(
                    f"| {name} | {rival.get(against, against)} | {seed} | {interval(rate)} | "
                    f"{np.mean(mine['grades']):.3f} | {np.mean(theirs['grades']):.3f} | "
                    f"{100 * mine['style']:.0f} |"
                )
    lines += [
        "",
        "Share of lit images, %, of mixtures with 0, 25, 50, 75 and 100 % of a lit user (the rest "
        "of a flat one), at guidance 2: "
        + "; ".join(
            f"seed {seed} {', '.join(f'{100 * s:.0f}' for s in result['mixture'])}"
            for seed, result in enumerate(results)
        )
        + ".",
        "",
        "Weight of the lit users in the mixture of a new user: "
        + "; ".join(
            f"seed {seed} {style} {lit_share(result[f'weights of a new {style}']):.2f}"
            for seed, result in enumerate(results)
            for style in STYLES
        )
        + ".",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/personalization"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/personalization.md"))
    parser.add_argument("--make_data", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--dataset", default="diffalign-quickstart/dataset")
    options = parser.parse_args()
    if options.make_data is not None:
        print(f"wrote {write_pairs(options.dataset, options.make_data)}")
        return
    make_data(options.work, options.model)
    pairs = options.work / "pairs"
    if not pairs.is_dir():
        write_pairs(dataset(options.work, "ranked"), pairs)
    if options.picture is not None:
        picture(options, pairs)
        return
    results = [measure(options, seed, pairs) for seed in range(options.seeds)]
    command = (
        f"python benchmarks/personalization.py --model {options.model} --seeds {options.seeds}"
    )
    about = str(__doc__).split("\n\n")[2].replace("\n", " ")
    text = ["# Two populations, one model", "", f"`{command}`", "", about, "", *table(results)]
    write_atomically(options.output, ("\n".join(text) + "\n").encode())
    print(json.dumps({"output": str(options.output)}))


if __name__ == "__main__":
    main()
