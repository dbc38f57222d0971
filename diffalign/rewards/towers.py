"""CLIP-type networks under both libraries that hold them.

These are transformers' `CLIPModel` folders and open_clip checkpoints.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, UserError, one_line
from ..runtime.hashing import text_hash
from . import checkpoints
from .checkpoints import ConfigLike
from .images import Preprocess
from .spec import ScorerSpec


def upcast(features: Tensor) -> Tensor:
    """Return half-precision features as float32.

    Norms, dot products and heads are never computed in half precision.
    """
    return features if features.dtype == torch.float64 else features.float()


def unit(features: Tensor) -> Tensor:
    """Scale rows to length 1, in float32 or wider."""
    features = upcast(features)
    return features / features.norm(dim=-1, keepdim=True)


def warn_truncated(prompt: str, limit: int, name: str) -> None:
    """Warn, once per call site, that the end of a prompt is not read."""
    shown = prompt[:60] + ("..." if len(prompt) > 60 else "")
    warnings.warn(
        f"{name}: a prompt of {len(prompt)} characters ({shown!r}) is longer than {limit} "
        "tokens; its end is not read",
        stacklevel=2,
    )


def tokenize(
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_length: int,
    name: str,
    padding: str | bool = True,
    **options: Any,
) -> Any:
    """Tokenize prompts with a transformers tokenizer, truncated with a warning.

    Args:
        tokenizer: of transformers.
        prompts (list of `str`): n texts.
        max_length (`int`): tokens that the network reads.
        name (`str`): the scorer's, for the warning.
        padding (`str` or `bool`, *optional*, defaults to True): as the tokenizer takes
            it.
        **options: of the tokenizer.

    Returns:
        token ids and mask, (n, length) each.
    """
    tokens = tokenizer(
        list(prompts),
        padding=padding,
        truncation=True,
        max_length=max_length,
        return_tensors="pt",
        **options,
    )
    for prompt, mask in zip(prompts, tokens["attention_mask"], strict=True):
        # Only a full row can have been cut, and only a long text is worth counting
        # again.
        if (
            int(mask.sum()) == max_length
            and len(tokenizer(prompt, truncation=False, verbose=False, **options)["input_ids"])
            > max_length
        ):
            warn_truncated(prompt, max_length, name)
    return tokens


class HFClip:
    """A `CLIPModel` folder of transformers.

    It holds config.json, weights, tokenizer and, where it has one,
    preprocessor_config.json.

    Args:
        model (path or `str`): folder or Hub id. None takes `spec.weights`.
        spec (`ScorerSpec`): of the scorer, for messages and the published weights.
        config (mapping or path, *optional*): fields that override the folder's
            config.json, e.g. ``{"text_config": {...}}``.
        tokenizer (path, *optional*): folder of the tokenizer. Defaults to the model's
            own.
        dtype (`torch.dtype`, *optional*, defaults to float32): of the towers.

    Attributes:
        module (`CLIPModel`): the network.
        tokenizer: of transformers.
        preprocess (`Preprocess`): of the folder.
        max_length (`int`): tokens that it reads.
        source (`Path`): the folder.
    """

    module: Any

    def __init__(
        self,
        model: str | Path | None,
        spec: ScorerSpec,
        *,
        config: ConfigLike = None,
        tokenizer: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.name = spec.key
        self.source = checkpoints.find_folder(model, spec)
        values = merged(
            checkpoints.read_config(self.source / "config.json", "model") or {},
            checkpoints.read_config(config) or {},
        )
        self.module = build_clip(values, folder_state(self.source), spec.key, dtype)
        self.tokenizer, self.max_length = clip_tokenizer(
            tokenizer or self.source, self.module, spec.key
        )
        self.preprocess = preprocess_of_folder(
            self.source, int(self.module.config.vision_config.image_size)
        )

    def text_inputs(self, prompts: Sequence[str], padding: str | bool = True) -> Any:
        """Tokenize prompts: ids and mask on the module's device."""
        # A literal '<|endoftext|>' in a prompt is text, not the end of it.
        tokens = tokenize(
            self.tokenizer,
            prompts,
            max_length=self.max_length,
            name=self.name,
            padding=padding,
            split_special_tokens=True,
        )
        return tokens.to(self.module.device)

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Return projected text features (n, d), not normalised."""
        inputs = self.text_inputs(prompts)
        pooled = self.module.text_model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).pooler_output
        return self.module.text_projection(pooled)

    def image(self, pixels: Tensor) -> Tensor:
        """Return projected image features (n, d), not normalised."""
        return self.module.visual_projection(
            self.module.vision_model(pixel_values=pixels).pooler_output
        )


def merged(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Replace some fields of a configuration, also inside its sections."""
    values = dict(base)
    for field, value in override.items():
        values[field] = {**values.get(field, {}), **value} if isinstance(value, Mapping) else value
    return values


