"""A reward that pixels have a gradient of: one scorer, or a weighted panel of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...rewards.base import Scorer
from ...runtime.missing import present, to_images
from .reward_function import RewardFunction


class DifferentiableReward:
    """Scores pixels with a gradient, and images with the scorers that only watch.

    Args:
        scorers: A scorer, its name, or a panel, see `RewardFunction`.

    Attributes:
        names (`list[str]`): The scorers that are optimised.
        watching (`list[str]`): Scorers of role `eval`, which need no gradient.

    Raises:
        ConfigError: A scorer has no gradient, there are several without a panel, or the
            panel's rule compares images instead of adding their scores.
    """

    def __init__(self, scorers: Any) -> None:
        self.function = RewardFunction(scorers)
        self.panel = self.function.panel
        if self.panel is not None:
            self.panel.check_differentiable()
            self.names = self.panel.train_names
            self.watching = [name for name in self.panel.names if name not in self.names]
            return
        if len(self.function.members) != 1:
            raise ConfigError(
                "scorers",
                f"{len(self.function.members)} scorers have no common scale; give a rewards "
                "section with weights and combine: {method: weighted_sum}",
            )
        (scorer,) = self.function.members
        if not isinstance(scorer, Scorer) or not scorer.differentiable:
            raise ConfigError("scorers", without_gradient(getattr(scorer, "name", str(scorer))))
        self.scorer, self.names, self.watching = scorer, [scorer.name], list[str]()

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score pixels.

        Args:
            pixels (`Tensor`): (n, 3, H, W) in [0, 1].
            prompts (`Sequence[str]`): n prompts.

        Returns:
            `Tensor`: (n,), higher is better, on the device of `pixels`.
        """
        if self.panel is not None:
            scores = self.panel.score_tensor(pixels, prompts)
        else:
            sign = 1.0 if self.scorer.spec.higher_is_better else -1.0
            scores = sign * self.scorer.score_tensor(pixels, prompts)
        return scores.to(pixels.device, torch.float32)

    def watch(self, pixels: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score images with the scorers of role `eval`, without a gradient.

        Args:
            pixels (`Tensor`): (n, 3, H, W) in [0, 1].
            prompts (`Sequence[str]`): n prompts.

        Returns:
            `dict[str, Tensor]`: Scorer -> (n,), NaN where an image is missing.
        """
        images = to_images(2 * pixels.detach().float().cpu() - 1)
        places = present(images)
        columns = {}
        for name in self.watching:
            values = torch.full((len(images),), float("nan"))
            with self.panel.using(name) as scorer:
                pictures: Any = [images[i] for i in places]
                texts = [prompts[i] for i in places]
                if places:
                    values[places] = torch.as_tensor(scorer(pictures, texts)).float().cpu()
            columns[name] = values.to(pixels.device)
        return columns


def without_gradient(name: str) -> str:
    """Return the message about a scorer that has no gradient.

    Args:
        name (`str`): The scorer.
    """
    from ...rewards.registry import get_spec, list_scorers

    able = [other for other in list_scorers() if get_spec(other).differentiable]
    return f"{name} gives no gradient; take one of {', '.join(able)}"
