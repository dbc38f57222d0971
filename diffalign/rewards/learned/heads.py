"""Heads of learned rewards, over the embeddings of their base."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .pal import pal_a_distances, pal_b_points, pal_b_scores

QUANTILES = tuple(round(0.05 * k, 2) for k in range(1, 20))
"""Levels of a head of quantiles: 0.05, 0.10, ..., 0.95 (QRM, arXiv 2409.10164)."""


def pair_features(image: Tensor, text: Tensor) -> Tensor:
    """What a head reads of an image and its prompt: image, image * prompt, cosine.

    Args:
        image (`Tensor`): Unit embeddings, (n, d); or embeddings of images together with
            their prompts.
        text (`Tensor`): Unit embeddings, (n, d); (n, 0) in the second case.

    Returns:
        `Tensor`: (n, 2 d + 1); `image` itself in the second case.
    """
    if not text.shape[-1]:
        return image
    product = image * text
    return torch.cat([image, product, product.sum(-1, keepdim=True)], -1)


class _FeatureHead(nn.Module):
    """A head of standardised `pair_features`, so that one penalty suits all of them.

    Args:
        width (`int`): Number of features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def standardise(self, image: Tensor, text: Tensor) -> None:
        """Set where the features of images and their prompts lie, (n, d) each."""
        features = pair_features(image, text)
        self.get_buffer("mean").copy_(features.mean(0))
        self.get_buffer("deviation").copy_(features.std(0, correction=0).clamp(min=1e-6))

    def scaled(self, image: Tensor, text: Tensor) -> Tensor:
        """Return the standardised `pair_features`."""
        mean: Tensor = self.get_buffer("mean")
        return (pair_features(image, text) - mean) / self.get_buffer("deviation")


class RewardHead(_FeatureHead):
    """Adds to its base: factor * (base - mean) + network(features), per member.

    At the start the networks are zero, so the reward is the base less its mean. Without
    that, members would differ by their factors times the level of the base.

    Args:
        dim (`int`): Size of an embedding.
        members (`int`): Number of networks, which make an ensemble.
        hidden (`int`): Width of a hidden layer. 0 is a linear network.
        quantiles (`bool`): Whether each network has an output for each of `QUANTILES`.
            Its score is their mean.
        joint (`bool`): Whether the base embeds images together with their prompts.
    """

    def __init__(
        self,
        dim: int,
        members: int = 1,
        hidden: int = 0,
        quantiles: bool = False,
        joint: bool = False,
    ) -> None:
        width, outputs = dim if joint else 2 * dim + 1, len(QUANTILES) if quantiles else 1
        super().__init__(width)
        layers: list[nn.Module] = []
        for _ in range(members):
            last = nn.Linear(hidden or width, outputs)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            inner = [nn.Linear(width, hidden), nn.ReLU()] if hidden else []
            layers.append(nn.Sequential(*inner, last))
        self.networks = nn.ModuleList(layers)
        self.log_factor = nn.Parameter(torch.zeros(members))
        self.register_buffer("base_mean", torch.zeros(()))

    def forward(self, base: Tensor, image: Tensor, text: Tensor) -> Tensor:
        """Score images by every member.

        Args:
            base (`Tensor`): Scores of the base, (n,).
            image, text (`Tensor`): See `pair_features`.

        Returns:
            `Tensor`: (n, members).
        """
        return self.outputs(base, image, text).mean(-1)

    def outputs(self, base: Tensor, image: Tensor, text: Tensor) -> Tensor:
        """Return what every network of every member says, (n, members, outputs).

        Arguments as `forward`.
        """
        features = self.scaled(image, text)
        added = torch.stack([network(features) for network in self.networks], 1)
        centred = (base - self.get_buffer("base_mean"))[:, None]
        return (self.log_factor.exp() * centred)[..., None] + added

    def directions(self, base: Tensor, image: Tensor, text: Tensor) -> Tensor:
        """Return the gradient of a linear head's score by its weights.

        The weights are the logarithm of the factor, and those of the features. The
        factor is the members' mean.

        Args:
            base, image, text (`Tensor`): As for `forward`.

        Returns:
            `Tensor`: (n, 1 + width).
        """
        scaled_base = self.log_factor.exp().mean() * (base - self.get_buffer("base_mean"))
        return torch.cat([scaled_base[:, None], self.scaled(image, text)], 1)

    def quantiles(
        self, base: Tensor, image: Tensor, text: Tensor, levels: Sequence[float]
    ) -> Tensor:
        """Return quantiles of the members' mean distribution, (n, levels).

        Outputs that cross are sorted. Between two of `QUANTILES` they are interpolated.

        Args:
            base, image, text (`Tensor`): As for `forward`.
            levels (`Sequence[float]`): In 0.05 to 0.95.
        """
        values = self.outputs(base, image, text).sort(-1).values.mean(1)
        places = torch.tensor(levels, dtype=values.dtype, device=values.device) / QUANTILES[0] - 1
        places = places.clamp(0, len(QUANTILES) - 1)
        low = places.floor().long().clamp(max=len(QUANTILES) - 2)
        share = places - low
        return values[:, low] * (1 - share) + values[:, low + 1] * share


