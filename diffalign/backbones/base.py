"""What every model family answers to."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..likelihood import NoisingProcess, process_from_scheduler
from ..runtime.missing import to_images
from .loading import ModelSource

ATTENTION_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


class Backbone:
    """A model family: encodes images and prompts, calls its network. Components are loaded when they are first needed.

    Attributes:
        network_name: the pipeline component that is trained, ``unet`` or ``transformer``.
        text_encoder_names: components that encode prompts.
        lora_targets: default LoRA target modules.
        upcast_vae: precisions of a run in which the autoencoder runs in float32, unless its config has `force_upcast: false`.
    """

    network_name: ClassVar[str] = "unet"
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    lora_targets: ClassVar[list[str]] = ATTENTION_TARGETS
    upcast_vae: ClassVar[tuple[torch.dtype, ...]] = (torch.float16,)

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self._loaded: dict[str, Any] = {}
        self.given_scheduler: dict[str, Any] = {}
        """Configuration of the model's scheduler, before `pipeline_scheduler`."""
        self._pipe: Any = None
        self.process: NoisingProcess = process_from_scheduler(self.scheduler)
        vae = source.component_config("vae")
        self.vae_scale = 2 ** (len(vae["block_out_channels"]) - 1)
        self.latent_channels = vae["latent_channels"]

    # Components -------------------------------------------------------------------------------------------------------------

    @property
    def scheduler(self) -> Any:
        return self.component("scheduler")

    def component(self, name: str) -> Any:
        """A component, loaded and placed on first use; modules come frozen and in evaluation mode."""
        if name not in self._loaded:
            component = self.source.load(name, self.component_dtype(name))
            if isinstance(component, torch.nn.Module):
                component.requires_grad_(False).eval().to(self.device)
            if name == "scheduler":
                self.given_scheduler = dict(component.config)
                component = self.pipeline_scheduler(component)
            self._loaded[name] = component
        return self._loaded[name]

    def pipeline_scheduler(self, scheduler: Any) -> Any:
        """A scheduler as the family's pipelines read it; most take it as it is."""
        return scheduler

    def component_dtype(self, name: str) -> torch.dtype:
        """The precision in which a component runs."""
        if (
            name == "vae"
            and self.dtype in self.upcast_vae
            and self.source.component_config("vae").get("force_upcast", True)
        ):
            return torch.float32
        return self.dtype

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Where frozen components live and in which precision they run; call before the first is loaded."""
        self.device, self.dtype = device, dtype
        for component in self._loaded.values():
            if isinstance(component, torch.nn.Module):
                component.to(device)

    def is_loaded(self, name: str) -> bool:
        return name in self._loaded

    def release(self, *names: str) -> None:
        """Forgets components, e.g. encoders once everything is cached."""
        for name in names:
            self._loaded.pop(name, None)
        self._pipe = None

    def load_network(self, dtype: torch.dtype) -> Any:
        """The trainable network, float32 for full fine-tuning, the run's precision under LoRA."""
        if self.network_name not in self._loaded:
            self._loaded[self.network_name] = (
                self.source.load(self.network_name, dtype).requires_grad_(False).to(self.device)
            )
        return self._loaded[self.network_name]

    def pipeline(self, *, with_vae: bool = True, network: Any = None) -> Any:
        """A plain diffusers pipeline around the components; loads the text encoders (and the VAE)."""
        names = [
            n
            for n in self.source.component_names()
            if n != self.network_name and (with_vae or n != "vae")
        ]
        components: dict[str, Any] = {name: self.component(name) for name in names}
        components[self.network_name] = (
            network if network is not None else self._loaded.get(self.network_name)
        )
        # A pipeline's sampler keeps state while it runs; the process of the run must not see it.
        components["scheduler"] = type(self.scheduler).from_config(self.scheduler.config)
        if with_vae and components["vae"].dtype != self.dtype:
            components["vae"] = _reading_any_precision(components["vae"])
        return self._assemble(components)

    def _assemble(self, components: dict[str, Any]) -> Any:
        import inspect

        cls = self.source.pipeline_class()
        parameters = inspect.signature(cls.__init__).parameters
        missing = {
            n: None
            for n, p in parameters.items()
            if n != "self" and p.default is inspect.Parameter.empty
        }
        pipe = cls(**{**missing, **self.source.pipeline_options(), **components})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _encoding_pipe(self) -> Any:
        """A pipeline with text encoders only: diffusers' own `encode_prompt` decides how prompts are encoded."""
        if self._pipe is None:
            names = [
                n
                for n in self.source.component_names()
                if n.startswith(("text_encoder", "tokenizer"))
            ]
            network = {self.network_name: self._loaded.get(self.network_name)}
            self._pipe = self._assemble(
                {name: self.component(name) for name in names}
                | network
                | {"scheduler": self.scheduler}
            )
        return self._pipe

    # Sizes ------------------------------------------------------------------------------------------------------------------

    @property
    def size_factor(self) -> int:
        """Image sides must be multiples of this."""
        return self.vae_scale

    @property
    def default_resolution(self) -> int:
        config = self.source.component_config(self.network_name)
        size = config.get("sample_size") or 64
        return (size if isinstance(size, int) else size[0]) * self.vae_scale

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return self.latent_channels, height // self.vae_scale, width // self.vae_scale

    # Encoding and prediction ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (n, 3, H, W) in [-1, 1] -> scaled posterior mean and standard deviation, each (n, C, h, w) float32."""
        vae = self.component("vae")
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        shift, scale = getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor
        return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> list[Any]:
        """Scaled latents (n, C, h, w) -> n PIL images, as the family's pipelines decode them; `Missing` where pixels are not finite."""
        vae = self.component("vae")
        shift, scale = getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor
        pixels = vae.decode((latents / scale + shift).to(vae.device, vae.dtype), return_dict=False)[
            0
        ]
        return to_images(pixels.float())

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Prompts -> tensors with leading dimension n. The empty prompt gives what guidance uses for "no prompt"."""
        raise NotImplementedError

    def geometry_condition(self, geometries: Sequence[Any]) -> dict[str, Tensor]:
        """Size conditioning of n images, leading dimension n; most families have none."""
        return {}

    def predict(
        self, network: Any, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        """The network's output (n, C, h, w) at noisy latents; `times` (n,) as the network wants them."""
        raise NotImplementedError

    # Weights ----------------------------------------------------------------------------------------------------------------

    def save_lora(self, folder: str, network: Any, state: dict[str, Tensor]) -> None:
        """Writes ``pytorch_lora_weights.safetensors`` with its metadata (alpha), as `pipe.load_lora_weights` reads it."""
        from diffusers.training_utils import _collate_lora_metadata

        self.source.pipeline_class().save_lora_weights(
            save_directory=folder,
            safe_serialization=True,
            **{f"{self.network_name}_lora_layers": state},
            **_collate_lora_metadata({self.network_name: network}),
        )


def _reading_any_precision(vae: Any) -> Any:
    """The autoencoder for a pipeline of another precision: its `decode` casts, which pipelines leave out."""
    cast = copy.copy(vae)  # of the same weights

    def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        return type(vae).decode(cast, z.to(vae.dtype), *args, **kwargs)

    cast.decode = decode
    return cast
