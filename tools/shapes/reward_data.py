"""Make what the embedded reward is trained from.

Run, in the repository::

    python -m tools.shapes.reward_data --output_dir shapes-clip
    diffalign reward train --config configs/reward/shapes_clip.yaml
    python -m tools.shapes.reward_card --data shapes-clip \\
        --reward rewards/shapes-clip --output_dir diffalign/shapes/reward_weights

The reward is a small real `transformers.CLIPModel`, made as PickScore was (Kirstain et
al. 2023, arXiv 2305.01569). This command makes its base by contrastive pre-training on
captioned images (here: rendered ones, in both styles), and draws the preferences: those
of the verifier, made noisy on purpose, on images of the embedded pipeline for training
prompts. `RewardTrainer` then trains on them, from a run file. The reward is imperfect
and can be hacked, as rewards learned from people are.

It writes ``base/`` (a CLIP that has seen captions and no preference), ``preferences/``
(pairs), ``captions.parquet`` (for the anchor) and the images that it draws into
``drawn/``, so that an interrupted run goes on.
"""

from __future__ import annotations

import io
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from diffalign.errors import ConfigError, UserError
from diffalign.rewards.images import CLIP_MEAN, CLIP_STD
from diffalign.runtime.files import replacing
from diffalign.shapes.prompts import (
    ATTRIBUTES,
    STYLES,
    held_out_prompts,
    parse_prompt,
    train_prompts,
)
from diffalign.shapes.renderer import RESOLUTION, render
from diffalign.shapes.tokenizer import MAX_LENGTH, build_tokenizer
from tools.shapes.captioned_images import token_ids
from tools.shapes.options import read_options

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

GUIDANCE_SCALES = (1.0, 2.0, 3.0, 5.0)
"""Image j of a prompt is drawn with entry ``j % 4``: from mostly wrong to mostly right.
"""
TRAIN_SEED, HELD_OUT_SEED = 20_000_000, 30_000_000
"""First image seeds, far from those of the quickstart's training and evaluation."""
PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": RESOLUTION},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": RESOLUTION, "width": RESOLUTION},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
}
"""``preprocessor_config.json``: what `CLIPImageProcessor` does to an image.

`resample` 3 is bicubic. Images of 64x64 pixels are not resized.
"""


@dataclass
class RewardDataConfig:
    """Settings of this command, whose defaults made the shipped weights.

    Raises:
        ConfigError: a value out of range.
    """

    seed: int = 0
    """Seed of images, labels, initialisation and batches."""
    num_prompts: int = 600
    """Training prompts (of 600)."""
    images_per_prompt: int = 4
    """Images drawn for each of them. Every pair of them is one preference."""
    steps: int = 20
    """Denoising steps of a drawn image."""
    temperature: float = 0.05
    """Temperature of the Bradley-Terry labels, in units of the verifier's graded score.

    One attribute is 0.16 of it, the style 0.15.
    """
    label_flips: float = 0.1
    """Share of labels that are turned round after that."""
    warmup_steps: int = 800
    """Steps of contrastive pre-training."""
    warmup_batch: int = 64
    """Rendered images per step, each with another prompt."""
    warmup_learning_rate: float = 1e-3
    """Peak of its one-cycle schedule."""
    weight_decay: float = 1e-2
    """Weight decay of AdamW."""
    renderings: int = 10
    """Captioned images of every training prompt, for the anchor."""
    eval_prompts: int = 120
    """Held-out prompts to measure on (of 120)."""
    eval_images_per_prompt: int = 8
    """Images drawn for each of them."""

    def __post_init__(self) -> None:
        highest = {"num_prompts": len(train_prompts()), "eval_prompts": len(held_out_prompts())}
        lowest = {
            "images_per_prompt": 2,
            "eval_images_per_prompt": 2,
            "num_prompts": 2,
            "eval_prompts": 2,
            "warmup_batch": 2,
        }
        for field in fields(self):
            value, name = getattr(self, field.name), field.name
            if field.type == "int":
                low, high = lowest.get(name, 0 if name == "seed" else 1), highest.get(name, 10**9)
                if not low <= value <= high:
                    raise ConfigError(f"--{name}", f"expected int in [{low}, {high}], got {value}")
            elif name == "label_flips":
                if not 0 <= value < 0.5:
                    raise ConfigError(f"--{name}", f"expected float in [0, 0.5), got {value}")
            elif value < 0 or (value == 0 and name != "weight_decay"):
                zero = " or 0" if name == "weight_decay" else ""
                raise ConfigError(f"--{name}", f"expected float above 0{zero}, got {value}")


