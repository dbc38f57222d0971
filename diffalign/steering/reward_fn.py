"""Score particles with any scorer or function of images."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, UserError
from ..runtime.missing import PipelineImage, present
from ..runtime.protocols import Numbers


class Rewarder:
    """Scores the images of particles, in batches.

    Args:
        scorer: a `Scorer`, its name in the registry, or a function (images, prompts) ->
            (n,). Scores of which lower is better are negated.
        intermediate (*optional*): function (x0hat latents, prompts) -> (n,).
        batch_size (`int`, *optional*): images per call of a plain function, and per
            forward pass of a `Scorer`. None is all of them, or the scorer's own.

    Attributes:
        calls, images (`int`): calls of the scorer, and images it saw.
        seconds (`float`): time spent in it.

    Raises:
        ConfigError: `scorer` or `intermediate` is none of these.
    """

    def __init__(
        self,
        scorer: str | Callable[..., Numbers],
        intermediate: Callable[[Tensor, list[str]], Numbers] | None = None,
        batch_size: int | None = None,
    ) -> None:
        if isinstance(scorer, str):
            from ..rewards.registry import load_scorer

            scorer = load_scorer(scorer)
        if not callable(scorer):
            raise ConfigError(
                "scorer",
                "expected a scorer, its name or a function (images, prompts) -> numbers, got "
                f"{type(scorer).__name__}",
            )
        if intermediate is not None and not callable(intermediate):
            raise ConfigError(
                "intermediate_reward",
                "expected a function (latents, prompts) -> numbers, got "
                f"{type(intermediate).__name__}",
            )
        self.scorer, self.intermediate, self.batch_size = scorer, intermediate, batch_size
        self.prompts: list[str] = []
        self.metadata: list[Mapping[str, Any]] | None = None
        self.k = 1
        self.calls = self.images = 0
        self.seconds = 0.0

    def start(
        self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None, k: int
    ) -> Rewarder:
        """Make a rewarder for one call.

        Args:
            prompts (sequence of `str`): P of them.
            metadata (*optional*): one mapping per prompt.
            k (`int`): particles per prompt.

        Returns:
            `Rewarder`: with the same scorer, and counters at zero.
        """
        from ..rewards.base import Scorer

        fresh = Rewarder(self.scorer, self.intermediate, self.batch_size)
        fresh.prompts = [prompt for prompt in prompts for _ in range(k)]
        fresh.metadata = None if metadata is None else [row for row in metadata for _ in range(k)]
        fresh.k = k
        if isinstance(self.scorer, Scorer):
            self.scorer.forget_prompts()  # rounding must not depend on earlier calls
        return fresh

    def of_latents(self, x0: Tensor) -> Tensor:
        """Score clean predictions with `intermediate`.

        Args:
            x0 (`Tensor`): (P * k, ...).

        Returns:
            `Tensor`: float64 (P, k).

        Raises:
            UserError: the function gave another number of rewards, or none at all.
        """
        assert self.intermediate is not None
        started = time.perf_counter()
        values = self._read(
            self.intermediate(x0, list(self.prompts)), len(self.prompts), "intermediate_reward"
        )
        self.seconds += time.perf_counter() - started
        self.calls += 1
        return values.unflatten(0, (-1, self.k))

    def of_images(self, images: Sequence[PipelineImage]) -> Tensor:
        """Score images, prompt after prompt.

        Args:
            images (sequence): P * k PIL images, or float arrays or tensors as pipelines
                return them for ``np`` and ``pt``, which the scorer sees as PIL images.
                The reward of a `diffalign.runtime.missing.Missing` is NaN.

        Returns:
            `Tensor`: float64 (P, k).

        Raises:
            UserError: the scorer gave another number of rewards, or none at all.
        """
        started = time.perf_counter()
        places = present(images)
        values = torch.full((len(images),), float("nan"), dtype=torch.float64)
        if places:
            values[places] = self._of_present(_as_pil([images[i] for i in places]), places)
        self.images += len(places)
        self.seconds += time.perf_counter() - started
        return values.unflatten(0, (-1, self.k))

    def _of_present(self, images: Sequence[PipelineImage], places: list[int]) -> Tensor:
        """Score the images at these places, (n,)."""
        from ..rewards.base import Scorer

        texts = [self.prompts[i] for i in places]
        facts = None if self.metadata is None else [self.metadata[i] for i in places]
        if isinstance(self.scorer, Scorer):
            needs = self.scorer.spec.requires
            size: dict[str, Any] = (
                {} if self.batch_size is None else {"batch_size": self.batch_size}
            )
            inputs = (texts if "prompt" in needs else None, facts if "metadata" in needs else None)
            values = self._read(self.scorer(list(images), *inputs, **size), len(images), "scorer")
            self.calls += 1
            return values if self.scorer.spec.higher_is_better else -values
        parts = []
        size_ = self.batch_size or len(images)
        for start in range(0, len(images), size_):
            chosen = slice(start, start + size_)
            extra = () if facts is None else (facts[chosen],)
            part = list(images[chosen])
            parts.append(self._read(self.scorer(part, texts[chosen], *extra), len(part), "scorer"))
            self.calls += 1
        return torch.cat(parts)

    @staticmethod
    def _read(values: object, expected: int, who: str) -> Tensor:
        try:
            rewards = torch.as_tensor(values).detach().to("cpu", torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise UserError(
                f"{who}: expected {expected} numbers, got {type(values).__name__}"
            ) from None
        if rewards.ndim == 2 and rewards.shape[1] == 1:
            rewards = rewards[:, 0]
        if rewards.shape != (expected,):
            raise UserError(
                f"{who}: expected {expected} numbers for {expected} images, got shape "
                f"{tuple(rewards.shape)}"
            )
        return rewards


def _as_pil(images: Sequence[Any]) -> Sequence[PipelineImage]:
    """Convert float images of a pipeline's ``np`` or ``pt`` output to PIL images.

    Arrays are (h, w, c), tensors are (c, h, w). Anything else is returned as it is.
    """
    from diffusers.image_processor import VaeImageProcessor

    first = images[0]
    if isinstance(first, Tensor) and first.ndim == 3 and first.is_floating_point():
        return VaeImageProcessor.numpy_to_pil(
            VaeImageProcessor.pt_to_numpy(torch.stack(list(images)).float())
        )
    if isinstance(first, np.ndarray) and first.ndim == 3 and first.dtype.kind == "f":
        return VaeImageProcessor.numpy_to_pil(np.stack(images))
    return images
