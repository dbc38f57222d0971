"""Check weight files before they are loaded.

What is damaged, missing or something else is reported in one sentence. Only headers are
read, so that a file of many gigabytes costs nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, UserError, one_line

if TYPE_CHECKING:
    import torch

_LARGEST_HEADER = 100 << 20
_VARIANT = re.compile(
    r"^(?:diffusion_pytorch_model|model)(?:\.([A-Za-z][\w]*))?(?:-\d{5}-of-\d{5})?(?:\.([A-Za-z][\w]*))?\.safetensors$"
)


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        shapes (`dict[str, tuple[int, ...]]`): name -> shape.
        metadata (`dict[str, str]`): its text entries.
    """

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


def what_is_wrong(path: Path) -> str | None:
    """Say why a file cannot hold weights.

    Args:
        path (`Path`): the file.

    Returns:
        `str` or `None`: the reason, such as ``is empty; download it again``. None where
            nothing speaks against it.
    """
    try:
        if path.is_dir():
            return "is a folder, not a file"
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        return "is not there"
    except (OSError, ValueError) as error:
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    if size == 0:
        return "is empty; download it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights; run git lfs pull"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page that was saved as a file; download the file itself"
    if path.suffix == ".safetensors":
        if head.startswith((b"PK\x03\x04", b"\x80\x02")):
            return "is a file of torch.save under another name; save it as safetensors"
        try:
            read_header(path)
        except ValueError as error:
            return str(error)
    return None


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file.

    Args:
        path (`Path`): the file.

    Returns:
        `Header`: shapes and metadata.

    Raises:
        ValueError: it has none, or the file is cut short.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise ValueError(
                "is no safetensors file, or its beginning is cut off; download it again"
            )
        try:
            values = json.loads(file.read(length))
        except ValueError:
            raise ValueError(
                "is no safetensors file (its header is no JSON); download it again"
            ) from None
    if not isinstance(values, dict):
        raise ValueError("is no safetensors file (its header is no JSON object); download it again")
    metadata = values.pop("__metadata__", None) or {}
    try:
        end = max((entry["data_offsets"][1] for entry in values.values()), default=0)
        shapes = {name: tuple(entry["shape"]) for name, entry in values.items()}
    except (KeyError, TypeError, IndexError):
        raise ValueError(
            "is no safetensors file (its header names no tensors); download it again"
        ) from None
    if 8 + length + end != size:
        raise ValueError(
            f"is cut short or damaged ({size} of {8 + length + end} bytes); download it again"
        )
    return Header(shapes, {str(k): str(v) for k, v in metadata.items()})


def check_file(path: Path, field: str) -> None:
    """Refuse a file that cannot hold weights.

    Args:
        path (`Path`): the file.
        field (`str`): how the message names the model.

    Raises:
        ConfigError: with the reason of `what_is_wrong`.
    """
    reason = what_is_wrong(path)
    if reason is not None:
        raise ConfigError(field, f"{str(path)!r} {reason}")