def build_model(tokenizer: Any) -> Any:
    """Build a `CLIPModel` of 0.41 M parameters.

    The vision tower has 4 layers of width 96 over 8x8 patches, the text tower 2 layers
    of width 64.

    Args:
        tokenizer (`CLIPTokenizer`): of the shapes world.
    """
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
        "hidden_act": "gelu",
        "projection_dim": 64,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,  # the text tower pools the first token of this id
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": RESOLUTION,
        "patch_size": 8,
        "hidden_act": "gelu",
        "projection_dim": 64,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def preprocess(pixels: Pixels) -> Tensor:
    """Convert pixels to what the vision tower reads, with CLIP's mean and deviation.

    Args:
        pixels (`np.ndarray`): uint8 (N, 64, 64, 3).

    Returns:
        `Tensor`: float32 (N, 3, 64, 64).
    """
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (tensor - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


def scores(model: Any, ids: Tensor, pixel_values: Tensor) -> Tensor:
    """Compute PickScore's score, exp(logit_scale) * cos(text, image).

    Args:
        model (`CLIPModel`): the reward.
        ids (`Tensor`): token ids of the prompts, (P, 16).
        pixel_values (`Tensor`): of N = P * k images, k per prompt, one prompt after the
            other.

    Returns:
        `Tensor`: (N,).
    """
    out = model(input_ids=ids, pixel_values=pixel_values)  # both embeddings come normalised
    text = out.text_embeds.repeat_interleave(len(pixel_values) // len(ids), dim=0)
    return model.logit_scale.exp() * (text * out.image_embeds).sum(-1)


@torch.no_grad()
def score_pixels(model: Any, tokenizer: Any, pixels: Pixels, prompts: Sequence[str]) -> Tensor:
    """Score images in chunks of prompts.

    Args:
        model (`CLIPModel`): the reward.
        tokenizer (`CLIPTokenizer`): of the shapes world.
        pixels (`np.ndarray`): uint8 (prompts, images per prompt, 64, 64, 3).
        prompts (sequence of `str`): the prompts.

    Returns:
        `Tensor`: (prompts, images per prompt).
    """
    ids, parts, chunk = token_ids(tokenizer, prompts), [], 30
    for start in range(0, len(prompts), chunk):
        batch = preprocess(pixels[start : start + chunk].reshape(-1, RESOLUTION, RESOLUTION, 3))
        parts.append(scores(model, ids[start : start + chunk], batch).view(-1, pixels.shape[1]))
    return torch.cat(parts)


def guidance_scales(images_per_prompt: int) -> list[float]:
    """List the guidance scale of each image of a prompt."""
    return [GUIDANCE_SCALES[j % len(GUIDANCE_SCALES)] for j in range(images_per_prompt)]


def draw(
    folder: Path,
    name: str,
    prompts: Sequence[str],
    images_per_prompt: int,
    steps: int,
    first_seed: int,
) -> Pixels:
    """Draw images with the embedded pipeline, into files that are not drawn again.

    Args:
        folder (`Path`): of the files.
        name (`str`): in the names of the files.
        prompts (sequence of `str`): the prompts.
        images_per_prompt (`int`): each with another guidance scale.
        steps (`int`): of the sampler.
        first_seed (`int`): seeds count on from it.

    Returns:
        `np.ndarray`: uint8 (prompts, images_per_prompt, 64, 64, 3).
    """
    from diffalign.generation.pipelines import base_pipeline
    from diffalign.generation.sampling import generate

    pipe = None
    chunk, columns = 60, []
    starts = range(0, len(prompts), chunk)
    bar = tqdm(
        total=len(prompts) * images_per_prompt, desc=f"images, {name}", unit="image", mininterval=5
    )
    for j, guidance in enumerate(guidance_scales(images_per_prompt)):
        parts = []
        for start in starts:
            path = folder / f"{name}-{j}-{start:03d}.npy"
            if not path.is_file():
                pipe = pipe or base_pipeline()
                part = list(prompts[start : start + chunk])
                first = first_seed + j * len(prompts) + start
                seeds = range(first, first + len(part))
                options: dict[str, Any] = {
                    "num_inference_steps": steps,
                    "guidance_scale": guidance,
                    "progress": False,
                }
                images = generate(pipe, part, seeds, batch_size=chunk, **options)
                with replacing(path) as temporary, temporary.open("wb") as file:
                    np.save(file, np.stack([np.asarray(image.convert("RGB")) for image in images]))
            parts.append(np.load(path, allow_pickle=False))
            bar.update(len(parts[-1]))
        columns.append(np.concatenate(parts))
    bar.close()
    return np.stack(columns, axis=1)


def verifier_scores(pixels: Pixels, prompts: Sequence[str]) -> Floats:
    """Compute the verifier's graded scores, (prompts, images per prompt)."""
    from diffalign.shapes.verifier import score

    k = pixels.shape[1]
    images = [Image.fromarray(image) for image in pixels.reshape(-1, *pixels.shape[2:])]
    return score(images, [prompt for prompt in prompts for _ in range(k)]).reshape(-1, k)


def verifier_parts(pixels: Pixels, prompts: Sequence[str]) -> tuple[Floats, Floats]:
    """Read what the score is made of.

    Returns:
        `tuple`: numbers of right attributes, and whether the style is the preferred
        one, each (prompts, images per prompt).
    """
    from diffalign.shapes.verifier import attribute_table

    k = pixels.shape[1]
    images = [Image.fromarray(image) for image in pixels.reshape(-1, *pixels.shape[2:])]
    table = attribute_table(images, [prompt for prompt in prompts for _ in range(k)])
    right = np.array([sum(row[name] for name in ATTRIBUTES) for row in table], dtype=np.float64)
    style = np.array([row["style"] for row in table], dtype=np.float64)
    return right.reshape(-1, k), style.reshape(-1, k)


def pairs_of(images_per_prompt: int) -> npt.NDArray[np.int64]:
    """List the pairs of images a < b of a prompt, (pairs, 2)."""
    return np.array(list(itertools.combinations(range(images_per_prompt), 2)))


def noisy_labels(truth: Floats, config: RewardDataConfig) -> npt.NDArray[np.bool_]:
    """Draw whether the first image of each pair is preferred.

    By Bradley-Terry, P(a) = sigmoid((s_a - s_b) / temperature) with the verifier's
    scores s. A share `label_flips` of the labels is then turned round. A label is drawn
    once and stays, because the noise belongs to the pair, as an annotator's mistake
    does.

    Args:
        truth (`np.ndarray`): the verifier's scores, (prompts, images per prompt).
        config (`RewardDataConfig`): temperature, share and seed.

    Returns:
        `np.ndarray`: bool (prompts, pairs).
    """
    rng = np.random.default_rng(config.seed + 1)
    pairs = pairs_of(truth.shape[1])
    difference = truth[:, pairs[:, 0]] - truth[:, pairs[:, 1]]
    # The hyperbolic tangent is a sigmoid that cannot overflow.
    prefers_first = rng.random(difference.shape) < 0.5 * (
        1 + np.tanh(0.5 * difference / config.temperature)
    )
    return prefers_first ^ (rng.random(difference.shape) < config.label_flips)


class _Optimizer:
    """AdamW with a one-cycle schedule and clipped gradients."""

    def __init__(self, model: Any, learning_rate: float, weight_decay: float, steps: int) -> None:
        self.parameters = list(model.parameters())
        self.adamw = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=weight_decay)
        # The schedule needs two steps at least.
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.adamw, learning_rate, total_steps=max(steps, 2), pct_start=0.1
        )

    def step(self, loss: Tensor) -> None:
        self.adamw.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adamw.step()
        self.schedule.step()


