"""Wrap a scorer in the shapes in which other trainers call a reward."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .base import Scorer
from .images import Images

P = ParamSpec("P")
R = TypeVar("R")


def as_ddpo(scorer: Scorer) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """Wrap a scorer as the reward of DDPO and its descendants.

    These are TRL's DDPO, d3po and flow_grpo.

    The reward is called as ``fn(images, prompts, metadata) -> (scores, info)``. Images
    are floats in [0, 1] or uint8 (n, 3, h, w), or uint8 (n, h, w, 3), as a tensor or an
    array, or a list as `Scorer.score` takes it. `metadata` is one mapping per image, or
    anything empty. Errors as `Scorer.score`.

    Args:
        scorer (`Scorer`): to be wrapped.

    Returns:
        a function of that form. `scores` is float32 (n,) on the CPU, NaN where a score
        is missing. `info` is ``{"errors": {index: sentence}}``.

    Example:
        ```python
        reward = as_ddpo(load_scorer("jpeg_compressibility"))
        scores, info = reward(torch.rand(2, 3, 64, 64), ["a cat", "a dog"], [{}, {}])
        assert scores.shape == (2,) and info == {"errors": {}}
        ```
    """

    def reward(
        images: Images,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        result = scorer.score(
            _channels_first(images),
            _texts(prompts),
            list(metadata) if metadata is not None and len(metadata) > 0 else None,
        )
        return result.values, {"errors": result.errors}

    return _named(reward, scorer)


def as_trl(
    scorer: Scorer, image_column: str = "image", prompt_column: str = "prompt"
) -> Callable[..., list[float | None]]:
    """Wrap a scorer as a reward function of TRL's GRPO.

    The function is called with keywords and returns one float per completion, None
    where a score is missing. A scorer that requires metadata gets the column
    ``metadata`` where there is one, else the other columns, row by row. Unreadable
    images give None. Every other error is that of `Scorer.score`.

    Args:
        scorer (`Scorer`): to be wrapped.
        image_column (`str`, *optional*, defaults to "image"): where the images are: a
            column of the dataset, or ``completions`` when images are generated.
        prompt_column (`str`, *optional*, defaults to "prompt"): where the prompts are.
            ``prompt`` is what TRL passes as `prompts`. Of a conversation the text of
            the last user message is taken.

    Example:
        ```python
        reward = as_trl(load_scorer("jpeg_compressibility"))
        scores = reward(prompts=["a cat"], image=[Image.new("RGB", (64, 64))])
        assert len(scores) == 1
        ```
    """

    def reward(prompts: Any = None, completions: Any = None, **columns: Any) -> list[float | None]:
        batch = {"prompt": prompts, "prompts": prompts, "completions": completions, **columns}
        images = batch.get(image_column)
        if images is None:
            raise UserError(
                f"image_column: the batch has no column {image_column!r}; "
                f"it has {', '.join(_filled(batch))}"
            )
        texts = batch.get(prompt_column)
        if texts is None and "prompt" in scorer.spec.requires:
            raise UserError(
                f"prompt_column: the batch has no column {prompt_column!r}; "
                f"it has {', '.join(_filled(batch))}"
            )
        metadata = None
        if "metadata" in scorer.spec.requires:
            metadata = (
                columns["metadata"]
                if "metadata" in columns
                else _rows(columns, image_column, len(images))
            )
        values = scorer.score(
            _channels_first(images), _texts(texts), metadata, on_error="nan"
        ).values
        return [None if value != value else value for value in values.tolist()]

    return _named(reward, scorer)


@dataclass
class FlowFactoryOutput:
    """What Flow-Factory reads of a reward.

    Attributes:
        rewards: float32 (N,), NaN where a score is missing.
        extra_info: ``{"errors": {index: sentence}}``.
    """

    rewards: Tensor
    extra_info: dict[str, Any] = field(default_factory=dict)


class FlowFactoryReward:
    """A reward model of Flow-Factory around a scorer, made by `as_flow_factory`.

    Attributes:
        required_fields: what a call needs, e.g. ``("prompt", "image")``.
        use_tensor_inputs: False: images come as PIL images. Tensors (3, h, w) in [0, 1]
            are taken too.
    """

    use_tensor_inputs = False

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.required_fields = tuple(
            name for name in ("prompt", "image", "metadata") if name in scorer.spec.requires
        )

    def __call__(
        self, *, prompt: Any = None, image: Any = None, metadata: Any = None, **_: Any
    ) -> FlowFactoryOutput:
        """Score images. Errors as `Scorer.score`.

        What other rewards need (`video`, `condition_images`, ...) is ignored.
        """
        if image is None:
            raise UserError(f"image: {self.scorer.name} scores images; give one per prompt")
        rows = (
            None
            if metadata is None
            else [json.loads(row) if isinstance(row, str) else row for row in metadata]
        )
        result = self.scorer.score(_channels_first(image), _texts(prompt), rows)
        return FlowFactoryOutput(result.values, {"errors": result.errors})


def as_flow_factory(scorer: Scorer) -> FlowFactoryReward:
    """Wrap a scorer as a pointwise reward model of Flow-Factory.

    Args:
        scorer (`Scorer`): to be wrapped.

    Returns:
        `FlowFactoryReward`: called with the keywords ``prompt=, image=``, it returns an
            object with `rewards` and `extra_info`.

    Example:
        ```python
        reward = as_flow_factory(load_scorer("jpeg_compressibility"))
        output = reward(prompt=["a cat"], image=[Image.new("RGB", (64, 64))])
        assert output.rewards.shape == (1,)
        ```
    """
    return FlowFactoryReward(scorer)


def _named(function: Callable[P, R], scorer: Scorer) -> Callable[P, R]:
    """Name a reward after its scorer, as trainers log its function's name."""
    function.__name__ = function.__qualname__ = scorer.name
    return function


def _channels_first(images: Images) -> Images:
    """Bring images into a form that `Scorer.score` takes.

    A uint8 tensor (n, h, w, 3) becomes (n, 3, h, w), half-precision arrays become
    float32. Everything else stays as it is.
    """
    if isinstance(images, np.ndarray) and images.dtype == np.float16:
        images = images.astype(np.float32)
    if (
        isinstance(images, Tensor)
        and images.ndim == 4
        and images.dtype == torch.uint8
        and images.shape[1] != 3 == images.shape[-1]
    ):
        return images.permute(0, 3, 1, 2)
    return images


def _texts(prompts: Any) -> Any:
    """Return one text per row.

    A conversation becomes the text of its last user message.
    """
    if prompts is None or isinstance(prompts, str):
        return prompts
    return [
        _last_user_text(prompt) if isinstance(prompt, (list, tuple)) else prompt
        for prompt in prompts
    ]


def _last_user_text(messages: Sequence[Mapping[str, Any]]) -> Any:
    contents = [message.get("content") for message in messages if message.get("role") == "user"]
    content = contents[-1] if contents else None
    if isinstance(content, (list, tuple)):  # parts of a multimodal message
        content = " ".join(part["text"] for part in content if part.get("type") == "text")
    return content


def _rows(columns: Mapping[str, Any], image_column: str, count: int) -> list[dict[str, Any]]:
    """Return what the dataset's columns say of each row.

    What TRL adds for the whole batch is no column.
    """
    names = [
        n
        for n, v in columns.items()
        if n != image_column and isinstance(v, (list, tuple)) and len(v) == count
    ]
    return [{name: columns[name][i] for name in names} for i in range(count)]


def _filled(batch: Mapping[str, Any]) -> list[str]:
    return [name for name, value in batch.items() if value is not None]
