"""Load pipelines for drawing: from the Hub, a folder or the package, with a LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backbones.loading import ModelSource
from ..backbones.lora import adapter_state, adapters_kept, load_lora
from ..runtime.weight_files import check_filled
from ..shapes.models import SHAPES_MODEL, embedded_origin, weights_dir
from ..shapes.sampling_defaults import sampling_settings

if TYPE_CHECKING:
    import torch

    from ..runtime.protocols import DeviceLike, LoraPipeline


def load_pipeline(
    model: str,
    *,
    dtype: torch.dtype | None = None,
    device: DeviceLike = None,
    variant: str | None = None,
    **components: Any,
) -> Any:
    """Load a plain diffusers pipeline from safetensors.

    Args:
        model (`str`): Hub id, folder or `shapes`.
        dtype (`torch.dtype`, *optional*): Precision of its weights. None is bfloat16 on
            a GPU, else float32.
        device (`str` or `torch.device`, *optional*): None and `auto` take the GPU if
            there is one.
        variant (`str`, *optional*): Variant of the weights, such as `fp16`. None takes
            the plain ones, or the variant that is there if there are none.
        **components: Replacements of the pipeline's own parts, e.g.
            `safety_checker=None`.

    Returns:
        `DiffusionPipeline` on the device.

    Raises:
        UserError: The model is not there, damaged or incomplete.

    Example:
        >>> from diffalign.generation.pipelines import load_pipeline
        >>> type(load_pipeline("shapes", device="cpu")).__name__
        'StableDiffusionPipeline'
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
    # A pipeline that was saved without a part, such as Stable Diffusion 3 without its
    # T5 encoder, loads only if the part is named.
    absent = {
        name: None
        for name, value in source.index.items()
        if isinstance(value, list) and value[0] is None
    }
    with source.explaining(None):
        pipe = DiffusionPipeline.from_pretrained(
            source.location,
            dtype=dtype,
            use_safetensors=True,
            variant=source.pipeline_variant(),
            **{**absent, **parts, **components},
        )
        for name, part in pipe.components.items():
            if isinstance(part, torch.nn.Module):
                check_filled(part, "model", f"component {name} of {source.name!r}")
        return pipe.to(place)


def load_for_scoring(
    model: str, *, dtype: torch.dtype | None = None, device: DeviceLike = None
) -> Any:
    """Load a pipeline without its safety checker.

    The checker paints images black, and a black image would be scored like any other.

    Args:
        model (`str`): Hub id, folder or `shapes`.
        dtype (`torch.dtype`, *optional*): See `load_pipeline`.
        device (`str` or `torch.device`, *optional*): See `load_pipeline`.
    """
    index = getattr(ModelSource(model), "index", {})
    components: dict[str, Any] = (
        {"safety_checker": None, "requires_safety_checker": False}
        if "safety_checker" in index
        else {}
    )
    return load_pipeline(model, dtype=dtype, device=device, **components)


def default_settings(model: object) -> dict[str, Any]:
    """Return arguments of the pipeline's call that it would not choose by itself.

    Only the embedded models have some, and pipelines that were trained from them.

    Args:
        model (`str`): Hub id, folder or name of an embedded model.
    """
    name = embedded_origin(model)
    return {} if name is None else sampling_settings(name)


@contextmanager
def with_lora(pipe: LoraPipeline, weights: str | Path, scale: float, role: str) -> Iterator[None]:
    """Put a LoRA on the pipeline while the block runs, beside the active ones.

    Args:
        pipe (`DiffusionPipeline`): The pipeline.
        weights: The LoRA: folder, file or Hub id.
        scale (`float`): Its strength.
        role (`str`): What messages call it.
    """
    before = adapter_state(pipe)
    name = "diffalign_compared"
    with adapters_kept(pipe):
        load_lora(pipe, weights, name, role)
        pipe.set_adapters([*before, name], [*(dict(weights) for weights in before.values()), scale])
        pipe.enable_lora()
        yield


def base_pipeline(model: str = SHAPES_MODEL) -> Any:
    """Load an embedded pipeline, without the checks of `load_pipeline`.

    Args:
        model (`str`, *optional*, defaults to `"shapes"`): `shapes` or `shapes-flow`.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return DiffusionPipeline.from_pretrained(weights_dir(model))
