"""Tensors of judgements: what heads are fitted to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .features import Features
from .judgements import Judgements
from .opinions import Opinions


@dataclass
class Labels:
    """How some pairs were judged.

    Attributes:
        label (`Tensor`): Share of judges who prefer the first image, (n,).
        weight (`Tensor`): Weight of each pair, mean 1, (n,).
        user (`Tensor`): Index of the judge or -1, (n,).
        prompt (`Tensor`): Index of the prompt, (n,).
        margin (`Tensor`): Lead that the winner must have, beside the settings', (n,).
    """

    label: Tensor
    weight: Tensor
    user: Tensor
    prompt: Tensor
    margin: Tensor

    def __len__(self) -> int:
        return len(self.label)


@dataclass
class Pairs(Labels):
    """Tensors of some pairs.

    Attributes:
        first (`Tensor`): Embeddings of the first images, (n, d).
        second (`Tensor`): Those of the others, (n, d).
        text (`Tensor`): Embeddings of the prompts, (n, d).
        base (`Tensor`): Scores of both by the base, (n, 2).
        nuisances (`Tensor`): Difference of the nuisances, (n, 6).
    """

    first: Tensor
    second: Tensor
    text: Tensor
    base: Tensor
    nuisances: Tensor

    def rows(self, rows: Tensor) -> Pairs:
        """Return some of the pairs, by a mask (n,) or by numbers."""
        return Pairs(**{name: values[rows] for name, values in vars(self).items()})


@dataclass
class Items:
    """Tensors of some opinions on single images.

    Attributes:
        opinions (`Opinions`): The n opinions.
        image (`Tensor`): Embeddings of the images, (n, d).
        text (`Tensor`): Embeddings of the prompts, (n, d).
        base (`Tensor`): Scores by the base, (n,).
        weight (`Tensor`): Weight of each opinion, (n,).
        prompt (`Tensor`): Index of the prompt, (n,).
    """

    opinions: Opinions
    image: Tensor
    text: Tensor
    base: Tensor
    weight: Tensor
    prompt: Tensor

    def rows(self, rows: Tensor) -> Items:
        """Return some of the opinions, by a mask (n,)."""
        tensors = ("image", "text", "base", "weight", "prompt")
        taken = {name: getattr(self, name)[rows] for name in tensors}
        return Items(self.opinions.rows(rows.numpy()), **taken)


def make_items(
    opinions: Opinions,
    features: Features,
    base: Callable[[Tensor, Tensor], Tensor],
    by_prompt: bool,
) -> Items:
    """Gather the embeddings of some opinions. Arguments as `make_pairs`."""
    rows, prompt = torch.from_numpy(opinions.image), torch.from_numpy(opinions.prompt)
    image, text = features.of(rows, prompt)
    weight = torch.from_numpy(opinions.weight)
    if by_prompt and len(rows):
        weight = weight / torch.bincount(prompt, weight)[prompt].clamp(min=1e-12)
    return Items(opinions, image, text, base(image, text), weight, prompt)


def make_labels(part: Judgements, by_prompt: bool) -> Labels:
    """Gather the labels of some pairs.

    Args:
        part (`Judgements`): The pairs.
        by_prompt (`bool`): Whether every prompt counts the same.
    """
    prompt, weight = torch.from_numpy(part.prompt), torch.from_numpy(part.weight)
    if by_prompt:
        totals = torch.zeros(int(prompt.max()) + 1, dtype=torch.float64)
        totals.index_add_(0, prompt, weight)
        weight = weight / totals[prompt].clamp(min=1e-12)
    weight = weight / weight.mean().clamp(min=1e-12)
    label, user = torch.from_numpy(part.label), torch.from_numpy(part.user)
    return Labels(label, weight, user, prompt, torch.zeros_like(label))


def make_pairs(
    part: Judgements, features: Features, base: Callable[[Tensor, Tensor], Tensor], by_prompt: bool
) -> Pairs:
    """Gather the embeddings of some pairs.

    Args:
        part (`Judgements`): The pairs.
        features (`Features`): Embeddings of all images and prompts.
        base (`Callable`): Score of the base from both embeddings.
        by_prompt (`bool`): Whether every prompt counts the same.
    """
    first, second, prompt = map(torch.from_numpy, (part.first, part.second, part.prompt))
    (shown, text), (other, _) = features.of(first, prompt), features.of(second, prompt)
    labels = make_labels(part, by_prompt)
    return Pairs(
        **vars(labels),
        first=shown,
        second=other,
        text=text,
        base=torch.stack([base(image, text) for image in (shown, other)], 1),
        nuisances=features.nuisances[first] - features.nuisances[second],
    )
