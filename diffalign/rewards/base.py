"""`Scorer`, the base class of all scorers: what its number is, and how to compute it.

A scorer has two modes. `score` reads 8-bit images exactly as the published code does,
without gradients. `score_tensor` is differentiable with respect to float pixels. The
two differ slightly and are never mixed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError, UserError
from ..runtime.devices import read_device, read_dtype
from ..runtime.hashing import text_hash
from ..runtime.protocols import DeviceLike, DtypeLike
from .cache import ScoreCache
from .images import Images
from .scoring import BatchScores, Item, ScoreResult, score
from .spec import ScorerSpec


class Scorer:
    """Base class of all scorers. A new one sets `spec` and writes `score_batch`.

    Args:
        device (`str` or `torch.device`, *optional*): where it runs. Defaults to the GPU
            when there is one.
        dtype (`torch.dtype` or its name, *optional*): of the towers. Defaults to
            float32, the reference. Heads, normalisation and dot products stay in
            float32.
        batch_size (`int`, *optional*): images per forward pass. Defaults to 16, and to
            8 on a CPU.
        cache (`ScoreCache` or path, *optional*): scores are looked up there first and
            written there. Defaults to none.

    Attributes:
        spec (`ScorerSpec`): the card: what the number means, what a call must give.
        deterministic (`bool`): the same input always gives the same score. Only then
            are scores kept in the cache.
        largest_batch (`int` or None): the micro-batch that last fitted into memory,
            None as long as every one did.

    Raises:
        ConfigError: an unknown device or dtype, or a `batch_size` below 1.

    Example:
        ```python
        class Brightness(Scorer):
            spec = ScorerSpec("brightness", "mean pixel", requires=("image",))

            def score_batch(self, items):
                return [numpy.asarray(item.image).mean() for item in items]


        assert Brightness()([Image.new("RGB", (8, 8), "white")]).item() == 255
        ```
    """

    spec: ClassVar[ScorerSpec]
    deterministic: ClassVar[bool] = True

    def __init__(
        self,
        *,
        device: DeviceLike = None,
        dtype: DtypeLike = None,
        batch_size: int | None = None,
        cache: ScoreCache | str | Path | None = None,
    ) -> None:
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ConfigError("batch_size", f"expected int >= 1, got {batch_size!r}")
        self.device = read_device(device)
        self.dtype = read_dtype(dtype)
        self.batch_size = batch_size
        self.cache = ScoreCache(cache) if isinstance(cache, (str, Path)) else cache
        self.largest_batch: int | None = None
        self._fingerprint: tuple[torch.dtype, str] | None = None

    # What a scorer writes

    def score_batch(self, items: list[Item]) -> BatchScores:
        """Score one micro-batch.

        Args:
            items (list of `Item`): n images with their prompts and metadata.

        Returns:
            n numbers, None or NaN where a score is missing. Optionally a second value:
            index -> one sentence why it is missing.
        """
        raise NotImplementedError(f"{type(self).__name__} must write score_batch")

    def identity(self) -> dict[str, Any]:
        """Return what else changes the numbers: hash of the weights, options.

        The fingerprint is made of it and of the card.
        """
        return {}

    @classmethod
    def spec_for(cls, options: Mapping[str, Any]) -> ScorerSpec:
        """Return the card of a scorer built with these options.

        Args:
            options (`Mapping[str, Any]`): Keyword arguments of the class.
        """
        return cls.spec

    def modules(self) -> Iterable[nn.Module]:
        """Return the networks, for `to` and `close`."""
        return ()

    # What a scorer may write to work ahead

    def prepare_prompts(self, prompts: Sequence[str], batch_size: int) -> None:
        """Get ready for all prompts of a call, before its first batch.

        Args:
            prompts (list of `str`): one per item, with repetitions.
            batch_size (`int`): items per micro-batch.
        """

    def prepare_item(self, item: Item) -> object:
        """Do an item's work on the CPU. It runs in a thread, one batch ahead on a GPU.

        Returns:
            what `score_batch` finds as `item.prepared`. Here the decoded image.

        Raises:
            UnreadableImage: the image cannot be used.
        """
        return item.image

    def forget_prompts(self) -> None:
        """Drop what is remembered of earlier prompts.

        The last digits of a score may depend on the batch in which its prompt was
        encoded. Forget the prompts where a result must not depend on earlier calls.
        """

    # What users call

    @property
    def name(self) -> str:
        """The key of its card."""
        return self.spec.key

    @property
    def differentiable(self) -> bool:
        """Whether `score_tensor` works."""
        return self.spec.differentiable

    def __call__(
        self,
        images: Images,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        *,
        batch_size: int | None = None,
    ) -> Tensor:
        """Return scores as a float32 tensor (n,) on the CPU, NaN where missing.

        Arguments and errors as `score`.
        """
        return self.score(images, prompts, metadata, batch_size=batch_size).values

    def score(
        self,
        images: Images,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        *,
        batch_size: int | None = None,
        on_error: str = "raise",
    ) -> ScoreResult:
        """Score images in the exact mode.

        Arguments and errors as `diffalign.rewards.scoring.score`.
        """
        return score(self, images, prompts, metadata, batch_size=batch_size, on_error=on_error)

    def score_tensor(self, pixels: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        """Score float pixels so that gradients flow back to them.

        Args:
            pixels (`Tensor`): (n, 3, h, w), floats in [0, 1].
            prompts (list of `str`, *optional*): one per image.

        Returns:
            `Tensor`: scores (n,) on the scorer's device.

        Raises:
            UserError: this scorer has no gradient, or the pixels are out of range or
                not finite.
        """
        raise UserError(
            f"{self.name}: has no gradient; "
            "call scorer(images, prompts), or take a differentiable scorer"
        )

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change whenever a score could.

        They stand for definition, weights, preprocessing, precision and options.
        """
        if self._fingerprint is None or self._fingerprint[0] != self.dtype:
            facts = {
                "key": self.spec.key,
                "version": self.spec.version,
                "preprocess": self.spec.preprocess,
                "text": self.spec.text,
                "dtype": str(self.dtype),
                **self.identity(),
            }
            text = json.dumps(facts, sort_keys=True, default=str)
            digest = text_hash(text)[:16]
            self._fingerprint = (self.dtype, digest)
        return self._fingerprint[1]

    def to(self, device: DeviceLike = None, dtype: DtypeLike = None) -> Scorer:
        """Move the networks.

        Args:
            device (`str` or `torch.device`, *optional*): defaults to where they are.
            dtype (`torch.dtype` or its name, *optional*): defaults to what they have.

        Returns:
            `Scorer`: itself.
        """
        self.device = read_device(device) if device is not None else self.device
        self.dtype = read_dtype(dtype) if dtype is not None else self.dtype
        for module in self.modules():
            module.to(self.device)
        self.largest_batch = None
        return self

    def offload(self) -> Scorer:
        """Move the weights to the CPU and free the device's memory."""
        device = self.device
        self.to("cpu")
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return self

    def close(self) -> None:
        """Free the weights. The scorer cannot score afterwards."""
        for module in self.modules():
            module.to("meta")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
