"""Choose the pair to vote on that would teach a trained reward most."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..errors import UserError
from ..rewards import load_scorer
from ..rewards.learned.calibration import disagreement
from ..rewards.learned.information import after_label, information_gain, label_information
from ..rewards.scorers.trained import TrainedReward
from .votes import Pair

CANDIDATES = 8


class Doubt:
    """Choose pairs by what their votes would teach a reward.

    A linear head knows how uncertain its weights are (`covariance.safetensors` of its
    folder): the pair with the largest expected information gain is chosen, and every
    chosen pair counts as answered, so that the next one asks something else. For other
    ensembles, and for rewards with users, it is the pair on which the members or the
    users disagree most: known users who disagree show soonest which of them a new user
    resembles.

    Args:
        folder (`Path`): A reward of `diffalign reward train`.
        device (`str`, *optional*): Where it runs.
        candidates (`int`, *optional*, defaults to `8`): Pairs among which to choose.
            More cost more drawing and save more votes.

    Raises:
        UserError: It is no reward, or one that knows of no doubt.
    """

    def __init__(
        self, folder: Path, device: str | None = None, candidates: int = CANDIDATES
    ) -> None:
        self.candidates = candidates
        if not (folder / "reward.json").is_file():
            raise UserError(
                f"--ask_reward: {str(folder)!r} is no reward of diffalign reward train; name its "
                "folder"
            )
        scorer = load_scorer(str(folder), device=device)
        assert isinstance(scorer, TrainedReward)
        self.scorer = scorer
        self.covariance = scorer.covariance()
        self._lock = threading.Lock()
        if self.covariance is None and _opinions(scorer) < 2:
            raise UserError(
                f"--ask_reward: {str(folder)!r} does not say how sure it is; train a linear head "
                "on frozen towers (train.towers: frozen, train.loss: pairs), or one with "
                "train.head: pal for users of different tastes"
            )

    def choose(self, pairs: Sequence[Pair]) -> Pair:
        """Return the pair whose vote would teach most.

        Args:
            pairs (`Sequence[Pair]`): At least one.
        """
        images = [image for pair in pairs for image in pair.images]
        prompts = [pair.prompt for pair in pairs for _ in pair.images]
        if self.covariance is not None:
            scores, directions = self.scorer.directions(images, prompts)
            return pairs[self._most_informative(_differences(scores), _differences(directions))]
        by_user = self.scorer.facts["head"]["kind"] == "pal"
        score = self.scorer.user_scores if by_user else self.scorer.member_scores
        doubts = disagreement(_differences(score(images, prompts)))
        return pairs[int(doubts.argmax())]

    def _most_informative(self, margins: Tensor, directions: Tensor) -> int:
        flip_rate = float(self.scorer.facts["settings"].get("flip_rate", 0.0))
        information = label_information(margins, flip_rate)
        with self._lock:
            assert self.covariance is not None
            place = int(information_gain(directions, information, self.covariance).argmax())
            self.covariance = after_label(self.covariance, directions[place], information[place])
        return place


def _differences(values: Tensor) -> Tensor:
    """First image less second, of rows that alternate."""
    return values[0::2] - values[1::2]


def _opinions(reward: TrainedReward) -> int:
    """Return the number of members, or of users who trained it."""
    head = reward.facts["head"]
    return int(head.get("trained_users" if head["kind"] == "pal" else "members", 1))
