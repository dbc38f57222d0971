"""The default settings for sampling from the embedded pipelines."""

from __future__ import annotations

from typing import Any

from .models import FLOW_MODEL, MAX_LENGTH, SHAPES_MODEL

SAMPLING: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 2.0}
"""The default sampler settings. The accuracies in the model cards are measured with
them, at several guidance scales.
"""


def sampling_settings(model: str = SHAPES_MODEL) -> dict[str, Any]:
    """Return the default arguments of an embedded pipeline's call.

    Args:
        model (`str`, *optional*, defaults to `"shapes"`): one of `EMBEDDED_MODELS`.

    Returns:
        `dict[str, Any]`: `SAMPLING`, and for ``shapes-flow`` the number of T5 tokens.
        diffusers would take 256, nearly all of them padding, at four times the cost.
    """
    if model == FLOW_MODEL:
        return {**SAMPLING, "max_sequence_length": MAX_LENGTH}
    return dict(SAMPLING)
