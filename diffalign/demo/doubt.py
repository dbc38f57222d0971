"""Choose the pair to vote on about which a trained reward is least sure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..rewards import load_scorer
from ..rewards.learned.calibration import disagreement
from ..rewards.scorers.trained import TrainedReward
from .votes import Pair


class Doubt:
    """The disagreement about pairs of an ensemble's members or of a PAL reward's users.

    Pairs on which known users disagree show soonest which of them a new user resembles.

    Args:
        folder (`Path`): A reward of `diffalign reward train` with `train.members` of 2
            or more, or with users (`train.head: pal`).
        device (`str`, *optional*): Where it runs.

    Raises:
        UserError: It is no such reward.
    """

    def __init__(self, folder: Path, device: str | None = None) -> None:
        if not (folder / "reward.json").is_file():
            raise UserError(
                f"--ask_reward: {str(folder)!r} is no reward of diffalign reward train; name its "
                "folder"
            )
        scorer = load_scorer(str(folder), device=device)
        if not isinstance(scorer, TrainedReward) or _opinions(scorer) < 2:
            raise UserError(
                f"--ask_reward: {str(folder)!r} has one member, which cannot disagree; train it "
                "with train.members: 4, or with train.head: pal for users of different tastes"
            )
        self.scorer = scorer

    def choose(self, pairs: Sequence[Pair]) -> Pair:
        """Return the pair on which the members or users disagree most.

        Args:
            pairs (`Sequence[Pair]`): At least one.
        """
        images = [image for pair in pairs for image in pair.images]
        prompts = [pair.prompt for pair in pairs for _ in pair.images]
        by_user = self.scorer.facts["head"]["kind"] == "pal"
        score = self.scorer.user_scores if by_user else self.scorer.member_scores
        scores = score(images, prompts)
        doubts = disagreement(scores[0::2] - scores[1::2])
        return pairs[int(doubts.argmax())]


def _opinions(reward: TrainedReward) -> int:
    """Return the number of members, or of users who trained it."""
    head = reward.facts["head"]
    return int(head.get("trained_users" if head["kind"] == "pal" else "members", 1))
