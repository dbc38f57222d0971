"""Load pipelines for drawing: from the Hub, a folder or the embedded model, with a LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..backbones.loading import ModelSource
from ..backbones.lora import adapter_state, adapters_kept, load_lora
from ..runtime.weight_files import check_filled


def load_pipeline(
    model: str,
    *,
    dtype: Any = None,
    device: Any = None,
    variant: str | None = None,
    **components: Any,
) -> Any:
    """A plain diffusers pipeline from a Hub id, a folder or ``shapes``; safetensors only.

    Args:
        dtype: of its weights; None is bfloat16 on a GPU, else float32.
        device: None and ``auto`` take the GPU if there is one.
        variant: of the weights, such as ``fp16``; None takes the plain ones, or the variant that is there where there are none.
        components: replace the pipeline's own, e.g. ``safety_checker=None``.
    """
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    from ..runtime.devices import read_device

    logging.disable_progress_bar()
    source = ModelSource(model, variant=variant)
    place = read_device(device)
    dtype = dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    source.check_files()
    parts = {
        name: source.load(name, dtype)
        for name in source.component_names()
        if source.from_transformers(name)
    }
    with source.explaining(None):
        pipe = DiffusionPipeline.from_pretrained(
            source.location,
            dtype=dtype,
            use_safetensors=True,
            variant=source.pipeline_variant(),
            **parts,
            **components,
        )
        for name, part in pipe.components.items():
            if isinstance(part, torch.nn.Module):
                check_filled(part, "model", f"component {name} of {source.name!r}")
        return pipe.to(place)


def load_for_scoring(model: str, *, dtype: Any = None, device: Any = None) -> Any:
    """`load_pipeline` without a safety checker: it paints images black, and a black image would be scored like any other."""
    index = getattr(ModelSource(model), "index", {})
    components: dict[str, Any] = (
        {"safety_checker": None, "requires_safety_checker": False}
        if "safety_checker" in index
        else {}
    )
    return load_pipeline(model, dtype=dtype, device=device, **components)


def default_settings(model: Any) -> dict[str, Any]:
    """Arguments of the pipeline's call that it would not choose by itself: those of the embedded one."""
    if model == "shapes" and ModelSource(model).local:
        from ..shapes.sampling_defaults import SAMPLING

        return dict(SAMPLING)
    return {}


@contextmanager
def with_lora(pipe: Any, weights: Any, scale: float, role: str) -> Iterator[None]:
    """A LoRA on the pipeline while the block runs, beside those that are active on it."""
    before = adapter_state(pipe)
    name = "diffalign_compared"
    with adapters_kept(pipe):
        load_lora(pipe, weights, name, role)
        pipe.set_adapters([*before, name], [*(dict(weights) for weights in before.values()), scale])
        pipe.enable_lora()
        yield


def base_pipeline() -> Any:
    """The embedded pipeline, plainly loaded."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    from ..shapes import weights_dir

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return StableDiffusionPipeline.from_pretrained(weights_dir())
