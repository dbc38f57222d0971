"""Turn scorers into preferences between images."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, UserError
from ...runtime.missing import MaybeImage, present

COMPARE = ("pareto", "majority", "combined")


def _of_present(function: Any, images: Sequence[MaybeImage], prompts: Sequence[str]) -> Tensor:
    """Return a function's scores of the images that exist, NaN for missing ones."""
    places = present(images)
    if len(places) == len(images):
        return torch.as_tensor(function(list(images), list(prompts))).detach().cpu().double()
    if not places:
        return torch.full((len(images),), float("nan"), dtype=torch.float64)
    values = (
        torch.as_tensor(function([images[i] for i in places], [prompts[i] for i in places]))
        .detach()
        .cpu()
        .double()
    )
    if len(values) != len(places):
        raise UserError(
            f"scorers: expected {len(places)} scores for {len(places)} images, got shape "
            f"{tuple(values.shape)}"
        )
    scores = torch.full((len(images), *values.shape[1:]), float("nan"), dtype=torch.float64)
    scores[places] = values
    return scores


def _by_name(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    """Call a user's function by the names of its arguments, and read None as NaN.

    Arguments that are not called `images` and `prompts` are given in this order.
    """
    from ...rewards.registry import positional_count

    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # built in, without a signature
        return function
    names = [p.name for p in parameters]
    positional = positional_count(parameters, 2)

    def called(images: Any, prompts: Any) -> Any:
        given = {"images": images, "prompts": prompts}
        if "images" in names or "prompts" in names:
            values = function(**{name: given[name] for name in names if name in given})
        else:
            values = function(*[images, prompts][:positional])
        if isinstance(values, (list, tuple)):
            values = [float("nan") if value is None else value for value in values]
        return values

    return called


class RewardFunction:
    """Scores images with scorers, a panel of scorers or functions.

    Args:
        scorers: A scorer, its name, a function, a sequence of these, or a panel. A
            function takes images and prompts and returns (n,) or (n, m) scores. A panel
            may be a mapping `{rewards: ..., combine: ...}`, see
            `diffalign.rewards.Panel`.
        device (`torch.device`, *optional*): Device of the scorers.

    Attributes:
        deciding (`int`, *optional*): How many columns of scores decide, from the left.
            None means all. A panel's scorers of role `eval` do not decide.

    Raises:
        ConfigError: `scorers` is empty or none of these.
    """

    def __init__(self, scorers: Any, device: torch.device | str | None = None) -> None:
        from ...rewards.panel import Panel

        self.panel: Any = None
        self.members: list[Any] = []
        self.deciding: int | None = None
        if isinstance(scorers, Panel):
            self.panel = scorers
        elif isinstance(scorers, Mapping):
            self.panel = Panel.from_config(dict(scorers), device=device)
        else:
            single = isinstance(scorers, str) or not isinstance(scorers, Sequence)
            self.members = [self._member(s, device) for s in ([scorers] if single else scorers)]
            if not self.members:
                raise ConfigError("scorers", "name at least one scorer")
        if self.panel is not None:
            self.deciding = len(self.panel.train_names)

    @staticmethod
    def _member(scorer: Any, device: torch.device | str | None) -> Any:
        from ...rewards.base import Scorer
        from ...rewards.registry import load_scorer

        if isinstance(scorer, str):
            return load_scorer(scorer, device=device)
        if isinstance(scorer, type) and callable(scorer):
            scorer = scorer()
        if isinstance(scorer, Scorer):
            return scorer
        if callable(scorer):
            return _by_name(scorer)
        raise ConfigError(
            "scorers", f"expected scorers, their names or functions, got {type(scorer).__name__}"
        )

    def __call__(self, images: Sequence[MaybeImage], prompts: Sequence[str]) -> Tensor:
        """Score images.

        Args:
            images (`Sequence`): n images. Some may be `Missing`.
            prompts (`Sequence[str]`): n prompts.

        Returns:
            `Tensor`: Scores, (n, m), float64. Higher is better in every column,
            deciding columns come first, and NaN marks a missing or infinite score.

        Raises:
            UserError: A function returned another number of scores.
        """
        if self.panel is not None:
            columns = self.panel.score(list(images), list(prompts), on_error="nan").columns
            return self.panel.signed(columns, self._panel_names(), len(images))
        return torch.cat([self._scores(member, images, prompts) for member in self.members], dim=1)

    @property
    def compares_images(self) -> bool:
        """Whether `combined` depends on the other images of a prompt or round."""
        if self.panel is None:
            return len(self.members) > 1
        ruled = self.panel.names_rule or len(self.panel.train_names) > 1
        return ruled and self.panel.combine_config.compares_images

    def _panel_names(self) -> list[str]:
        train = self.panel.train_names
        return [*train, *(name for name in self.panel.names if name not in train)]

    def names(self, count: int) -> list[str]:
        """Return the names of the columns of scores.

        Args:
            count (`int`): Number of columns. Those of functions are named `score_<i>`.
        """
        from ...rewards.base import Scorer

        if self.panel is not None:
            return self._panel_names()
        if all(isinstance(member, Scorer) for member in self.members):
            return [member.name for member in self.members]
        return [f"score_{i}" for i in range(count)]

    def weights(self, count: int) -> list[float]:
        """Return the weight of each deciding column of scores. 1 without a panel.

        Args:
            count (`int`): Number of deciding columns.
        """
        if self.panel is None:
            return [1.0] * count
        return [entry.weight for entry in self.panel.entries if entry.role == "train"]

    @staticmethod
    def _scores(member: Any, images: Sequence[MaybeImage], prompts: Sequence[str]) -> Tensor:
        from ...rewards.base import Scorer

        if isinstance(member, Scorer):
            result = member.score(list(images), list(prompts), on_error="nan").values
            values = torch.as_tensor(result).double()
            values = values if member.spec.higher_is_better else -values
        else:
            values = _of_present(member, images, prompts)
        values = values[:, None] if values.ndim == 1 else values
        if values.ndim != 2 or len(values) != len(images):
            raise UserError(
                f"scorers: expected {len(images)} scores for {len(images)} images, got shape "
                f"{tuple(values.shape)}"
            )
        # One infinite score would make the moments of a whole round NaN.
        return torch.where(values.isfinite(), values, torch.nan)

    def combined(self, scores: Tensor) -> Tensor:
        """Combine the deciding scores of each image into one.

        The panel's rule combines them, or else the mean of their win rates. A single
        score stays as it is where no rule was named.

        Args:
            scores (`Tensor`): (g, k, m).

        Returns:
            `Tensor`: (g, k), higher is better.
        """
        scores = scores[..., : self.deciding]
        if scores.shape[-1] == 1 and not (self.panel is not None and self.panel.names_rule):
            return scores[..., 0]
        if self.panel is None:
            from ...rewards.ensemble import win_rates

            return win_rates(scores)
        g, k, _ = scores.shape
        columns = dict(zip(self.panel.train_names, scores.flatten(0, 1).T, strict=True))
        signs = {n: 1.0 if self.panel.specs[n].higher_is_better else -1.0 for n in columns}
        raw = {n: v * signs[n] for n, v in columns.items()}  # with the scorers' own signs
        values = self.panel.combine(raw, [i for i in range(g) for _ in range(k)]).values
        return values.double().unflatten(0, (g, k))


def pareto_preferences(scores: Tensor) -> Tensor:
    """Compare images by Pareto dominance.

    Image a beats image b if none of its scores is lower and at least one is higher.
    Anything else, and any missing score, is a tie.

    Args:
        scores (`Tensor`): (g, k, m), higher is better.

    Returns:
        `Tensor`: (g, k, k). +1 if the first image is better, -1 if the second is, 0 for
        a tie.
    """
    a, b = scores[:, :, None, :], scores[:, None, :, :]
    better = (a >= b).all(-1) & (a > b).any(-1)
    worse = (a <= b).all(-1) & (a < b).any(-1)
    return better.to(scores.dtype) - worse.to(scores.dtype)


def majority_preferences(scores: Tensor) -> Tensor:
    """Compare images by a vote of their scores (BalancedDPO, arXiv 2503.12575).

    Each score votes for the image that it rates higher, whatever its scale. A pair with
    a missing score is a tie.

    Args:
        scores (`Tensor`): (g, k, m), higher is better.

    Returns:
        `Tensor`: (g, k, k). +1 if the first image is better, -1 if the second is, 0 for
        a tie.
    """
    differences = scores[:, :, None, :] - scores[:, None, :, :]
    votes = differences.sign().sum(-1).sign()
    return votes.masked_fill(differences.isnan().any(-1), 0.0)


def preferences(reward_function: RewardFunction, scores: Tensor, compare: str) -> Tensor:
    """Compare images by Pareto dominance, by majority or by their combined score.

    Args:
        reward_function (`RewardFunction`): Combines scores.
        scores (`Tensor`): (g, k, m), higher is better.
        compare (`str`): `pareto`, `majority` or `combined`.

    Returns:
        `Tensor`: (g, k, k). +1 if the first image is better, -1 if the second is, 0 for
        a tie.

    Raises:
        ConfigError: Another value of `compare`.
    """
    if compare not in COMPARE:
        raise ConfigError("compare", f"expected one of {', '.join(COMPARE)}, got {compare!r}")
    if compare == "combined":
        return pareto_preferences(reward_function.combined(scores)[..., None])
    compared = pareto_preferences if compare == "pareto" else majority_preferences
    return compared(scores[..., : reward_function.deciding])


class ScoreAhead:
    """Scores images while the next ones are sampled.

    Args:
        reward_function (`Callable`): Scores images.
        prompts (`Sequence[str]`): One prompt per image.
        pool (`Executor`, *optional*): Threads that score. None scores at once.
    """

    def __init__(
        self,
        reward_function: Callable[[Sequence[MaybeImage], Sequence[str]], Tensor],
        prompts: Sequence[str],
        pool: Executor | None,
    ) -> None:
        self.reward_function, self.prompts = reward_function, list(prompts)
        self.pool = pool
        self.parts: list[Any] = []

    def __call__(self, first: int, images: list[MaybeImage]) -> None:
        """Score a chunk of images.

        Args:
            first (`int`): Index of the first image.
            images (`list`): The images.
        """
        prompts = self.prompts[first : first + len(images)]
        self.parts.append(
            self.pool.submit(self.reward_function, images, prompts)
            if self.pool
            else self.reward_function(images, prompts)
        )

    def result(self) -> Tensor:
        """Wait for the scores of all chunks, (n, m)."""
        return torch.cat([part.result() if self.pool else part for part in self.parts])