def check_component(folder: Path, field: str, variant: str | None = None) -> str | None:
    """Check the weight files of one component of a pipeline folder.

    Args:
        folder (`Path`): of the component, with its config.json.
        field (`str`): how messages name the model.
        variant (`str`, *optional*): the one that was asked for.

    Returns:
        `str` or `None`: the variant to read. It is `variant` where the component has
            it, or the only one where there are no plain files.

    Raises:
        ConfigError: a file is missing or damaged; the config is no JSON object; several
            variants and no plain files.
    """
    config = folder / "config.json"
    try:
        values = json.loads(config.read_bytes())
    except FileNotFoundError:
        raise ConfigError(
            field, f"{str(folder)!r} has no config.json; download the folder again"
        ) from None
    except ValueError:
        raise ConfigError(field, f"{str(config)!r} is no JSON; download it again") from None
    if not isinstance(values, dict):
        raise ConfigError(field, f"{str(config)!r} holds no JSON object; download it again")
    variants: dict[str | None, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        match = _VARIANT.match(path.name)
        if match:
            variants.setdefault(match.group(1) or match.group(2), []).append(path)
    if not variants:
        return variant  # pickles, or names that only the library knows
    if variant in variants:
        chosen: str | None = variant
    elif None in variants:
        chosen = None
    elif len(variants) == 1:
        chosen = next(iter(variants))
    else:
        raise ConfigError(
            field,
            f"{str(folder)!r} has the variants {', '.join(map(str, variants))} alone; choose one "
            "with variant",
        )
    for path in variants[chosen]:
        check_file(path, field)
    if all("-of-" in path.name for path in variants[chosen]):
        # Shards, of which the index says how many there must be.
        for index in folder.glob("*.safetensors.index*.json"):
            if (chosen or "") in index.name and (
                chosen is not None or index.name.endswith(".index.json")
            ):
                _check_index(index, field)
    return chosen


def _check_index(index: Path, field: str) -> None:
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(field, f"{str(index)!r} is damaged; download it again") from None
    for name in sorted(map(str, shards)):
        check_file(index.with_name(name), field)


def check_filled(module: torch.nn.Module, field: str, name: str) -> None:
    """Refuse a module whose weights were missing in the file.

    They have no values then, or random ones.

    Args:
        module (`torch.nn.Module`): the loaded module.
        field (`str`): how the message names the model.
        name (`str`): how it names the module.

    Raises:
        ConfigError: names the weights.
    """
    empty = [
        key for key, value in [*module.named_parameters(), *module.named_buffers()] if value.is_meta
    ]
    if empty:
        raise ConfigError(
            field,
            f"{name} lacks the weights {', '.join(empty[:2])}; the files are incomplete: download "
            "them again",
        )


def load_transformers(cls: Any, place: str | Path, field: str, what: str, **options: Any) -> Any:
    """Load a network of transformers with all of its weights.

    Args:
        cls: the class, or one of transformers' Auto classes.
        place (`str` or `Path`): folder or Hub id.
        field (`str`): how messages name the model.
        what (`str`): what lacks weights, for the message.
        **options: of `from_pretrained`.

    Returns:
        `torch.nn.Module`: the network.

    Raises:
        ConfigError: a file lacks weights. The library would draw them at random, with
            nothing but a table in its log.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    module, facts = cls.from_pretrained(
        place, output_loading_info=True, use_safetensors=True, **options
    )
    lacking = sorted(facts.get("missing_keys", ()))
    if lacking:
        raise ConfigError(
            field,
            f"{what} lacks the weights {', '.join(lacking[:2])}; the files are incomplete: "
            "download them again",
        )
    return module


def could_be_hub_id(name: str) -> bool:
    """Tell whether a name that is no local file or folder has the form of a Hub id.

    The form is ``user/name``.
    """
    return not name.startswith((".", "/", "~")) and name.count("/") == 1


def loading_errors() -> tuple[type[Exception], ...]:
    """List what libraries raise for files that cannot be loaded.

    Such files are damaged, missing or of another model, or configurations without
    sense.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    plain = (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        ArithmeticError,
        AssertionError,
    )
    return (*plain, SafetensorError, StrictDataclassError)


# LoRA files ---------------------------------------------------------------------------

_NETWORK_PREFIXES = ("unet.", "transformer.", "lora_unet_", "lora_transformer_")
TEXT_PREFIXES = (
    "text_encoder.",
    "text_encoder_2.",
    "text_encoder_3.",
    "lora_te_",
    "lora_te1_",
    "lora_te2_",
    "lora_te3_",
)
_KINDS = (
    (re.compile(r"\.hada_[wt]\d"), "LoHa"),
    (re.compile(r"\.lokr_"), "LoKr"),
    (re.compile(r"lora_magnitude_vector"), "DoRA"),
    (re.compile(r"\.dora_scale$"), "kohya's DoRA scales"),
    (re.compile(r"\.lora_mid\."), "LoCon's middle layers"),
    (re.compile(r"\.(diff|diff_b)$"), "full weight differences"),
    (re.compile(r"\.lora_[AB]\.bias$|\.lora_B\.bias"), "LoRA biases"),
    (re.compile(r"base_layer\.|modules_to_save"), "weights of the base model"),
    (re.compile(r"\.scalar$"), "scalars"),
)
_DOWN = re.compile(
    r"(\.lora_A\.(?:default\.)?weight|\.lora_down\.weight|[._]lora\.down\.weight|\.lora_linear_layer\.down\.weight)$"
)
_UP = re.compile(
    r"(\.lora_B\.(?:default\.)?weight|\.lora_up\.weight|[._]lora\.up\.weight|\.lora_linear_layer\.up\.weight)$"
)
UNSUPPORTED = (
    "LoHa",
    "LoKr",
    "kohya's DoRA scales",
    "LoCon's middle layers",
    "full weight differences",
    "weights of the base model",
    "scalars",
)
"""Kinds of weights that diffusers drops or does not know."""


@dataclass(frozen=True)
class LoraContent:
    """What a LoRA file holds, read from its names alone.

    Attributes:
        layers (`int`): layers of the denoiser.
        text_encoders (`int`): layers of the text encoders.
        kinds (`tuple[str, ...]`): kinds of weights beside plain LoRA matrices.
        unpaired (`str`, *optional*): a layer with one of its two matrices.
        compiled (`bool`): whether names are of a compiled network, with `_orig_mod` in
            them.
    """

    layers: int
    text_encoders: int
    kinds: tuple[str, ...]
    unpaired: str | None
    compiled: bool


def classify(names: Iterable[str]) -> LoraContent:
    """Read what a LoRA file holds from its names.

    Args:
        names (iterable of `str`): of its tensors.

    Returns:
        `LoraContent`: layers and kinds.
    """
    downs: set[str] = set()
    ups: set[str] = set()
    kinds: list[str] = []
    compiled = False
    for name in names:
        compiled |= "_orig_mod" in name
        kinds += [kind for pattern, kind in _KINDS if pattern.search(name)]
        if _DOWN.search(name):
            downs.add(_DOWN.sub("", name))
        elif _UP.search(name):
            ups.add(_UP.sub("", name))
    odd = sorted(downs ^ ups)
    whole = downs & ups
    text = [layer for layer in whole if layer.startswith(TEXT_PREFIXES)]
    network = [layer for layer in whole if layer.startswith(_NETWORK_PREFIXES)]
    return LoraContent(
        len(network), len(text), tuple(dict.fromkeys(kinds)), odd[0] if odd else None, compiled
    )


USUAL_LORA = "pytorch_lora_weights.safetensors"
"""The name that diffusers gives a LoRA's file."""


def find_lora_file(place: Path, role: str) -> Path:
    """Find the file of a LoRA.

    Args:
        place (`Path`): the file, or a folder with one.
        role (`str`): how messages name the LoRA.

    Returns:
        `Path`: the file.

    Raises:
        UserError: a folder without one, or with several.
    """
    if place.is_file():
        return place
    usual = place / USUAL_LORA
    if usual.is_file():
        return usual
    files = sorted(place.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if not files:
        raise UserError(
            f"{role}: the folder {str(place)!r} holds no LoRA for this model: there is no "
            "safetensors file in it"
        )
    raise UserError(
        f"{role}: the folder {str(place)!r} holds several files "
        f"({', '.join(f.name for f in files[:4])}); name one of them"
    )


def fetch_lora_file(name: str, role: str) -> Path:
    """Download the file of a LoRA from the Hub, once, into the Hub's own cache.

    Args:
        name (`str`): Hub id.
        role (`str`): how messages name the LoRA.

    Returns:
        `Path`: the file.

    Raises:
        UserError: no such repository, none or several safetensors files in it, or no
            connection.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        try:
            return Path(hf_hub_download(name, USUAL_LORA))
        except (LocalEntryNotFoundError, OfflineModeIsEnabled):  # no connection: what the cache has
            return find_lora_file(Path(snapshot_download(name, local_files_only=True)), role)
        except EntryNotFoundError:
            files = [
                file
                for file in HfApi().list_repo_files(name)
                if file.endswith(".safetensors") and "/" not in file
            ]
            if len(files) == 1:
                return Path(hf_hub_download(name, files[0]))
            held = (
                f"several safetensors files ({', '.join(files[:4])})"
                if files
                else "no safetensors file"
            )
    except UserError:
        raise
    except Exception as error:  # the hub raises a dozen types: missing, gated, offline, ...
        raise UserError(
            f"{role}: neither a local file or folder nor a LoRA on the Hub: {name!r} "
            f"({one_line(error)})"
        ) from error
    raise UserError(f"{role}: {name!r} holds {held}; download the file of one LoRA and name it")
