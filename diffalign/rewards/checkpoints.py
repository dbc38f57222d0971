"""Find the weights of reward models, read them without unpickling, and load them.

Loading is strict: every tensor by name and shape.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import ConfigError, UserError, one_line
from ..runtime import text_files
from ..runtime.hashing import WEIGHT_SUFFIXES
from ..runtime.weight_files import could_be_hub_id
from .spec import ScorerSpec

ConfigLike: TypeAlias = "Mapping[str, Any] | str | Path | None"
"""Overrides of an architecture: a mapping, or a JSON file that holds one."""


def find_weights(
    model: str | Path | None,
    spec: ScorerSpec,
    filename: str | None = None,
    *,
    revision: str | None = None,
) -> Path:
    """Find the checkpoint file of a scorer.

    Args:
        model (path or `str`, *optional*): a file, a folder that holds `filename` (or
            one single weights file), or a Hub id ``user/name``. Defaults to the
            published one.
        spec (`ScorerSpec`): the scorer's card.
        filename (`str`, *optional*): name inside a folder or Hub repository. Defaults
            to `spec.filename`.
        revision (`str`, *optional*): Hub revision. Defaults to `spec.revision`.

    Raises:
        ConfigError: with the field `model`, when there is no such thing or the Hub
            cannot be reached.
    """
    filename = filename or spec.filename
    if model is not None:
        path = Path(model)
        if path.is_file():
            return path
        if path.is_dir():
            return _in_folder(path, spec, filename)
    return _from_hub(_hub_id(model, spec), spec, filename, revision)


def _hub_id(model: str | Path | None, spec: ScorerSpec) -> str:
    name = str(model) if model is not None else spec.weights
    if name is None:
        raise ConfigError(
            "model",
            f"{spec.key} has no weights that could be downloaded; pass model=FILE_OR_FOLDER",
        )
    if name.startswith("https://"):
        raise ConfigError(
            "model",
            f"{spec.filename} of {spec.key} is published at {name}; "
            "download it and pass model=FILE",
        )
    if not could_be_hub_id(name):
        raise ConfigError(
            "model",
            f"there is no file or folder {name!r}, and it is no Hub id of the form 'user/name'",
        )
    return name


def _in_folder(path: Path, spec: ScorerSpec, filename: str | None) -> Path:
    if filename is not None and (path / filename).is_file():
        return path / filename
    files = sorted(p for p in path.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    if len(files) > 1:
        # One set of weights in two formats: take the one that cannot hold code.
        files = [p for p in files if p.suffix == ".safetensors"] or files
    if len(files) != 1:
        held = ", ".join(p.name for p in files) or "no weights file"
        raise ConfigError(
            "model", f"the folder {str(path)!r} holds {held}; pass the file of {spec.key} itself"
        )
    return files[0]


def _from_hub(name: str, spec: ScorerSpec, filename: str | None, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    pinned = revision or (spec.revision if name == spec.weights else None)
    try:
        return Path(hf_hub_download(name, filename or "model.safetensors", revision=pinned))
    except Exception as error:  # the hub raises a dozen types: missing, gated, offline, ...
        raise ConfigError("model", _not_here(name, spec, filename, error)) from error


def _not_here(name: str, spec: ScorerSpec, filename: str | None, error: Exception) -> str:
    reason = one_line(error)
    what = f"{filename} of {name!r}" if filename else repr(name)
    return (
        f"the weights of {spec.key}, {what}, are not on this machine and the Hub did not "
        f"give them ({reason}); pass model=FILE_OR_FOLDER"
    )


def find_folder(
    model: str | Path | None,
    spec: ScorerSpec,
    *,
    needs: str = "config.json",
    revision: str | None = None,
) -> Path:
    """Find the folder of a transformers model: local, or a snapshot of a Hub id.

    Args:
        model (path or `str`, *optional*): folder or Hub id. Defaults to the published
            one.
        spec (`ScorerSpec`): the scorer's card.
        needs (`str`, *optional*, defaults to "config.json"): a file that must be in it.
        revision (`str`, *optional*): Hub revision. Defaults to `spec.revision`.

    Raises:
        ConfigError: with the field `model`.
    """
    if model is not None and Path(model).is_dir():
        if not (Path(model) / needs).is_file():
            raise ConfigError(
                "model",
                f"the folder {str(model)!r} has no {needs}; "
                f"{spec.key} reads a folder in transformers' format",
            )
        return Path(model)
    if model is not None and Path(model).is_file():
        raise ConfigError(
            "model",
            f"{str(model)!r} is a file; "
            f"{spec.key} reads a folder in transformers' format (config.json beside the "
            "weights)",
        )
    name = _hub_id(model, spec)
    from huggingface_hub import snapshot_download

    pinned = revision or (spec.revision if name == spec.weights else None)
    try:
        folder = snapshot_download(
            name, revision=pinned, allow_patterns=["*.json", "*.txt", "model*.safetensors"]
        )
    except Exception as error:
        raise ConfigError("model", _not_here(name, spec, None, error)) from error
    if not (Path(folder) / needs).is_file():
        raise ConfigError(
            "model",
            f"{name!r} is on this machine without {needs}; download it whole or pass model=FOLDER",
        )
    return Path(folder)


def read_config(value: object, field: str = "config") -> dict[str, Any] | None:
    """Read a configuration given as a mapping or as a JSON file. None stays None.

    Raises:
        ConfigError: another type, a missing file, no JSON object.
    """
    if value is None or isinstance(value, Mapping):
        return None if value is None else dict(value)
    if isinstance(value, (str, Path)) and Path(value).is_file():
        try:
            content = text_files.parse_json(text_files.read_text(value))
        except ValueError as error:
            raise ConfigError(field, f"{str(value)!r} is not valid JSON ({error})") from error
        if isinstance(content, dict):
            return content
        raise ConfigError(
            field, f"{str(value)!r} must hold a JSON object, not {type(content).__name__}"
        )
    raise ConfigError(field, f"expected a mapping or a JSON file, got {value!r}")


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint file, to the CPU.

    Nothing is unpickled: a file that needs code to be read is refused.

    Args:
        path (`Path`): safetensors, or a file of `torch.save` that holds a state dict,
            bare or under the key `state_dict`.

    Raises:
        UserError: with the file's name: it would run code, is damaged, or holds no
            tensors.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except Exception as error:  # safetensors raises its own type
            raise UserError(
                f"model: {str(path)!r} is no safetensors file ({error}); download it again"
            ) from error
    try:
        content = _torch_load(path)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"model: {str(path)!r} is a pickle that holds more than tensors and would run "
            "code when loaded, so it is refused; "
            "save its state_dict() in a trusted environment, best as safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(
            f"model: {str(path)!r} is no checkpoint ({' '.join(str(error).split())[:160]}); "
            "download it again"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    state = (
        {name: value for name, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, dict)
        else {}
    )
    if not state:
        raise UserError(f"model: {str(path)!r} holds no tensors; expected a state dict")
    return state


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        # The format before torch 1.6 cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True)


def rename(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries whose names begin with `prefix`, without it."""
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }


