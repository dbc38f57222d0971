"""Write the model card of a finished run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..runtime.files import write_atomically
from ..runtime.templates import render
from ..runtime.versions import versions
from ..shapes.models import embedded_name
from .run_folder import sample_pictures
from .run_record import RunRecord


def _parameters(cls: Any) -> set[str]:
    """List the names of a constructor's parameters."""
    return set(inspect.signature(cls.__init__).parameters)


def _last_picture(folder: Path) -> str | None:
    """Find the picture of the last validation, relative to the folder."""
    pictures = sample_pictures(folder)
    return f"samples/{pictures[0].name}" if pictures else None


def write_card(record: RunRecord, metrics: Mapping[str, Any], folder: Path) -> None:
    """Write ``README.md``, a model card that says how the weights were made.

    Args:
        record (`RunRecord`): The facts of the run.
        metrics: Name -> last logged value. Only numbers are shown, and no NaN.
        folder (`Path`): Holds the weights and the pictures of validations.
    """
    # `load_or_create_model_card` of diffusers asks the Hub for an existing card first.
    # That stalls a machine without network.
    from diffusers.utils.hub_utils import populate_model_card
    from huggingface_hub import ModelCard, ModelCardData

    is_lora, source = record.peft_config is not None, record.backbone.source
    pipeline = source.pipeline_class()
    # diffusers must be told which components the pipeline never had, such as the third
    # encoder of SD3.
    absent = [
        name
        for name in ("text_encoder_3", "tokenizer_3")
        if name in _parameters(pipeline) and not source.has(name)
    ]
    embedded = embedded_name(source.name)
    licence = record.backbone.licence if embedded is None else "Apache-2.0"
    body = render(
        "training/templates/model_card.md",
        title=folder.resolve().name,
        is_lora=is_lora,
        trained="" if record.built is None else record.built.trained,
        base=source.name,
        base_path=f'weights_dir("{embedded}")' if embedded else f'"{source.name}"',
        is_embedded=embedded is not None,
        licence=licence,
        method=record.name,
        paper=record.paper,
        pipeline=pipeline.__name__,
        absent=absent,
        facts=record.lines,
        metrics=[
            (name, value)
            for name, value in sorted(metrics.items())
            if isinstance(value, (int, float)) and not math.isnan(value)
        ],
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
        dataset=record.dataset.fingerprint,
        picture=_last_picture(folder),
    )
    prompts = record.validation.validation_prompts if record.validation is not None else []
    data = ModelCardData(
        base_model=source.name if embedded is None else None,
        license="other" if embedded is None else "apache-2.0",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        widget=[{"text": prompt} for prompt in prompts] or None,
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")
    tags = [
        "text-to-image",
        "diffusers",
        "diffusers-training",
        "diffalign",
        *(["lora"] if is_lora else []),
        *record.tags,
    ]
    write_atomically(folder / "README.md", str(populate_model_card(card, tags=tags)).encode())
