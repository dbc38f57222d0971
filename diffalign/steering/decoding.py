"""Decode predicted clean latents into the images that an intermediate reward sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backbones import Backbone, backbone_class
from ..errors import ConfigError, UserError
from ..runtime.missing import MaybeImage, to_images


class LatentDecoder:
    """Decodes clean predictions of any pipeline with an image autoencoder, in batches.

    Args:
        pipe: the pipeline, of diffusers.
        decoder: None for the pipeline's own autoencoder; another autoencoder, such as
            the cheaper `AutoencoderTiny`; or a function of unpacked latents (n, ...)
            that returns pixels (n, 3, h, w) in [-1, 1]. The target distribution does
            not depend on it.
        batch_size (`int`): latents per forward pass.
        height, width (`int`, *optional*): size of the image, needed for packed latents.

    Attributes:
        decoded (`int`): latents decoded so far.

    Raises:
        ConfigError: `decoder` is none of these.
    """

    def __init__(
        self,
        pipe: Any,
        decoder: Any,
        batch_size: int,
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        from diffusers.image_processor import VaeImageProcessor

        self.pipe, self.batch_size, self.height, self.width = pipe, batch_size, height, width
        self.module: Any = (
            getattr(pipe, "vae", None)
            if decoder is None
            else decoder
            if hasattr(decoder, "decode")
            else None
        )
        self.function = None if decoder is None or self.module is not None else decoder
        if self.function is not None and not callable(self.function):
            raise ConfigError(
                "decoder",
                "expected an autoencoder, a function of latents or None, got "
                f"{type(decoder).__name__}",
            )
        # How the model's family packs and normalises latents, unless it does neither.
        self.family = backbone_class(type(pipe).__name__)
        self.processor = getattr(pipe, "image_processor", None) or VaeImageProcessor()
        self.decoded = 0

    def images(self, x0: Tensor) -> list[MaybeImage]:
        """Decode latents into images.

        Args:
            x0 (`Tensor`): clean latents as the scheduler has them, (n, ...).

        Returns:
            `list`: n PIL images, `Missing` where pixels are not finite.

        Raises:
            UserError: packed or video latents that are not understood, or a pipeline
                without a known image autoencoder.
        """
        latents = self._unpack(x0)
        images: list[MaybeImage] = []
        with torch.no_grad():
            for start in range(0, len(latents), self.batch_size):
                pixels = self._decode(latents[start : start + self.batch_size])
                images += to_images(pixels.float(), self.processor)
        self.decoded += len(latents)
        return images

    def _unpack(self, x0: Tensor) -> Tensor:
        if self.function is not None:
            return x0
        if self.family is not None:
            return self.family.unpacked(self.pipe, x0, *self._size())
        if x0.ndim != 3:
            return x0
        unpack = getattr(self.pipe, "_unpack_latents", None)
        if unpack is None:
            raise UserError(
                "decoder: this pipeline packs its latents in a way that is not known here; give "
                "decoder= a function of latents"
            )
        return unpack(x0, *self._size(), self.pipe.vae_scale_factor)

    def _size(self) -> tuple[int, int]:
        side = getattr(self.pipe, "default_sample_size", 0) * self.pipe.vae_scale_factor
        if not side and self.family is not None:
            side = self.family.resolution or 0
        return self.height or side, self.width or side

    def _decode(self, latents: Tensor) -> Tensor:
        if self.function is not None:
            pixels = self.function(latents)
            if not isinstance(pixels, Tensor) or pixels.ndim != 4 or len(pixels) != len(latents):
                raise UserError(
                    "decoder: expected a function that returns pixels (n, 3, height, width) in "
                    "[-1, 1] for n latents"
                )
            return pixels
        if self.module is None:
            if latents.ndim == 4 and latents.shape[1] in (1, 3):
                return latents  # a pipeline in pixel space
            raise UserError(
                "decoder: this pipeline has no autoencoder named vae; give decoder= a function of "
                "latents"
            )
        vae: Any = self.module
        # Under offloading the weights lie elsewhere until the module is called.
        is_pipelines_own = vae is getattr(self.pipe, "vae", None) and hasattr(
            self.pipe, "_execution_device"
        )
        device = self.pipe._execution_device if is_pipelines_own else vae.device
        own_kind = type(vae) is type(getattr(self.pipe, "vae", None))
        if own_kind and self.family is not None and self.family.pixels is not Backbone.pixels:
            return self.family.pixels(vae, latents.to(device))
        if latents.ndim != 4:
            raise UserError(
                f"decoder: expected image latents of 4 dimensions, got {latents.ndim}; give "
                "decoder= a function of latents"
            )
        config = vae.config
        scaling = config.get("scaling_factor") or 1.0
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            mean, std = (
                torch.tensor(x, dtype=latents.dtype, device=latents.device).view(1, -1, 1, 1)
                for x in (mean, std)
            )
            latents = latents * std / scaling + mean
        else:
            latents = latents / scaling + (config.get("shift_factor") or 0.0)
        # Half-precision SDXL autoencoders overflow. The pipeline itself decodes in
        # float32 then, and so do we.
        dtype = vae.dtype
        upcast = dtype == torch.float16 and config.get("force_upcast", False)
        if upcast:
            vae.to(dtype=torch.float32)
        try:
            return vae.decode(latents.to(device, vae.dtype), return_dict=False)[0]
        finally:
            if upcast:
                vae.to(dtype=dtype)
