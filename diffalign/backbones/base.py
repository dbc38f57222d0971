"""The base class of all model families."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from ..errors import ConfigError
from ..likelihood import NoiseSchedule, schedule_from_scheduler
from ..runtime.missing import MaybeImage, to_images
from ..runtime.offload import offload_layers
from .guidance_rules import CLASSIFIER_FREE, GuidanceRule
from .loading import ModelSource

ATTENTION_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


_PIXELS_AT_ONCE = 1024 * 1024
"""Pixels that go through an autoencoder together."""


class Backbone:
    """A model family: encodes images and prompts, and calls its network.

    Components are loaded when they are first needed.

    Args:
        source (`ModelSource`): where they come from.

    Attributes:
        pipeline_classes (`tuple[str, ...]`): names of the diffusers pipelines of the
            family.
        network_name (`str`): the component that is trained, ``unet`` or
            ``transformer``.
        text_encoder_names (`tuple[str, ...]`): components that encode prompts.
        encoding_names (`tuple[str, ...]`): how the names of the components begin that
            encode prompts.
        resolution (`int`, *optional*): side of a square image, in pixels, of families
            whose networks do not name one.
        steps (`int`): of the default call of the pipelines, see `num_inference_steps`.
        default_guidance (`float`): of a network that takes guidance as an input.
        guidance (`float`): what such a network is given in this run.
        even_sigmas (`bool`): the pipelines give their scheduler sigmas that fall evenly
            from 1 to 1 / steps.
        guidance_rule (`GuidanceRule`): how the pipelines guide.
        ragged (`tuple[str, ...]`): conditions whose rows have lengths of their own, see
            `conditions`.
        lora_targets (`list[str]` or `str`): default target modules of a LoRA, as peft
            takes them: ends of names, or a regular expression.
        guides_in_one_batch (`bool`): the pipelines put the unconditional rows in front
            of the conditional ones and call the network once.
        supports_lora (`bool`): diffusers can load a LoRA for the family.
        licence (`str`): of the family's published weights, for the model card.
        upcast_vae (`tuple[torch.dtype, ...]`): precisions of a run in which the
            autoencoder runs in float32, unless its config has `force_upcast: false`.
        schedule (`NoiseSchedule`): the model's noise schedule.
    """

    network_name: ClassVar[str] = "unet"
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    encoding_names: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    resolution: ClassVar[int | None] = None
    steps: ClassVar[int] = 50
    default_guidance: ClassVar[float] = 1.0
    even_sigmas: ClassVar[bool] = False
    guidance_rule: ClassVar[GuidanceRule] = CLASSIFIER_FREE
    ragged: ClassVar[tuple[str, ...]] = ()
    lora_targets: ClassVar[list[str] | str] = ATTENTION_TARGETS
    supports_lora: ClassVar[bool] = True
    guides_in_one_batch: ClassVar[bool] = True
    licence: ClassVar[str] = "see its model card"
    upcast_vae: ClassVar[tuple[torch.dtype, ...]] = (torch.float16,)

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.network_device = self.device
        self.offloads = False
        """Whether frozen components wait on the CPU, see `place`."""
        self._loaded: dict[str, Any] = {}
        self.guidance = self.default_guidance
        self.given_scheduler: dict[str, Any] = {}
        """Configuration of the model's scheduler, before `pipeline_scheduler`."""
        self._pipe: Any = None
        self.schedule: NoiseSchedule = schedule_from_scheduler(self.scheduler)
        if self.source.component_config(self.network_name).get("time_cond_proj_dim"):
            raise ConfigError(
                "model",
                f"{source.name}: its UNet is distilled with guidance as an input "
                "(time_cond_proj_dim), which is not supported; give the model that it was "
                "distilled from",
            )

    @property
    def process(self) -> NoiseSchedule:
        """Deprecated name of `schedule`. It goes in version 0.3."""
        warnings.warn(
            "process is now called schedule; the old name goes in version 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.schedule

    @process.setter
    def process(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule

    # Components -----------------------------------------------------------------------

    @property
    def scheduler(self) -> Any:
        """The model's scheduler, as the family's pipelines read it."""
        return self.component("scheduler")

    def component(self, name: str) -> Any:
        """Return a component, loaded and placed on first use.

        Modules come frozen and in evaluation mode.

        Args:
            name (`str`): in the pipeline, such as ``vae``.
        """
        if name not in self._loaded:
            component = self.source.load(name, self.component_dtype(name))
            if isinstance(component, torch.nn.Module):
                component.requires_grad_(False).eval()
                if self.offloads:
                    offload_layers(component, self.device)
                else:
                    component.to(self.device)
            if name == "scheduler":
                self.given_scheduler = dict(component.config)
                component = self.pipeline_scheduler(component)
            self._loaded[name] = component
        return self._loaded[name]

    def pipeline_scheduler(self, scheduler: Any) -> Any:
        """Change a scheduler as the family's pipelines do. Most leave it as it is."""
        return scheduler

    def component_dtype(self, name: str) -> torch.dtype:
        """Return the precision in which a component runs."""
        if (
            name == "vae"
            and self.dtype in self.upcast_vae
            and self.source.component_config("vae").get("force_upcast", True)
        ):
            return torch.float32
        return self.dtype

    def place(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        offload: bool = False,
        shard: bool = False,
    ) -> None:
        """Choose where frozen components live and in which precision they run.

        Call it before the first one is loaded.

        Args:
            device (`torch.device`): where they run.
            dtype (`torch.dtype`): precision of the run.
            offload (`bool`, *optional*, defaults to `False`): keep all but the trained
                network on the CPU, and run them layer by layer.
            shard (`bool`, *optional*, defaults to `False`): leave the trained network
                on the CPU, until it is spread over the processes.
        """
        self.device, self.dtype, self.offloads = device, dtype, offload
        self.network_device = torch.device("cpu") if shard else device
        for name, component in self._loaded.items():
            waits = shard if name == self.network_name else self.offloads
            if isinstance(component, torch.nn.Module) and not waits:
                component.to(device)

    def is_loaded(self, name: str) -> bool:
        """Tell whether a component is in memory."""
        return name in self._loaded

    def release(self, *names: str) -> None:
        """Drop components from memory, such as encoders once everything is cached.

        Those of a pipeline that was handed in belong to the user, and wait on the CPU.
        """
        for name in names:
            component = self._loaded.pop(name, None)
            is_given = self.source.pipe is not None and isinstance(component, Module)
            if is_given and not self.offloads:
                component.to("cpu")
        self._pipe = None

    def load_network(self, dtype: torch.dtype, quantization: Any = None) -> Any:
        """Load the network that is trained.

        Args:
            dtype (`torch.dtype`): float32 for full fine-tuning, the run's precision
                under LoRA.
            quantization (*optional*): diffusers' config of a quantised network.

        Raises:
            ConfigError: a network to quantise is in memory already.
        """
        if self.network_name not in self._loaded:
            network = self.source.load(self.network_name, dtype, quantization)
            self._loaded[self.network_name] = network.requires_grad_(False).to(self.network_device)
        return self._loaded[self.network_name]

    def use_network(self, network: Any) -> None:
        """Take a network that is in memory already as the one that is trained."""
        self._loaded[self.network_name] = network

    @staticmethod
    def checkpoint_activations(network: Any) -> None:
        """Make the network compute activations again in its backward pass."""
        network.enable_gradient_checkpointing()

    def pipeline(self, *, with_vae: bool = True, network: Module | None = None) -> Any:
        """Build a plain diffusers pipeline around the components.

        Text encoders are loaded for it, and the autoencoder.

        Args:
            with_vae (`bool`, *optional*, defaults to `True`): whether it gets the
                autoencoder.
            network (*optional*): the denoiser. None takes the loaded one.
        """
        names = [
            n
            for n in self.source.component_names()
            if n != self.network_name and (with_vae or n != "vae")
        ]
        components: dict[str, Any] = {name: self.component(name) for name in names}
        components[self.network_name] = (
            network if network is not None else self._loaded.get(self.network_name)
        )
        # A pipeline's sampler keeps state, which the run's schedule must not see.
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
        """Build a pipeline with text encoders only.

        diffusers' own `encode_prompt` then decides how prompts are encoded.
        """
        if self._pipe is None:
            names = self.encoders()
            network = {self.network_name: self._loaded.get(self.network_name)}
            self._pipe = self._assemble(
                {name: self.component(name) for name in names}
                | network
                | {"scheduler": self.scheduler}
            )
        return self._pipe

    # Sizes ----------------------------------------------------------------------------

    @property
    def vae_scale(self) -> int:
        """Image pixels along a side of one latent pixel."""
        return int(2 ** (len(self.source.component_config("vae")["block_out_channels"]) - 1))

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.source.component_config("vae")["latent_channels"])

    @property
    def patch(self) -> int:
        """Latent pixels along a side of one token of the network."""
        return 1

    @property
    def size_factor(self) -> int:
        """The number of which image sides must be multiples: whole tokens."""
        return self.vae_scale * self.patch

    @property
    def default_resolution(self) -> int:
        """The side of a square image that the network was trained on, in pixels."""
        if self.resolution is not None:
            return self.resolution
        config = self.source.component_config(self.network_name)
        size = config.get("sample_size") or 64
        return (size if isinstance(size, int) else size[0]) * self.vae_scale

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of an image's latents."""
        return self.latent_channels, height // self.vae_scale, width // self.vae_scale

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network takes guidance as an input."""
        return bool(self.source.component_config(self.network_name).get("guidance_embeds"))

    # Times ----------------------------------------------------------------------------

    @property
    def few_steps(self) -> int | None:
        """Steps of a model that was distilled to a few of them, or None."""
        return None

    @property
    def num_inference_steps(self) -> int:
        """Steps of the model's default call."""
        return self.few_steps or self.steps

    def tokens(self, height: int, width: int) -> int:
        """Count the tokens of an image, as the family's pipelines do for the shift."""
        return (height // self.size_factor) * (width // self.size_factor)

    def dynamic_shift(self, height: int, width: int, steps: int) -> float:
        """Compute mu of a scheduler that shifts by the number of tokens.

        It is linear in them, as in most of diffusers' pipelines.

        Args:
            height, width (`int`): of the image, in pixels.
            steps (`int`): of the sampler. Most families do not use it.
        """
        config = self.scheduler.config
        tokens = self.tokens(height, width)
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return float(base + (most - base) * (tokens - low) / (high - low))

    def timestep_shift(self, height: int, width: int) -> float:
        """Return the shift of the sigmas that the family's pipelines sample at.

        Args:
            height, width (`int`): of the image, in pixels.

        Returns:
            `float`: 1 is no shift.
        """
        config = self.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return float(getattr(self.schedule, "shift", 1.0))
        mu = self.dynamic_shift(height, width, self.num_inference_steps)
        return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu

    def sampler_arguments(self, steps: int, height: int, width: int) -> dict[str, Any]:
        """Return what the family's pipelines pass to `scheduler.set_timesteps`.

        Args:
            steps (`int`): of the sampler.
            height, width (`int`): of the image, in pixels.
        """
        arguments: dict[str, Any] = {"num_inference_steps": steps}
        if self.even_sigmas:
            arguments = {"sigmas": np.linspace(1.0, 1 / steps, steps)}
        if self.scheduler.config.get("use_dynamic_shifting"):
            arguments["mu"] = self.dynamic_shift(height, width, steps)
        return arguments

    # Encoding and prediction ----------------------------------------------------------

    @staticmethod
    def normalised(vae: Any, latents: Tensor, *, deviation: bool = False) -> Tensor:
        """Bring an autoencoder's latents to the scale on which the network works.

        Args:
            vae: the autoencoder.
            latents (`Tensor`): as `encode` returns them.
            deviation (`bool`, *optional*, defaults to `False`): they are standard
                deviations, which are scaled and not shifted.

        Returns:
            `Tensor`: (n, C, h, w).
        """
        shift = 0.0 if deviation else getattr(vae.config, "shift_factor", None) or 0.0
        return (latents - shift) * vae.config.scaling_factor

    @staticmethod
    def pixels(vae: Any, latents: Tensor) -> Tensor:
        """Decode latents on the network's scale, as the family's pipelines do it.

        Args:
            vae: the autoencoder.
            latents (`Tensor`): (n, C, h, w), on its device.

        Returns:
            `Tensor`: (n, 3, H, W), about [-1, 1].
        """
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        latents = latents / vae.config.scaling_factor + shift
        return vae.decode(latents.to(vae.dtype), return_dict=False)[0]

    @staticmethod
    def unpacked(pipe: Any, latents: Tensor, height: int, width: int) -> Tensor:
        """Bring the latents of a running pipeline into the form (n, C, h, w).

        Args:
            pipe: of the family.
            latents (`Tensor`): as the pipeline's scheduler steps them.
            height, width (`int`): of the image, in pixels.
        """
        return latents

    def check_lora(self) -> None:
        """Check that a LoRA of this family can be used.

        Raises:
            ConfigError: diffusers cannot load one.
        """
        if not self.supports_lora:
            raise ConfigError(
                "lora",
                f"diffusers cannot load a LoRA into a {self.source.pipeline_class_name}; leave "
                "lora out to train all weights",
            )

    def images_at_once(self, height: int, width: int) -> int:
        """Return how many images go through the autoencoder together.

        Its activations take about 2.5 GiB for a million pixels in float32.

        Args:
            height, width (`int`): of the images, in pixels.
        """
        return max(1, _PIXELS_AT_ONCE // (height * width))

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images into latent distributions, some at a time.

        Args:
            pixels (`Tensor`): (n, 3, H, W) in [-1, 1].

        Returns:
            `tuple[Tensor, Tensor]`: scaled mean and standard deviation of the
            posterior, each (n, C, h, w) float32. The deviation is 0 where the family's
            autoencoder has no posterior.
        """
        parts = pixels.split(self.images_at_once(*pixels.shape[-2:]))
        mean, std = zip(*(self.posterior(part) for part in parts), strict=True)
        return torch.cat(mean), torch.cat(std)

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images together. Arguments and results as for `encode_images`."""
        vae = self.component("vae")
        with own_precision(vae):
            posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
            return (
                self.normalised(vae, posterior.mean.float()),
                self.normalised(vae, posterior.std.float(), deviation=True),
            )

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> list[MaybeImage]:
        """Decode latents into images, as the family's pipelines do it.

        Args:
            latents (`Tensor`): scaled, (n, C, h, w).

        Returns:
            `list`: n PIL images, `Missing` where pixels are not finite.
        """
        vae, scale = self.component("vae"), self.vae_scale
        height, width = latents.shape[-2:]
        parts = latents.split(self.images_at_once(height * scale, width * scale))
        with own_precision(vae):
            pixels = [self.pixels(vae, part.to(vae.device)).float() for part in parts]
        return to_images(torch.cat(pixels))

    def decode_pixels(self, latents: Tensor) -> Tensor:
        """Decode latents into pixels, with a gradient.

        Args:
            latents (`Tensor`): scaled, (n, C, h, w).

        Returns:
            `Tensor`: (n, 3, H, W) in [0, 1], float32. A pixel that was clamped has no
            gradient.
        """
        vae = self.component("vae")
        with own_precision(vae):
            pixels = self.pixels(vae, latents.to(vae.device)).float()
        return (pixels / 2 + 0.5).clamp(0, 1)

    @staticmethod
    def call_arguments(settings: dict[str, Any]) -> dict[str, Any]:
        """Turn this package's names of sampler settings into those of the pipeline.

        Args:
            settings (`dict`): arguments for the pipeline's call, prompts included, with
                ``guidance_scale`` for what the family's pipeline calls its guidance.
        """
        return settings

    def encoders(self) -> list[str]:
        """List the components that encode prompts: encoders and tokenizers."""
        return [n for n in self.source.component_names() if n.startswith(self.encoding_names)]

    @property
    def prompt_settings(self) -> dict[str, Any]:
        """Arguments with which the pipeline's call encodes as `encode_prompts` does."""
        return {}

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts into tensors.

        Args:
            prompts (sequence of `str`): n of them. The empty one gives what guidance
                takes for "no prompt".

        Returns:
            `dict[str, Tensor]`: each with leading dimension n.
        """
        raise NotImplementedError

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """Give the shapes of a row's condition for a long prompt, without encoders.

        Returns:
            `dict[str, tuple[int, ...]]`: name as in `encode_prompts` and
            `geometry_condition` -> sizes after the first. Masks end in ``mask``. Those
            of `ragged` families are left out: nothing is padded then. Empty where the
            family does not say.
        """
        return {}

    def _network_size(self, name: str) -> int:
        """Read a number from the config of the trained network."""
        return int(self.source.component_config(self.network_name)[name])

    def geometry_condition(self, geometries: Sequence[Any]) -> dict[str, Tensor]:
        """Encode the size and crop of n images. Most families need neither.

        Args:
            geometries (sequence): one per image.

        Returns:
            `dict[str, Tensor]`: each with leading dimension n.
        """
        return {}

    def predict(
        self, network: Module, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        """Run the network at noisy latents.

        Args:
            network: the policy or the reference.
            noisy (`Tensor`): (n, C, h, w).
            times (`Tensor`): as the network is given them, (n,).
            condition (`dict[str, Tensor]`): of `encode_prompts` and
                `geometry_condition`.

        Returns:
            `Tensor`: (n, C, h, w).
        """
        raise NotImplementedError

    # Weights --------------------------------------------------------------------------

    def save_lora(self, folder: str, network: Module, state: dict[str, Tensor]) -> None:
        """Write ``pytorch_lora_weights.safetensors``, as diffusers reads it.

        Args:
            folder (`str`): where to.
            network: with the adapter. Its alpha goes into the metadata.
            state (`dict[str, Tensor]`): of `lora_state`.
        """
        from diffusers.training_utils import _collate_lora_metadata

        told = _collate_lora_metadata({self.network_name: network})
        self.source.pipeline_class().save_lora_weights(
            save_directory=folder,
            safe_serialization=True,
            **{f"{self.network_name}_lora_layers": state},
            **{name: portable_metadata(config) for name, config in told.items()},
        )


_ALWAYS_TOLD = ("r", "lora_alpha", "target_modules", "peft_type")


def portable_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what a LoRA's configuration has by default.

    Readers build peft's `LoraConfig` of the metadata, and an older peft does not know
    the fields of a newer one.

    Args:
        config (`Mapping[str, Any]`): All fields of a `LoraConfig`.
    """
    from peft import LoraConfig

    plain = LoraConfig().to_dict()
    return {
        name: value
        for name, value in config.items()
        if name != "peft_version" and (name in _ALWAYS_TOLD or value != plain.get(name))
    }


def own_precision(module: Any) -> torch.autocast:
    """Return a context in which autocast leaves the precision of a module alone.

    Args:
        module: an autoencoder or a head, on its device.
    """
    return torch.autocast(torch.device(module.device).type, enabled=False)


def _reading_any_precision(vae: Any) -> Any:
    """Copy an autoencoder for a pipeline of another precision.

    Its `decode` casts, which pipelines leave out.
    """
    cast = copy.copy(vae)  # of the same weights

    def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        with own_precision(vae):
            return type(vae).decode(cast, z.to(vae.dtype), *args, **kwargs)

    cast.decode = decode
    return cast
