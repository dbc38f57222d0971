"""What the package uses of objects that others made, for type checkers.

The classes of diffusers and transformers differ from family to family. A protocol names
the few members that every family has and that we use. Where code asks an object what
else it has (`hasattr`, `getattr`), the parameter is `object`; where it then uses such a
member, it stays `Any`.

Nothing here is checked at run time, and importing this file loads no library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

DeviceLike: TypeAlias = "torch.device | str | None"
"""A device or its name. None and ``auto`` leave the choice to us."""

DtypeLike: TypeAlias = "torch.dtype | str | None"
"""A floating type or its name. None leaves the choice to us."""

Numbers: TypeAlias = "Sequence[float] | np.ndarray | Tensor"
"""One number per item, as a user's function returns them."""


class Scheduler(Protocol):
    """A scheduler of diffusers.

    What it knows of noise (`sigmas`, `alphas_cumprod`, `step_index`) differs from class
    to class and is not part of this.
    """

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take one step of the sampler. What it takes and returns is the class's."""

    @property
    def config(self) -> Mapping[str, Any]:
        """What it was made with."""

    @property
    def timesteps(self) -> Tensor:
        """The noise levels of a run, from `set_timesteps`."""

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Choose the noise levels of a run."""


class Pipeline(Protocol):
    """A text-to-image pipeline of diffusers.

    Its networks (`unet` or `transformer`, `vae`, text encoders) differ from family to
    family. Ask for them with `getattr`.

    Attributes:
        scheduler: a `Scheduler`, of which some code reads members of its class.
    """

    scheduler: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Draw. What it takes and returns is the family's."""

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Choose how its progress bar looks, or `disable` it."""


class LoraPipeline(Pipeline, Protocol):
    """A pipeline on which LoRAs can be switched."""

    def set_adapters(self, adapter_names: list[str], adapter_weights: list[Any]) -> None:
        """Switch these adapters on with these strengths, and all others off."""

    def enable_lora(self) -> None:
        """Let the adapters that are on take part."""


class GuidedPipeline(Pipeline, Protocol):
    """A pipeline that runs two branches of guidance in one batch."""

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """Turn texts into embeddings."""

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running call is guided."""


class Tokenizer(Protocol):
    """A tokenizer of transformers, as steering of text uses it."""

    @property
    def model_max_length(self) -> int:
        """Tokens of the longest text."""

    @property
    def mask_token_id(self) -> int | None:
        """The token that stands for an unknown one."""

    @property
    def bos_token_id(self) -> int | None:
        """The token at the beginning of a text."""

    @property
    def cls_token_id(self) -> int | None:
        """The first token of BERT's family."""

    def __len__(self) -> int:
        """Size of the vocabulary."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, Any]:
        """Split a text into tokens, of which ``input_ids`` are read."""

    def batch_decode(
        self, sequences: list[list[int]], *, skip_special_tokens: bool
    ) -> Sequence[str]:
        """Turn tokens back into texts."""
