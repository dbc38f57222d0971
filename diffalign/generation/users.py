"""Draw for a user with the adapter that PPD trained, and describe new users."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..backbones import load_backbone
from ..backbones.lora import denoiser
from ..backbones.user_adapter import UserAdapter, load_user_adapter
from ..errors import UserError
from ..likelihood import denoising_errors, sample_times
from ..rewards.users import ExamplePair, UserEmbedder, embed_users, load_user_embedder
from ..runtime.seeds import row_generator

if TYPE_CHECKING:
    from ..runtime.protocols import Pipeline

User: TypeAlias = "str | Mapping[str, float] | Tensor | None"
MOST_USERS, MOST_PAIRS = 128, 16
"""How many known users and pairs a new user is compared with at the most."""
DRAWS = 8
"""Noises and timesteps at which the pairs of a new user are measured."""


def user_weights(margins: Tensor) -> Tensor:
    """Compute how well each known user explains the pairs of a new one.

    The weights are the posterior of the Bradley-Terry model under a uniform prior:
    softmax over users of sum_pairs log sigmoid(z).

    Args:
        margins (`Tensor`): z of each pair under each user, (users, pairs).

    Returns:
        `Tensor`: (users,), which sum to 1.

    Example:
        ```python
        import torch

        weights = user_weights(torch.tensor([[2.0, 3.0], [-2.0, -3.0]]))
        assert weights[0] > 0.99
        ```
    """
    return logsigmoid(margins).sum(1).softmax(0)


class Users:
    """The users of a pipeline with a user adapter.

    Args:
        pipe (`DiffusionPipeline`): The pipeline, with the adapter's hooks.
        adapter (`UserAdapter`): The adapter.
        beta (`float`): Beta of the training, for `weights_of_pairs`.
        embeddings (`str`, *optional*, defaults to `"table"`): Where the embeddings of
            users come from, see `PPDConfig.user_embeddings`.
    """

    def __init__(
        self, pipe: Pipeline, adapter: UserAdapter, beta: float, embeddings: str = "table"
    ) -> None:
        self.pipe, self.adapter, self.beta = pipe, adapter, beta
        self.embeddings = embeddings
        self._embedder: UserEmbedder | None = None

    @property
    def names(self) -> list[str]:
        """Users with embeddings of their own."""
        return list(self.adapter.user_names)

    @contextmanager
    def apply(self, user: User, scale: float = 1.0) -> Iterator[None]:
        """Draw for a user while a block runs.

        Args:
            user (`str`, `Mapping[str, float]` or `Tensor`, *optional*): A name, name ->
                weight for a mixture, or an embedding of `from_pairs`. None draws
                without a user.
            scale (`float`, *optional*, defaults to `1.0`): Strength of the user, beside
                that of the training.

        Raises:
            UserError: An unknown user.
        """
        before = self.adapter.scale
        with torch.no_grad():
            embedding = user if user is None or isinstance(user, Tensor) else None
            if isinstance(user, (str, Mapping)):
                embedding = self.adapter.embedding(user)
            elif user is not None and embedding is None:
                raise UserError(
                    f"user: expected a name, weights of names or an embedding, got "
                    f"{type(user).__name__}"
                )
            with self.adapter.users(None if embedding is None else embedding[None]):
                self.adapter.scale = before * scale
                try:
                    yield
                finally:
                    self.adapter.scale = before

    def from_pairs(
        self, pairs: Sequence[tuple[str, Image.Image, Image.Image]], *, seed: int = 0
    ) -> dict[str, float] | Tensor:
        """Describe a new user by their pairs, without training.

        An embedder embeds them as it embedded the users of the training. Learned
        embeddings are mixed, see `weights_of_pairs`.

        Args:
            pairs (`Sequence`): Prompt, chosen image and rejected image of each pair.
            seed (`int`, *optional*, defaults to `0`): Seed of the noises.

        Returns:
            `dict[str, float]` or `Tensor`: For `apply`: user -> weight, or an embedding
            (tokens, dim).

        Raises:
            UserError: There is no pair, or the embedder fails.
        """
        if self.embeddings == "table":
            return self.weights_of_pairs(pairs, seed=seed)
        if not pairs:
            raise UserError("user_pairs: expected at least one pair, got none")
        if self._embedder is None:
            self._embedder = load_user_embedder(self.embeddings)
        embedder = self._embedder
        examples = [ExamplePair(*pair) for pair in pairs[-MOST_PAIRS:]]
        embedding = embed_users(embedder, [examples])[0]
        if embedding.shape != (self.adapter.tokens, self.adapter.dim):
            raise UserError(
                f"user_embeddings: {embedder.name} gives {tuple(embedding.shape)}, the adapter was "
                f"trained with {(self.adapter.tokens, self.adapter.dim)}"
            )
        return embedding.to(next(self.adapter.parameters()).device)

    @torch.no_grad()
    def weights_of_pairs(
        self, pairs: Sequence[tuple[str, Image.Image, Image.Image]], *, seed: int = 0
    ) -> dict[str, float]:
        """Describe a new user by their pairs, as a mixture of the known users.

        Nothing is trained. Each pair is measured at eight noises and timesteps under
        every known user. Of more than 16 pairs the last 16 count, and of more than 128
        users 128 that are drawn by `seed`.

        Args:
            pairs (`Sequence`): Prompt, chosen image and rejected image of each pair.
            seed (`int`, *optional*, defaults to `0`): Seed of the noises.

        Returns:
            `dict[str, float]`: User -> weight, for `apply`.

        Raises:
            UserError: There is no pair, or the adapter knows no users.
        """
        if not pairs:
            raise UserError("user_pairs: expected at least one pair, got none")
        if not self.names:
            raise UserError("user_adapter: it knows no users to mix")
        names = self.names
        if len(names) > MOST_USERS:
            order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
            names = sorted(names[i] for i in order[:MOST_USERS].tolist())
        margins = [
            self._margins(*pair, names, seed + number)
            for number, pair in enumerate(pairs[-MOST_PAIRS:])
        ]
        weights = user_weights(torch.stack(margins, dim=1))
        return dict(zip(names, weights.tolist(), strict=True))

    def _margins(
        self,
        prompt: str,
        chosen: Image.Image,
        rejected: Image.Image,
        names: Sequence[str],
        seed: int,
    ) -> Tensor:
        """z of one pair under every user, (users,)."""
        backbone = load_backbone(self.pipe)
        network = denoiser(self.pipe)
        parameter = next(network.parameters())
        backbone.place(parameter.device, parameter.dtype)
        side = backbone.default_resolution
        fitted = [ImageOps.fit(image.convert("RGB"), (side, side)) for image in (chosen, rejected)]
        values = np.stack([np.asarray(image, np.float32) for image in fitted]) / 127.5 - 1
        pixels = torch.from_numpy(values).permute(0, 3, 1, 2)
        stream = row_generator(seed, 0, 0, "user-pairs")
        x0 = backbone.encode_images(pixels)[0].repeat(DRAWS, 1, 1, 1)
        noise = torch.randn((DRAWS, *x0.shape[1:]), generator=stream).repeat_interleave(2, 0)
        noise = noise.to(x0)
        uniforms = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
        times = sample_times(backbone.schedule, uniforms, "uniform").repeat_interleave(2)
        condition = backbone.encode_prompts([prompt] * len(x0))
        geometry = SimpleNamespace(
            original_size=(side, side), crop_top_left=(0, 0), target_size=(side, side)
        )
        condition |= backbone.geometry_condition([geometry] * len(x0))
        condition = {
            name: value.to(parameter.device, parameter.dtype)
            if value.is_floating_point()
            else value.to(parameter.device)
            for name, value in condition.items()
        }
        schedule = backbone.schedule
        noisy = schedule.add_noise(x0, noise, times)
        target = schedule.target(x0, noise, times)
        model_times = schedule.model_times(times).to(parameter.device)

        def errors(users: Tensor | None) -> Tensor:
            with self.adapter.users(users):
                output = backbone.predict(
                    network, noisy.to(parameter.dtype), model_times, dict(condition)
                )
            return denoising_errors(output, target).unflatten(0, (DRAWS, 2)).double()

        reference = errors(None)
        margins = []
        for name in names:
            change = errors(self.adapter.embedding(name)[None]) - reference
            margins.append(-(self.beta / 2) * (change[:, 0] - change[:, 1]).mean())
        return torch.stack(margins).cpu()


def load_users(pipe: Pipeline, folder: str | Path) -> Users:
    """Read a user adapter that `PPDTrainer` wrote, and attach it to a pipeline.

    Args:
        pipe (`DiffusionPipeline`): The base model of the training.
        folder (`str` or `Path`): Output folder of the run.

    Returns:
        `Users`.

    Raises:
        UserError: There is no adapter, or it does not fit the pipeline.

    Example:
        ```python
        from diffalign import load_users
        from diffalign.backbones.user_adapter import UserAdapter
        from diffalign.generation.pipelines import base_pipeline

        pipe = base_pipeline()
        # As a run of PPDTrainer writes it, here without training.
        UserAdapter(pipe.unet, dim=8, tokens=2, user_names=["ann", "bob"]).save(".")
        users = load_users(pipe, ".")
        prompt = "a small red circle on the left of a gray background"
        with users.apply({"ann": 0.5, "bob": 0.5}):
            image = pipe(prompt, num_inference_steps=2).images[0]
        assert users.names == ["ann", "bob"]
        ```
    """
    adapter, facts = load_user_adapter(denoiser(pipe), folder)
    adapter.requires_grad_(False)
    embeddings = str(facts.get("user_embeddings", "table"))
    return Users(pipe, adapter, float(facts.get("beta") or 2000.0), embeddings)


def read_mixture(text: str) -> str | dict[str, float]:
    """Read a user or a mixture from a command line: `ann`, or `ann=0.3,bob=0.7`.

    Args:
        text (`str`): The option.

    Raises:
        UserError: A weight is no number.
    """
    if "=" not in text:
        return text
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.rpartition("=")
        try:
            weights[name.strip()] = float(weight)
        except ValueError:
            raise UserError(
                f"--user: expected a name, or name=weight with commas between, got {text!r}"
            ) from None
    return weights


def mixture_words(weights: Mapping[str, float], most: int = 5) -> str:
    """Describe a mixture by its largest weights.

    Args:
        weights (`Mapping[str, float]`): User -> weight.
        most (`int`, *optional*, defaults to `5`): Users to name.
    """
    order: Sequence[tuple[str, float]] = sorted(weights.items(), key=lambda pair: -pair[1])
    rest = f", {len(order) - most} more" if len(order) > most else ""
    return ", ".join(f"{name} {weight:.2f}" for name, weight in order[:most]) + rest
