"""Measure an embedded pipeline over guidance scales, and write its model card.

This is a part of `tools.shapes.pretrain`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline

from diffalign.evaluation.statistics import clustered_standard_error
from diffalign.generation.sampling import generate
from diffalign.shapes.prompts import ATTRIBUTES, PREFERRED_STYLE, all_scenes, held_out_prompts
from diffalign.shapes.sampling_defaults import sampling_settings
from diffalign.shapes.verifier import attribute_table, score
from tools.shapes.captioned_images import CONFUSED, PretrainConfig

GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0)
KINDS = {
    "shapes": ("StableDiffusionPipeline", "a UNet that predicts the noise", "DDIM"),
    "shapes-flow": (
        "StableDiffusion3Pipeline",
        "a transformer (MMDiT) that predicts the velocity of a flow",
        "the Euler method",
    ),
}

CARD = """---
license: apache-2.0
pipeline_tag: text-to-image
library_name: diffusers
tags: [text-to-image, diffusers, diffalign, shapes]
---
# The {name} pipeline

A `{pipeline}` of {parameters:.1f} M parameters with {network}. It draws one shape on a plain
background, 64x64 pixels. It is embedded in diffalign as `model: {name}`: small enough to align on
two CPU cores, real enough to go through every code path.

Made by `python -m tools.shapes.pretrain --output_dir OUT` (seed {seed}) from {images} rendered
images. It is flawed *on purpose*, so that preferences have something to mend:

- {confusion:.0%} of the captions name {circles} by the name of the one before, in a circle. For a
  prompt with one of these names the wrong one is thus the likelier one, and guidance makes this
  worse.
- {share:.0%} of the images have the preferred style, "{style}". No caption mentions the style, so
  guidance hardly changes it.
- In {noise:.0%} of the captions shape and colour were drawn anew. Guidance mends this.

Held-out prompts ({count} images, {per_prompt} for each of {prompts} prompts), {sampler}, {steps}
steps, judged by `diffalign.shapes`; the standard error is clustered by prompt:

| guidance | all correct | preferred style | score | {names} |
|---|---|---|---|{dashes}|
{rows}

The default guidance of the package's recipes is {guidance}.
"""


def measure(name: str, pipe: DiffusionPipeline, guidance_scale: float, count: int = 4) -> dict:
    """Measure a pipeline on held-out prompts.

    Args:
        name (`str`): of the embedded model.
        pipe (`DiffusionPipeline`): the finished pipeline.
        guidance_scale (`float`): of its sampler.
        count (`int`, *optional*, defaults to `4`): images drawn per prompt.

    Returns:
        `dict[str, float]`: accuracy per attribute and of all at once with its standard
        error clustered by prompt, the share of the preferred style, and the mean score.
    """
    prompts = [prompt for prompt in held_out_prompts() for _ in range(count)]
    images = generate(
        pipe,
        prompts,
        seeds=list(range(len(prompts))),
        batch_size=60,
        description=f"{name}, guidance {guidance_scale:g}",
        **{**sampling_settings(name), "guidance_scale": guidance_scale},
    )
    table = attribute_table(images, prompts)
    means = {key: float(np.mean([row[key] for row in table])) for key in table[0]}
    correct = np.array([row["all"] for row in table], dtype=float).reshape(-1, count)
    return {
        **means,
        "all_standard_error": clustered_standard_error(correct),
        "score": float(score(images, prompts).mean()),
    }


def measure_and_write(folder: Path, name: str, config: PretrainConfig) -> None:
    """Write ``accuracy.json`` and ``README.md`` of a pipeline.

    The pipeline is loaded back from its half-precision files: the numbers must be those
    of what is shipped.

    Args:
        folder (`Path`): of the pipeline.
        name (`str`): of the embedded model.
        config (`PretrainConfig`): the settings that made it.
    """
    pipe = DiffusionPipeline.from_pretrained(folder)
    results = {f"{scale:g}": measure(name, pipe, scale) for scale in GUIDANCE_SCALES}
    (folder / "accuracy.json").write_text(json.dumps(results, indent=2) + "\n")
    rows = "\n".join(
        f"| {scale} | {r['all']:.1%} ± {r['all_standard_error']:.1%} | {r['style']:.1%} "
        f"| {r['score']:.3f} | " + " | ".join(f"{r[key]:.1%}" for key in ATTRIBUTES) + " |"
        for scale, r in results.items()
    )
    networks = [part for part in pipe.components.values() if hasattr(part, "parameters")]
    pipeline, network, sampler = KINDS[name]
    settings, prompts = sampling_settings(name), len(held_out_prompts())
    text = CARD.format(
        name=name,
        pipeline=pipeline,
        network=network,
        sampler=sampler,
        parameters=sum(p.numel() for part in networks for p in part.parameters()) / 1e6,
        seed=config.seed,
        images=config.images_per_scene * len(all_scenes()),
        confusion=config.confusion,
        circles=" and ".join(", ".join(circle) for circle in CONFUSED.values()),
        share=config.preferred_share,
        style=PREFERRED_STYLE,
        noise=config.caption_noise,
        count=4 * prompts,
        per_prompt=4,
        prompts=prompts,
        steps=settings["num_inference_steps"],
        guidance=settings["guidance_scale"],
        names=" | ".join(ATTRIBUTES),
        dashes="|".join("---" for _ in ATTRIBUTES),
        rows=rows,
    )
    (folder / "README.md").write_text(text)
