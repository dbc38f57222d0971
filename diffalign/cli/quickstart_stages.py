"""The stages of the quickstart: make preferences, align the small model, and compare.

Every stage writes its result, and is skipped if the result is there. So an interrupted
command goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError
from ..generation.pipelines import base_pipeline
from ..runtime.files import save_image, unfinished_names, write_atomically
from ..runtime.folder_lock import FolderLock
from ..shapes.prompts import ATTRIBUTES, held_out_prompts, train_prompts
from .quickstart_config import QuickstartConfig

BASE_SEED = 10_000_000
"""First seed of the evaluation, far from the seeds of the training images."""
CHOICE_SEED = 15_000_000
"""First seed of the images that choose the guidance scales."""
GUIDANCE_SCALES = (1.0, 2.0, 3.0, 5.0, 7.0)
"""The scales among which each model's best one is chosen."""
BETAS = {"shapes": 500.0, "shapes-flow": 50.0}
"""Model -> beta of Diffusion-DPO."""


def run(output_dir: Path, config: QuickstartConfig) -> dict[str, Any]:
    """Run the quickstart, or go on with it.

    Args:
        output_dir (`Path`): Folder of the quickstart.
        config (`QuickstartConfig`): Its settings.

    Returns:
        `dict[str, Any]`: Content of `results.json`.

    Raises:
        UserError: The folder holds something else, or a quickstart with other settings.
    """
    with FolderLock(output_dir):
        return _run(output_dir, config)


def _run(output_dir: Path, config: QuickstartConfig) -> dict[str, Any]:
    started = time.perf_counter()
    finished = claim(output_dir, config)
    if finished is not None:
        print(f"{output_dir} holds a finished quickstart; nothing was run again")
        return finished
    dataset = make_preferences(output_dir, config)
    train(output_dir, config, dataset)
    results = compare(output_dir, config)
    results["settings"] = dataclasses.asdict(config)
    results["seconds"] = round(time.perf_counter() - started, 1)
    write_json(output_dir / "results.json", results)
    return results


def _require(images: list[Any], name: str) -> None:
    """Raise `UserError` if the embedded model drew an image that cannot be used."""
    from ..runtime.missing import left_out

    sentence = left_out(images, len(images), name)
    if sentence:
        raise UserError(f"{sentence}; the weights are damaged: use another folder")


