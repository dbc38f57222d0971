"""Compare models over guidance scales, each at its own best one.

Guidance raises the scores of a model, and a tuned model may do no more than that. So
the question is whether the tuned model at its best guidance beats the base at its best
guidance. The best scale of each model is chosen on one half of the prompts, and the
models are compared on the other half.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..config.ranges import read_scales
from ..errors import ConfigError
from .compare import measure, read_models
from .guidance_curves import GuidanceCurves, check_prompts, model_name
from .models import ModelLike

GUIDANCE_SCALES = (1.0, 2.0, 3.0, 5.0, 7.0)


def compare_guidance(
    base: ModelLike,
    tuned: ModelLike | Sequence[ModelLike],
    prompts: str | Iterable[str] = "shapes",
    scorers: object = None,
    *,
    guidance_scales: Sequence[float] = GUIDANCE_SCALES,
    output_dir: str | Path = "diffalign-comparison",
    verbose: bool = False,
    **options: Any,
) -> GuidanceCurves:
    """Compare models at several guidance scales, and each at its own best one.

    Every model draws the same prompts from the same noise at every scale. Finished
    images and scores stay in `output_dir`, as in `compare`, and scales can be added.

    Args:
        base: Model that the others are compared with, see `compare`.
        tuned: One model or a sequence of them, see `compare`.
        prompts (`str` or `Iterable[str]`, defaults to ``shapes``): At least four, see
            `compare`. The best scales are chosen on the first, third, ... of them, and
            reported on the others.
        scorers (*optional*): See `compare`. The first one chooses the best scales.
        guidance_scales (`Sequence[float]`): At least two different scales. Defaults to
            1, 2, 3, 5 and 7.
        output_dir (`str` or `Path`, defaults to ``diffalign-comparison``): Folder for
            the results.
        verbose (`bool`, defaults to `False`): Print the tables.
        options: The other arguments of `compare`, such as `num_images`, `seed`,
            `max_prompts` and `num_inference_steps`.

    Returns:
        `GuidanceCurves` with the scores. Tables, pictures and a report are in
        `output_dir`.

    Raises:
        UserError: Models, prompts, scorers or scales do not fit, which is found before
            anything is drawn.

    Example:
        >>> from diffalign import compare_guidance
        >>> curves = compare_guidance(
        ...     "shapes",
        ...     "again=shapes",
        ...     guidance_scales=[1, 3],
        ...     max_prompts=4,
        ...     num_images=1,
        ...     num_inference_steps=2,
        ...     output_dir="guidance",
        ... )
        >>> curves.best("again") == curves.best("base"), curves.win_rate("again").rate
        (True, 0.5)
    """
    if "guidance_scale" in options:
        raise ConfigError("guidance_scale", "it cannot be combined with guidance_scales")
    scales = read_scales(guidance_scales)
    arms = read_models(base, tuned)
    for arm in arms:
        if arm.guidance_scale is not None:
            raise ConfigError(
                f"{arm.name}.guidance_scale", "it cannot be combined with guidance_scales"
            )
    models = [
        dataclasses.replace(arm, name=model_name(arm.name, scale), guidance_scale=scale)
        for arm in arms
        for scale in scales
    ]
    comparison, is_main = measure(
        models,
        prompts,
        scorers,
        output_dir=output_dir,
        check=lambda prompt_set: check_prompts(len(prompt_set.prompts)),
        # Without the scales, so that some can be added later.
        identity={"models": {arm.name: arm.fingerprint() for arm in arms}, "curves": True},
        **options,
    )
    curves = GuidanceCurves(comparison, arms, scales)
    if is_main:
        from .guidance_report import write

        write(curves)
        if verbose:
            print(curves.table())
    return curves
