"""Checkpoints in one file, as programs for drawing keep them.

A file is converted once into a folder of the Hub's cache, by diffusers' own converters.
From then on it is a pipeline like any other, of which single components are loaded.
"""

from __future__ import annotations

import glob
import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, one_line
from ..runtime.hashing import sampled_hash, text_hash
from ..runtime.weight_files import loading_errors, read_header, what_is_wrong

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
_ONE_OF_UNET = "model.diffusion_model.input_blocks."
_TEXT = ("cond_stage_model.", "conditioner.", "text_encoders.", "text_encoder.")
_SCALES = (".scale_weight", ".weight_scale", ".weight_scale_2", ".scale_input", ".input_scale")
_AUTOENCODER = ("first_stage_model.", "vae.")


def is_single_file(model: Any) -> bool:
    """Tell whether a model is named by a file of weights."""
    return isinstance(model, (str, Path)) and (
        Path(model).expanduser().is_file() or str(model).endswith(SUFFIXES)
    )


def cache_folder() -> Path:
    """Where converted files are kept."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "diffalign" / "single-file"


def converted(file: str | Path, base: str | None, open_base: Callable[[str], Any]) -> Path:
    """Convert a checkpoint in one file, if that was not done before.

    Args:
        file (`str` or `Path`): a safetensors file.
        base (`str`, *optional*): folder or Hub id of a pipeline of the same family. The
            configs come from it, and the parts that the file lacks. The default is the
            family's own on the Hub.
        open_base (`Callable`): `ModelSource`, which opens that pipeline.

    Returns:
        `Path`: folder of a diffusers pipeline.

    Raises:
        ConfigError: with the field `model`: there is no such file, it is damaged, of a
            family that is not known, or cannot be converted.
    """
    path = Path(file).expanduser()
    shapes = _shapes(path)
    kind = _kind(path, shapes)
    name = f"{path.stem}-{sampled_hash(path)[:12]}"
    folder = cache_folder() / f"{name}-{_base_hash(base or _default_base(kind))}"
    if (folder / "model_index.json").is_file():
        return folder
    if base is None:  # a command after a run that named the base
        others = sorted(cache_folder().glob(f"{glob.escape(name)}-*/model_index.json"))
        if len(others) > 1:
            raise ConfigError(
                "model",
                f"{str(path)!r} was converted with several bases; say which one with model_base, "
                f"or name one of the folders {', '.join(str(each.parent) for each in others)}",
            )
        if others:
            return others[0].parent
        base = _default_base(kind)
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    # One process of several converts, and the others find the result.
    with FileLock(f"{folder}.lock"):
        if not (folder / "model_index.json").is_file():
            print(f"model: converting {path} ({kind}), once, into {folder}", flush=True)
            _convert(path, base, open_base, shapes, folder)
    return folder


def _base_hash(base: str) -> str:
    """Identify a base: its name, and the content of its configs if it is a folder."""
    folder = Path(base)
    files = sorted(folder.glob("*/*.json")) if folder.is_dir() else []
    return text_hash(base, *(sampled_hash(file) for file in files))[:8]


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if not path.is_file():
        raise ConfigError("model", f"there is no file {str(path)!r}")
    if path.suffix != ".safetensors":
        raise ConfigError(
            "model",
            f"{str(path)!r} is no safetensors file; other files can run code when loaded, or hold "
            "weights that cannot be trained",
        )
    reason = what_is_wrong(path)
    if reason is not None:
        raise ConfigError("model", f"{str(path)!r} {reason}")
    shapes = read_header(path).shapes
    scaled = [name for name in shapes if name == "scaled_fp8" or name.endswith(_SCALES)]
    if scaled:
        raise ConfigError(
            "model",
            f"{str(path)!r} is quantised with scales ({scaled[0]!r}), which diffusers does not "
            "read; take the file in bf16, fp16 or plain fp8",
        )
    return shapes


def _kind(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What diffusers calls the family of the file."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    kind = str(infer_diffusers_model_type(tensors))
    # What it does not know, it calls v1.
    if kind == "v1" and not any(name.startswith(_ONE_OF_UNET) for name in shapes):
        raise ConfigError(
            "model",
            f"{str(path)!r} is no checkpoint of a family that is known (it begins with "
            f"{next(iter(shapes), 'no tensor')!r}); convert it to a diffusers folder, or if it is "
            "a LoRA, name it in lora.start_from",
        )
    return kind


def _default_base(kind: str) -> str:
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS

    return str(DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"])


def _marked(scheduler: Any, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """Follow the marker tensors of a file that predicts v, as ComfyUI reads them."""
    if "v_pred" not in shapes:
        return scheduler
    settings: dict[str, Any] = {"prediction_type": "v_prediction"}
    if "ztsnr" in shapes:
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    print(f"model: the file says that it predicts v ({', '.join(settings)})", flush=True)
    return type(scheduler).from_config(scheduler.config, **settings)


def _convert(
    path: Path,
    base: str,
    open_base: Callable[[str], Any],
    shapes: Mapping[str, tuple[int, ...]],
    folder: Path,
) -> None:
    """Write the pipeline of a file and of what it lacks into a folder, or nothing."""
    try:
        source = open_base(base)
    except ConfigError as error:
        raise ConfigError(
            "model",
            f"{str(path)!r} needs the configs of {base!r}, which cannot be read; name a pipeline "
            "of its family with model_base",
        ) from error
    cls: Any = getattr(importlib.import_module("diffusers"), source.pipeline_class_name)
    dtype = _dtype(path)
    lacking = {
        name: source.load(name, dtype)
        for name in source.component_names()
        if (name.startswith("text_encoder") and not _has(shapes, _TEXT))
        or (name == "vae" and not _has(shapes, _AUTOENCODER))
        or name.startswith(("tokenizer", "scheduler"))
    }
    if "scheduler" in lacking:
        lacking["scheduler"] = _marked(lacking["scheduler"], shapes)
    if hasattr(cls, "safety_checker"):
        lacking["safety_checker"] = None
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        pipe = cls.from_single_file(str(path), config=source.location, torch_dtype=dtype, **lacking)
        pipe.save_pretrained(temporary, safe_serialization=True)
        os.replace(temporary, folder)
    except loading_errors() as error:
        # diffusers leaves the weights that a file lacks on the meta device.
        reason = "weights are missing" if "meta tensor" in str(error) else one_line(error)
        raise ConfigError(
            "model",
            f"{str(path)!r} cannot be converted with the configs of {base!r} ({reason}); the file "
            "may be incomplete, or model_base must name another pipeline of its family",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _has(shapes: Mapping[str, Any], prefixes: tuple[str, ...]) -> bool:
    return any(name.startswith(prefixes) for name in shapes)


def _dtype(path: Path) -> torch.dtype:
    """The precision of most weights, bf16 for files in 8 bits."""
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        dtypes = [opened.get_slice(name).get_dtype() for name in opened.keys()]  # noqa: SIM118
    most = max(set(dtypes), key=dtypes.count)
    return {"F32": torch.float32, "F16": torch.float16}.get(most, torch.bfloat16)
