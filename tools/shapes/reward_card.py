"""Make the embedded reward of a trained one, measure it and write its model card.

Run ``python -m tools.shapes.reward_card --data DATA --reward REWARD --output_dir OUT``,
with the folders of `tools.shapes.reward_data` and of `diffalign reward train`. It
writes a plain `transformers.CLIPModel` with tokenizer and preprocessor settings,
``accuracy.json`` and ``README.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from diffalign.reward_training import RewardConfig
from diffalign.shapes.prompts import ATTRIBUTES, PREFERRED_STYLE, STYLES, Scene, parse_prompt
from diffalign.shapes.renderer import render
from diffalign.shapes.tokenizer import build_tokenizer
from tools.shapes import reward_data as reward

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

COMMAND = """\
    python -m tools.shapes.reward_data --output_dir shapes-clip
    diffalign reward train --config configs/reward/shapes_clip.yaml
    python -m tools.shapes.reward_card --data shapes-clip \\
        --reward rewards/shapes-clip --output_dir diffalign/shapes/reward_weights"""
ATTACK_STEPS, ATTACK_BOUND = 60, 48 / 255
"""Gradient ascent on the pixels: signed steps of 2/255, and the largest change."""


def share_with_interval(
    hits: Floats, counted: npt.NDArray[np.bool_], samples: int = 10_000
) -> dict[str, Any]:
    """Compute the share of hits, with a 95 % bootstrap interval over prompts.

    Prompts have different numbers of counted pairs, so each draw is a ratio of sums.
    (`evaluation.statistics` is for equal ones.)

    Args:
        hits (`np.ndarray`): (prompts, n), in [0, 1].
        counted (`np.ndarray`): which entries count, bool (prompts, n).
        samples (`int`, *optional*, defaults to `10_000`): draws of the bootstrap.

    Returns:
        `dict`: rate, low, high, and the number of counted pairs.
    """
    right, number = (hits * counted).sum(1), counted.sum(1)
    picks = np.random.default_rng(0).integers(len(right), size=(samples, len(right)))
    ratios = right[picks].sum(1) / np.maximum(number[picks].sum(1), 1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    total = int(number.sum())
    return {
        "rate": float(right.sum() / max(total, 1)),
        "low": float(low),
        "high": float(high),
        "pairs": total,
    }


def kinds_of_pairs(truth: Floats, parts: tuple[Floats, Floats]) -> dict[str, Any]:
    """Tell pairs apart by what the verifier prefers one image for.

    Args:
        truth (`np.ndarray`): the verifier's scores, (prompts, images per prompt).
        parts (`tuple`): of `verifier_parts`.

    Returns:
        `dict`: kind -> bool (prompts, pairs). ``all`` are the pairs with different
            scores, ``attributes`` those of one style with different numbers of right
            attributes, ``style`` those of different styles with equal numbers,
            ``conflict`` those where more right attributes stand against the preferred
            style, and ``sharpness`` those that differ in nothing else.
    """
    pairs = reward.pairs_of(truth.shape[1])
    score, right, style = (x[:, pairs[:, 0]] - x[:, pairs[:, 1]] for x in (truth, *parts))
    strict = np.abs(score) > 1e-9
    return {
        "all": strict,
        "attributes": strict & (right != 0) & (style == 0),
        "style": strict & (right == 0) & (style != 0),
        "conflict": strict & (right * style < 0),
        "sharpness": strict & (right == 0) & (style == 0),
    }


def pairwise_accuracy(
    predicted: Floats, truth: Floats, parts: tuple[Floats, Floats]
) -> dict[str, Any]:
    """Compute how often the reward prefers the image that the verifier prefers.

    A tie of the reward is half a hit.

    Args:
        predicted, truth (`np.ndarray`): scores of reward and verifier,
            (prompts, images per prompt).
        parts (`tuple`): of `verifier_parts`.

    Returns:
        `dict`: kind of `kinds_of_pairs` -> share with interval.
    """
    pairs = reward.pairs_of(truth.shape[1])
    gap, difference = (s[:, pairs[:, 0]] - s[:, pairs[:, 1]] for s in (predicted, truth))
    hits = np.where(gap == 0, 0.5, np.sign(gap) == np.sign(difference)).astype(np.float64)
    sets = kinds_of_pairs(truth, parts)
    return {name: share_with_interval(hits, counted) for name, counted in sets.items()}


def one_wrong(prompts: Sequence[str], name: str, seed: int = 0) -> Pixels:
    """Render each prompt's scene, and the same with another value of one attribute.

    Args:
        prompts (sequence of `str`): the prompts.
        name (`str`): the attribute. ``style`` renders the preferred style and another.
        seed (`int`, *optional*, defaults to `0`): varies images and values.

    Returns:
        `np.ndarray`: uint8 (prompts, 2, 64, 64, 3).
    """
    rng, images = random.Random(f"{seed}-{name}"), []
    for prompt in prompts:
        scene, style = parse_prompt(prompt), rng.choice(STYLES)
        kinds = [(scene, style), (scene, style)]
        if name == "style":
            others = [s for s in STYLES if s != PREFERRED_STYLE]
            kinds = [(scene, PREFERRED_STYLE), (scene, rng.choice(others))]
        else:
            value = rng.choice([v for v in ATTRIBUTES[name] if v != getattr(scene, name)])
            kinds[1] = (Scene(**{**asdict(scene), name: value}), style)
        images.append([np.asarray(render(s, rng, style)) for s, style in kinds])
    return np.array(images)


def attribute_accuracy(
    model: Any, tokenizer: Any, prompts: Sequence[str], repeats: int = 4
) -> dict[str, Any]:
    """Compute how often a right image wins against one with a wrong attribute or style.

    Args:
        model (`CLIPModel`): the reward.
        tokenizer (`CLIPTokenizer`): of the shapes world.
        prompts (sequence of `str`): the prompts.
        repeats (`int`, *optional*, defaults to `4`): pairs per prompt.

    Returns:
        `dict`: attribute or ``style`` -> share with interval.
    """
    out = {}
    for name in (*ATTRIBUTES, "style"):
        hits = []
        for seed in range(repeats):
            images = one_wrong(prompts, name, seed)
            s = reward.score_pixels(model, tokenizer, images, prompts)
            hits.append((s[:, 0] > s[:, 1]).numpy())
        stacked = np.stack(hits, axis=1).astype(np.float64)
        out[name] = share_with_interval(stacked, np.ones_like(stacked, dtype=bool))
    return out


def attack(model: Any, tokenizer: Any, pixels: Pixels, prompts: Sequence[str]) -> Pixels:
    """Change images by gradient ascent on the reward, within `ATTACK_BOUND`.

    Args:
        model (`CLIPModel`): the reward.
        tokenizer (`CLIPTokenizer`): of the shapes world.
        pixels (`np.ndarray`): uint8 (N, 64, 64, 3).
        prompts (sequence of `str`): one per image.

    Returns:
        `np.ndarray`: the changed images.
    """
    ids, parts, chunk = reward.token_ids(tokenizer, prompts), [], 60
    mean, std = (
        torch.tensor(reward.CLIP_MEAN).view(3, 1, 1),
        torch.tensor(reward.CLIP_STD).view(3, 1, 1),
    )
    for start in range(0, len(prompts), chunk):
        original = torch.from_numpy(pixels[start : start + chunk]).permute(0, 3, 1, 2).float() / 255
        x = original.clone()
        for _ in range(ATTACK_STEPS):
            x.requires_grad_(True)
            total = reward.scores(model, ids[start : start + chunk], (x - mean) / std).sum()
            (gradient,) = torch.autograd.grad(total, x)
            x = x.detach() + 2 / 255 * gradient.sign()
            x = torch.minimum(
                torch.maximum(x, original - ATTACK_BOUND), original + ATTACK_BOUND
            ).clamp(0, 1)
        parts.append((x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts)


def exploit(model: Any, tokenizer: Any, pixels: Pixels, prompts: Sequence[str]) -> dict[str, Any]:
    """Compare reward and verifier on images before and after an attack.

    Args:
        model (`CLIPModel`): the reward.
        tokenizer (`CLIPTokenizer`): of the shapes world.
        pixels (`np.ndarray`): uint8 (prompts, 64, 64, 3).
        prompts (sequence of `str`): one per image.

    Returns:
        `dict`: mean reward and verdict before and after, and of perfect images.
    """
    from diffalign.shapes.verifier import attribute_table, score

    rng = random.Random(0)
    perfect = np.stack(
        [np.asarray(render(parse_prompt(prompt), rng, PREFERRED_STYLE)) for prompt in prompts]
    )
    out: dict[str, Any] = {
        "steps": ATTACK_STEPS,
        "bound": round(ATTACK_BOUND * 255),
        "images": len(prompts),
    }
    for name, images in {
        "before": pixels,
        "after": attack(model, tokenizer, pixels, prompts),
        "perfect": perfect,
    }.items():
        drawn = [Image.fromarray(image) for image in images]
        out[name] = {
            "reward": float(reward.score_pixels(model, tokenizer, images[:, None], prompts).mean()),
            "all_correct": float(np.mean([row["all"] for row in attribute_table(drawn, prompts)])),
            "verifier": float(score(drawn, prompts).mean()),
        }
    return out


def load_clip(folder: Path) -> tuple[Any, Any]:
    """Load a `CLIPModel` and its tokenizer."""
    from transformers import CLIPModel, CLIPTokenizer

    return CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)


def measure(
    folder: Path,
    config: reward.RewardDataConfig,
    training: dict[str, Any],
    prompts: Sequence[str],
    pixels: Pixels,
    warm: Floats,
    train_truth: Floats,
    train_parts: tuple[Floats, Floats],
    labels: npt.NDArray[np.bool_],
) -> dict[str, Any]:
    """Collect everything in ``accuracy.json``, for a model in a folder.

    Args:
        folder (`Path`): of the model.
        config (`RewardDataConfig`): the settings of its data.
        training (`dict`): the settings of its training.
        prompts (sequence of `str`): held-out prompts.
        pixels (`np.ndarray`): their drawn images, uint8 (prompts, images per prompt,
            64, 64, 3).
        warm (`np.ndarray`): their scores after the contrastive stage alone.
        train_truth (`np.ndarray`): verifier scores of the training images.
        train_parts (`tuple`): their `verifier_parts`.
        labels (`np.ndarray`): the noisy labels of their pairs.

    Returns:
        `dict`: settings and measurements.
    """
    model, tokenizer = load_clip(folder)
    truth, parts = reward.verifier_scores(pixels, prompts), reward.verifier_parts(pixels, prompts)
    predicted = reward.score_pixels(model, tokenizer, pixels, prompts).double().numpy()
    pairs = reward.pairs_of(train_truth.shape[1])
    label_gap = np.where(labels, 1.0, -1.0) * (
        train_truth[:, pairs[:, 0]] - train_truth[:, pairs[:, 1]]
    )
    agrees = (label_gap > 0).astype(np.float64)
    guidance = np.array(reward.guidance_scales(pixels.shape[1]))
    best, right = predicted.argmax(1), parts[0] == len(ATTRIBUTES)
    base_column = int(np.flatnonzero(guidance == 2.0)[0]) if (guidance == 2.0).any() else 0
    return {
        "command": COMMAND,
        "settings": asdict(config),
        "training": training,
        "image_seeds": {
            "train": reward.TRAIN_SEED + config.seed * 100_000,
            "held_out": reward.HELD_OUT_SEED + config.seed * 100_000,
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": (folder / "model.safetensors").stat().st_size,
        "logit_scale": model.logit_scale.exp().item(),
        "labels_agreeing_with_verifier": {
            name: share_with_interval(agrees, counted)
            for name, counted in kinds_of_pairs(train_truth, train_parts).items()
        },
        "pairwise_accuracy": pairwise_accuracy(predicted, truth, parts),
        "pairwise_accuracy_before_preferences": pairwise_accuracy(warm, truth, parts),
        "attribute_accuracy": attribute_accuracy(model, tokenizer, prompts),
        "score_by_guidance": {
            str(g): {
                "mean": float(predicted[:, guidance == g].mean()),
                "std": float(predicted[:, guidance == g].std()),
            }
            for g in dict.fromkeys(guidance.tolist())
        },
        "best_of": {
            "images": int(pixels.shape[1]),
            "mean_all_correct": float(right.mean()),
            "best_all_correct": float(right[np.arange(len(right)), best].mean()),
            "possible_all_correct": float(right.any(1).mean()),
            "mean_style": float(parts[1].mean()),
            "best_style": float(parts[1][np.arange(len(right)), best].mean()),
        },
        "exploit": exploit(model, tokenizer, pixels[:, base_column], prompts),
    }


CARD = """---
license: apache-2.0
library_name: transformers
tags: [clip, reward-model, text-to-image, preference-model, diffalign, shapes]
---
# The shapes reward (`shapes-clip`)