class FactorHead(nn.Module):
    """Scales the scores of trained towers."""

    def __init__(self) -> None:
        super().__init__()
        self.log_factor = nn.Parameter(torch.zeros(()))

    def forward(self, base: Tensor) -> Tensor:
        """Score images by the scores of the towers, (n,)."""
        return self.log_factor.exp() * base


class UserHead(nn.Module):
    """A head whose users have weights of prototypes of their own.

    Attributes:
        logits (`nn.Parameter`): Of each user's weights, (users, K).
    """

    logits: nn.Parameter

    def score(self, image: Tensor, text: Tensor, weights: Tensor) -> Tensor:
        """Score images for users.

        Args:
            image (`Tensor`): (n, d).
            text (`Tensor`): (n, d).
            weights (`Tensor`): Weights of the prototypes, (n, K).

        Returns:
            `Tensor`: (n,).
        """
        raise NotImplementedError

    def margins(
        self, first: Tensor, second: Tensor, text: Tensor, temperature: float = 1.0
    ) -> Callable[[Tensor], Tensor]:
        """Return the function that gives a user's margins of pairs, for `fit_new_user`.

        The function is differentiable in the weights, and in nothing else.

        Args:
            first, second (`Tensor`): Images of the pairs, (n, d).
            text (`Tensor`): Their prompts, (n, d).
            temperature (`float`, *optional*, defaults to `1.0`): Multiplies the
                margins.

        Returns:
            `Callable`: Of weights of the prototypes (K,). Returns (n,), float64.
        """
        raise NotImplementedError


