"""ControlNet, ControlNet++ and Ctrl-U at equal steps: who follows the condition image?

    python benchmarks/conditional.py [--seeds 3] [--steps 600] [--work FOLDER]
        [--output benchmarks/conditional.md]
    python benchmarks/conditional.py --make_data FOLDER
    python benchmarks/conditional.py --picture docs/papers/ctrl_u.jpg

The condition is a silhouette: the object and the background of a rendered scene in
their two colors, without light and soft edges. 600 scenes of the training prompts
train, those of the 120 held-out prompts judge. Each ControlNet starts as a copy of the
embedded UNet's encoder and trains as `configs/ctrl_u/shapes.yaml` says: as plain
ControlNet (no reward), as ControlNet++ (a reward at one noise level) and as Ctrl-U.
Guidance is chosen on 60 scenes of training prompts with other places and sizes.

The measure is the mean intersection over union of object and background between the
palette segmentation of the drawn image and the condition, and the share of images whose
attributes are all right. Goes on where it stopped. `--picture` trains two models of the
first seed if need be, and only draws what they do.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from leaderboard import BATCH, choice_prompts, folder_name, kept, recipe, train_whole
from PIL import Image

from diffalign.data.images import raw_bytes
from diffalign.data.inspect import write_canonical
from diffalign.evaluation.statistics import clustered_bootstrap
from diffalign.generation.grids import models_grid
from diffalign.generation.pipelines import base_pipeline
from diffalign.recipe import build_trainer
from diffalign.runtime.files import write_atomically
from diffalign.shapes.prompts import held_out_prompts, parse_prompt, train_prompts
from diffalign.shapes.renderer import BACKGROUND_PALETTE, PALETTE, render
from diffalign.shapes.verifier import attribute_table

SCALES = (1.0, 2.0, 3.0, 5.0)
SEED, CHOICE_SEED = 48_000_000, 49_000_000
PICTURED = 8
ARMS: dict[str, dict[str, Any]] = {
    "ControlNet": {"train.uncertainty": "false", "train.reward_weight": 0.0},
    "reward at one level (ControlNet++)": {"train.uncertainty": "false"},
    "Ctrl-U": {},
}
Array = npt.NDArray[np.float64]


def scene_images(prompt: str, number: int) -> tuple[Image.Image, Image.Image]:
    """A rendered scene and its silhouette."""
    scene, rng = parse_prompt(prompt), random.Random(number)
    image = render(scene, rng)
    colors = np.array([BACKGROUND_PALETTE[scene.background], PALETTE[scene.color]], np.float64)
    pixels = np.asarray(image, np.float64)
    distance = ((pixels[:, :, None] - colors) ** 2).sum(-1)
    return image, Image.fromarray(colors[distance.argmin(-1)].astype(np.uint8))


def make_data(folder: Path) -> Path:
    """Scenes of the training prompts with their silhouettes."""
    rows = []
    for number, prompt in enumerate(train_prompts()):
        image, silhouette = scene_images(prompt, number)
        rows.append(
            {
                "prompt": prompt,
                "image": {"bytes": raw_bytes(image), "path": None},
                "conditioning_image": {"bytes": raw_bytes(silhouette), "path": None},
                "weight": 1.0,
            }
        )
    return write_canonical(rows, folder)


def overlap(image: Image.Image, silhouette: Image.Image) -> float:
    """Mean intersection over union of the condition's two classes."""
    colors = np.array([*PALETTE.values(), *BACKGROUND_PALETTE.values()], np.float64)

    def classes(picture: Image.Image) -> npt.NDArray[np.int64]:
        pixels = np.asarray(picture.convert("RGB"), np.float64)
        return ((pixels[:, :, None] - colors) ** 2).sum(-1).argmin(-1)

    drawn, wanted = classes(image), classes(silhouette)
    values = []
    for label in np.unique(wanted):
        one, other = drawn == label, wanted == label
        values.append((one & other).sum() / (one | other).sum())
    return float(np.mean(values))


def draw(pipe: Any, prompts: list[str], first: int, scale: float) -> list[tuple[Any, Any]]:
    """Drawn images beside their conditions."""
    pairs = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        numbers = range(first + start, first + start + len(part))
        silhouettes = [scene_images(p, n)[1] for p, n in zip(part, numbers, strict=True)]
        images = pipe(
            part, image=silhouettes, num_inference_steps=20, guidance_scale=scale,
            generator=[torch.Generator().manual_seed(n) for n in numbers],
        ).images  # fmt: skip
        pairs += zip(images, silhouettes, strict=True)
    return pairs