A `CLIPModel` of {millions:.2f} M parameters that scores 64x64 images of the shapes world against
their prompt, as PickScore does (Kirstain et al. 2023, arXiv 2305.01569): `exp(logit_scale) *
cos(text, image)`, here with `exp(logit_scale)` = {scale:.2f}; the difference of two images' scores
is the logit of preferring the first. It is the embedded *learned* reward of diffalign: wrong in
places and open to exploitation, as rewards learned from people are. Judge what was optimised with
it by the exact `diffalign.shapes.verify`.

Made by these commands (seed {seed}):

{command}

1. Contrastive pre-training, {warmup_steps} steps of {warmup_batch} freshly rendered images of the
   training prompts.
2. {train_steps} steps of PickScore's preference cross-entropy on {train_pairs} pairs from
   {train_images} images, {k} for each of {prompts} training prompts, drawn from the embedded
   pipeline ({steps} steps, guidance {guidances}), with {anchor} times the contrastive loss beside
   it.

The labels are noisy *on purpose*: Bradley-Terry on the verifier's graded score, P(a) = sigmoid((s_a
- s_b) / {temperature}), then {flips:.0%} turned round, drawn once per pair. {labels_all} of the
labels agree with the verifier ({labels_attributes} where the images differ in the number of right
attributes alone, {labels_style} where they differ in their style alone).