class LinearPalHead(_FeatureHead, UserHead):
    """One linear reward for everybody, and tastes that are added to it.

    The score is factor * cosine + shared @ features + sum_k w_uk taste_k @ image. It is
    PAL (arXiv 2406.08469) with ideal points compared by a product, beside a reward of
    what all users agree on. Without tastes it is a linear `RewardHead`.

    Args:
        dim (`int`): Size of an embedding.
        users (`int`): Number of users.
        prototypes (`int`): K.
    """

    def __init__(self, dim: int, users: int, prototypes: int) -> None:
        super().__init__(2 * dim + 1)
        self.log_factor = nn.Parameter(torch.zeros(()))
        self.shared = nn.Parameter(torch.zeros(2 * dim + 1))
        self.tastes = nn.Parameter(torch.zeros(prototypes, dim))
        self.logits = nn.Parameter(torch.zeros(users, prototypes))

    def parts(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the score is linear in.

        Returns:
            `tuple[Tensor, Tensor]`: The cosines (n,), and the standardised
            `pair_features` (n, 2 d + 1), which begin with the image.
        """
        return (image * text).sum(-1), self.scaled(image, text)

    def by_prototype(self, image: Tensor, text: Tensor) -> Tensor:
        """Score images by every prototype alone, (n, K)."""
        cosine, features = self.parts(image, text)
        everybody = self.log_factor.exp() * cosine + features @ self.shared
        return everybody[:, None] + features[:, : self.tastes.shape[1]] @ self.tastes.T

    def score(self, image: Tensor, text: Tensor, weights: Tensor) -> Tensor:
        """See `UserHead.score`."""
        return (weights * self.by_prototype(image, text)).sum(-1)

    def margins(
        self, first: Tensor, second: Tensor, text: Tensor, temperature: float = 1.0
    ) -> Callable[[Tensor], Tensor]:
        """See `UserHead.margins`."""
        sides = [
            self.by_prototype(image.to(self.logits), text.to(self.logits)).detach().double()
            for image in (first, second)
        ]
        by_prototype = temperature * (sides[0] - sides[1])
        return lambda weights: by_prototype @ weights


class PalHead(UserHead):
    """PAL over the embeddings: scores by the mixture of prototypes of each user.

    f and g_k are residual networks of standardised embeddings. In PAL-B a prototype is
    a point g_k of the prompt and the score is a cosine. Their last layers start at zero
    or nearly, so that at the start it is the cosine of image and prompt, for every
    user. In PAL-A a prototype is a point of its own, whatever the prompt, and the score
    is the negative distance from it.

    Args:
        dim (`int`): Size of an embedding.
        users (`int`): Number of users.
        prototypes (`int`): K.
        hidden (`int`): Width of the hidden layer. 0 is a linear network.
        form (`str`, *optional*, defaults to `"b"`): `a` or `b`.
    """

    def __init__(
        self, dim: int, users: int, prototypes: int, hidden: int = 0, form: str = "b"
    ) -> None:
        super().__init__()
        self.form, self.count = form, prototypes

        def network(scale: float) -> nn.Sequential:
            last = nn.Linear(hidden or dim, dim)
            with torch.no_grad():
                last.weight.mul_(scale)
                last.bias.zero_()
            inner = [nn.Linear(dim, hidden), nn.ReLU()] if hidden else []
            return nn.Sequential(*inner, last)

        self.item = network(0.0)
        if form == "a":
            self.points = nn.Parameter(torch.randn(prototypes, dim))
        else:
            self.prompts = nn.ModuleList([network(0.01) for _ in range(prototypes)])
        self.logits = nn.Parameter(0.1 * torch.randn(users, prototypes))
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        for kind in ("image", "text"):
            self.register_buffer(f"{kind}_mean", torch.zeros(dim))
            self.register_buffer(f"{kind}_deviation", torch.ones(dim))

    def standardise(self, image: Tensor, text: Tensor) -> None:
        """Set where the embeddings lie, (n, d) each, so that one penalty suits all."""
        for kind, values in (("image", image), ("text", text)):
            deviation = values.std(0, correction=0).clamp(min=1e-6)
            self.get_buffer(f"{kind}_mean").copy_(values.mean(0))
            self.get_buffer(f"{kind}_deviation").copy_(deviation)
            if self.form == "a" and kind == "image":  # begin among the images
                with torch.no_grad():
                    self.points.mul_(deviation).add_(values.mean(0))

    def _scaled(self, kind: str, values: Tensor) -> Tensor:
        mean = self.get_buffer(f"{kind}_mean")
        return (values - mean) / self.get_buffer(f"{kind}_deviation")

    def by_prototype(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return f(x) (n, d) and the prototypes' points for the prompts (n, K, d)."""
        item = image + self.item(self._scaled("image", image))
        if self.form == "a":
            return item, self.points.expand(len(image), -1, -1)
        prompt = self._scaled("text", text)
        return item, torch.stack([text + network(prompt) for network in self.prompts], 1)

    def score(self, image: Tensor, text: Tensor, weights: Tensor) -> Tensor:
        """See `UserHead.score`."""
        items, prototypes = self.by_prototype(image, text)
        return self._scored(items, pal_b_points(prototypes, weights), self.log_scale)

    def _scored(self, items: Tensor, points: Tensor, log_scale: Tensor) -> Tensor:
        scale = log_scale.exp().clamp(max=100)
        if self.form == "a":
            return -scale * pal_a_distances(items, points)
        return pal_b_scores(items, points, scale=scale)

    def margins(
        self, first: Tensor, second: Tensor, text: Tensor, temperature: float = 1.0
    ) -> Callable[[Tensor], Tensor]:
        """See `UserHead.margins`."""
        sides = []
        for image in (first, second):
            items, points = self.by_prototype(image.to(self.logits), text.to(self.logits))
            sides.append((items.detach().double(), points.detach().double()))
        log_scale = self.log_scale.detach().double()

        def margins(weights: Tensor) -> Tensor:
            scores = [
                self._scored(items, pal_b_points(points, weights), log_scale)
                for items, points in sides
            ]
            return temperature * (scores[0] - scores[1])

        return margins