def contrastive_loss(
    model: Any, tokenizer: Any, prompts: Sequence[str], rng: random.Random, size: int, scale: Tensor
) -> Tensor:
    """Compute CLIP's symmetric contrastive loss on freshly rendered images.

    Args:
        model (`CLIPModel`): the reward.
        tokenizer (`CLIPTokenizer`): of the shapes world.
        prompts (sequence of `str`): each image shows another one of them.
        rng (`random.Random`): chooses prompts and varies images.
        size (`int`): images.
        scale (`Tensor`): multiplies the cosines, a scalar.

    Returns:
        `Tensor`: a scalar.
    """
    batch = rng.sample(list(prompts), min(size, len(prompts)))
    # The style says nothing about the prompt. Preferences alone teach the taste.
    pixels = np.stack(
        [np.asarray(render(parse_prompt(prompt), rng, rng.choice(STYLES))) for prompt in batch]
    )
    out = model(input_ids=token_ids(tokenizer, batch), pixel_values=preprocess(pixels))
    logits, right = scale * out.text_embeds @ out.image_embeds.T, torch.arange(len(batch))
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits, right) + cross_entropy(logits.T, right)) / 2


def warm_up(config: RewardDataConfig, model: Any, tokenizer: Any, prompts: Sequence[str]) -> None:
    """Pre-train contrastively on training prompts, with the model's `logit_scale`."""
    optimizer = _Optimizer(
        model, config.warmup_learning_rate, config.weight_decay, config.warmup_steps
    )
    rng = random.Random(config.seed + 2)
    bar = tqdm(range(config.warmup_steps), desc="contrastive warm-up", mininterval=5)
    for _ in bar:
        loss = contrastive_loss(
            model, tokenizer, prompts, rng, config.warmup_batch, model.logit_scale.exp()
        )
        optimizer.step(loss)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def claim(folder: Path, config: RewardDataConfig) -> Path:
    """Claim ``folder/drawn`` for the images of these settings.

    Returns:
        `Path`: that folder.

    Raises:
        UserError: it holds images drawn with other settings.
    """
    settings = asdict(config)
    drawn = folder / "drawn"
    drawn.mkdir(parents=True, exist_ok=True)
    file = drawn / "settings.json"
    if file.is_file():
        there = json.loads(file.read_text())
        if there != settings:
            flags = ", ".join(
                f"--{name} {value}" for name, value in there.items() if settings.get(name) != value
            )
            raise UserError(
                f"--output_dir: {str(folder)!r} holds images drawn with {flags}; use those "
                "settings or another folder"
            )
    else:
        file.write_text(json.dumps(settings, indent=2) + "\n")
    return drawn


