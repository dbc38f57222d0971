"""Who says which image is better: scorers, a panel of them, or functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, UserError
from ...runtime.missing import present

COMPARE = ("pareto", "combined")


def _of_present(function: Any, images: Sequence[Any], prompts: Sequence[str]) -> Tensor:
    """A function's scores of the images that are there, NaN for the others."""
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


class Judge:
    """Scores groups of images.

    Args:
        scorers: a scorer, its name, a function (images, prompts) -> (n,) or (n, m), a sequence of those, or the mapping of a
            panel (``{rewards: ..., combine: ...}``, see `diffalign.rewards.Panel`).
        device: of the scorers.

    Attributes:
        deciding: how many columns of scores, from the left, decide, None for all; a panel's scorers of role ``eval`` are only
            recorded.

    Raises:
        ConfigError: none of these.
    """

    def __init__(self, scorers: Any, device: Any = None) -> None:
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
    def _member(scorer: Any, device: Any) -> Any:
        from ...rewards.registry import load_scorer

        if isinstance(scorer, str):
            return load_scorer(scorer, device=device)
        if not callable(scorer):
            raise ConfigError(
                "scorers",
                f"expected scorers, their names or functions, got {type(scorer).__name__}",
            )
        return scorer

    def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> Tensor:
        """Scores (n, m), float64, higher is better in every column, those that decide first; NaN = missing.

        Raises:
            UserError: a function that returns another number of scores.
        """
        if self.panel is not None:
            columns = self.panel.score(list(images), list(prompts), on_error="nan").columns
            return self.panel.signed(columns, self._panel_names(), len(images))
        return torch.cat([self._scores(member, images, prompts) for member in self.members], dim=1)

    def _panel_names(self) -> list[str]:
        train = self.panel.train_names
        return [*train, *(name for name in self.panel.names if name not in train)]

    def names(self, count: int) -> list[str]:
        """What the `count` columns of scores are called: as the scorers, or ``score_<i>`` where functions judge."""
        from ...rewards.base import Scorer

        if self.panel is not None:
            return self._panel_names()
        if all(isinstance(member, Scorer) for member in self.members):
            return [member.name for member in self.members]
        return [f"score_{i}" for i in range(count)]

    @staticmethod
    def _scores(member: Any, images: Sequence[Any], prompts: Sequence[str]) -> Tensor:
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
        return values

    def combined(self, scores: Tensor) -> Tensor:
        """One number per image of groups, (g, k, m) -> (g, k): the panel's rule, or the mean of win rates of several scorers."""
        scores = scores[..., : self.deciding]
        if scores.shape[-1] == 1:
            return scores[..., 0]
        if self.panel is None:
            from ...rewards.ensemble import win_rates

            return win_rates(scores)
        g, k, _ = scores.shape
        columns = dict(zip(self.panel.train_names, scores.flatten(0, 1).T, strict=True))
        signs = {n: 1.0 if self.panel.specs[n].higher_is_better else -1.0 for n in columns}
        raw = {n: v * signs[n] for n, v in columns.items()}  # as the scorers gave them
        values = self.panel.combine(raw, [i for i in range(g) for _ in range(k)]).values
        return values.double().unflatten(0, (g, k))


def pareto_preferences(scores: Tensor) -> Tensor:
    """Which of two images is better in every respect: (g, k, m) -> (g, k, k) with entries +1, -1 and 0 (methods.md 4.2).

    Image a beats b if none of its scores is lower and one is higher; anything else, and any missing score, is a tie.
    """
    a, b = scores[:, :, None, :], scores[:, None, :, :]
    better = (a >= b).all(-1) & (a > b).any(-1)
    worse = (a <= b).all(-1) & (a < b).any(-1)
    return better.to(scores.dtype) - worse.to(scores.dtype)


def preferences(judge: Judge, scores: Tensor, compare: str) -> Tensor:
    """(g, k, k) of +1, -1, 0 from scores (g, k, m): by Pareto dominance or by the combined score."""
    if compare not in COMPARE:
        raise ConfigError("compare", f"expected one of {', '.join(COMPARE)}, got {compare!r}")
    return pareto_preferences(
        scores[..., : judge.deciding] if compare == "pareto" else judge.combined(scores)[..., None]
    )


class ScoreAhead:
    """Scores chunks of images as they come, beside the sampling where that has a device of its own.

    Args:
        judge: of the images.
        prompts: one per image.
        parallel: score in a thread; on a CPU the two would only take turns.
    """

    def __init__(
        self,
        judge: Callable[[Sequence[Any], Sequence[str]], Tensor],
        prompts: Sequence[str],
        parallel: bool,
    ) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self.judge, self.prompts = judge, list(prompts)
        self.pool = ThreadPoolExecutor(1) if parallel else None
        self.parts: list[Any] = []

    def __call__(self, first: int, images: list[Any]) -> None:
        prompts = self.prompts[first : first + len(images)]
        self.parts.append(
            self.pool.submit(self.judge, images, prompts)
            if self.pool
            else self.judge(images, prompts)
        )

    def result(self) -> Tensor:
        """(n, m), all parts."""
        found = [part.result() if self.pool else part for part in self.parts]
        if self.pool:
            self.pool.shutdown()
        return torch.cat(found)
