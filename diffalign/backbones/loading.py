"""Load single components of a diffusers pipeline.

A run with full caches thus never touches the autoencoder or the text encoders.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..config.yaml_text import expand_home
from ..errors import ConfigError, one_line
from ..runtime import text_files
from ..runtime.hashing import module_hash, sampled_hash, text_hash
from ..runtime.weight_files import (
    check_component,
    check_filled,
    could_be_hub_id,
    load_transformers,
    loading_errors,
)
from ..shapes.models import embedded_name, weights_dir
from .lora import unwrapped
from .single_file import converted, is_single_file

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Plain pipelines load them for inference. A training run has no use for them.
_NEVER = ("safety_checker", "feature_extractor", "image_encoder")


def _component_hash(component: Any) -> str:
    """Hash weights and settings of a component in memory."""
    config: Any = getattr(component, "config", None)
    facts = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
    facts = {name: value for name, value in facts.items() if not str(name).startswith("_")}
    weights = ""
    if isinstance(component, torch.nn.Module):
        weights = module_hash(component)
    else:
        facts["length"] = getattr(component, "model_max_length", None)
    return text_hash(weights, json.dumps(facts, default=str, sort_keys=True))


def _is_plain(value: Any) -> bool:
    """Whether a value of a model_index.json is an option, and not a component."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(number, (int, float)) for number in value)
    return isinstance(value, (bool, int, float, str))