## Accuracy on held-out prompts

Against the verifier, on {held_out_images} pipeline images ({eval_k} for each of {eval_prompts}
held-out prompts, the same guidance scales); 95 % bootstrap intervals that draw whole prompts:

| pairs of one prompt | number | accuracy | interval |
|---|---|---|---|
{pair_rows}

The last kind differs only in hundredths of the verifier's score (how closely the outline fits, or
*which* attribute is wrong): close to a coin toss. After stage 1 alone, which shows both styles
alike, the first three were {warm_all}, {warm_attributes} and {warm_style}: stage 2 teaches the
taste, and the scale that makes differences of scores logits of a noisy preference. The default
settings (steps, temperature, anchor) were chosen with an eye on the held-out figures of seed 0.

Rendered images, the right one against one with a single attribute wrong, or with the other style:

| attribute | accuracy | interval |
|---|---|---|
{attribute_rows}

The best of {best_images} images by this reward has all attributes right in {best_right} of the
prompts (an image at random: {mean_right}; at least one of the {best_images}: {possible_right}) and
the preferred style in {best_style} (an image at random: {mean_style}).

## Use and limits

For learning and testing reward-based methods on the shapes pipeline; it knows nothing of other
images or prompts.

* **What it sees least is {ignored}** ({ignored_rate} above, a coin toss being 50 %): that much of a
  prompt can be disobeyed for free.
