"""Steer diffusion language models with rewards on decoded text.

The particle core is that of images. The models themselves, `MaskedDiffusion` and
`UniformDiffusion`, can also be given to `diffalign.steering.smc.run` directly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, UserError
from ..runtime.protocols import Numbers, Tokenizer
from ..runtime.seeds import stream
from .resampling import Generators, resample
from .schedule import check_schedule
from .smc import SMCResult, check_options, run
from .tokens import Denoiser, MaskedDiffusion, TokenModel, TokenState, UniformDiffusion

__all__ = [
    "FKTextSteering",
    "MaskedDiffusion",
    "TextReward",
    "TextSteeringResult",
    "TokenModel",
    "TokenState",
    "UniformDiffusion",
]


class TextReward:
    """A reward on decoded text, for the particle core.

    Each distinct text is scored once per call.

    Args:
        decode: list of token lists -> list of texts, such as ``tokenizer.batch_decode``
            without special tokens.
        scorer: list of texts -> as many numbers. Higher is better.

    Attributes:
        calls, scored (`int`): calls of the scorer, and texts it saw.
    """

    def __init__(
        self,
        decode: Callable[[list[list[int]]], Sequence[str]],
        scorer: Callable[[list[str]], Numbers],
    ) -> None:
        self.decode, self.scorer = decode, scorer
        self.calls = self.scored = 0

    def texts(self, tokens: Tensor) -> list[str]:
        """Decode (n, length) tokens to texts.

        A row of special tokens alone decodes to the empty text.
        """
        return [" ".join(text.split()) for text in self.decode(tokens.tolist())]

    def __call__(self, tokens: Tensor) -> Tensor:
        """Score texts.

        Args:
            tokens (`Tensor`): (..., length).

        Returns:
            `Tensor`: float64, in the shape of `tokens` without its last dimension.

        Raises:
            UserError: the scorer gave another number of rewards.
        """
        texts = self.texts(tokens.flatten(0, -2))
        distinct = list(dict.fromkeys(texts))
        values = torch.as_tensor(self.scorer(distinct)).detach().to("cpu", torch.float64).flatten()
        if len(values) != len(distinct):
            raise UserError(
                f"scorer: expected {len(distinct)} numbers for {len(distinct)} texts, got "
                f"{len(values)}"
            )
        self.calls += 1
        self.scored += len(distinct)
        table = dict(zip(distinct, values.tolist(), strict=True))
        return torch.tensor([table[text] for text in texts], dtype=torch.float64).reshape(
            tokens.shape[:-1]
        )


@dataclass
class TextSteeringResult:
    """A weighted sample of texts for every prompt.

    Attributes:
        prompts (`list[str]`): P of them.
        texts (`list[list[str]]`): [prompt][particle].
        smc (`SMCResult`): weights, trace and ancestors.
    """

    prompts: list[str]
    texts: list[list[str]]
    smc: SMCResult

    @property
    def rewards(self) -> Tensor:
        """Rewards of the texts, float64 (P, K)."""
        return self.smc.rewards

    @property
    def log_weights(self) -> Tensor:
        """Normalised log weights, (P, K)."""
        return self.smc.log_weights

    @property
    def log_z(self) -> Tensor:
        """Estimate of log E[exp(lmbda r)], (P,)."""
        return self.smc.log_z

    @property
    def best(self) -> list[str]:
        """The text of highest reward of each prompt."""
        top = self.rewards.nan_to_num(nan=-math.inf, neginf=-math.inf).argmax(1)
        return [row[int(k)] for row, k in zip(self.texts, top, strict=True)]

    def draw(self, generator: Generators = None) -> list[str]:
        """Draw one text per prompt by its weight.

        Args:
            generator (`torch.Generator` or one per prompt, *optional*): None is torch's
                global one.

        Returns:
            `list[str]`: one text per prompt.
        """
        chosen = resample(self.smc.weights, "multinomial", generator=generator)[:, 0]
        return [row[int(k)] for row, k in zip(self.texts, chosen, strict=True)]


class FKTextSteering:
    """Steers a masked diffusion language model towards a reward on text.

    Args:
        denoiser (*optional*): tokens (n, length) -> logits, see `TokenModel`. None
            takes the embedded one of the shapes world's captions.
        tokenizer (*optional*): of transformers. None takes the embedded one.
        scorer: list of texts -> as many numbers. Higher is better. Texts are prompt and
            continuation, without special tokens.
        num_particles (`int`, *optional*, defaults to `4`): K per prompt.
        num_steps (`int`, *optional*, defaults to `16`): of the sampler.
        length (`int`, *optional*): tokens of a text. None is the tokenizer's
            ``model_max_length``.
        mask_token_id (`int`, *optional*): None is the tokenizer's, or the first id
            after its vocabulary.
        num_x0_samples (`int`, *optional*, defaults to `4`): draws of the clean text per
            scored particle.
        temperature, guidance, batch_size: see `MaskedDiffusion`.
        steering: `lmbda`, `ess_target`, `potential`, `resample_steps`, `scheme`,
            `ess_threshold`, `adaptive_tempering`, `temperatures`, as in `FKSteering`;
            and `aggregate` and `resample_generator` of `diffalign.steering.smc.run`.

    Raises:
        ConfigError: an option out of range.

    Example:
        ```python
        from diffalign.steering.text import FKTextSteering

        def mentions_a_star(texts: list[str]) -> list[float]:
            return [float("star" in text) for text in texts]

        steering = FKTextSteering(None, None, mentions_a_star, lmbda=5.0)
        texts = steering("a large blue", seed=0).texts[0]
        ```
    """

    def __init__(
        self,
        denoiser: Denoiser | None,
        tokenizer: Tokenizer | None,
        scorer: Callable[[list[str]], Numbers],
        *,
        num_particles: int = 4,
        num_steps: int = 16,
        length: int | None = None,
        mask_token_id: int | None = None,
        num_x0_samples: int = 4,
        temperature: float = 1.0,
        guidance: Callable[[Tensor, Tensor, int], Tensor] | None = None,
        batch_size: int | None = None,
        **steering: Any,
    ) -> None:
        if denoiser is None or tokenizer is None:
            if denoiser is not None or tokenizer is not None:
                raise ConfigError(
                    "tokenizer", "give denoiser and tokenizer, or None for both (the embedded ones)"
                )
            from ..shapes.text_denoiser import load_text_denoiser

            denoiser, tokenizer = load_text_denoiser()
        schedule = steering.get("resample_steps")
        check_options(
            num_particles=num_particles,
            **{
                k: v
                for k, v in steering.items()
                if k not in ("resample_steps", "aggregate", "resample_generator")
            },
        )
        check_schedule(schedule)
        if num_particles == 1 and schedule:
            raise ConfigError(
                "num_particles",
                "1 particle cannot be resampled; give at least 2, or leave out resample_steps",
            )
        if not callable(scorer):
            raise ConfigError(
                "scorer", f"expected a function of a list of texts, got {type(scorer).__name__}"
            )
        known = tokenizer.mask_token_id if mask_token_id is None else mask_token_id
        self.mask_token_id = len(tokenizer) if known is None else int(known)
        self.length = length or int(tokenizer.model_max_length)
        self.denoiser, self.tokenizer, self.scorer = denoiser, tokenizer, scorer
        self.num_particles, self.steering = num_particles, steering
        self.options: dict[str, Any] = {
            "num_steps": num_steps,
            "num_x0_samples": num_x0_samples,
            "temperature": temperature,
            "guidance": guidance,
            "batch_size": batch_size,
        }
        self._model(None)  # mistakes show here

    def _model(self, template: Tensor | None) -> MaskedDiffusion:
        return MaskedDiffusion(
            self.denoiser,
            mask_token_id=self.mask_token_id,
            length=self.length,
            template=template,
            **self.options,
        )

    def __call__(
        self, prompts: str | Sequence[str] = "", *, seed: int | Sequence[int] = 0
    ) -> TextSteeringResult:
        """Draw and steer K texts for every prompt.

        Args:
            prompts (`str` or sequence, *optional*, defaults to `""`): beginnings of
                texts, which stay as they are. The empty one leaves everything free.
            seed (`int` or sequence, *optional*, defaults to `0`): one per prompt. With
                one number, prompt i takes ``seed + i``. The noise of a prompt does not
                depend on the others, but rounding that depends on the batch may change
                a token.

        Returns:
            `TextSteeringResult`: texts and weights of every prompt.

        Raises:
            ConfigError: no prompt, or another number of seeds.
            UserError: a prompt as long as the text, or rewards that do not fit.
        """
        beginnings = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = (
            [seed + i for i in range(len(beginnings))]
            if isinstance(seed, int)
            else [int(s) for s in seed]
        )
        if not beginnings or len(seeds) != len(beginnings):
            raise ConfigError(
                "prompts",
                f"expected at least one, and as many seeds ({len(seeds)}), got {len(beginnings)}",
            )
        template = torch.full((len(beginnings), self.length), self.mask_token_id)
        for row, text in zip(template, beginnings, strict=True):
            ids = self._prefix(text)
            if len(ids) >= self.length:
                raise UserError(
                    f"prompts: {text!r:.60} has {len(ids)} tokens, the whole text only "
                    f"{self.length}; shorten it"
                )
            row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
        reward = TextReward(
            lambda tokens: self.tokenizer.batch_decode(tokens, skip_special_tokens=True),
            self.scorer,
        )
        result = run(
            self._model(template),
            reward,
            groups=len(beginnings),
            num_particles=self.num_particles,
            generator=[stream(s, "noise") for s in seeds],
            **self.steering,
        )
        texts = reward.texts(result.particles.flatten(0, 1))
        k = self.num_particles
        return TextSteeringResult(
            beginnings, [texts[p * k : (p + 1) * k] for p in range(len(beginnings))], result
        )

    def _prefix(self, text: str) -> list[int]:
        """Return the token ids of the fixed beginning, without an end token.

        The start token comes first, where the tokenizer has one.
        """
        if not text.strip():
            return []
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        start = (
            self.tokenizer.bos_token_id
            if self.tokenizer.bos_token_id is not None
            else self.tokenizer.cls_token_id
        )
        return ids if start is None else [start, *ids]
