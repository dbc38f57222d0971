"""The names and folders of the embedded models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def embedded_origin(model: object) -> str | None:
    """Return the name of the embedded pipeline that a model is, or was trained from.

    A pipeline of another model has other networks.

    Args:
        model: what a user gave as `model`. A folder counts if its networks have the
            configs of an embedded pipeline.
    """
    name = embedded_name(model)
    if name is not None or not isinstance(model, (str, Path)):
        return name
    folder = Path(model).expanduser()
    for name in EMBEDDED_MODELS:
        files = [*weights_dir(name).glob("[ut]*/config.json")]
        if files and all(_config(folder / f.parent.name) == _config(f.parent) for f in files):
            return name
    return None


def _config(folder: Path) -> dict[str, Any] | None:
    """Read the config of a network without what names its versions."""
    try:
        values = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict):
        return None
    return {key: values.get(key) for key in _CONFIG_KEYS}


_CONFIG_KEYS = (
    "_class_name",
    "architectures",
    "sample_size",
    "hidden_size",
    "num_layers",
    "block_out_channels",
    "cross_attention_dim",
    "in_channels",
    "num_attention_heads",
    "vocab_size",
)
