"""The names and folders of the embedded models."""

from __future__ import annotations

from pathlib import Path

SHAPES_MODEL = "shapes"
"""The name of the embedded Stable Diffusion pipeline, which predicts the noise."""
FLOW_MODEL = "shapes-flow"
"""The name of the embedded Stable Diffusion 3 pipeline, which predicts the velocity."""
MAX_LENGTH = 16
"""Text tokens of the embedded models."""
EMBEDDED_MODELS = {SHAPES_MODEL: "weights", FLOW_MODEL: "flow_weights"}
"""The names under which `model:` accepts an embedded pipeline, with their folders."""


def weights_dir(model: str = SHAPES_MODEL) -> Path:
    """Return the folder of an embedded pipeline, for `from_pretrained`.

    Args:
        model (`str`, *optional*, defaults to `"shapes"`): one of `EMBEDDED_MODELS`.

    Raises:
        ValueError: unknown name.
    """
    if model not in EMBEDDED_MODELS:
        raise ValueError(f"model: {model!r} is not one of {', '.join(EMBEDDED_MODELS)}")
    return Path(__file__).parent / EMBEDDED_MODELS[model]


def embedded_name(model: object) -> str | None:
    """Return the name of an embedded pipeline if a model is one, else None.

    A folder of that name in the working directory goes first.

    Args:
        model: what a user gave as `model`.
    """
    if isinstance(model, str) and model in EMBEDDED_MODELS and not Path(model).is_dir():
        return model
    return None