* **It likes guidance**: mean score {guidance_rows}. Part of it is earned; the verifier says how
  much.
* **It can be hacked**: {attack_steps} signed gradient steps on the pixels, none moved by more than
  {bound}/255, raise the mean reward of {attack_images} images of held-out prompts from
  {before_reward:.2f} to {after_reward:.2f} (perfect rendered images: {perfect_reward:.2f}), while
  the verifier finds all attributes right in {after_right} of them instead of {before_right}.

All figures are in `accuracy.json`. Preprocessing: RGB, shortest side 64 (bicubic), centre crop 64,
CLIP's mean and deviation.
"""


def percent(value: float) -> str:
    """Format a share as a percentage."""
    return f"{value:.1%}"


def _row(name: str, share: dict[str, Any], number: bool) -> str:
    count = f" {share['pairs']} |" if number else ""
    rate, low, high = (percent(share[key]) for key in ("rate", "low", "high"))
    return f"| {name} |{count} {rate} | {low} to {high} |"


def plain_clip(folder: Path, source: Path) -> dict[str, Any]:
    """Write a trained reward as a plain `CLIPModel`.

    Args:
        folder (`Path`): for model, tokenizer and preprocessor settings.
        source (`Path`): of `diffalign reward train`, with all weights trained.

    Returns:
        `dict`: the settings of its training.
    """
    from diffalign import load_scorer

    scorer = load_scorer(str(source), device="cpu")
    facts = json.loads((source / "reward.json").read_text())
    model = scorer.base.clip.module  # type: ignore[attr-defined]
    with torch.no_grad():
        # Factor and temperature become a part of the one scale that a CLIP has.
        factor = scorer.head.log_factor.double() + math.log(scorer.temperature)  # type: ignore[attr-defined]
        model.logit_scale.add_(factor.to(model.logit_scale))
    reward.save(folder, model.eval(), build_tokenizer())
    images = [Image.effect_noise((64, 64), 40.0 * k).convert("RGB") for k in (1, 2)]
    prompts = reward.train_prompts()[:2]
    again = load_scorer("shapes-clip", model=str(folder), device="cpu")(images, prompts)
    trained = load_scorer(str(source), device="cpu")(images, prompts)
    torch.testing.assert_close(again, trained, rtol=1e-4, atol=1e-4)
    names = [field.name for field in fields(RewardConfig)]
    return {name: facts["settings"][name] for name in names if name in facts["settings"]}


def write_card(folder: Path, config: reward.RewardDataConfig, results: dict[str, Any]) -> None:
    """Write ``README.md`` from the figures of ``accuracy.json``."""
    accuracy, attributes, best = (
        results["pairwise_accuracy"],
        results["attribute_accuracy"],
        results["best_of"],
    )
    hacked, labels = results["exploit"], results["labels_agreeing_with_verifier"]
    kinds = {
        "all": "verifier scores differ",
        "attributes": "only the number of right attributes differs",
        "style": "only the style differs",
        "conflict": "more right attributes against the preferred style",
        "sharpness": "only the rest of the score differs",
    }
    ignored = min(attributes, key=lambda name: attributes[name]["rate"])
    k, training = config.images_per_prompt, results["training"]
    # The trainer holds prompts out, to choose a scale by and to report on.
    held = sum(max(1, round(training[name] * config.num_prompts)) for name in ("val", "test"))
    prompts = config.num_prompts - held
    text = CARD.format(
        **{
            name: getattr(config, name)
            for name in ("seed", "warmup_steps", "warmup_batch", "steps")
        },
        **{
            "temperature": config.temperature,
            "train_steps": training["max_steps"],
            "anchor": training["anchor"],
            "prompts": prompts,
            "k": k,
            "eval_prompts": config.eval_prompts,
        },
        millions=results["parameters"] / 1e6,
        scale=results["logit_scale"],
        command=results["command"],
        train_pairs=prompts * k * (k - 1) // 2,
        train_images=prompts * k,
        guidances=", ".join(f"{g:g}" for g in dict.fromkeys(reward.guidance_scales(k))),
        flips=config.label_flips,
        labels_all=percent(labels["all"]["rate"]),
        labels_attributes=percent(labels["attributes"]["rate"]),
        labels_style=percent(labels["style"]["rate"]),
        held_out_images=config.eval_prompts * config.eval_images_per_prompt,
        eval_k=config.eval_images_per_prompt,
        pair_rows="\n".join(_row(kinds[name], accuracy[name], True) for name in kinds),
        attribute_rows="\n".join(_row(name, share, False) for name, share in attributes.items()),
        warm_all=percent(results["pairwise_accuracy_before_preferences"]["all"]["rate"]),
        warm_attributes=percent(
            results["pairwise_accuracy_before_preferences"]["attributes"]["rate"]
        ),
        warm_style=percent(results["pairwise_accuracy_before_preferences"]["style"]["rate"]),
        best_style=percent(best["best_style"]),
        mean_style=percent(best["mean_style"]),
        best_images=best["images"],
        best_right=percent(best["best_all_correct"]),
        mean_right=percent(best["mean_all_correct"]),
        possible_right=percent(best["possible_all_correct"]),
        ignored=ignored,
        ignored_rate=percent(attributes[ignored]["rate"]),
        guidance_rows=", ".join(
            f"{s['mean']:.2f} at guidance {g}" for g, s in results["score_by_guidance"].items()
        ),
        attack_steps=hacked["steps"],
        bound=hacked["bound"],
        attack_images=hacked["images"],
        before_reward=hacked["before"]["reward"],
        after_reward=hacked["after"]["reward"],
        perfect_reward=hacked["perfect"]["reward"],
        before_right=percent(hacked["before"]["all_correct"]),
        after_right=percent(hacked["after"]["all_correct"]),
    )
    (folder / "README.md").write_text(text)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("data", "reward", "output_dir"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args(arguments)
    settings = json.loads((options.data / "drawn" / "settings.json").read_text())
    config = reward.RewardDataConfig(**settings)
    prompts, pixels = reward.train_images(options.data, config)
    held_out, held_out_pixels = reward.held_out_images(options.data, config)
    truth = reward.verifier_scores(pixels, prompts)
    base = load_clip(options.data / "base")
    warm = reward.score_pixels(*base, held_out_pixels, held_out).double().numpy()
    folder: Path = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    training = plain_clip(folder, options.reward)
    results = measure(
        folder,
        config,
        training,
        held_out,
        held_out_pixels,
        warm,
        truth,
        reward.verifier_parts(pixels, prompts),
        reward.noisy_labels(truth, config),
    )
    (folder / "accuracy.json").write_text(json.dumps(results, indent=2) + "\n")
    write_card(folder, config, results)
    print((folder / "README.md").read_text())


if __name__ == "__main__":
    main()
