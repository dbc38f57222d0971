"""Store votes so that no crash loses one.

A vote is a line of JSON, on disk before the visitor sees the next pair.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError
from ..evaluation.statistics import WinRate, rate_of
from ..runtime import decoding
from ..runtime.files import check_output_dir, replacing, write_atomically
from ..runtime.hashing import bytes_hash
from ..runtime.text_files import BadLine, journal

VOTES = "votes.jsonl"
CHOICES = ("left", "right", "tie")
ANNOTATOR_CHARS = 40
_PICTURE = re.compile(r"images/[0-9a-f]{24}\.png")


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


def read_annotator(text: object) -> str:
    """Turn a visitor's name into at most 40 harmless characters.

    Args:
        text: The name. Empty means anonymous.
    """
    return re.sub(r"[^\w .@-]", "", str(text or ""))[:ANNOTATOR_CHARS].strip()


class VoteStore:
    """Store votes in a folder, as `votes.jsonl` and `images/`.

    Args:
        folder (`Path`): The folder. It is created with the first vote.

    Attributes:
        votes (`list[dict[str, Any]]`): All votes.
        left_out (`list[BadLine]`): Lines of the file that are no votes, and why.

    Raises:
        UserError: The folder holds something else.
    """

    def __init__(self, folder: Path) -> None:
        check_output_dir(folder, VOTES)
        self._open(folder, VOTES)

    def _open(self, folder: Path, name: str) -> None:
        self.folder, self.file = folder, folder / name
        self._lock = threading.Lock()
        self.votes: list[dict[str, Any]] = []
        self.left_out: list[BadLine] = []
        self._known: set[str] = set()
        entries, self.left_out = journal(self.file) if self.file.is_file() else ([], [])
        for number, entry in entries:
            reason = self._fault(entry)
            if reason is None:
                self.votes.append(entry)
            else:
                self.left_out.append(BadLine(number, reason))
            if isinstance(entry, dict) and isinstance(entry.get("id"), str):
                self._known.add(entry["id"])
        if self.left_out:
            first = "; ".join(map(str, sorted(self.left_out, key=lambda line: line.number)[:3]))
            print(
                f"{self.file}: {len(self.votes)} votes; {len(self.left_out)} lines left out "
                f"({first})",
                flush=True,
            )

    def _fault(self, entry: Any) -> str | None:
        """Return why an entry of the file is no vote of this store, or None."""
        reason = self._common_fault(entry, ("prompt", "left", "right"))
        if reason is not None:
            return reason
        if entry.get("vote") not in CHOICES:
            return f"vote is {str(entry.get('vote'))[:40]!r}, expected {', '.join(CHOICES)}"
        for name in ("left_image", "right_image"):
            if not isinstance(entry.get(name), str) or not _PICTURE.fullmatch(entry[name]):
                return (
                    f"{name} is {str(entry.get(name))[:60]!r}, which is no picture of this folder"
                )
        return None

    def _common_fault(self, entry: object, texts: tuple[str, ...]) -> str | None:
        if not isinstance(entry, dict):
            return "no vote"
        for name in ("id", *texts):
            if not isinstance(entry.get(name), str) or not entry[name]:
                return f"has no {name}"
        if entry["id"] in self._known:
            return f"the vote {entry['id'][:40]!r} stands twice"
        entry.setdefault("annotator", "")
        return None if isinstance(entry["annotator"], str) else "annotator is no text"

    def remarks(self) -> str:
        """Return a remark on the lines that are left out, empty if there are none."""
        return f" {len(self.left_out)} lines of the file are left out." if self.left_out else ""

    def add(self, pair: Pair, choice: str, annotator: object) -> bool:
        """Write a vote to the disk.

        Args:
            pair (`Pair`): What was voted on.
            choice (`str`): `left`, `right` or `tie`.
            annotator: The name that the visitor gave.

        Returns:
            `bool`: False if this pair has a vote already.

        Raises:
            UserError: There is no such choice.
        """
        if choice not in CHOICES:
            raise UserError(f"vote: expected {', '.join(CHOICES)}, got {str(choice)[:40]!r}")
        with self._lock:
            if pair.id in self._known:
                return False
            vote = self._record(pair, choice, read_annotator(annotator))
            self.folder.mkdir(parents=True, exist_ok=True)
            line = json.dumps(vote, ensure_ascii=False)
            torn = self.file.is_file() and self.file.stat().st_size > 0 and not self._ends_well()
            with self.file.open("a", encoding="utf-8") as file:
                file.write(("\n" if torn else "") + line + "\n")
                file.flush()
                os.fsync(file.fileno())
            self.votes.append(vote)
            self._known.add(pair.id)
        return True

    def _ends_well(self) -> bool:
        with self.file.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

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

    def _keep(self, image: Image.Image) -> str:
        """Store an image under a digest of its content, and return its name.

        It is there before the vote that names it.
        """
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        name = f"images/{bytes_hash(buffer.getvalue())[:24]}.png"
        if not (self.folder / name).is_file():
            (self.folder / "images").mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / name, buffer.getvalue())
        return name

    def rate(self, base: str, tuned: str) -> tuple[int, WinRate]:
        """Compute how often one model wins against another.

        Every prompt counts the same, however many votes it has.

        Args:
            base (`str`): Name of the base model.
            tuned (`str`): Name of the tuned model.

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
            raise UserError("votes: nobody has preferred an image yet; ties teach nothing")
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

    def _picture(self, name: str) -> bytes | None:
        """Return a picture's file, or None when it is gone or was changed."""
        try:
            content = (self.folder / name).read_bytes()
        except OSError:
            return None
        return content if bytes_hash(content).startswith(Path(name).stem) else None


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
        who = read_annotator(annotator)
        with self._lock:
            votes = [(frozenset((v["image_a"], v["image_b"])), v["annotator"]) for v in self.votes]
        judged = {pair for pair, name in votes if name == who}
        count = Counter(pair for pair, _ in votes)
        open_pairs = [pair for pair in self._pairs() if pair.ids not in judged]
        while open_pairs := [pair for pair in open_pairs if not pair.ids & self._unreadable]:
            fewest = min(count[pair.ids] for pair in open_pairs)
            pair = rng.choice([pair for pair in open_pairs if count[pair.ids] == fewest])
            sides = list(pair.sides)
            rng.shuffle(sides)
            images = [self._image(side) for side in sides]
            if images[0] is not None and images[1] is not None:
                names = (sides[0]["id"], sides[1]["id"])
                return Pair(
                    f"{rng.getrandbits(64):016x}",
                    pair.prompt,
                    (images[0], images[1]),
                    names,
                    {},
                )
        return None

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