def build_empty(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a module whose parameters take no memory yet and whose buffers are real.

    Buffers that no checkpoint holds, such as position ids, would stay on the meta
    device if they were built there. Embedding look-ups with them return uninitialised
    memory without an error.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return build()


def load_strict(
    module: nn.Module, state: Mapping[str, Tensor], what: str, *, dtype: torch.dtype | None = None
) -> nn.Module:
    """Load every tensor by name and shape, then freeze the module in `eval()`.

    Args:
        module (`nn.Module`): from `build_empty`, or any module.
        state (`dict[str, Tensor]`): nothing may be missing or left over.
        what (`str`): named in the message, e.g. ``imagereward's vision tower``.
        dtype (`torch.dtype`, *optional*, defaults to float32): of floating parameters
            and buffers.

    Raises:
        UserError: naming the keys that are missing, left over or misshapen.
    """
    expected = module.state_dict()
    problems = {
        "lacks": sorted(set(expected) - set(state)),
        "has unknown": sorted(set(state) - set(expected)),
        "has misshapen": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in sorted(set(expected) & set(state))
            if expected[name].shape != state[name].shape
        ],
    }
    complaints = [
        f"{kind} {len(names)} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for kind, names in problems.items()
        if names
    ]
    if complaints:
        raise UserError(
            f"model: the checkpoint does not fit {what}: it {'; it '.join(complaints)}; "
            "pass the matching checkpoint, or its architecture as config"
        )
    # Copied one by one: what stays mapped to the file would crash the process when
    # somebody overwrites that file.
    module.load_state_dict(
        {name: tensor.clone() for name, tensor in state.items()}, strict=True, assign=True
    )
    module.to(dtype or torch.float32)
    return freeze(module, what)


def freeze(module: nn.Module, what: str) -> nn.Module:
    """Set `eval()`, turn gradients off, and check that nothing is on the meta device.

    Raises:
        RuntimeError: a parameter or buffer has no memory, so scores would be garbage.
    """
    module.eval().requires_grad_(False)
    meta = [
        name
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
        if tensor.is_meta
    ]
    if meta:
        raise RuntimeError(f"{what}: {', '.join(meta[:4])} were not loaded")
    return module