def save(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write model, ``config.json``, tokenizer and preprocessor settings."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")


def write_preferences(
    folder: Path, prompts: Sequence[str], pixels: Pixels, labels: npt.NDArray[np.bool_]
) -> None:
    """Write every pair of images of a prompt as a row: prompt, chosen, rejected.

    Args:
        folder (`Path`): of the dataset.
        prompts (sequence of `str`): training prompts.
        pixels (`np.ndarray`): uint8 (prompts, images per prompt, 64, 64, 3).
        labels (`np.ndarray`): of `noisy_labels`.
    """
    rows = []
    for number, prompt in enumerate(prompts):
        images = [_png(image) for image in pixels[number]]
        for (a, b), first in zip(pairs_of(len(images)), labels[number], strict=True):
            chosen, rejected = (a, b) if first else (b, a)
            rows.append({"prompt": prompt, "chosen": images[chosen], "rejected": images[rejected]})
    _write_rows(folder / "train.parquet", rows, ("chosen", "rejected"))


def write_captions(file: Path, config: RewardDataConfig, prompts: Sequence[str]) -> None:
    """Write rendered images of the prompts, each in either style.

    The style says nothing about the prompt. Preferences alone teach the taste.
    """
    rng = random.Random(config.seed + 4)
    rows = [
        {"prompt": prompt, "image": _png(np.asarray(render(parse_prompt(prompt), rng, style)))}
        for _ in range(config.renderings)
        for prompt in prompts
        for style in [rng.choice(STYLES)]
    ]
    _write_rows(file, rows, ("image",))


def _png(pixels: Pixels) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def _write_rows(file: Path, rows: list[dict[str, Any]], images: Sequence[str]) -> None:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    features = Features({"prompt": Value("string")} | {name: ImageFeature() for name in images})
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        Dataset.from_list(rows, features=features).to_parquet(temporary)


def train_images(folder: Path, config: RewardDataConfig) -> tuple[list[str], Pixels]:
    """Draw the training images, or read those that are there."""
    prompts = train_prompts()[: config.num_prompts]
    first = TRAIN_SEED + config.seed * 100_000
    drawn = folder / "drawn"
    return prompts, draw(drawn, "train", prompts, config.images_per_prompt, config.steps, first)


def held_out_images(folder: Path, config: RewardDataConfig) -> tuple[list[str], Pixels]:
    """Draw the images to measure on, or read those that are there."""
    prompts = held_out_prompts()[: config.eval_prompts]
    first, count = HELD_OUT_SEED + config.seed * 100_000, config.eval_images_per_prompt
    return prompts, draw(folder / "drawn", "held-out", prompts, count, config.steps, first)


def make_base(folder: Path, config: RewardDataConfig) -> None:
    """Pre-train the base on captions, if it is not there."""
    if (folder / "preprocessor_config.json").is_file():
        return
    torch.manual_seed(config.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    warm_up(config, model, tokenizer, train_prompts()[: config.num_prompts])
    save(folder, model.eval(), tokenizer)


def run(folder: Path, config: RewardDataConfig) -> None:
    """Draw, pre-train and write.

    Args:
        folder (`Path`): for everything that is written.
        config (`RewardDataConfig`): the settings.
    """
    claim(folder, config)
    prompts, pixels = train_images(folder, config)
    held_out_images(folder, config)
    labels = noisy_labels(verifier_scores(pixels, prompts), config)
    write_preferences(folder / "preferences", prompts, pixels, labels)
    write_captions(folder / "captions.parquet", config, prompts)
    make_base(folder / "base", config)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    folder, config = read_options(RewardDataConfig, __doc__, arguments)
    run(folder, config)
    print(f"wrote {folder}: base/, preferences/, captions.parquet")


if __name__ == "__main__":
    main()
