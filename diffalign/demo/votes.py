"""Store votes so that no crash loses one.

A vote is a line of JSON, on disk before the visitor sees the next pair.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError
from ..evaluation.statistics import WinRate, rate_of
from ..runtime import decoding
from ..runtime.files import replacing
from .answers import AnswerStore, read_annotator

VOTES, LIKES = "votes.jsonl", "likes.jsonl"
CHOICES = ("left", "right", "tie")


@dataclass(frozen=True)
class Pair:
    """Two images of a prompt, with shuffled sides.

    Attributes:
        id (`str`): An id that nobody can guess.
        prompt (`str`): The prompt of both.
        images (`tuple[PIL.Image.Image, PIL.Image.Image]`): Left and right.
        sides (`tuple[str, str]`): What is left and right: model names, or image ids of
            a round. They are never shown before the vote.
        facts (`Mapping[str, Any]`): What is stored with the vote (seed, settings).
    """

    id: str
    prompt: str
    images: tuple[Image.Image, Image.Image]
    sides: tuple[str, str]
    facts: Mapping[str, Any]


class VoteStore(AnswerStore):
    """Store votes in a folder, as `votes.jsonl` and `images/`.

    Args:
        folder (`Path`): The folder. It is created with the first vote.

    Raises:
        UserError: The folder holds something else.
    """

    file_name = VOTES
    choices = CHOICES
    siblings = (VOTES, LIKES)

    def _fault(self, entry: Any) -> str | None:
        """Return why an entry of the file is no vote of this store, or None."""
        pictures = ("left_image", "right_image")
        reason = self._common_fault(entry, ("prompt", "left", "right"), pictures)
        if reason is None and entry.get("vote") not in CHOICES:
            return f"vote is {str(entry.get('vote'))[:40]!r}, expected {', '.join(CHOICES)}"
        return reason

    def _record(self, pair: Pair, choice: str, annotator: str) -> dict[str, Any]:
        names = [self._keep(image) for image in pair.images]
        return {
            "id": pair.id,
            "time": round(time.time(), 3),
            "annotator": annotator,
            "prompt": pair.prompt,
            "left": pair.sides[0],
            "right": pair.sides[1],
            "vote": choice,
            "left_image": names[0],
            "right_image": names[1],
            **pair.facts,
        }

    def rate(
        self, base: str, tuned: str, weights: Mapping[str, str] | None = None
    ) -> tuple[int, WinRate]:
        """Compute how often one model wins against another.

        Every prompt counts the same, however many votes it has.

        Args:
            base (`str`): Name of the base model.
            tuned (`str`): Name of the tuned model.
            weights (`Mapping[str, str]`, *optional*): Fingerprints of both models.
                Votes on other weights are left out, and votes of earlier versions,
                which hold none, count. None counts all.

        Returns:
            `tuple[int, WinRate]`: The number of votes on this pair of models, and the
            win rate of `tuned`.
        """
        points: dict[str, list[float]] = {}
        with self._lock:
            votes = [
                vote
                for vote in self.votes
                if {vote.get("left"), vote.get("right")} == {base, tuned}
                and (weights is None or vote.get("models", weights) == weights)
            ]
        for vote in votes:
            won = vote.get(vote["vote"]) if vote["vote"] != "tie" else None
            points.setdefault(vote["prompt"], []).append(
                0.5 if won is None else float(won == tuned)
            )
        most = max(map(len, points.values()), default=0)
        padded = [row + [math.nan] * (most - len(row)) for row in points.values()]
        table = np.array(padded).reshape(len(points), most)
        return len(votes), rate_of(table)

    def export(self, path: Path) -> int:
        """Write the decided votes as preference pairs that `diffalign train` reads.

        Votes whose pictures are lost or damaged are left out. Their ids are then in
        `lost`.

        Args:
            path (`Path`): The parquet file.

        Returns:
            `int`: The number of pairs.

        Raises:
            UserError: There is none.
        """
        from datasets import Dataset, Features, Value
        from datasets import Image as ImageFeature

        with self._lock:
            decided = [vote for vote in self.votes if vote["vote"] in ("left", "right")]
        if not decided:
            raise UserError("votes: there is no decided vote yet; ties are not exported")
        rows: dict[str, list[Any]] = {
            "prompt": [],
            "chosen": [],
            "rejected": [],
            "annotator": [],
            "chosen_model": [],
            "rejected_model": [],
        }
        self.lost: list[str] = []
        for vote in decided:
            won, lost = ("left", "right") if vote["vote"] == "left" else ("right", "left")
            pictures = [self._picture(vote[f"{side}_image"]) for side in (won, lost)]
            if None in pictures:
                self.lost.append(vote["id"])
                continue
            rows["prompt"].append(vote["prompt"])
            for column, side, content in (
                ("chosen", won, pictures[0]),
                ("rejected", lost, pictures[1]),
            ):
                rows[column].append({"bytes": content, "path": None})
                rows[f"{column}_model"].append(vote[side])
            rows["annotator"].append(vote["annotator"])
        if not rows["prompt"]:
            raise UserError(
                f"votes: the pictures of all {len(decided)} votes are lost or damaged; put "
                f"{self.folder / 'images'} back"
            )
        texts = {
            name: Value("string")
            for name in ("prompt", "annotator", "chosen_model", "rejected_model")
        }
        features = Features({**texts, "chosen": ImageFeature(), "rejected": ImageFeature()})
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            Dataset.from_dict(rows, features=features).to_parquet(temporary)
        return len(rows["prompt"])


@dataclass(frozen=True)
class _OpenPair:
    """Two images of a round that may be shown."""

    prompt: str
    sides: tuple[Mapping[str, Any], Mapping[str, Any]]

    @property
    def ids(self) -> frozenset[str]:
        return frozenset(side["id"] for side in self.sides)


class RoundVotes(VoteStore):
    """Store votes on the images of a round that a run waits for.

    Such a run has `train.feedback: people`. The votes lie beside the round's manifest.

    Args:
        folder (`Path`): `<output_dir>/feedback/round-NNNN`.

    Raises:
        UserError: The folder holds no round.
    """

    def __init__(self, folder: Path) -> None:
        from ..training.online.feedback import MANIFEST, read_manifest

        if not (folder / MANIFEST).is_file():
            raise UserError(
                f"--feedback: {str(folder)!r} holds no round of images; start the run with "
                "diffalign feedback collect"
            )
        self.groups: Sequence[Mapping[str, Any]] = read_manifest(folder)
        self._unreadable: set[str] = set()
        self._open(folder, "votes-demo.jsonl")

    def _record(self, pair: Pair, choice: str, annotator: str) -> dict[str, Any]:
        """Return a vote as `diffalign.training.online.feedback.read_votes` reads it."""
        preference = {"left": "a", "right": "b", "tie": "tie"}[choice]
        facts = {"id": pair.id, "time": round(time.time(), 3), "annotator": annotator}
        return {
            **facts,
            "image_a": pair.sides[0],
            "image_b": pair.sides[1],
            "preference": preference,
            "prompt": pair.prompt,
        }

    def _fault(self, entry: Any) -> str | None:
        reason = self._common_fault(entry, ("image_a", "image_b"))
        if reason is None and entry.get("preference") not in ("a", "b", "tie"):
            return f"preference is {str(entry.get('preference'))[:40]!r}, expected a, b or tie"
        return reason

    def remarks(self) -> str:
        """Return a remark on lines that are left out and on unreadable images."""
        lost = (
            f" {len(self._unreadable)} images cannot be opened; their pairs are not shown."
            if self._unreadable
            else ""
        )
        return super().remarks() + lost

    def next(self, annotator: object, rng: random.Random) -> Pair | None:
        """Return a pair that this annotator has not judged, with the fewest votes.

        Args:
            annotator: The name that the visitor gave.
            rng (`random.Random`): Chooses among them.

        Returns:
            `Pair`, or None when there is none left.
        """
        pairs = self.candidates(annotator, rng, 1)
        return pairs[0] if pairs else None

    def candidates(self, annotator: object, rng: random.Random, count: int) -> list[Pair]:
        """Return pairs that this annotator has not judged, all with the fewest votes.

        Args:
            annotator: The name that the visitor gave.
            rng (`random.Random`): Chooses among them.
            count (`int`): How many at most.
        """
        who = read_annotator(annotator)
        with self._lock:
            votes = [(frozenset((v["image_a"], v["image_b"])), v["annotator"]) for v in self.votes]
        judged = {pair for pair, name in votes if name == who}
        votes_on = Counter(pair for pair, _ in votes)

        def votes_of(pair: _OpenPair) -> int:
            return votes_on[pair.ids]

        open_pairs = [pair for pair in self._pairs() if pair.ids not in judged]
        rng.shuffle(open_pairs)
        for _, level in groupby(sorted(open_pairs, key=votes_of), key=votes_of):
            shown = (self._shown(pair, rng) for pair in level)
            chosen = list(islice((pair for pair in shown if pair is not None), count))
            if chosen:
                return chosen
        return []

    def _shown(self, pair: _OpenPair, rng: random.Random) -> Pair | None:
        """Open both images, sides shuffled. None if one cannot be opened."""
        if pair.ids & self._unreadable:
            return None
        sides = list(pair.sides)
        rng.shuffle(sides)
        images = [self._image(side) for side in sides]
        if images[0] is None or images[1] is None:
            return None
        names = (sides[0]["id"], sides[1]["id"])
        return Pair(f"{rng.getrandbits(64):016x}", pair.prompt, (images[0], images[1]), names, {})

    def _pairs(self) -> Iterator[_OpenPair]:
        """Yield every pair of images of one prompt in this round."""
        for group in self.groups:
            for first, second in combinations(group["images"], 2):
                yield _OpenPair(group["prompt"], (first, second))

    def _image(self, side: Mapping[str, Any]) -> Image.Image | None:
        """Read an image of the round. Remember a damaged one, and return None."""
        try:
            return decoding.decode(self.folder / side["file"])
        except decoding.UnreadableImage:
            self._unreadable.add(side["id"])
            return None