def claim(folder: Path, config: QuickstartConfig) -> dict[str, Any] | None:
    """Take the folder for a quickstart with these settings.

    Args:
        folder (`Path`): Created if it does not exist.
        config (`QuickstartConfig`): Settings of the quickstart.

    Returns:
        `dict[str, Any]`, *optional*: The results, if the quickstart in it is finished.

    Raises:
        UserError: The folder holds something else, or a quickstart with other settings.
    """
    settings = folder / "quickstart.json"
    if settings.is_file():
        there = json.loads(settings.read_text())
        different = {k: v for k, v in there.items() if dataclasses.asdict(config).get(k) != v}
        if different:
            others = ", ".join(f"--{k} {v}" for k, v in different.items())
            raise UserError(
                f"--output_dir: {str(folder)!r} holds a quickstart with {others}; use those "
                "settings or another folder"
            )
        results = folder / "results.json"
        if results.is_file():
            return json.loads(results.read_text())
        print(f"continuing the quickstart in {folder}")
        return None
    unfinished = unfinished_names(settings.name)
    if folder.exists() and (
        not folder.is_dir() or any(p.name not in unfinished for p in folder.iterdir())
    ):
        raise UserError(
            f"--output_dir: {str(folder)!r} exists and is no quickstart; name another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(settings, dataclasses.asdict(config))
    return None


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write values as JSON, the whole file or none of it.

    Args:
        path (`Path`): The file.
        values (`dict[str, Any]`): The values.
    """
    write_atomically(path, (json.dumps(values, indent=2) + "\n").encode())


def shuffled_prompts(config: QuickstartConfig) -> list[str]:
    """List the training prompts in the order in which this run takes them.

    The first ones get preferences. The last ones choose the guidance.

    Args:
        config (`QuickstartConfig`): Its seed orders them.
    """
    import random

    prompts = train_prompts()
    random.Random(config.seed).shuffle(prompts)
    return prompts


def make_preferences(folder: Path, config: QuickstartConfig) -> Path:
    """Draw and score images, and write them into `dataset/` as ranked lists.

    There is one row per prompt, with prompt, images and scores, as parquet.

    Args:
        folder (`Path`): Folder of the quickstart.
        config (`QuickstartConfig`): Its settings.

    Returns:
        `Path`: Folder of the dataset.
    """
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    from ..generation.sampling import generate
    from ..shapes.sampling_defaults import sampling_settings
    from ..shapes.verifier import score

    target = folder / "dataset"
    if target.is_dir():
        print(f"preferences: {target} is there")
        return target
    prompts, k = shuffled_prompts(config)[: config.num_prompts], config.images_per_prompt
    repeated = [prompt for prompt in prompts for _ in range(k)]
    first = config.seed * len(train_prompts()) * 100
    images = generate(
        base_pipeline(config.model),
        repeated,
        range(first, first + len(repeated)),
        batch_size=64,
        description="1/3 sampling from the base",
        **sampling_settings(config.model),
    )
    _require(images, "base")
    scores = score(images, repeated)
    rows = {
        "prompt": prompts,
        "images": [images[i * k : (i + 1) * k] for i in range(len(prompts))],
        "scores": scores.reshape(-1, k).tolist(),
    }
    features = Features(
        {
            "prompt": Value("string"),
            "images": List(ImageFeature()),
            "scores": List(Value("float64")),
        }
    )
    temporary = folder / ".dataset.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(
        temporary / "train-00000-of-00001.parquet"
    )
    os.replace(temporary, target)
    return target


def train(folder: Path, config: QuickstartConfig, dataset: Path) -> None:
    """Train a LoRA by Diffusion-DPO, on each prompt's best image against its worst.

    Args:
        folder (`Path`): Folder of the quickstart. The LoRA goes into `lora/`.
        config (`QuickstartConfig`): Its settings.
        dataset (`Path`): Folder of the dataset.

    Raises:
        Interrupted: A signal ended the training.
    """
    from peft import LoraConfig

    from ..data import DataConfig, load_preferences
    from ..methods.diffusion_dpo import DiffusionDPOConfig, DiffusionDPOTrainer
    from ..training.checkpoint import list_checkpoints
    from ..training.trained_weights import LORA_FILE

    output_dir = folder / "lora"
    if (output_dir / LORA_FILE).is_file():
        print(f"training: {output_dir} is there")
        return
    args = DiffusionDPOConfig(
        output_dir=str(output_dir),
        seed=config.seed,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        beta=config.beta or BETAS[config.model],
        learning_rate=config.learning_rate,
        lr_scheduler="cosine",
        warmup_steps=min(20, config.max_steps // 10),
        proportion_empty_prompts=0.1,
        save_steps=100,
        save_total_limit=1,
    )
    cache = str(folder / "cache")
    trainer = DiffusionDPOTrainer(
        model=config.model,
        args=args,
        train_dataset=load_preferences(str(dataset), verbose=False),
        peft_config=LoraConfig(r=config.rank, lora_alpha=config.rank, init_lora_weights="gaussian"),
        data=DataConfig(
            dataset_name=str(dataset), cache_latents=cache, cache_text_embeddings=cache
        ),
    )
    print("2/3 training")
    output = trainer.train(
        resume_from_checkpoint="latest" if list_checkpoints(output_dir) else None
    )
    if output.interrupted_by is not None:
        raise Interrupted(
            output.interrupted_by,
            f"run the same command again to go on from step {output.global_step}",
        )


class Interrupted(RuntimeError):
    """A signal ended the run after a checkpoint.

    Args:
        signal (`int`): Number of the signal.
        remedy (`str`): How to go on.
    """

    def __init__(self, signal: int, remedy: str) -> None:
        super().__init__(f"interrupted: {remedy}")
        self.signal = signal


def choice_scores(pipe: Any, name: str, config: QuickstartConfig) -> dict[str, float]:
    """Score a model at every guidance scale, on prompts that are used for nothing else.

    Args:
        pipe (`DiffusionPipeline`): The model.
        name (`str`): What progress bar and messages call it.
        config (`QuickstartConfig`): Settings of the quickstart.

    Returns:
        `dict[str, float]`: Scale -> mean graded score of the verifier.
    """
    from ..generation.sampling import generate
    from ..shapes.sampling_defaults import sampling_settings
    from ..shapes.verifier import score

    prompts = shuffled_prompts(config)[-config.choice_prompts :]
    first = CHOICE_SEED + config.seed * len(prompts)
    means = {}
    for scale in GUIDANCE_SCALES:
        images = generate(
            pipe,
            prompts,
            range(first, first + len(prompts)),
            batch_size=64,
            description=f"3/3 guidance {scale:g}, {name}",
            **{**sampling_settings(config.model), "guidance_scale": scale},
        )
        _require(images, name)
        means[f"{scale:g}"] = float(score(images, prompts).mean())
    return means


def compare(folder: Path, config: QuickstartConfig) -> dict[str, Any]:
    """Compare base and tuned model, each at its own best guidance, with the same seeds.

    The best guidance is chosen on training prompts without preferences. The models are
    compared on held-out prompts.

    Args:
        folder (`Path`): Folder of the quickstart.
        config (`QuickstartConfig`): Its settings.

    Returns:
        `dict[str, Any]`: Guidance scales, accuracies, scores and the win rate.
    """
    from ..evaluation.statistics import clustered_standard_error, win_rate
    from ..generation.grids import comparison_grid
    from ..generation.sampling import generate
    from ..shapes.sampling_defaults import sampling_settings
    from ..shapes.verifier import attribute_table, score

    prompts = held_out_prompts()[: config.eval_prompts]
    count = config.eval_images
    repeated = [prompt for prompt in prompts for _ in range(count)]
    seeds = range(
        BASE_SEED + config.seed * len(repeated), BASE_SEED + (config.seed + 1) * len(repeated)
    )
    pipe = base_pipeline(config.model)
    images: dict[str, list[Image.Image]] = {}
    scores: dict[str, Any] = {}
    results: dict[str, Any] = {}
    for name in ("base", "tuned"):
        if name == "tuned":
            pipe.load_lora_weights(str(folder / "lora"))
        choice = choice_scores(pipe, name, config)
        scale = float(max(choice, key=choice.__getitem__))
        images[name] = generate(
            pipe,
            repeated,
            seeds,
            batch_size=64,
            description=f"3/3 held-out prompts, {name}",
            **{**sampling_settings(config.model), "guidance_scale": scale},
        )
        _require(images[name], name)
        table = attribute_table(images[name], repeated)
        correct = np.array([row["all"] for row in table], dtype=float).reshape(-1, count)
        scores[name] = score(images[name], repeated).reshape(-1, count)
        results[name] = {
            "guidance_scale": scale,
            "choice_scores": choice,
            "accuracy": float(correct.mean()),
            "accuracy_standard_error": clustered_standard_error(correct),
            "attributes": {a: float(np.mean([row[a] for row in table])) for a in ATTRIBUTES},
            "style": float(np.mean([row["style"] for row in table])),
            "score": float(scores[name].mean()),
        }
    results["win_rate"] = dataclasses.asdict(win_rate(scores["base"], scores["tuned"]))
    results["prompts"], results["images_per_prompt"] = len(prompts), count
    shown = [
        (
            prompts[i],
            images["base"][i * count : (i + 1) * count],
            images["tuned"][i * count : (i + 1) * count],
        )
        for i in range(0, len(prompts), max(1, len(prompts) // 8))
    ][:8]
    base, tuned = (f"{name}, guidance {results[name]['guidance_scale']:g}" for name in images)
    grid: Image.Image = comparison_grid(shown, left=base, right=tuned, cell=96, columns=2)
    save_image(grid, folder / "comparison.png")
    return results


def summary(results: dict[str, Any], folder: Path) -> str:
    """Format the results, the files and the next command.

    Args:
        results (`dict[str, Any]`): What `compare` returned.
        folder (`Path`): Folder of the quickstart.
    """
    base, tuned, wins = results["base"], results["tuned"], results["win_rate"]
    scales = list(base["choice_scores"])
    lines = [
        "",
        "mean score by guidance, on training prompts without preferences",
        f"{'guidance':<14}" + "".join(f"{scale:>8}" for scale in scales),
        *(
            f"{name:<14}" + "".join(f"{results[name]['choice_scores'][s]:>8.3f}" for s in scales)
            for name in ("base", "tuned")
        ),
        "",
        f"held-out prompts: {results['prompts']} x {results['images_per_prompt']} images, "
        "same seeds under both models, each at its best guidance",
        f"{'':<14}{'base':>16}{'tuned':>16}",
        f"{'guidance':<14}{base['guidance_scale']:>16g}{tuned['guidance_scale']:>16g}",
        f"{'all correct':<14}"
        + "".join(
            f"{m['accuracy']:>9.1%} ± {m['accuracy_standard_error']:.1%}" for m in (base, tuned)
        ),
        *(
            f"{a:<14}{base['attributes'][a]:>16.1%}{tuned['attributes'][a]:>16.1%}"
            for a in base["attributes"]
        ),
        f"{'style':<14}{base['style']:>16.1%}{tuned['style']:>16.1%}",
        f"{'score':<14}{base['score']:>16.3f}{tuned['score']:>16.3f}",
        "",
        "tuned at its best guidance against base at its best guidance:",
        f"win-rate {wins['rate']:.1%}, 95 % interval {wins['low']:.1%} to {wins['high']:.1%} "
        f"(wins {wins['wins']:.1%}, ties {wins['ties']:.1%}, losses {wins['losses']:.1%})",
        "",
        f"picture    {folder / 'comparison.png'}",
        f"numbers    {folder / 'results.json'}",
        f"LoRA       {folder / 'lora' / 'pytorch_lora_weights.safetensors'}",
        f"dataset    {folder / 'dataset'}",
        f"log        {folder / 'lora' / 'logs' / 'metrics.jsonl'}",
        "",
        "next: " + next_command(folder, results["settings"]["model"]),
    ]
    return "\n".join(lines)


def next_command(folder: Path, model: str) -> str:
    """Return a command to run after the quickstart.

    Args:
        folder (`Path`): Folder of the quickstart.
        model (`str`): The model that it aligned.
    """
    return (
        f"diffalign sample --model {model} --lora {folder / 'lora'} --prompt "
        "'a large yellow star on the right of a black background' --output_dir "
        f"{folder / 'samples'}"
    )