def trained(name: str, seed: int, options: argparse.Namespace, data: Path) -> Path:
    """The folder of a trained ControlNet."""
    folder = options.work / "runs" / f"{folder_name(name)}-{options.steps}-{seed}"
    values = {
        "model": "shapes",
        "data.dataset_name": data,
        "data.cache_text_embeddings": options.work / "cache",
        "train.output_dir": folder,
        "train.seed": seed,
        "train.max_steps": options.steps,
        "train.overwrite_output_dir": "true",
        "train.save_steps": 100_000,
        "train.logging_steps": 25,
        **ARMS[name],
    }
    if not (folder / "config.json").is_file():
        train_whole(build_trainer(recipe("ctrl_u/shapes", values)))
    return Path(folder)


def pipeline(controlnet: Path) -> Any:
    parts = base_pipeline("shapes").components
    pipe = StableDiffusionControlNetPipeline(
        **parts,
        controlnet=ControlNetModel.from_pretrained(controlnet),
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(options: argparse.Namespace, data: Path) -> None:
    """Draws the condition and what two ControlNets make of it, from the same noise."""
    prompts, columns = list(held_out_prompts()[:PICTURED]), []
    for name in ("ControlNet", "Ctrl-U"):
        pairs = draw(pipeline(trained(name, 0, options, data)), prompts, SEED, 2.0)
        columns.append([image for image, _ in pairs])
    columns.insert(0, [silhouette for _, silhouette in pairs])
    rows = [(prompt, [[column[i]] for column in columns]) for i, prompt in enumerate(prompts)]
    grid = models_grid(rows, ["condition", "ControlNet", "Ctrl-U"], cell=112, columns=2)
    grid.save(options.picture, quality=90)


def measure(name: str, seed: int, options: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Train an arm and judge it."""
    pipe = pipeline(trained(name, seed, options, data))
    choice = {
        scale: float(
            np.mean([overlap(*p) for p in draw(pipe, choice_prompts(), CHOICE_SEED, scale)])
        )
        for scale in SCALES
    }
    best = max(choice, key=choice.__getitem__)
    prompts = held_out_prompts()
    pairs = draw(pipe, prompts, SEED, best)
    right = attribute_table([image for image, _ in pairs], prompts)
    return {
        "best": best,
        "overlap": [overlap(*pair) for pair in pairs],
        "right": [float(row["all"]) for row in right],
    }


def table(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Lines of Markdown."""
    lines = [
        "| method | seed | mIoU | minus ControlNet | all right, % | guidance |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        for seed, run in enumerate(runs):
            difference = ""
            if name != "ControlNet":
                plain = np.array(results["ControlNet"][seed]["overlap"])
                gap = (np.array(run["overlap"]) - plain)[:, None]
                low, high = clustered_bootstrap(gap)
                difference = f"{gap.mean():+.4f} ({low:+.4f} to {high:+.4f})"
            lines.append(
                f"| {name} | {seed} | {np.mean(run['overlap']):.4f} | {difference} | "
                f"{100 * np.mean(run['right']):.0f} | {run['best']:g} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--work", type=Path, default=Path("runs/conditional"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/conditional.md"))
    parser.add_argument("--make_data", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    if options.make_data is not None:
        print(f"wrote {make_data(options.make_data)}")
        return
    data = options.work / "data"
    if not data.is_dir():
        make_data(data)
    if options.picture is not None:
        picture(options, data)
        return
    results: dict[str, list[dict[str, Any]]] = {}
    for name in ARMS:
        results[name] = [
            kept(
                options.work / "judged" / f"{folder_name(name)}-{options.steps}-{seed}.json",
                lambda name=name, seed=seed: measure(name, seed, options, data),
            )
            for seed in range(options.seeds)
        ]
        print("\n".join(table(results)), flush=True)
    about = [part.replace("\n", " ") + "\n" for part in str(__doc__).split("\n\n")[2:]]
    command = f"python benchmarks/conditional.py --seeds {options.seeds} --steps {options.steps}"
    text = ["# Following a condition image", "", f"`{command}`", "", *about, *table(results)]
    write_atomically(options.output, ("\n".join(text) + "\n").encode())


if __name__ == "__main__":
    main()
