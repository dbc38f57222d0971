"""`ModelScorer`, the base class of scorers made of neural towers.

Prompts are encoded once, images are prepared in threads, and scores have gradients
where the scorer declares them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, UserError
from ..runtime.devices import read_dtype
from ..runtime.protocols import DeviceLike, DtypeLike
from .base import Scorer
from .images import ImageInput, Images, Preprocess, check_pixels, read_images
from .scoring import Item, make_items

_TEXTS_KEPT = 512  # prompts whose features stay in memory between calls


class ModelScorer(Scorer):
    """A scorer made of neural towers.

    A new one writes `text_features`, `image_features` and `similarity`, and sets
    `preprocess`. It also writes `towers` (and `heads`), so that `to` finds its
    networks.

    Args:
        **options: as for `Scorer`.

    Attributes:
        preprocess (`Preprocess`): how an image becomes a tower's input.

    Example:
        ```python
        class Redness(ModelScorer):
            spec = ScorerSpec(
                "redness", "how red", requires=("image",), differentiable=True
            )
            preprocess = Preprocess(size=8, mean=(0.0,) * 3, std=(1.0,) * 3)

            def text_features(self, prompts):
                return (torch.zeros(len(prompts)),)

            def image_features(self, pixels):
                return pixels.mean((2, 3))

            def similarity(self, image, text):
                return image[:, 0] - image[:, 1:].mean(1)


        assert Redness()([Image.new("RGB", (8, 8), "red")]).item() == 1
        ```
    """

    preprocess: Preprocess

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._texts: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()

    # What a scorer writes

    def text_features(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """Return what `similarity` needs of the prompts.

        Args:
            prompts (list of `str`): n distinct prompts.

        Returns:
            tensors with one row per prompt, on the device.
        """
        raise NotImplementedError

    def image_features(self, pixels: Tensor) -> Tensor:
        """Return what `similarity` needs of the images.

        Args:
            pixels (`Tensor`): (n, 3, size, size), normalised, of the towers' dtype.

        Returns:
            `Tensor`: one row per image.
        """
        raise NotImplementedError

    def similarity(self, image: Tensor, text: tuple[Tensor, ...]) -> Tensor:
        """Return the scores (n,) of n rows of features, in float32 or wider."""
        raise NotImplementedError

    def towers(self) -> Iterable[nn.Module]:
        """Return the networks that run in `dtype`."""
        return ()

    def heads(self) -> Iterable[nn.Module]:
        """Return the networks that stay in float32 beside half-precision towers."""
        return ()

    # The exact mode

    def prepare_prompts(self, prompts: Sequence[str], batch_size: int) -> None:
        """Encode the prompts that are not known yet, a batch at a time."""
        unknown = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        for start in range(0, len(unknown), batch_size):
            part = unknown[start : start + batch_size]
            features = self.text_features(part)
            for i, prompt in enumerate(part):
                self._texts[prompt] = tuple(feature[i] for feature in features)
        # The prompts of this call are the last to be forgotten.
        for prompt in dict.fromkeys(prompts):
            self._texts.move_to_end(prompt)
        while len(self._texts) > max(_TEXTS_KEPT, len(set(prompts))):
            self._texts.popitem(last=False)

    def prepare_item(self, item: Item) -> Tensor:
        """Resize an image: (3, size, size), not yet normalised."""
        pixels = self.preprocess.exact(item.image)
        item.input.release()
        return pixels

    def score_batch(self, items: list[Item]) -> Tensor:
        prompts = [item.prompt for item in items]
        images = [
            self.prepare_item(item) if item.prepared is None else item.prepared for item in items
        ]
        pixels = self.preprocess.stack(images).to(self.device, non_blocking=True)
        features = self.image_features(self.preprocess.normalise(pixels).to(self.dtype))
        texts = self.prompt_features(prompts, batch_size=len(prompts))
        return self.similarity(features, texts).float().cpu()

    def prompt_features(self, prompts: Sequence[str], batch_size: int) -> tuple[Tensor, ...]:
        """Return `text_features` with one row per prompt, encoding each prompt once.

        Args:
            prompts (list of `str`): one per row, repetitions allowed.
            batch_size (`int`): prompts encoded at once.
        """
        self.prepare_prompts(prompts, batch_size)
        rows = [self._texts[prompt] for prompt in prompts]
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))

    def forget_prompts(self) -> None:
        """Drop the features of earlier prompts."""
        self._texts.clear()

    # The differentiable mode

    def score_tensor(self, pixels: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        if not self.differentiable:
            return super().score_tensor(pixels, prompts)
        check_pixels(pixels)
        if pixels.dtype == torch.uint8:
            raise UserError(
                "pixels: expected floats in [0, 1], got uint8, which carries no gradient; "
                "call scorer(images, prompts)"
            )
        items = make_items(self, [ImageInput("pixels", b"")] * len(pixels), prompts, None)
        with torch.autocast(self.device.type, enabled=False):
            pixels = pixels.to(self.device)
            if self.dtype != torch.float64:
                pixels = pixels.float()
            with torch.no_grad():
                texts = self.prompt_features([item.prompt for item in items], len(items))
            prepared = self.preprocess.normalise(self.preprocess.tensor(pixels))
            return self.similarity(self.image_features(prepared.to(self.dtype)), texts)

    # Embeddings and networks

    @torch.no_grad()
    def embed(self, images: Images) -> Tensor:
        """Embed images as `image_features` does.

        Args:
            images: n images in any form that `Scorer.score` takes.

        Returns:
            `Tensor`: (n, d), float32 on the CPU.

        Raises:
            UserError: unreadable images, or a scorer whose features are no single
                vector per image.
        """
        embeddings = self.image_rows(images)
        if embeddings.ndim != 2:
            raise UserError(
                f"{self.name} has no single embedding per image; "
                "take a CLIP scorer such as clip-l14 or pickscore"
            )
        return embeddings

    @torch.no_grad()
    def image_rows(self, images: Images) -> Tensor:
        """Return `image_features` of images, (n, ...), float32 on the CPU."""
        inputs, rows = read_images(images), []
        # On a CPU one by one, where a batch gains little and changes last digits.
        size = 1 if self.device.type == "cpu" else 32
        for start in range(0, len(inputs), size):
            prepared = [self.preprocess.exact(x.image) for x in inputs[start : start + size]]
            pixels = self.preprocess.stack(prepared).to(self.device)
            pixels = self.preprocess.normalise(pixels).to(self.dtype)
            rows.append(self.image_features(pixels).float().cpu())
        return torch.cat(rows)

    def modules(self) -> Iterable[nn.Module]:
        return [*self.towers(), *self.heads()]

    def to(self, device: DeviceLike = None, dtype: DtypeLike = None) -> Scorer:
        """Move the networks, and forget what they made of earlier prompts.

        Arguments as `Scorer.to`.

        Raises:
            ConfigError: half-precision towers cannot become wider, for the lost digits
                do not come back.
        """
        if dtype is not None and self.dtype.itemsize < 4 and read_dtype(dtype) != self.dtype:
            held = str(self.dtype).removeprefix("torch.")
            raise ConfigError(
                "dtype",
                f"{self.name} was rounded to {held} and cannot be widened; "
                "load it again with that dtype",
            )
        super().to(device, dtype)
        if dtype is not None:
            for tower in self.towers():
                tower.to(self.dtype)
            for head in self.heads():
                head.to(torch.promote_types(self.dtype, torch.float32))
        self.forget_prompts()
        return self