def build_clip(
    config: Mapping[str, Any], state: Mapping[str, Tensor], name: str, dtype: torch.dtype
) -> Any:
    """Build a `CLIPModel` of this configuration with these weights.

    Args:
        config (mapping): `CLIPConfig` fields.
        state (`dict[str, Tensor]`): every weight, by transformers' names.
        name (`str`): the scorer's, for messages.
        dtype (`torch.dtype`): of the network.
    """
    from transformers import CLIPConfig, CLIPModel

    module = checkpoints.build_empty(lambda: CLIPModel(CLIPConfig.from_dict(dict(config))))
    # Position ids were stored by transformers before version 4.31. They are counted,
    # not learned.
    state = {
        key: value for key, value in state.items() if not key.endswith("embeddings.position_ids")
    }
    return checkpoints.load_strict(module, state, f"{name}'s CLIPModel", dtype=dtype)


def clip_tokenizer(source: str | Path, module: Any, name: str) -> tuple[Any, int]:
    """Load the `CLIPTokenizer` of a network.

    Also sets the token at which the network takes its features.

    Args:
        source (path): folder or Hub id of the tokenizer.
        module (`CLIPModel`): the network.
        name (`str`): the scorer's, for messages.

    Returns:
        the tokenizer and the number of tokens that the network reads.
    """
    from transformers import CLIPTokenizer

    tokenizer = load_tokenizer(CLIPTokenizer, source, name)
    text_config = module.config.text_config
    highest = max(tokenizer.get_vocab().values())
    check_vocabulary(highest, text_config.vocab_size, name)
    # Its id in a config is often the legacy 2, which stands for 'the highest id', or a
    # default that this vocabulary does not have.
    module.text_model.eos_token_id = (
        2 if tokenizer.eos_token_id == highest else tokenizer.eos_token_id
    )
    return tokenizer, min(int(tokenizer.model_max_length), int(text_config.max_position_embeddings))


