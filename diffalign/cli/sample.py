"""`diffalign sample`: draw images of a model, with and without a LoRA."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import ConfigError
from ..generation.grids import comparison_grid
from ..generation.pipelines import default_settings, load_pipeline
from ..generation.sampling import generate
from ..runtime.files import make_folder, save_image
from ..runtime.missing import check_any, left_out, present


def sample(options: argparse.Namespace) -> None:
    """Draw images and write them as `<prompt>-<seed>-<model>.png`.

    With a LoRA or a negative model it also writes `comparison.png`.

    Args:
        options (`argparse.Namespace`): Options of the command.

    Raises:
        UserError: A model or LoRA is missing, or a number is out of range.
    """
    for name, lowest in (("num_images", 1), ("batch_size", 1), ("seed", 0)):
        if getattr(options, name) < lowest:
            raise ConfigError(
                f"--{name}", f"expected int >= {lowest}, got {getattr(options, name)}"
            )
    pipe = load_pipeline(options.model)
    settings: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("num_inference_steps", "guidance_scale")
        if getattr(options, name) is not None
    }
    settings = {**default_settings(options.model), **settings}
    prompts = [prompt for prompt in options.prompt for _ in range(options.num_images)]
    seeds = [options.seed + i for _ in options.prompt for i in range(options.num_images)]
    sides = {
        "base": generate(
            pipe, prompts, seeds, batch_size=options.batch_size, description="base", **settings
        )
    }
    if options.lora:
        from ..backbones.lora import load_lora

        load_lora(pipe, options.lora, "tuned", "--lora")
        pipe.set_adapters("tuned", options.lora_scale)
        sides["tuned"] = generate(
            pipe, prompts, seeds, batch_size=options.batch_size, description="tuned", **settings
        )
    if options.negative_lora:
        from ..generation.guidance import NegativeGuidance, load_negative

        negative = load_negative(pipe, options.negative_lora)
        with NegativeGuidance(pipe, negative=negative, alpha=options.alpha, beta=options.beta):
            sides["tuned"] = generate(
                pipe,
                prompts,
                seeds,
                batch_size=options.batch_size,
                description="negative guidance",
                **settings,
            )
    make_folder(options.output_dir)
    for name, images in sides.items():
        check_any(images, name)
        for i in present(images):
            image = images[i]
            save_image(
                image,
                options.output_dir / f"{i // options.num_images:03d}-seed{seeds[i]}-{name}.png",
            )
    if "tuned" in sides:
        n = options.num_images
        rows = [
            (p, sides["base"][i * n : (i + 1) * n], sides["tuned"][i * n : (i + 1) * n])
            for i, p in enumerate(options.prompt)
        ]
        save_image(comparison_grid(rows), options.output_dir / "comparison.png")
    for name, images in sides.items():
        if len(present(images)) < len(images):
            print(left_out(images, len(images), name))
    print(
        f"wrote {sum(len(present(images)) for images in sides.values())} images to "
        f"{options.output_dir}"
    )