class ModelSource:
    """The place that a pipeline's components are loaded from.

    Args:
        model: Hub id, folder, safetensors file, name of an embedded model or a loaded
            `DiffusionPipeline`.
        revision (`str`, *optional*): Git revision on the Hub.
        variant (`str`, *optional*): of the weights, such as ``fp16``.
        vae (`str` or module, *optional*): another autoencoder.
        base (`str`, *optional*): pipeline that a model in one file takes its configs
            and missing parts from, see `single_file.converted`.

    Raises:
        ConfigError: with the field `model`: there is no such pipeline, or its weights
            are pickles.
    """

    def __init__(
        self,
        model: Any,
        *,
        revision: str | None = None,
        variant: str | None = None,
        vae: Any = None,
        base: str | None = None,
    ) -> None:
        self.revision, self.variant, self.vae = revision, variant, vae
        self._configs: dict[str, dict[str, Any]] = {}
        self.embedded = embedded_name(model)
        self.pipe = None if isinstance(model, (str, Path)) else model
        if self.pipe is not None:
            if not hasattr(self.pipe, "components"):
                raise ConfigError(
                    "model",
                    "expected a Hub id, a folder or a DiffusionPipeline, got "
                    f"{type(model).__name__}",
                )
            # A pipeline that was loaded from a `Path` remembers it as one.
            self.name = str(self.pipe.config.get("_name_or_path") or type(self.pipe).__name__)
            self.pipeline_class_name = type(self.pipe).__name__
            return
        self.name = model = str(expand_home(str(model)))
        if self.embedded is not None:
            self.location, self.local = str(weights_dir(self.embedded)), True
        elif is_single_file(model):
            self.location, self.local = str(converted(model, base, ModelSource)), True
        else:
            self.location, self.local = self.name, Path(self.name).is_dir()
        self.index = self._read_index()
        self.pipeline_class_name = self.index["_class_name"]
        self._variants: dict[str, str | None] = {}
        if self.local:
            self._refuse_pickles()

    def _read_index(self) -> dict[str, Any]:
        path = Path(self.location)
        if self.local:
            if not (path / "model_index.json").is_file():
                raise ConfigError(
                    "model",
                    f"the folder {self.name!r} is no diffusers pipeline: it has no "
                    "model_index.json",
                )
            return self._parsed_index(path / "model_index.json")
        if not could_be_hub_id(self.name):
            raise ConfigError(
                "model",
                f"there is no folder {self.name!r}, and it is no Hub id of the form 'user/name'",
            )
        from huggingface_hub import hf_hub_download

        try:
            file = hf_hub_download(self.name, "model_index.json", revision=self.revision)
        except Exception as error:  # the hub raises a dozen types: missing, gated, offline, ...
            reason = one_line(error)
            raise ConfigError(
                "model",
                f"neither a local folder nor a pipeline on the Hub: {self.name!r} ({reason})",
            ) from error
        return self._parsed_index(Path(file))

    def _parsed_index(self, file: Path) -> dict[str, Any]:
        index = text_files.read_json(file, dict, "model: ")
        if not isinstance(index.get("_class_name"), str):
            raise ConfigError(
                "model",
                f"{self.name!r} is no diffusers pipeline: its model_index.json names no "
                "_class_name; give a folder that save_pretrained of a pipeline wrote",
            )
        return index

    @contextmanager
    def explaining(self, component: str | None) -> Iterator[None]:
        """Turn loading errors into one sentence that names the component.

        Args:
            component (`str`, *optional*): its name. None names the whole model.

        Raises:
            ConfigError: in place of the library's error.
        """
        try:
            yield
        except ConfigError:
            raise
        except loading_errors() as error:
            what = f"component {component} of {self.name!r}" if component else repr(self.name)
            raise ConfigError("model", f"{what} cannot be loaded: {one_line(error)}") from error

    def from_transformers(self, name: str) -> bool:
        """Tell whether a component is a network of transformers."""
        if self.pipe is not None or self.index[name][0] != "transformers":
            return False
        cls = self._class(name)
        return isinstance(cls, type) and issubclass(cls, torch.nn.Module)

    def check_files(self) -> None:
        """Check the files of every component of a local folder, before any is loaded.

        Raises:
            ConfigError: one is missing or damaged.
        """
        if self.pipe is None and self.local:
            for name in self.component_names():
                self._component_variant(name)

    def _component_variant(self, name: str) -> str | None:
        """Return the variant to read, see `weight_files.check_component`."""
        if not self.local:
            return self.variant
        if name not in self._variants:
            folder = Path(self.location) / name
            has_weights = any(folder.glob("*.safetensors")) or (folder / "config.json").is_file()
            variant = (
                check_component(folder, "model", self.variant) if has_weights else self.variant
            )
            self._variants[name] = variant
        return self._variants[name]

    def pipeline_variant(self) -> str | None:
        """Return the variant in which to load the whole pipeline.

        Raises:
            ConfigError: the components have several.
        """
        if self.pipe is not None or not self.local:
            return self.variant
        variants = {self._component_variant(name) for name in self.component_names()} - {None}
        if len(variants) > 1:
            raise ConfigError(
                "model",
                f"the components of {self.name!r} have the variants "
                f"{', '.join(map(str, variants))}; choose one",
            )
        return next(iter(variants), None)

    def _refuse_pickles(self) -> None:
        for name in self.component_names():
            folder = Path(self.location) / name
            pickles = [p for p in folder.glob("*") if p.suffix in _PICKLES]
            if pickles and not list(folder.glob("*.safetensors")):
                raise ConfigError(
                    "model",
                    f"{name}/{pickles[0].name} of {self.name!r} is a pickle, which can run code "
                    "when loaded; "
                    "only safetensors are read: save the pipeline again with "
                    "safe_serialization=True",
                )

    def component_names(self) -> list[str]:
        """List the pipeline's components that a run may need."""
        if self.pipe is not None:
            return [
                name
                for name, value in self.pipe.components.items()
                if value is not None and name not in _NEVER
            ]
        return [
            n
            for n, v in self.index.items()
            if isinstance(v, list) and v[0] is not None and n not in _NEVER
        ]

    def has(self, name: str) -> bool:
        """Tell whether the pipeline has a component that a run may need."""
        return name in self.component_names()

    def component_config(self, name: str) -> dict[str, Any]:
        """Read a component's config without its weights. Files are read once.

        Raises:
            ConfigError: it cannot be read.
        """
        if self.pipe is not None:
            return dict(getattr(self.pipe, name).config)
        if name not in self._configs:
            self._configs[name] = self._read_config(name)
        return self._configs[name]

    def _read_config(self, name: str) -> dict[str, Any]:
        if name == "vae" and self.vae is not None:
            return dict(self.load("vae").config)  # it lies wherever the replacement's weights do
        cls = self._class(name)
        with self.explaining(name):
            return dict(cls.load_config(self.location, subfolder=name, revision=self.revision))

    def _class(self, name: str) -> Any:
        if not isinstance(self.index.get(name), list):
            raise ConfigError(
                "model", f"{self.name!r} is incomplete: its model_index.json names no {name}"
            )
        library, cls = self.index[name]
        if library not in ("diffusers", "transformers"):
            raise ConfigError(
                "model",
                f"component {name} of {self.name!r} comes from {library!r}, which would run "
                "foreign code",
            )
        component_class = getattr(importlib.import_module(library), str(cls), None)
        if component_class is None:
            raise ConfigError(
                "model",
                f"component {name} of {self.name!r} is a {cls}, which this version of {library} "
                "does not have",
            )
        return component_class

    def load(self, name: str, dtype: torch.dtype = torch.float32, quantization: Any = None) -> Any:
        """Load one component from safetensors, or take that of the loaded pipeline.

        Args:
            name (`str`): in the pipeline, such as ``vae``.
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): of a module.
            quantization (*optional*): diffusers' config of a quantised network.

        Raises:
            ConfigError: files are missing or damaged, the class is of a foreign
                library, or a network to quantise is in memory already.
        """
        if quantization is not None and self.pipe is not None:
            raise ConfigError(
                "train.quantization",
                f"the {name} of {self.name!r} is in memory already; name the model instead of "
                "passing a pipeline, or load the pipeline quantised",
            )
        if name == "vae" and self.vae is not None:
            if not isinstance(self.vae, (str, Path)):
                return self.vae
            subfolder = "vae" if (Path(self.vae) / "vae").is_dir() else None
            return self._load_vae(subfolder, dtype)
        if self.pipe is not None:
            component = unwrapped(getattr(self.pipe, name))
            return (
                component.to(dtype)
                if isinstance(component, torch.nn.Module) and component.dtype != dtype
                else component
            )
        cls = self._class(name)
        options: dict[str, Any] = {"subfolder": name, "revision": self.revision}
        if not issubclass(cls, torch.nn.Module):
            with self.explaining(name):
                return cls.from_pretrained(self.location, **options)
        options |= {"dtype": dtype, "variant": self._component_variant(name)}
        if quantization is not None:
            options["quantization_config"] = quantization
        what = f"component {name} of {self.name!r}"
        with self.explaining(name):
            if self.from_transformers(name):
                module = load_transformers(cls, self.location, "model", what, **options)
            else:
                module = cls.from_pretrained(self.location, use_safetensors=True, **options)
        check_filled(module, "model", what)
        return module

    def empty(self, name: str, dtype: torch.dtype = torch.float32) -> Any:
        """Build a component without content, from its config alone.

        Args:
            name (`str`): in the pipeline, such as ``unet``.
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): of the
                weights.

        Returns:
            `torch.nn.Module`: on the meta device.

        Raises:
            ConfigError: the config cannot be read.
        """
        cls = type(getattr(self.pipe, name)) if self.pipe is not None else self._class(name)
        with self.explaining(name), torch.device("meta"):
            if hasattr(cls, "load_config"):
                return cls.from_config(self.component_config(name)).to(dtype)
            if self.pipe is not None:
                config = getattr(self.pipe, name).config
            else:
                config = cls.config_class.from_pretrained(
                    self.location, subfolder=name, revision=self.revision
                )
            return cls(config).to(dtype)

    def _load_vae(self, subfolder: str | None, dtype: torch.dtype) -> Any:
        """Load the autoencoder that replaces the pipeline's own."""
        folder = Path(self.vae) / (subfolder or "")
        variant = None
        if folder.is_dir():
            variant = check_component(folder, "vae")
        elif Path(self.vae).is_file() or not could_be_hub_id(str(self.vae)):
            raise ConfigError(
                "vae",
                f"there is no folder {str(self.vae)!r} of an autoencoder, and it is no Hub id of "
                "the form 'user/name'",
            )
        try:
            module = self._class("vae").from_pretrained(
                self.vae, subfolder=subfolder, dtype=dtype, use_safetensors=True, variant=variant
            )
        except loading_errors() as error:
            raise ConfigError(
                "vae", f"{str(self.vae)!r} cannot be loaded: {one_line(error)}"
            ) from error
        check_filled(module, "vae", repr(str(self.vae)))
        return module

    def pipeline_class(self) -> Any:
        """Return the class of the diffusers pipeline."""
        return (
            type(self.pipe)
            if self.pipe is not None
            else getattr(importlib.import_module("diffusers"), self.pipeline_class_name)
        )

    def pipeline_options(self) -> dict[str, Any]:
        """Read the plain values that the pipeline's constructor takes.

        An example is SDXL's `force_zeros_for_empty_prompt`.
        """
        values = dict(self.pipe.config) if self.pipe is not None else self.index
        names = inspect.signature(self.pipeline_class().__init__).parameters
        options = {k: v for k, v in values.items() if k in names and _is_plain(v)}
        if "requires_safety_checker" in names:
            options["requires_safety_checker"] = False
        return options

    def fingerprint(self, *names: str) -> str:
        """Hash the content of components, for the keys of caches and of checkpoints.

        Args:
            names (`str`): of the components.

        Returns:
            `str`: 16 hexadecimal digits, the same in every process.
        """
        parts: list[str] = []
        for name in names:
            if name == "vae" and self.vae is not None:
                parts.append(self._vae_identity())
            elif self.pipe is not None:
                component = getattr(self.pipe, name)
                parts.append(_component_hash(component))
            elif self.local:
                folder = Path(self.location) / name
                files = sorted(path for path in folder.rglob("*") if path.is_file())
                parts += [f"{name}/{path.name}:{sampled_hash(path)}" for path in files]
                if self.variant is not None:
                    parts.append(f"variant {self.variant}")
            else:
                from huggingface_hub import hf_hub_download

                # A cached file's path holds the commit, which identifies the content.
                snapshot = Path(
                    hf_hub_download(self.name, "model_index.json", revision=self.revision)
                ).parent.name
                parts.append(f"{self.name}@{snapshot}/{name}:{self.variant}")
        return text_hash(*parts)[:16]

    def _vae_identity(self) -> str:
        """Identify the autoencoder that replaces the pipeline's own.

        It is its content, or its name on the Hub.
        """
        if not isinstance(self.vae, (str, Path)):
            return _component_hash(self.vae)
        folder = Path(self.vae)
        files = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else []
        return str([f"{path.name}:{sampled_hash(path)}" for path in files] or str(self.vae))