def folder_state(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a transformers folder.

    Safetensors come first, shards by their index.

    Raises:
        ConfigError: the folder holds no weights.
    """
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).is_file():
            return checkpoints.read_state(folder / stem)
        index = folder / f"{stem}.index.json"
        if index.is_file():
            files = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            return {
                name: value
                for file in files
                for name, value in checkpoints.read_state(folder / Path(file).name).items()
            }
    raise ConfigError(
        "model",
        f"the folder {str(folder)!r} has neither model.safetensors nor pytorch_model.bin; "
        "download it whole",
    )


def load_tokenizer(cls: Any, source: str | Path, name: str) -> Any:
    """Load a tokenizer from a folder, a vocabulary file or a Hub id.

    Args:
        cls: tokenizer class of transformers.
        source (path or `str`): where it is.
        name (`str`): the scorer's, for messages.

    Raises:
        ConfigError: with the field `tokenizer`: not there, or degenerate, which
            transformers returns without an error.
    """
    try:
        tokenizer = (
            cls(vocab=str(source)) if Path(source).is_file() else cls.from_pretrained(str(source))
        )
    except Exception as error:  # transformers raises OSError, ValueError, TypeError, KeyError, ...
        reason = one_line(error)
        raise ConfigError(
            "tokenizer",
            f"{str(source)!r} cannot be loaded for {name} ({reason}); pass tokenizer=FOLDER",
        ) from error
    if len(tokenizer) <= 8:  # the special tokens alone
        raise ConfigError(
            "tokenizer",
            f"{str(source)!r} holds a vocabulary of {len(tokenizer)} entries; "
            "pass the folder with its vocabulary files",
        )
    return tokenizer


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash what decides how a tokenizer splits text.

    Args:
        tokenizer: of transformers or open_clip.
    """
    inner = getattr(tokenizer, "tokenizer", tokenizer)  # of open_clip's HFTokenizer
    backend = getattr(inner, "backend_tokenizer", None)
    if backend is not None:
        facts = json.loads(backend.to_str())
        # Every call sets these two.
        facts = {name: facts[name] for name in facts if name not in ("truncation", "padding")}
    elif hasattr(inner, "get_vocab"):
        facts = inner.get_vocab()
    else:  # open_clip's SimpleTokenizer
        facts = inner.encoder
    return text_hash(json.dumps(facts, sort_keys=True))[:16]


def check_vocabulary(highest: int, size: int, name: str) -> None:
    """Check that the network has an embedding for every id the tokenizer writes.

    Raises:
        ConfigError: it has none for the highest.
    """
    if highest >= size:
        raise ConfigError(
            "tokenizer",
            f"its ids go up to {highest}, but {name}'s text tower knows {size}; "
            "pass the tokenizer of this checkpoint",
        )


def preprocess_of_folder(folder: Path, image_size: int) -> Preprocess:
    """Read the exact preprocessing of a folder's preprocessor_config.json.

    A folder without one gets the usual preprocessing for `image_size`.

    Raises:
        ConfigError: the file crops to another size than the network reads.
    """
    path = folder / "preprocessor_config.json"
    base = Preprocess(size=image_size)
    if not path.is_file():
        return base
    values = checkpoints.read_config(path, "model") or {}
    size, crop = values.get("size", image_size), values.get("crop_size", image_size)
    shortest = size.get("shortest_edge", size.get("height")) if isinstance(size, Mapping) else size
    side = crop.get("height") if isinstance(crop, Mapping) else crop
    if not values.get("do_center_crop", True):
        side = shortest
    if side != image_size:
        raise ConfigError(
            "model",
            f"{str(path)!r} crops to {side} pixels, but the network reads {image_size}; "
            "use the file of this checkpoint",
        )
    return replace(
        base,
        resize_to=shortest if shortest != side else None,
        mean=tuple(values.get("image_mean", base.mean)),
        std=tuple(values.get("image_std", base.std)),
    )


class OpenClip:
    """An open_clip network from a checkpoint in open_clip's format.

    Args:
        model (path or `str`): checkpoint file, or folder or Hub id with
            open_clip_config.json. None takes the published weights of `tag`.
        spec (`ScorerSpec`): of the scorer.
        architecture (`str` or None): open_clip's model name, e.g. ``ViT-H-14``.
        tag (`str`, *optional*): open_clip's name of the published weights.
        filename (`str`, *optional*): name of the checkpoint inside a folder or Hub
            repository.
        config (mapping or path, *optional*): model config as a mapping or JSON file,
            bare or as in open_clip_config.json. It overrides `architecture`.
        tokenizer (path, *optional*): a byte-pair file of open_clip (``.gz``), or a
            folder of a transformers tokenizer.
        dtype (`torch.dtype`, *optional*, defaults to float32): of the towers.
    """

    module: Any

    def __init__(
        self,
        model: str | Path | None,
        spec: ScorerSpec,
        *,
        architecture: str | None,
        tag: str | None = None,
        filename: str | None = None,
        config: ConfigLike = None,
        tokenizer: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        import open_clip

        self.name = spec.key
        values = checkpoints.read_config(config)
        if (
            values is None
            and model is not None
            and (Path(model) / "open_clip_config.json").is_file()
        ):
            values = checkpoints.read_config(Path(model) / "open_clip_config.json", "model")
        values = values or {}
        self.preprocess_config: dict[str, Any] = dict(values.get("preprocess_cfg", {}))
        self.config = dict(values.get("model_cfg", values)) or architecture_config(architecture)
        if model is None and tag is not None:
            self.source, published = _published(architecture, tag)
            self.preprocess_config = {**published, **self.preprocess_config}
        else:
            self.source = checkpoints.find_weights(model, spec, filename)
        self.module = checkpoints.load_strict(
            checkpoints.build_empty(lambda: build_open_clip(self.config)),
            _plain_keys(checkpoints.read_state(self.source)),
            f"{spec.key}'s open_clip model",
            dtype=dtype,
        )
        self.tokenizer = _open_clip_tokenizer(open_clip, tokenizer, self.config, spec.key)
        self.max_length = int(self.config.get("text_cfg", {}).get("context_length", 77))
        self.image_size = _square(self.config.get("vision_cfg", {}).get("image_size", 224))

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Return text features (n, d), not normalised."""
        ids = self.tokenizer(list(prompts))
        for prompt, row in zip(prompts, ids, strict=True):
            # A full row that ends in text: open_clip writes the end-of-text token over
            # whatever stood last.
            if len(prompt) > self.max_length and int((row != 0).sum()) == self.max_length:
                warn_truncated(prompt, self.max_length, self.name)
        return self.module.encode_text(ids.to(next(self.module.parameters()).device))

    def image(self, pixels: Tensor) -> Tensor:
        """Return image features (n, d), not normalised."""
        return self.module.encode_image(pixels)


def architecture_config(architecture: str | None) -> dict[str, Any]:
    """Return open_clip's configuration of a named architecture.

    Raises:
        ConfigError: no name, or an unknown one, with close matches.
    """
    import difflib

    import open_clip

    if not architecture:
        raise ConfigError(
            "scorer", "open_clip needs an architecture: write open_clip:ViT-B-32, or pass config="
        )
    config = open_clip.get_model_config(architecture)
    if config is None:
        close = difflib.get_close_matches(architecture, open_clip.list_models(), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError("scorer", f"open_clip has no architecture {architecture!r}{hint}")
    return dict(config)


def build_open_clip(config: Mapping[str, Any]) -> nn.Module:
    """Build an open_clip network of this configuration, without weights.

    Raises:
        ConfigError: open_clip refuses the configuration.
    """
    import copy

    import open_clip

    values = copy.deepcopy(dict(config))
    vision, text = values.get("vision_cfg", {}), values.get("text_cfg", {})
    custom = values.pop("custom_text", False) or "hf_model_name" in text
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
    try:
        return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**values)
    except (TypeError, AssertionError, KeyError) as error:
        raise ConfigError(
            "config",
            f"open_clip cannot build a network from it ({error}); "
            "expected embed_dim, vision_cfg and text_cfg",
        ) from error


def _plain_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take off the ``module.`` that checkpoints of distributed training have."""
    if state and all(name.startswith("module.") for name in state):
        return checkpoints.rename(state, "module.")
    return state


def _published(architecture: str | None, tag: str) -> tuple[Path, dict[str, Any]]:
    """Download the weights of a tag, and say how open_clip preprocesses for them."""
    from open_clip.pretrained import (
        download_pretrained,
        get_pretrained_cfg,
        list_pretrained_tags_by_model,
    )

    published = get_pretrained_cfg(architecture, tag)
    if not published:
        tags = ", ".join(list_pretrained_tags_by_model(architecture))
        raise ConfigError(
            "scorer",
            f"open_clip has no weights {tag!r} of {architecture}; there are {tags or 'none'}",
        )
    try:
        path = download_pretrained(published)
    except Exception as error:
        reason = one_line(error)
        raise ConfigError(
            "model",
            f"the weights {tag!r} of {architecture} are not on this machine and cannot be "
            f"downloaded ({reason}); pass model=FILE",
        ) from error
    names = ("mean", "std", "interpolation", "resize_mode")
    return Path(path), {name: published[name] for name in names if name in published}


def _open_clip_tokenizer(
    open_clip: Any, source: str | Path | None, config: Mapping[str, Any], name: str
) -> Any:
    text = config.get("text_cfg", {})
    length = text.get("context_length", 77)
    options = text.get("tokenizer_kwargs", {})
    try:
        if source is not None and Path(source).is_file():
            tokenizer = open_clip.tokenizer.SimpleTokenizer(
                bpe_path=str(source), context_length=length, **options
            )
        elif source is not None or text.get("hf_tokenizer_name"):
            where = str(source or text["hf_tokenizer_name"])
            tokenizer = open_clip.tokenizer.HFTokenizer(where, context_length=length, **options)
        else:
            tokenizer = open_clip.tokenizer.SimpleTokenizer(context_length=length, **options)
    except Exception as error:
        reason = one_line(error)
        raise ConfigError(
            "tokenizer", f"{str(source)!r} cannot be loaded for {name} ({reason})"
        ) from error
    size = getattr(tokenizer, "vocab_size", None) or len(tokenizer.tokenizer)
    check_vocabulary(int(size) - 1, int(text.get("vocab_size", 49408)), name)
    return tokenizer


def _square(size: Any) -> int:
    if isinstance(size, (list, tuple)):
        if len(set(size)) != 1:
            raise UserError(
                f"config: only square images are supported, got image_size {tuple(size)}"
            )
        size = size[0]
    return int(size)
