"""Discrete diffusion over tokens as particle models: masked and uniform.

Masked diffusion is MDLM (Sahoo et al. 2024, arXiv 2406.07524), with its
substitution parametrisation: the mask is never predicted and revealed tokens are
frozen. A step from t to s reveals each masked position with probability (t - s) / t.
Uniform diffusion is D3PM (Austin et al. 2021, arXiv 2107.03006) through diffusers'
`DiscreteDDIMScheduler`.

The clean prediction is sampled, n draws per particle. Its mode is a poor estimate while
most tokens are masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, UserError
from .resampling import Generators
from .streams import side_stream

Denoiser = Callable[[Tensor], Any]


@dataclass
class TokenState:
    """Particles of text.

    Attributes:
        tokens (`Tensor`): int64 (groups, k, length).
        prediction (`Tensor`, *optional*): float64 (groups, k, length, vocabulary): log
            p(x0 | x_t) per position (masked) or logits (uniform). None before the
            network was run on these tokens.
    """

    tokens: Tensor
    prediction: Tensor | None = None

    def index(self, ancestors: Tensor) -> TokenState:
        """Take the particles ``ancestors`` (groups, k)."""
        rows = torch.arange(len(ancestors))[:, None]
        return TokenState(
            self.tokens[rows, ancestors],
            None if self.prediction is None else self.prediction[rows, ancestors],
        )


class TokenModel:
    """Runs the network and draws clean tokens, for masked and uniform diffusion.

    Args:
        denoiser: tokens (n, length) int64 -> logits (n, length, vocabulary), or an
            object with ``.logits``, or a tuple that starts with them.
        length (`int`): tokens of a text.
        num_steps (`int`): of the sampler.
        temperature (`float`, *optional*, defaults to `1.0`): of the logits, above 0. 1
            is the model's distribution.
        num_x0_samples (`int`, *optional*, defaults to `1`): draws of the clean text
            that a particle is scored by.
        batch_size (`int`, *optional*): rows per call of the network. None is all.

    Attributes:
        network_rows (`int`): rows that the network was run on.

    Raises:
        ConfigError: a number out of range.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        length: int,
        num_steps: int,
        temperature: float = 1.0,
        num_x0_samples: int = 1,
        batch_size: int | None = None,
    ) -> None:
        for name, value in (
            ("length", length),
            ("num_steps", num_steps),
            ("num_x0_samples", num_x0_samples),
            ("batch_size", batch_size or 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(name, f"expected int >= 1, got {value!r}")
        if not 0 < temperature < math.inf:
            raise ConfigError(
                "temperature",
                f"expected a number above 0, got {temperature!r}; at 0 all particles would be the "
                "same text",
            )
        self.denoiser, self.length, self.num_steps = denoiser, length, num_steps
        self.temperature, self.num_x0_samples, self.batch_size = (
            float(temperature),
            num_x0_samples,
            batch_size,
        )
        self.network_rows = 0
        self._x0_stream: Generators = None

    def logits(self, tokens: Tensor) -> Tensor:
        """Run the network.

        Args:
            tokens (`Tensor`): int64 (groups, k, length).

        Returns:
            `Tensor`: logits, float64 (groups, k, length, vocabulary) on the CPU.

        Raises:
            UserError: it returned something else.
        """
        flat = tokens.flatten(0, 1)
        size = self.batch_size or len(flat)
        if isinstance(self.denoiser, torch.nn.Module):
            flat = flat.to(next(self.denoiser.parameters()).device)
        parts = []
        with torch.no_grad():
            for start in range(0, len(flat), size):
                out = self.denoiser(flat[start : start + size])
                chunk: Any = getattr(out, "logits", out)
                chunk = chunk[0] if isinstance(chunk, tuple) else chunk
                parts.append(chunk.detach().to("cpu", torch.float64))
        self.network_rows += len(flat)
        logits = torch.cat(parts)
        if logits.ndim != 3 or logits.shape[:2] != flat.shape:
            raise UserError(
                f"denoiser: expected logits {(*flat.shape, 'vocabulary')}, got shape "
                f"{tuple(logits.shape)}"
            )
        return logits.unflatten(0, tokens.shape[:2])

    def start_x0_stream(self, generator: Generators) -> None:
        """Give draws of clean texts a stream of their own.

        Args:
            generator (`torch.Generator` or one per group, *optional*): the sampler's.
        """
        self._x0_stream = side_stream(generator, "x0")

    def draw_x0(self, probabilities: Tensor) -> Tensor:
        """Draw clean texts, each position independently.

        Args:
            probabilities (`Tensor`): (groups, k, length, vocabulary).

        Returns:
            `Tensor`: int64 (groups, k, num_x0_samples, length).
        """
        groups, k, length, _ = probabilities.shape
        noise = uniforms((groups, k, self.num_x0_samples, length), self._x0_stream)
        return categorical(
            probabilities[:, :, None].expand(-1, -1, self.num_x0_samples, -1, -1), noise
        )

    def index(self, state: TokenState, ancestors: Tensor) -> TokenState:
        """Reorder the particles."""
        return state.index(ancestors)

    def final(self, state: TokenState) -> Tensor:
        """Return the texts, (groups, k, length), which the terminal reward scores."""
        return state.tokens


class MaskedDiffusion(TokenModel):
    """Ancestral sampling of a masked diffusion model.

    Args:
        denoiser, length, num_steps, temperature, num_x0_samples, batch_size: see
            `TokenModel`.
        mask_token_id (`int`): the mask. Its logit is ignored.
        template (`Tensor`, *optional*): fixed tokens, (length,) or (groups, length),
            with `mask_token_id` where the text is free.
        guidance (*optional*): function (tokens (n, length), log_probs
            (n, length, vocabulary), step) -> extra logits (n, length, vocabulary).
            Tokens are drawn from the tilted probabilities. The ratio goes into the
            weights, so that the target stays the same.

    Raises:
        ConfigError: a number out of range, or a template of the wrong length.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        mask_token_id: int,
        length: int,
        num_steps: int,
        template: Tensor | None = None,
        guidance: Callable[[Tensor, Tensor, int], Tensor] | None = None,
        temperature: float = 1.0,
        num_x0_samples: int = 1,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(
            denoiser,
            length=length,
            num_steps=num_steps,
            temperature=temperature,
            num_x0_samples=num_x0_samples,
            batch_size=batch_size,
        )
        if template is not None and template.shape[-1] != length:
            raise ConfigError("template", f"expected {length} tokens, got {template.shape[-1]}")
        self.mask_token_id, self.template, self.guidance = mask_token_id, template, guidance

    def init(self, groups: int, num_particles: int, generator: Generators) -> TokenState:
        """Return masked texts, with the tokens of the template.

        Args:
            groups, num_particles (`int`): sizes.
            generator (`torch.Generator` or one per group, *optional*): of the sampler.

        Raises:
            ConfigError: a template for another number of groups.
        """
        self.start_x0_stream(generator)
        template = (
            torch.full((self.length,), self.mask_token_id)
            if self.template is None
            else self.template.long().cpu()
        )
        if template.ndim == 2 and len(template) != groups:
            raise ConfigError(
                "template", f"expected one, or one per group ({groups}), got {len(template)}"
            )
        template = template if template.ndim == 2 else template.expand(groups, -1)
        return TokenState(template[:, None].repeat(1, num_particles, 1))

    def prepare(self, state: TokenState, i: int) -> TokenState:
        """Run the network once, for scoring and for the step.

        The prediction is copied with the particle.
        """
        logits = self.logits(state.tokens) / self.temperature
        if self.mask_token_id < logits.shape[-1]:
            logits[..., self.mask_token_id] = -math.inf
        return TokenState(state.tokens, logits.log_softmax(-1))

    def predict_x0(self, state: TokenState, i: int) -> Tensor:
        """Draw whole texts, with revealed tokens as they are.

        Returns:
            `Tensor`: int64 (groups, k, num_x0_samples, length).
        """
        assert state.prediction is not None
        drawn = self.draw_x0(state.prediction.exp())
        now = state.tokens[:, :, None].expand_as(drawn)
        return torch.where(now == self.mask_token_id, drawn, now)

    def propose(
        self, state: TokenState, i: int, generator: Generators
    ) -> TokenState | tuple[TokenState, Tensor]:
        """Reveal masked positions.

        Returns:
            `TokenState`, with the log ratio (groups, k) of the proposal under guidance.
        """
        assert state.prediction is not None
        shape = tuple(state.tokens.shape)
        noise = uniforms((shape[0], shape[1], 2, shape[2]), generator)
        # (t - s) / t with t = 1 - i / N: the last step reveals everything, whatever the
        # rounding.
        hidden = state.tokens == self.mask_token_id
        revealed = hidden & (
            (noise[:, :, 0] < 1 / (self.num_steps - i)) | (i == self.num_steps - 1)
        )
        log_tau = state.prediction
        if self.guidance is not None:
            extra = self.guidance(state.tokens.flatten(0, 1), state.prediction.flatten(0, 1), i)
            log_tau = (
                state.prediction + extra.to("cpu", torch.float64).unflatten(0, shape[:2])
            ).log_softmax(-1)
        drawn = categorical(log_tau.exp(), noise[:, :, 1])
        tokens = torch.where(revealed, drawn, state.tokens)
        if self.guidance is None:
            return TokenState(tokens)
        ratio = (state.prediction - log_tau).gather(-1, drawn[..., None])[..., 0]
        return TokenState(tokens), torch.where(revealed, ratio, torch.zeros_like(ratio)).sum(-1)


class UniformDiffusion(TokenModel):
    """Diffusion with uniform corruption, through diffusers' `DiscreteDDIMScheduler`.

    Its corrector sweeps are included.

    Args:
        denoiser, length, num_steps, temperature, num_x0_samples, batch_size: see
            `TokenModel`.
        scheduler: a `DiscreteDDIMScheduler`.
        vocab_size (`int`): tokens to start from, uniformly.

    Raises:
        ConfigError: a number out of range, or another scheduler.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: Any,
        *,
        vocab_size: int,
        length: int,
        num_steps: int,
        temperature: float = 1.0,
        num_x0_samples: int = 1,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(
            denoiser,
            length=length,
            num_steps=num_steps,
            temperature=temperature,
            num_x0_samples=num_x0_samples,
            batch_size=batch_size,
        )
        if type(scheduler).__name__ != "DiscreteDDIMScheduler":
            raise ConfigError(
                "scheduler", f"expected a DiscreteDDIMScheduler, got {type(scheduler).__name__}"
            )
        if vocab_size < 2:
            raise ConfigError("vocab_size", f"expected int >= 2, got {vocab_size}")
        self.scheduler, self.vocab_size = scheduler, vocab_size
        scheduler.set_timesteps(num_steps)

    def init(self, groups: int, num_particles: int, generator: Generators) -> TokenState:
        """Draw uniform tokens, see `MaskedDiffusion.init`."""
        self.start_x0_stream(generator)
        noise = uniforms((groups, num_particles, self.length), generator)
        return TokenState((noise * self.vocab_size).long().clamp(max=self.vocab_size - 1))

    def prepare(self, state: TokenState, i: int) -> TokenState:
        """Run the network once, for scoring and for the step."""
        return TokenState(state.tokens, self.logits(state.tokens))

    def predict_x0(self, state: TokenState, i: int) -> Tensor:
        """Draw whole texts from p(x0 | x_t), see `MaskedDiffusion.predict_x0`."""
        assert state.prediction is not None
        return self.draw_x0((state.prediction / self.temperature).softmax(-1))

    def propose(self, state: TokenState, i: int, generator: Generators) -> TokenState:
        """Take one step of the scheduler, and its corrector sweeps."""
        assert state.prediction is not None
        tokens = self._per_group(self._step, generator, state.prediction, state.tokens, i)
        for _ in range(self.scheduler.config.corrector_steps if i < self.num_steps - 1 else 0):
            tokens = self._per_group(self._correct, generator, self.logits(tokens), tokens, i)
        return TokenState(tokens)

    def _step(
        self, logits: Tensor, i: int, tokens: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        return self.scheduler.step(
            logits, i, tokens, temperature=self.temperature, generator=generator
        ).prev_sample

    def _correct(
        self, logits: Tensor, i: int, tokens: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        return self.scheduler.step_correct(
            logits / self.temperature, i, tokens, generator=generator
        ).prev_sample

    @staticmethod
    def _per_group(
        action: Callable[..., Tensor], generator: Generators, logits: Tensor, tokens: Tensor, i: int
    ) -> Tensor:
        if generator is None or isinstance(generator, torch.Generator):
            return action(logits.flatten(0, 1), i, tokens.flatten(0, 1), generator).unflatten(
                0, tokens.shape[:2]
            )
        return torch.stack(
            [action(logits[g], i, tokens[g], one) for g, one in enumerate(generator)]
        )


def categorical(probabilities: Tensor, noise: Tensor) -> Tensor:
    """Draw tokens by inversion, in float64. Tokens of probability zero are never drawn.

    Args:
        probabilities (`Tensor`): (..., vocabulary).
        noise (`Tensor`): uniform numbers in [0, 1), (...).

    Returns:
        `Tensor`: int64 (...).
    """
    cumulated = probabilities.cumsum(-1)
    cumulated = cumulated / cumulated[..., -1:]
    tokens = torch.searchsorted(cumulated.contiguous(), noise[..., None].contiguous(), right=True)[
        ..., 0
    ]
    alive = probabilities > 0
    last = probabilities.shape[-1] - 1 - alive.flip(-1).to(torch.int8).argmax(-1)
    return torch.minimum(tokens, last)


def uniforms(shape: tuple[int, ...], generator: Generators) -> Tensor:
    """Draw uniform numbers in float64.

    Args:
        shape (`tuple[int, ...]`): of the result.
        generator (`torch.Generator` or one per group, *optional*): one per group stands
            for the first dimension.

    Returns:
        `Tensor`: in [0, 1).
    """
    if generator is None or isinstance(generator, torch.Generator):
        return torch.rand(shape, dtype=torch.float64, generator=generator)
    return torch.stack(
        [torch.rand(shape[1:], dtype=torch.float64, generator=one) for one in generator]
    )
